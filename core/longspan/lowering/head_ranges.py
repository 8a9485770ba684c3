"""Head numbers as regular runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from longspan.lowering.layout import Heads

__all__ = ["progressions"]


def progressions(heads: Sequence[int]) -> Iterator[Heads]:
    """Head numbers, ascending, as few regular runs as a greedy look finds."""
    start = 0
    while start < len(heads):
        stop = start + 1
        step = heads[stop] - heads[start] if stop < len(heads) else 1
        while stop < len(heads) and heads[stop] - heads[stop - 1] == step:
            stop += 1
        yield Heads(heads[start], stop - start, step)
        start = stop
