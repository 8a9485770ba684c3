"""Block rows as a batch: padded to as many blocks as the longest has, so that one launch of a kind serves them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from longspan.plugin import BlockCSR, BlockLayout

__all__ = ["Batch", "batches_of"]

FULL, ABSENT = 0, 1
"""Rows of blocks in a table of masks: those that hide nothing, and those that hide everything."""
WASTE = 2.5
"""Blocks that are computed over blocks that are kept, in one batch. Beyond it rows are put into several."""


@frozen(eq=False)
class Batch:
    """Block rows that run at once.

    `rows` `(lines,)` are their numbers among all block rows of all heads and batch entries, None for all of them in
    order. `blocks` `(lines * most,)` are the block columns of each, numbered in the same way. `masks` `(lines * size *
    most,)` are rows of `table` `(*, size)`, which is 0 where a query sees a key and else -inf; None where nothing is
    hidden. `empty` `(lines, size)` are queries that see no key; they are shown some, and their results are thrown away.
    """

    size: int
    lines: int
    most: int
    rows: Tensor | None
    blocks: Tensor
    masks: Tensor | None
    table: Tensor
    empty: Tensor | None

    @property
    def pairs(self) -> int:
        """Query-key pairs that are computed, the padding's among them."""
        return self.lines * self.most * self.size**2


def batches_of(layout: BlockLayout, batch: int, dtype: torch.dtype) -> tuple[Batch, ...] | None:
    """The batches of a layout; None where block rows or columns are ragged.

    Args:
        layout: of one document.
        batch: how many batch entries there are.
        dtype: of the masks.
    """
    if len(layout.blocks) != 1:
        return None
    heads = layout.blocks[0]
    csr, size = heads.layouts[0], heads.layouts[0].block_size
    if csr.q_len % size or csr.kv_len % size or csr.query_offset % size or not layout.pairs:
        return None
    with torch.inference_mode(False), torch.device("cpu"):
        table, first = _table(heads.layouts, dtype)
        counts = torch.cat([heads[head].indptr.diff() for head in range(len(heads.of_head))])
        made = []
        for rows in _classes(counts):
            padded = [
                _padded(heads[head], first[heads.of_head[head]], head, rows[rows // csr.rows == head] % csr.rows, most)
                for most in (int(counts[rows].max()),)
                for head in range(len(heads.of_head))
            ]
            blocks, states = (torch.cat(parts) for parts in zip(*padded, strict=True))
            made.append(_batch(rows, counts, blocks, states, table, size, batch, csr.columns * len(heads.of_head)))
    return tuple(made)


def _classes(counts: Tensor) -> Sequence[Tensor]:
    """Block rows, by how many blocks they have: all of them, or those within a factor of two of each other."""
    every = torch.arange(len(counts), dtype=torch.int64, device="cpu")
    if int(counts.max()) * len(counts) <= WASTE * int(counts.sum()):
        return [every]
    kinds = torch.where(counts > 0, counts.clamp(min=1).log2().floor().long(), -1)
    return [every[kinds == kind] for kind in torch.unique(kinds).tolist() if kind >= 0]


def _table(layouts: Sequence[BlockCSR], dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """`(masks, size, size)` of all layouts, and where those of each begin."""
    size = layouts[0].block_size
    fixed = torch.zeros(2, size, size, dtype=dtype, device="cpu")
    fixed[ABSENT] = -torch.inf
    first = [2]
    for csr in layouts:
        first.append(first[-1] + len(csr.masks))
    hidden = [
        torch.zeros(csr.masks.shape, dtype=dtype, device="cpu").masked_fill_(~csr.masks, -torch.inf) for csr in layouts
    ]
    return torch.cat([fixed, *hidden]), first


def _padded(csr: BlockCSR, first: int, head: int, rows: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Block columns `(rows, most)`, numbered over all heads, and their masks in the table."""
    if not csr.nnz:
        nothing = torch.zeros(len(rows), most, dtype=torch.int64, device="cpu")
        return nothing + head * csr.columns, nothing + ABSENT
    place = csr.indptr[rows][:, None] + torch.arange(most, dtype=torch.int64, device="cpu")
    there = place < csr.indptr[rows + 1][:, None]
    place = torch.where(there, place, 0)
    states = csr.mask_ids.long()[place]
    states = torch.where(there, torch.where(states > 0, states - 1 + first, FULL), ABSENT)
    return torch.where(there, csr.indices.long()[place], 0) + head * csr.columns, states


def _batch(
    rows: Tensor, counts: Tensor, blocks: Tensor, states: Tensor, table: Tensor, size: int, batch: int, columns: int
) -> Batch:
    lines, most = blocks.shape
    within = torch.arange(size, dtype=torch.int64, device="cpu")
    masks = states[:, None, :] * size + within[:, None]  # (lines, size, most)
    flat = table.view(-1, size)
    blind = (flat == -torch.inf).all(-1)[masks].all(-1)  # (lines, size)
    masks[..., 0].masked_fill_(blind, FULL)
    numbers = torch.arange(batch, dtype=torch.int64, device="cpu")[:, None]
    return Batch(
        size,
        batch * lines,
        most,
        None if lines == len(counts) else (rows + numbers * len(counts)).flatten(),
        (blocks.flatten() + numbers * columns).flatten(),
        masks.flatten().repeat(batch) if bool((states != FULL).any()) else None,
        flat,
        blind.repeat(batch, 1) if bool(blind.any()) else None,
    )
