"""Sets of blocks with their states, possibly complemented, and what `&`, `|` and `~` make of them in O(non-zeros).

A set lists its blocks by their keys, ascending. A complemented one lists what it lacks, so that `a & ~b` takes time in
what `a` and `b` list, not in what `~b` holds. Bands (windows, the causal triangle) need not be listed to be met with.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from longspan.errors import ArgumentError
from longspan.numerics.tensors import counting
from longspan.patterns.blocks.grid import Grid
from longspan.patterns.blocks.masks import EMPTY, MaskTable, all_full

__all__ = ["MOST", "Band", "BlockSet", "complement", "everything", "intersect", "listed", "unite"]

MOST = 2**28
"""Blocks that a layout may have: beyond it, the index alone would take more than 3 GB."""


@frozen(eq=False)
class BlockSet:
    """Blocks by key, `(n,)` int64, ascending, and their states, `(n,)` int64, none of them empty.

    `absent`: the set is everything but these.
    """

    keys: Tensor
    states: Tensor
    absent: bool = False


@frozen
class Band:
    """The pairs with `-right <= query - key <= left`, in tokens. None: no bound on that side."""

    left: int | None
    right: int | None

    def meet(self, other: Band) -> Band:
        """The pairs that both bands hold, which are a band."""
        return Band(_least(self.left, other.left), _least(self.right, other.right))

    def _states(self, grid: Grid, table: MaskTable) -> tuple[int, Tensor]:
        """The least difference of block numbers (row - column) in the band, and the states from there on."""
        size, last = grid.block_size, grid.first_row + grid.rows
        left = (last + 1) * size if self.left is None else min(self.left, (last + 1) * size)
        right = (grid.columns + 1) * size if self.right is None else min(self.right, (grid.columns + 1) * size)
        low = max(-((right + size - 1) // size), grid.first_row - grid.columns)  # below it the grid has none
        high = min((left + size - 1) // size, last)
        states = all_full(max(0, high - low + 1))
        full_low, full_high = -((right + 1 - size) // size), (left + 1 - size) // size
        ends = sorted({*range(low, min(full_low, high + 1)), *range(max(full_high + 1, low), high + 1)})
        step = counting(size)
        for difference in ends:  # at most four, whatever the length
            apart = difference * size + step[:, None] - step[None, :]
            states[difference - low] = table.add(((apart <= left) & (apart >= -right))[None])[0]
        return low, states

    def at(self, grid: Grid, table: MaskTable, keys: Tensor) -> Tensor:
        """The states of the given blocks in this band."""
        low, states = self._states(grid, table)
        states = torch.nn.functional.pad(states, (1, 1), value=EMPTY)
        difference = keys // grid.columns + grid.first_row - keys % grid.columns
        return states[(difference - (low - 1)).clamp_(0, len(states) - 1)]

    def blocks(self, grid: Grid, table: MaskTable) -> BlockSet:
        """All blocks of the band."""
        low, states = self._states(grid, table)
        rows, columns = grid.row_numbers(), grid.columns
        first = (rows - (low + len(states) - 1)).clamp_(min=0)
        counts = (torch.clamp(rows - low, max=columns - 1) - first + 1).clamp_(min=0)
        ends = counts.cumsum(0)
        total = check_count(int(ends[-1]) if len(ends) else 0)
        starts = ends - counts
        shift = counting(grid.rows) * columns + first - starts
        keys = counting(total) + torch.repeat_interleave(shift, counts, output_size=total)
        of_block = all_full(total)
        for number in states.nonzero().squeeze(1).tolist():
            column = rows - (low + number)
            there = (column >= first) & (column < first + counts)
            of_block[(starts + column - first)[there]] = states[number]
        return listed(keys, of_block)


def check_count(count: int) -> int:
    """`count`, or `ArgumentError` where so many blocks would not fit in memory."""
    if count > MOST:
        raise ArgumentError(
            "pattern", f"{count:,} blocks", f"at most {MOST:,} blocks", "use Dense, a larger block_size or less density"
        )
    return count


def listed(keys: Tensor, states: Tensor) -> BlockSet:
    """The set of these blocks, without those whose state is empty."""
    kept = states != EMPTY
    return BlockSet(keys, states) if bool(kept.all()) else BlockSet(keys[kept], states[kept])


def complement(blocks: BlockSet) -> BlockSet:
    """All blocks and pairs of the grid but these."""
    return BlockSet(blocks.keys, blocks.states, not blocks.absent)


def everything(grid: Grid, but: BlockSet, table: MaskTable) -> BlockSet:
    """The blocks of a complemented set, listed: as many as it holds."""
    check_count(grid.rows * grid.columns)
    keys = counting(grid.rows * grid.columns)
    states = torch.zeros_like(keys)
    states[but.keys] = table.without(states[but.keys], but.states)
    return listed(keys, states)


def intersect(a: BlockSet, b: BlockSet, table: MaskTable) -> BlockSet:
    """The pairs in both sets. The time is that of `a`'s list, so it is the shorter one; absent only where both are."""
    if a.absent:
        return complement(unite(complement(a), complement(b), table))
    _, other = _look_up(b, a.keys)
    return listed(a.keys, table.without(a.states, other) if b.absent else table.meet(a.states, other))


def unite(a: BlockSet, b: BlockSet, table: MaskTable) -> BlockSet:
    """The pairs in either of two listed sets."""
    index, known = _look_up(a, b.keys)
    shared = known != EMPTY
    states = a.states.clone()
    states[index[shared]] = table.join(known[shared], b.states[shared])
    new = ~shared
    keys = b.keys[new]
    from_a = counting(len(a.keys)) + torch.searchsorted(keys, a.keys)
    from_b = counting(len(keys)) + torch.searchsorted(a.keys, keys)
    all_keys = torch.empty(len(a.keys) + len(keys), dtype=torch.int64, device="cpu")
    all_states = torch.empty_like(all_keys)
    all_keys[from_a], all_keys[from_b] = a.keys, keys
    all_states[from_a], all_states[from_b] = states, b.states[new]
    return BlockSet(all_keys, all_states)


def _look_up(blocks: BlockSet, keys: Tensor) -> tuple[Tensor, Tensor]:
    """For each key, its index in the list (or another block's) and its listed state."""
    if not len(blocks.keys):
        return torch.zeros_like(keys), torch.full_like(keys, EMPTY)
    index = torch.searchsorted(blocks.keys, keys).clamp_(max=len(blocks.keys) - 1)
    return index, torch.where(blocks.keys[index] == keys, blocks.states[index], EMPTY)


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)
