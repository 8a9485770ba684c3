"""A layout: a pattern lowered to dense calls for one shape. Values only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from attrs import frozen

__all__ = ["Call", "Heads", "Layout", "Rows", "head_ranges"]

CALL = 700
"""Bytes that a dense call takes, about: itself, its heads, its rows and their numbers."""


@frozen
class Heads:
    """Heads `start, start + step, ...`, `count` of them."""

    start: int
    count: int
    step: int = 1


@frozen
class Rows:
    """A regular grid of sequence indices: `start + j * period + i * stride` for `i < length`, `j < count`.

    One dense attention runs over each of the `count` dense segments of `length` rows.
    """

    start: int
    length: int
    stride: int = 1
    count: int = 1
    period: int = 0


@frozen
class Call:
    """One dense attention: dense segment `j` of `queries` attends to segment `j` of `keys`, for each of the heads.

    `heads.count` is a multiple of `kv_heads.count`: query heads are in order of the key heads that they share.
    `is_causal` (as many queries as keys): query `i` of a segment sees its keys up to `i`.
    `first`: nothing was written to these rows before, so the result is stored; else it is merged into them.
    `flipped`: the kernel gets both segments in reverse order, so that a causal square becomes its mirror image,
    in which query `i` sees the keys from `i` on.
    """

    heads: Heads
    kv_heads: Heads
    queries: Rows
    keys: Rows
    is_causal: bool
    first: bool
    flipped: bool = False

    @property
    def pairs(self) -> int:
        """Query-key products over all heads and segments, for one batch entry (a causal square counts its half)."""
        rows, keys = self.queries.length, self.keys.length
        seen = rows * (rows + 1) // 2 if self.is_causal else rows * keys
        return self.heads.count * self.queries.count * seen


@frozen
class Layout:
    """The dense calls that together compute a pattern, in order.

    `covered`: the calls marked `first` write every row of every head, so that no row needs an initial value.
    `is_frozen`: nobody may change it, so a cache gives everybody the same object.
    """

    is_frozen: ClassVar[bool] = True

    calls: tuple[Call, ...]
    covered: bool

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, about."""
        return CALL * len(self.calls)

    @property
    def merges(self) -> bool:
        """Whether any row is written by more than one call."""
        return not all(call.first for call in self.calls)

    @property
    def pairs(self) -> int:
        """Query-key products for one batch entry; four times head_dim of it are the forward's FLOPs."""
        return sum(call.pairs for call in self.calls)

    def __str__(self) -> str:
        calls = "1 dense call" if len(self.calls) == 1 else f"{len(self.calls)} dense calls"
        return f"{calls}, {self.pairs:,} query-key pairs per batch entry"


def head_ranges(heads: Sequence[int]) -> Iterator[Heads]:
    """Head numbers, ascending, as few regular runs as a greedy look finds."""
    start = 0
    while start < len(heads):
        stop = start + 1
        step = heads[stop] - heads[start] if stop < len(heads) else 1
        while stop < len(heads) and heads[stop] - heads[stop - 1] == step:
            stop += 1
        yield Heads(heads[start], stop - start, step)
        start = stop
