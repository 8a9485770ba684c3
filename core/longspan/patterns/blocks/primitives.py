"""The rules that compositions are made of: global rows and columns, blocks at chosen distances, and explicit blocks."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from longspan.errors import ArgumentError
from longspan.numerics.tensors import counting
from longspan.patterns.blocks.csr import BlockCSR, remember_csr
from longspan.patterns.blocks.grid import Grid
from longspan.patterns.blocks.masks import EMPTY, FULL, MaskTable, all_full
from longspan.patterns.blocks.rules import Rule
from longspan.patterns.blocks.sets import BlockSet, check_count, listed, unite

__all__ = ["Dilation", "ExplicitBlocks", "GlobalBlocks", "GlobalTokens", "Hierarchy", "Strides", "suffix"]


def suffix(unit: int, block_size: int) -> str:
    """`@unit` where a rule's blocks are not those of its pattern."""
    return "" if unit == block_size else f"@{unit}"


def _from_start(numbers: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Numbers that may count from the end, as numbers from the start, ascending."""
    return tuple(sorted({number + count if number < 0 else number for number in numbers}))


def _lines(grid: Grid, table: MaskTable, numbers: Tensor, states: Tensor) -> BlockSet:
    """Whole block rows and the block columns of the same numbers; `states` is `(2, n)`: of a row and of a column."""
    row = (numbers >= grid.first_row) & (numbers < grid.first_row + grid.rows)
    column = (numbers >= 0) & (numbers < grid.columns)
    check_count(int(row.sum()) * grid.columns + int(column.sum()) * grid.rows)
    starts = (numbers[row] - grid.first_row) * grid.columns
    across = (starts[:, None] + counting(grid.columns)).flatten()
    down = (counting(grid.rows)[:, None] * grid.columns + numbers[column]).flatten()
    rows = BlockSet(across, states[0, row].repeat_interleave(grid.columns))
    return unite(rows, BlockSet(down, states[1, column].repeat(grid.rows)), table)


@frozen(slots=False, init=False)
class GlobalBlocks(Rule):
    """Blocks that see everything and that everything sees. Negative numbers count from the last block of keys."""

    numbers: tuple[int, ...]
    unit: int

    def __init__(self, numbers: tuple[int, ...], unit: int) -> None:
        self.__dict__.update(numbers=numbers, unit=unit)

    def text(self, block_size: int) -> str:
        """`global:0,-1`."""
        return "global:" + ",".join([str(number) for number in self.numbers]) + suffix(self.unit, block_size)

    def allowed(self, query: Tensor, key: Tensor, head: int, kv_len: int) -> Tensor:
        """Either end lies in a global block."""
        last = (kv_len - 1) // self.unit
        kept = (query < 0) & (key < 0)
        for number in self.numbers:
            block = number if number >= 0 else last + 1 + number
            kept = kept | (query // self.unit == block) | (key // self.unit == block)
        return kept

    def blocks(self, grid: Grid, table: MaskTable) -> BlockSet:
        """Whole rows and columns of full blocks."""
        numbers = torch.tensor(_from_start(self.numbers, grid.columns), dtype=torch.int64, device="cpu")
        return _lines(grid, table, numbers, all_full(2, len(numbers)))


@frozen(slots=False, init=False)
class GlobalTokens(Rule):
    """Tokens that see everything and that everything sees. Negative positions count from the last key."""

    positions: tuple[int, ...]

    def __init__(self, positions: tuple[int, ...]) -> None:
        self.__dict__["positions"] = positions

    def text(self, block_size: int) -> str:
        """`tokens:0,-1`."""
        return "tokens:" + ",".join([str(position) for position in self.positions])

    def allowed(self, query: Tensor, key: Tensor, head: int, kv_len: int) -> Tensor:
        """Either end is a global token."""
        kept = (query < 0) & (key < 0)
        for position in self.positions:
            token = position if position >= 0 else kv_len + position
            kept = kept | (query == token) | (key == token)
        return kept

    def blocks(self, grid: Grid, table: MaskTable) -> BlockSet:
        """Partial wherever a block holds a global token and others."""
        size = grid.block_size
        positions = torch.tensor(
            [p for p in _from_start(self.positions, grid.kv_len) if p >= 0], dtype=torch.int64, device="cpu"
        )
        numbers, index = torch.unique_consecutive(positions // size, return_inverse=True)
        marks = torch.zeros(len(numbers), size, dtype=torch.bool, device="cpu")
        marks[index, positions % size] = True
        states = [all_full(2, 0)]
        for part in torch.split(marks, table.chunk):
            down = table.add(part[:, :, None].expand(-1, -1, size))
            states.append(torch.stack([down, table.add(part[:, None, :].expand(-1, size, -1))]))
        return _lines(grid, table, numbers, torch.cat(states, 1))


class _Distances(Rule):
    """Base of the rules that keep whole blocks by the distance `row - column`, in blocks."""

    unit: int

    def distances(self, low: int, high: int) -> Tensor:
        """The kept distances from `low` to `high`, ascending, int64."""
        raise NotImplementedError

    def blocks(self, grid: Grid, table: MaskTable) -> BlockSet:
        """Full blocks along the diagonals at the kept distances."""
        rows = grid.row_numbers()
        kept = self.distances(grid.first_row - grid.columns + 1, grid.first_row + grid.rows - 1).flip(0)
        check_count(len(rows) * len(kept))
        columns = rows[:, None] - kept
        keys = columns + ((rows - grid.first_row) * grid.columns)[:, None]
        keys = keys[(columns >= 0) & (columns < grid.columns)]
        return listed(keys, torch.full_like(keys, FULL))


@frozen(slots=False, init=False)
class Strides(_Distances):
    """Every `stride`-th block, counted from the query's own."""

    stride: int
    unit: int

    def __init__(self, stride: int, unit: int) -> None:
        self.__dict__.update(stride=stride, unit=unit)

    def text(self, block_size: int) -> str:
        """`strided:stride`."""
        return f"strided:{self.stride}" + suffix(self.unit, block_size)

    def allowed(self, query: Tensor, key: Tensor, head: int, kv_len: int) -> Tensor:
        """The distance is a multiple of the stride."""
        return (query // self.unit - key // self.unit) % self.stride == 0

    def distances(self, low: int, high: int) -> Tensor:
        """The multiples of the stride."""
        first = -(-low // self.stride)
        return counting(first, max(first, high // self.stride + 1)) * self.stride


@frozen(slots=False, init=False)
class Dilation(_Distances):
    """The query's own block, and on either side `reach` blocks at distances `rate`, `2 * rate`, ..."""

    reach: int
    rate: int
    unit: int

    def __init__(self, reach: int, rate: int, unit: int) -> None:
        self.__dict__.update(reach=reach, rate=rate, unit=unit)

    def text(self, block_size: int) -> str:
        """`dilated:reach,rate`."""
        return f"dilated:{self.reach},{self.rate}" + suffix(self.unit, block_size)

    def allowed(self, query: Tensor, key: Tensor, head: int, kv_len: int) -> Tensor:
        """The distance is a multiple of the rate and not too far."""
        apart = (query // self.unit - key // self.unit).abs()
        return (apart % self.rate == 0) & (apart <= self.reach * self.rate)

    def distances(self, low: int, high: int) -> Tensor:
        """The multiples of the rate, as many to either side as the reach says."""
        first, last = max(-self.reach, -(-low // self.rate)), min(self.reach, high // self.rate)
        return counting(first, max(first, last + 1)) * self.rate


@frozen(slots=False, init=False)
class Hierarchy(_Distances):
    """Fine near, coarse far: every block nearer than `near` blocks, then every 2nd, every 4th, ...

    A step holds from a distance to twice that distance, and doubles there.
    """

    near: int
    unit: int

    def __init__(self, near: int, unit: int) -> None:
        self.__dict__.update(near=near, unit=unit)

    def text(self, block_size: int) -> str:
        """`hierarchical:near`."""
        return f"hierarchical:{self.near}" + suffix(self.unit, block_size)

    def allowed(self, query: Tensor, key: Tensor, head: int, kv_len: int) -> Tensor:
        """The distance is a multiple of the step that its level has."""
        apart = (query // self.unit - key // self.unit).abs()
        kept = apart < self.near
        step, start = 2, self.near
        while start <= int(apart.max() if apart.numel() else 0):
            kept = kept | ((apart >= start) & (apart < 2 * start) & (apart % step == 0))
            step, start = 2 * step, 2 * start
        return kept

    def distances(self, low: int, high: int) -> Tensor:
        """Level by level, to either side."""
        furthest = max(abs(low), abs(high))
        levels = [counting(min(self.near, furthest + 1))]
        step, start = 2, self.near
        while start <= furthest:
            first = -(-start // step) * step
            levels.append(counting(first, max(first, min(2 * start, furthest + 1)), step))
            step, start = 2 * step, 2 * start
        ahead = torch.cat(levels)
        both = torch.cat([-ahead[1:].flip(0), ahead])
        return both[(both >= low) & (both <= high)]


@frozen(slots=False, init=False)
class ExplicitBlocks(Rule):
    """The blocks of a layout that somebody made, for its own length alone."""

    csr: BlockCSR
    name: str

    def __init__(self, csr: BlockCSR) -> None:
        csr = remember_csr(csr)
        self.__dict__.update(csr=csr, name=csr.digest, unit=csr.block_size)

    def text(self, block_size: int) -> str:
        """`csr:digest`, which `find_csr` gives back."""
        return f"csr:{self.name}"

    def allowed(self, query: Tensor, key: Tensor, head: int, kv_len: int) -> Tensor:
        """By looking up each pair's block, then its bit in the mask."""
        csr, size = self.csr, self.csr.block_size
        _check_lengths(csr, csr.q_len, kv_len, csr.query_offset)
        mask_ids = torch.full((csr.rows * csr.columns,), EMPTY, device=key.device, dtype=torch.int64)
        mask_ids[csr.keys().to(key.device)] = csr.mask_ids.long().to(key.device)
        row = query // size - csr.first_row
        there = (query >= csr.query_offset) & (query < csr.query_offset + csr.q_len) & (key >= 0) & (key < kv_len)
        column = key // size
        mask_id = mask_ids[(row * csr.columns + column).clamp(0, len(mask_ids) - 1)]
        bits = torch.cat([csr.masks.new_ones(1, size, size), csr.masks]).to(key.device)
        return there & (mask_id >= 0) & bits[mask_id.clamp(min=0), query % size, key % size]

    def blocks(self, grid: Grid, table: MaskTable) -> BlockSet:
        """The layout's own blocks, on the grid that they were made for."""
        csr = self.csr
        _check_lengths(csr, grid.q_len, grid.kv_len, grid.query_offset)
        states = [table.add(part) for part in torch.split(csr.masks, table.chunk)]
        return listed(csr.keys(), torch.cat([all_full(1), *states])[csr.mask_ids])


def _check_lengths(csr: BlockCSR, q_len: int, kv_len: int, query_offset: int) -> None:
    if (csr.q_len, csr.kv_len, csr.query_offset) != (q_len, kv_len, query_offset):
        raise ArgumentError(
            "pattern",
            f"a layout of {csr.q_len} queries from {csr.query_offset} on and {csr.kv_len} keys for a problem of "
            f"{q_len} queries from {query_offset} on and {kv_len} keys",
            "a layout of the problem's lengths",
            "make it for these lengths, or use a rule such as local_blocks, which fits any (with packed documents, "
            "every document)",
        )
