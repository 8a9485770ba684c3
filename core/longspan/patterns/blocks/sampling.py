"""Blocks drawn at random, by counting instead of by a generator's state.

The columns of block row `i` are the first few values of a permutation of all columns, which is keyed by the seed and
`i` alone. So a row's choice depends on nothing but the seed, its number, how many columns there are and how many are
drawn, and is the same on every platform: integers below 2**63 in int64, no floating point, no overflow.

The permutation is a Feistel network (Luby and Rackoff, 1988) on a power of two that holds the columns,
walked along its cycle until it lands among them (Black and Rogaway, 2002). Its round function is a 32-bit mix: xors
with right shifts, and odd multipliers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

import torch
from attrs import frozen
from torch import Tensor

from longspan.numerics.tensors import counting
from longspan.patterns.blocks.grid import Grid
from longspan.patterns.blocks.masks import MaskTable, all_full
from longspan.patterns.blocks.primitives import suffix
from longspan.patterns.blocks.rules import Rule
from longspan.patterns.blocks.sets import BlockSet, check_count

__all__ = ["Drawn"]

_ROUNDS = 6
_LEAST_BITS = 6
"""A network on fewer bits favours some columns: halves of one or two bits mix too little."""
_CHUNK = 2**20
"""Blocks that are drawn at once, so that temporaries stay small."""
_WORD = 0xFFFFFFFF

Number = TypeVar("Number", int, Tensor)


@frozen(slots=False, init=False)
class Drawn(Rule):
    """In every block row, as many distinct blocks: a share of the columns (a float) or a number of them (an int)."""

    amount: float | int
    seed: int
    unit: int

    def __init__(self, amount: float | int, seed: int, unit: int) -> None:
        self.__dict__.update(amount=amount, seed=seed, unit=unit)

    def text(self, block_size: int) -> str:
        """`random:share,seed` or `random:number,seed`; a share has a point."""
        return f"random:{self.amount},{self.seed}" + suffix(self.unit, block_size)

    def count(self, columns: int) -> int:
        """How many blocks a row of so many columns gets."""
        if isinstance(self.amount, int):
            return min(self.amount, columns)
        return min(max(1, round(self.amount * columns)), columns)

    def allowed(self, query: Tensor, key: Tensor, head: int, kv_len: int) -> Tensor:
        """Row by row, with Python's integers."""
        columns = -(-kv_len // self.unit)
        kept = torch.zeros(query.shape[0], key.shape[1], dtype=torch.bool, device=key.device)
        for row in torch.unique(query // self.unit).tolist():
            for column in _drawn(self.seed, row, columns, self.count(columns)):
                kept |= (query // self.unit == row) & (key // self.unit == column)
        return kept

    def blocks(self, grid: Grid, table: MaskTable) -> BlockSet:
        """As many full blocks in each row as are drawn."""
        columns = grid.columns
        count = self.count(columns)
        check_count(grid.rows * count)
        keys = torch.empty(grid.rows, count, dtype=torch.int64, device="cpu")
        step = max(1, _CHUNK // max(1, count))
        for start in range(0, grid.rows if count else 0, step):
            rows = grid.row_numbers()[start : start + step]
            drawn = _permuted(self.seed, rows, columns, count).sort(1).values
            keys[start : start + step] = drawn + ((rows - grid.first_row) * columns)[:, None]
        return BlockSet(keys.flatten(), all_full(grid.rows * count))


def _mix(x: Number) -> Number:
    """A 32-bit mix of a number below 2**32."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _WORD
    x = (x ^ (x >> 15)) * 0x735A2D97 & _WORD
    return x ^ (x >> 15)


def _round_keys(seed: int, row: Number) -> list[Number]:
    """What tells the permutation of one row from those of others, and of other seeds: a key for each round."""
    start = _mix(_mix(seed & _WORD ^ 0x9E3779B9) ^ (seed >> 32 & _WORD))
    key = _mix(_mix((row & _WORD) ^ start) ^ (row >> 32 & _WORD))
    return [_mix(key ^ (0x9E3779B9 * number & _WORD)) for number in range(1, _ROUNDS + 1)]


def _permuted(seed: int, rows: Tensor, columns: int, count: int) -> Tensor:
    """The first `count` values of each row's permutation: `(len(rows), count)` int64, distinct in a row."""
    bits = max(_LEAST_BITS, (columns - 1).bit_length())
    low_bits = (bits + 1) // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    keys = [key[:, None] for key in _round_keys(seed, rows)]
    x = counting(count).repeat(len(rows), 1)
    numbers, unfinished = x, counting(x.numel())
    while True:
        high, low = x >> low_bits, x & low_mask
        for number in range(0, _ROUNDS, 2):
            high = high ^ (_mix(low ^ keys[number]) & high_mask)
            low = low ^ (_mix(high ^ keys[number + 1]) & low_mask)
        x = high << low_bits | low
        numbers.view(-1)[unfinished] = x.flatten()
        out = (x >= columns).flatten()
        if not bool(out.any()):
            return numbers
        unfinished = unfinished[out]
        keys = [key.expand_as(x).flatten()[out] for key in keys]
        x = x.flatten()[out]


@lru_cache(maxsize=4096)
def _drawn(seed: int, row: int, columns: int, count: int) -> frozenset[int]:
    """The columns of one row, one after the other."""
    bits = max(_LEAST_BITS, max(0, columns - 1).bit_length())
    low_bits = (bits + 1) // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    keys = _round_keys(seed, row)
    chosen = set()
    for x in range(count):
        while True:
            high, low = x >> low_bits, x & low_mask
            for number, key in enumerate(keys):
                if number % 2:
                    low ^= _mix(high ^ key) & low_mask
                else:
                    high ^= _mix(low ^ key) & high_mask
            x = high << low_bits | low
            if x < columns:
                break
        chosen.add(x)
    return frozenset(chosen)
