"""How the threads of a backward share the tiles of a program, and where each adds up the gradients of the keys.

A share is a run of tiles, so that it reads and writes a run of the keys. Where the runs of different shares hardly
overlap, as in a window, all shares write to one place, and the few tiles between them come last, by one thread; else
every share but one has sums of its own, of its keys alone. Who adds what, and in which order, depends on the number of
shares alone.
"""

from __future__ import annotations

from itertools import pairwise
from math import isqrt

import torch
from attrs import frozen
from torch import Tensor

from longspan_plugins.cpu_fused.program import Program
from longspan_plugins.cpu_fused.table import Table, counting, integers

__all__ = ["Shares", "share"]

MOST, FEWEST = 64, 32
"""Sums in single precision, and tiles at least that are added up apart where there are more."""
BETWEEN = 0.05
"""The part of the work that one thread may do alone at the end."""


@frozen
class Shares:
    """Who computes which tiles.

    `tiles` `(programs, shares, 2)`: the first tile and the one after the last. `keys`: for each share the first key and
    the one after the last, of any program. `between`, in the same form as `tiles`: what comes last; None where shares
    have sums of their own. `sums`: the most that a head adds up in the gradients of a key, or somewhat more.
    """

    tiles: Table
    keys: tuple[tuple[int, int], ...]
    between: Table | None
    sums: int

    @property
    def count(self) -> int:
        """The number of shares."""
        return len(self.keys)

    def apart(self, heads: int) -> int:
        """How many tiles add up apart, for `heads` that share their keys; 0 where single precision serves without."""
        many = self.sums * heads
        return max(FEWEST, isqrt(many)) if many > MOST else 0


def share(program: Program, count: int) -> Shares:
    """Share a program's tiles.

    Args:
        program: of which every head's tiles are shared alike.
        count: how many shares there are to be.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        work, low, high = _tiles(program)
        ranges = program.ranges.tensor().tolist()
        sums = max((_most_sums(program, *tiles) for tiles in ranges), default=0)
        if count == 1:
            return Shares(
                Table.of(integers(ranges).view(-1, 1, 2)),
                ((0, int(high.max()) if len(high) else 0),),
                None,
                sums,
            )
        cuts = [_cuts(work[first:last], count) for first, last in ranges]
        runs = [
            [(first + a, first + b) for a, b in pairwise(cut)] for (first, _), cut in zip(ranges, cuts, strict=True)
        ]
        keys = [_extent([(low[a:b], high[a:b]) for a, b in column]) for column in zip(*runs, strict=True)]
        own, between = _disjoint(runs, keys, low)
        late = sum(int(work[a:b].sum()) for run in between for a, b in run)
        if late <= BETWEEN * int(work.sum()):
            return Shares(_table(own), tuple(keys), _table(between), sums)
        return Shares(_table(runs), tuple(keys), None, sums)


def _segments(program: Program, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The segments of some tiles: the tile's number among them, the segment, and the key after its last."""
    first, many = tiles[:, 4], tiles[:, 5] - tiles[:, 4]
    tile = torch.repeat_interleave(counting(len(tiles)), many)
    place = counting(len(tile)) - torch.repeat_interleave(many.cumsum(0) - many - first, many)
    mine = program.segments.tensor()[place]
    return tile, mine, mine[:, 0] + (mine[:, 2] - 1) * mine[:, 1] + 1


def _most_sums(program: Program, first: int, last: int) -> int:
    """The most segments of these tiles that reach over one key."""
    _, mine, ends = _segments(program, program.tiles.tensor()[first:last])
    some = mine[:, 2] > 0
    begins, ends = mine[some, 0], ends[some]
    if not len(begins):
        return 0
    change = torch.zeros(int(ends.max()) + 1, dtype=torch.int64, device="cpu")
    for places, by in ((begins, 1), (ends, -1)):
        change.index_add_(0, places, torch.full_like(places, by))
    return int(change.cumsum(0).max())


def _tiles(program: Program) -> tuple[Tensor, Tensor, Tensor]:
    """Of each tile: how many products it takes, its first key and the one after the last."""
    tiles = program.tiles.tensor()
    tile, mine, ends = _segments(program, tiles)
    work = tiles[:, 2] * torch.zeros(len(tiles), dtype=torch.int64, device="cpu").index_add_(0, tile, mine[:, 2])
    low = torch.full((len(tiles),), 2**62, dtype=torch.int64, device="cpu").scatter_reduce_(0, tile, mine[:, 0], "amin")
    high = torch.zeros(len(tiles), dtype=torch.int64, device="cpu").scatter_reduce_(0, tile, ends, "amax")
    return work, low, high


def _cuts(work: Tensor, count: int) -> list[int]:
    """Where runs of about equal work begin and end."""
    done = work.cumsum(0)
    total = int(done[-1]) if len(done) else 0
    wanted = integers([total * part // count for part in range(1, count)])
    return [0, *torch.searchsorted(done, wanted).tolist(), len(work)]


def _extent(runs: list[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    some = [(int(low.min()), int(high.max())) for low, high in runs if len(low) and int(high.max())]
    return (min(a for a, _ in some), max(b for _, b in some)) if some else (0, 0)


Runs = list[list[tuple[int, int]]]


def _disjoint(runs: Runs, keys: list[tuple[int, int]], low: Tensor) -> tuple[Runs, Runs]:
    """Every run without the tiles up to the last that reads keys of runs before it, and those tiles."""
    own: Runs = [[] for _ in runs]
    between: Runs = [[] for _ in runs]
    reached = 0
    for part, (_, end) in enumerate(keys):
        for number, run in enumerate(runs):
            a, b = run[part]
            shared = (low[a:b] < reached).nonzero().flatten()
            cut = a + int(shared[-1]) + 1 if len(shared) else a
            own[number].append((cut, b))
            between[number].append((a, cut))
        reached = max(reached, end)
    return own, between


def _table(runs: Runs) -> Table:
    return Table.of(integers(runs).view(len(runs), -1, 2))
