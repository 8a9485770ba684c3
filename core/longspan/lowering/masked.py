"""Dense attention under a mask: how a block-sparse layout runs where it keeps so much that blocks would not pay.

Slabs of many query rows read the keys from the first to the last that any of their rows sees. The mask of a slab is
made when it runs and thrown away, so memory stays O(non-zeros) but for one slab.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attrs import frozen
from torch import Tensor

from longspan.lowering.blocks import BlockLayout
from longspan.lowering.dense import head_pairs
from longspan.lowering.layout import Call, Heads, Layout, head_ranges
from longspan.lowering.segments import Span
from longspan.patterns.blocks.csr import BlockCSR
from longspan.patterns.blocks.masks import FULL
from longspan.spec.problem import Problem

__all__ = ["MaskedLayout", "Slab", "masked_layout", "masked_pairs"]

ROWS, KEYS = 1024, 8192
"""Queries and keys of a slab, about: tall enough for every kernel, 32 MiB of mask at most in float32."""


@frozen(eq=False)
class Slab:
    """Block rows and block columns of a layout that run as one dense call; both count from the document's first."""

    csr: BlockCSR
    rows: slice
    columns: slice

    @property
    def queries(self) -> slice:
        """The queries of the block rows, among the document's."""
        size, csr = self.csr.block_size, self.csr
        lead = csr.query_offset - csr.first_row * size  # queries that the first block row lacks
        return slice(max(0, self.rows.start * size - lead), min(csr.q_len, self.rows.stop * size - lead))

    @property
    def keys(self) -> slice:
        """The keys of the block columns."""
        size = self.csr.block_size
        return slice(self.columns.start * size, min(self.csr.kv_len, self.columns.stop * size))

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys of its blocks, those that the sequence lacks among them."""
        size = self.csr.block_size
        return (self.rows.stop - self.rows.start) * size, (self.columns.stop - self.columns.start) * size

    def fill(self, mask: Tensor) -> Tensor:
        """Write the mask, 0 where a query sees a key and else -inf, into a tensor `shape` of the CPU.

        Returns:
            `(1, 1, queries, keys)`, those that the sequence has.
        """
        csr, size = self.csr, self.csr.block_size
        low, high = self.rows.start, self.rows.stop
        with torch.inference_mode(False), torch.device("cpu"):
            ends = csr.indptr[low : high + 1]
            entries = slice(int(ends[0]), int(ends[-1]))
            row = torch.repeat_interleave(torch.arange(high - low, dtype=torch.int64, device="cpu"), ends.diff())
            column = csr.indices[entries].long() - self.columns.start
            mine = (column >= 0) & (column < self.columns.stop - self.columns.start)
            row, column, states = row[mine], column[mine], csr.mask_ids[entries].long()[mine]
            lines = torch.full(
                (high - low, self.columns.stop - self.columns.start), -torch.inf, dtype=mask.dtype, device="cpu"
            )
            lines[row, column] = 0.0
            lines = lines.repeat_interleave(size, dim=1)[:, None]
            mixed = states != FULL
            partial, place = torch.unique(states[mixed] - 1, return_inverse=True)
            masks = torch.zeros(len(partial), size, size, dtype=mask.dtype, device="cpu")
            masks.masked_fill_(~csr.masks[partial], -torch.inf)
        mask.view(high - low, size, -1).copy_(lines)  # rows of blocks, as if all that are kept were full
        mask.view(high - low, size, -1, size).transpose(1, 2)[row[mixed], column[mixed]] = masks[place]
        lead = max(0, csr.query_offset - csr.first_row * size - low * size)
        queries, keys = self.queries.stop - self.queries.start, self.keys.stop - self.keys.start
        return mask[None, None, lead : lead + queries, :keys]


@frozen
class MaskedLayout(Layout):
    """Dense calls under the masks of these slabs, one for each call."""

    slabs: tuple[Slab, ...]

    def __str__(self) -> str:
        return f"{Layout.__str__(self)} under masks"


def masked_layout(problem: Problem, layout: BlockLayout) -> MaskedLayout:
    """The blocks as dense calls under masks.

    Args:
        problem: a block-sparse problem.
        layout: its blocks.
    """
    calls: list[Call] = []
    slabs: list[Slab] = []
    covering = 0
    for span, found in zip(layout.spans, layout.blocks, strict=True):
        for which, csr in enumerate(found.layouts):
            mine = [head for head, one in enumerate(found.of_head) if one == which]
            pairs = [pair for heads in head_ranges(mine) for pair in head_pairs(heads, problem)]
            for slab, is_first in _slabs(csr):
                covering += is_first * len(mine) * (slab.queries.stop - slab.queries.start)
                calls += [_call(span, slab, is_first, *pair) for pair in pairs]
                slabs += [slab] * len(pairs)
    return MaskedLayout(tuple(calls), covering == problem.heads * problem.q_len, tuple(slabs))


def masked_pairs(layout: BlockLayout) -> int:
    """Query-key pairs that `masked_layout` computes, kept or not, over all heads, for one batch entry."""
    found = 0
    for span, blocks in zip(layout.spans, layout.blocks, strict=True):
        for which, csr in enumerate(blocks.layouts):
            size = csr.block_size
            rows, starts, stops = _extents(csr)
            lead = csr.query_offset - csr.first_row * size
            queries = ((rows + _height(csr)) * size - lead).clamp_(max=span.queries) - (rows * size - lead).clamp_(
                min=0
            )
            keys = (stops * size).clamp_(max=span.keys) - starts * size
            found += int((queries * keys).sum()) * blocks.of_head.count(which)
    return found


def _call(span: Span, slab: Slab, is_first: bool, heads: Heads, kv_heads: Heads) -> Call:
    queries, keys = slab.queries, slab.keys
    rows = span.query_rows(span.first + queries.start, queries.stop - queries.start)
    return Call(heads, kv_heads, rows, span.key_rows(keys.start, keys.stop - keys.start), False, is_first)


def _slabs(csr: BlockCSR) -> Iterator[tuple[Slab, bool]]:
    """The slabs of a layout, those of the same rows in turn, and whether each is their first."""
    width = max(1, KEYS // csr.block_size)
    for low, start, stop in zip(*(one.tolist() for one in _extents(csr)), strict=True):
        rows = slice(low, min(low + _height(csr), csr.rows))
        for left in range(start, stop, width):
            yield Slab(csr, rows, slice(left, min(left + width, stop))), left == start


def _extents(csr: BlockCSR) -> tuple[Tensor, Tensor, Tensor]:
    """Of the slabs that keep anything: the first block row, the first block column and the one after the last."""
    with torch.device("cpu"):
        kept = csr.indptr.diff().nonzero().squeeze(1)
        slab = kept // _height(csr)
        count = -(-csr.rows // _height(csr))
        first, last = csr.indices[csr.indptr[kept]].long(), csr.indices[csr.indptr[kept + 1] - 1].long()
        starts = torch.full((count,), csr.columns, dtype=torch.int64, device="cpu").scatter_reduce_(
            0, slab, first, "amin"
        )
        stops = torch.zeros(count, dtype=torch.int64, device="cpu").scatter_reduce_(0, slab, last + 1, "amax")
        there = stops.nonzero().squeeze(1)
        return there * _height(csr), starts[there], stops[there]


def _height(csr: BlockCSR) -> int:
    return max(1, ROWS // csr.block_size)
