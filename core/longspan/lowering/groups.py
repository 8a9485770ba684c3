"""Block rows that can run as one batch: as tall, with as many full blocks and as many partial ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from attrs import frozen
from torch import Tensor

from longspan.lowering.segments import Span
from longspan.patterns.blocks.csr import BlockCSR
from longspan.patterns.blocks.masks import FULL

__all__ = ["Columns", "Group", "group_rows"]


@frozen(slots=False, eq=False, repr=False)
class Columns:
    """The keys that the rows of a group read in one call: whole blocks, and the ragged last one where there is one.

    `blocks` `(rows, n)` int64 are block columns, ascending. `tail` is how many keys of the last block follow, 0 where
    the row does not have it or it is whole. `run` says that the blocks of every row are adjacent and move regularly:
    the first row's first block, and by how many blocks it moves from row to row. `mask_ids` `(rows or 1, n or n + 1)`
    are the numbers of the masks, None for full blocks.
    """

    blocks: Tensor
    tail: int
    size: int
    run: tuple[int, int] | None
    mask_ids: Tensor | None

    @cached_property
    def keys(self) -> int:
        """How many keys a row reads."""
        return self.blocks.shape[1] * self.size + self.tail

    @property
    def nbytes(self) -> int:
        """Bytes of the index."""
        return self.blocks.nbytes + (0 if self.mask_ids is None else self.mask_ids.nbytes)

    def cut(self, most: int) -> Iterator[Columns]:
        """The same in parts of at most `most` blocks, so that what is gathered stays bounded."""
        count = self.blocks.shape[1]
        if count <= most:
            yield self
            return
        for start in range(0, count, most):
            stop = min(start + most, count)
            last = stop == count
            tail = self.tail if last else 0
            mask_ids = None if self.mask_ids is None else self.mask_ids[:, start : stop + (last and self.tail > 0)]
            run = None if self.run is None else (self.run[0] + start, self.run[1])
            yield Columns(self.blocks[:, start:stop], tail, self.size, run, mask_ids)


@frozen(eq=False, repr=False)
class Group:
    """Block rows of one document and layout.

    Row `i` holds `height` queries from index `start + i * step` of the query tensor on, or, where `rows` is given, from
    `start + rows[i] * step` on, with `reach` such rows up to the last. `low` is the first one's place in its block,
    `key_start` the index of the document's first key, `key_blocks` how many whole blocks of keys it has.
    """

    count: int
    height: int
    low: int
    start: int
    step: int
    rows: Tensor | None
    reach: int
    key_start: int
    key_blocks: int
    columns: tuple[Columns, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the index."""
        own = 0 if self.rows is None else self.rows.nbytes
        return own + sum(one.nbytes for one in self.columns)


def group_rows(span: Span, csr: BlockCSR) -> tuple[Group, ...]:
    """The groups of a layout. Rows without a block are in none.

    Args:
        span: the document.
        csr: its blocks.
    """
    if not csr.nnz:
        return ()
    index = _Index(span, csr)
    _, group_of = torch.unique(index.kinds(), dim=0, return_inverse=True)
    order = torch.argsort(group_of, stable=True)
    groups = [index.group(rows) for rows in torch.split(order, torch.bincount(group_of).tolist())]
    return tuple(group for group in groups if group.columns)


class _Index:
    """A layout's blocks by kind, row by row."""

    def __init__(self, span: Span, csr: BlockCSR) -> None:
        self.span, self.size, self.rows = span, csr.block_size, csr.rows
        self.low, self.high = csr.grid.row_spans()
        self.tail = span.keys % csr.block_size
        self.whole = span.keys // csr.block_size
        row = torch.repeat_interleave(torch.arange(csr.rows, dtype=torch.int64, device="cpu"), csr.indptr.diff())
        column, mask_id = csr.indices.long(), csr.mask_ids.long()
        at_tail, full = column >= self.whole, mask_id == FULL
        self.full, self.partial = (_Kind(row, column, mask_id, at_tail, kind, csr.rows) for kind in (full, ~full))

    def kinds(self) -> Tensor:
        """`(rows, 6)`: what is alike in rows of one group."""
        of_blocks = (self.full.counts, self.full.tails >= 0, self.partial.counts, self.partial.tails >= 0)
        return torch.stack([self.low, self.high, *(one.long() for one in of_blocks)], dim=1)

    def group(self, rows: Tensor) -> Group:
        """The group of these rows, which are alike."""
        first, size = int(rows[0]), self.size
        low = int(self.low[first])
        lead = int(self.low[0])  # queries that the first block row lacks
        columns = [self._columns(kind, rows) for kind in (self.full, self.partial)]
        step = _step(rows)
        start = first * size + low - lead  # rows after the first begin `lead` queries earlier than whole blocks would
        relative = None
        if step is None:
            relative, step = rows - first, 1
        return Group(
            count=len(rows),
            height=int(self.high[first]) - low,
            low=low,
            start=self.span.query_start + start,
            step=step * size,
            rows=relative,
            reach=int(rows[-1]) - first + 1,
            key_start=self.span.key_start,
            key_blocks=self.whole,
            columns=tuple(one for one in columns if one.keys),
        )

    def _columns(self, kind: _Kind, rows: Tensor) -> Columns:
        first = int(rows[0])
        place = kind.first[rows][:, None] + torch.arange(int(kind.counts[first]), dtype=torch.int64, device="cpu")
        blocks, mask_ids = kind.columns[place], kind.mask_ids[place]
        tail = self.tail if int(kind.tails[first]) >= 0 else 0
        if tail:
            mask_ids = torch.cat([mask_ids, kind.tails[rows][:, None]], dim=1)
        if kind.is_full:
            return Columns(blocks, tail, self.size, self._run(blocks, tail), None)
        if bool((mask_ids == mask_ids[:1]).all()):
            mask_ids = mask_ids[:1]
        return Columns(blocks, tail, self.size, self._run(blocks, tail), mask_ids - 1)

    def _run(self, blocks: Tensor, tail: int) -> tuple[int, int] | None:
        rows, count = blocks.shape
        if not count:
            return (self.whole, 0) if tail else None
        starts = blocks[:, 0]
        if bool((blocks[:, -1] - starts != count - 1).any()):
            return None
        steps = starts.diff()
        period = int(steps[0]) if rows > 1 else 0
        if period < 0 or bool((steps != period).any()):
            return None
        reaches = int(starts[0]) + count == self.whole and period == 0
        return (int(starts[0]), period) if reaches or not tail else None


class _Kind:
    """The full blocks of a layout, or the partial ones, but for the ragged last column, which is kept apart."""

    def __init__(self, row: Tensor, column: Tensor, mask_id: Tensor, at_tail: Tensor, mine: Tensor, rows: int) -> None:
        kept, last = mine & ~at_tail, mine & at_tail
        self.is_full = bool((mask_id[mine] == FULL).all())
        self.columns, self.mask_ids = column[kept], mask_id[kept]
        self.counts = torch.bincount(row[kept], minlength=rows)
        self.first = self.counts.cumsum(0) - self.counts
        # the mask id of the last column's block, -1 where a row lacks it
        self.tails = torch.full((rows,), -1, dtype=torch.int64, device="cpu")
        self.tails[row[last]] = mask_id[last]


def _step(rows: Tensor) -> int | None:
    """By how much row numbers grow, where that is regular."""
    steps = rows.diff()
    if not len(steps):
        return 1
    return int(steps[0]) if bool((steps == steps[0]).all()) else None
