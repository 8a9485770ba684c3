"""What the native kernels run: query tiles and, for each, the key segments that it attends to in one softmax.

A tile is up to 128 query rows at a regular step, a segment a run of keys at a regular step; both say at which positions
they stand, so that causality and windows are one comparison. Built with vectorised operations, in time and memory
proportional to the number of tiles and segments.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from attrs import frozen
from torch import Tensor

from longspan.plugin import LongspanError, Problem
from longspan_plugins.cpu_fused.table import Table, counting, integers

__all__ = ["FAR", "TILE", "Part", "Program", "Span", "assemble", "check_program", "columns", "covers", "spans"]

TILE = 128
FAR = 2**60
"""A reach beyond every position: sums of the two are to fit 64 bits."""


@frozen(eq=False)
class Program:
    """Tiles and segments as `attention.h` reads them: int64 rows, one program a kind of head.

    `covered`: every query row of every head is in a tile. `keys`: keys of all segments together.
    """

    tiles: Table
    segments: Table
    ranges: Table  # (programs, 2): first and last tile
    of_head: Table  # (heads,): which program a head runs
    covered: bool
    keys: int
    masks: Table | None = None  # (masks, keys, words) int32

    @classmethod
    def of(
        cls,
        tiles: Tensor,
        segments: Tensor,
        ranges: Tensor,
        of_head: Tensor,
        covered: bool,
        masks: Tensor | None = None,
    ) -> Program:
        """From tensors of the same rows; the keys are counted."""
        return cls(
            Table.of(tiles),
            Table.of(segments),
            Table.of(ranges),
            Table.of(of_head),
            covered,
            int(segments[:, 2].sum()),
            None if masks is None else Table.of(masks),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        held = (self.tiles, self.segments, self.ranges, self.of_head, self.masks)
        return sum(table.nbytes for table in held if table is not None)


def check_program(program: Program, problem: Problem) -> None:
    """Refuse a program that leads the kernels out of its tables, or out of tensors as long as the problem's.

    Raises:
        LongspanError: it does.
    """
    tiles, segments = program.tiles.tensor(), program.segments.tensor()
    ranges, of_head = program.ranges.tensor(), program.of_head.tensor()
    masks = (0, 0, 0) if program.masks is None else program.masks.shape
    runs = tiles[:, 5] - tiles[:, 4]
    owner = torch.repeat_interleave(counting(len(tiles)), runs.clamp(min=0))
    place = counting(len(owner)) - (runs.cumsum(0) - runs - tiles[:, 4])[owner]
    sound = (
        _within(ranges, len(tiles))
        and bool((ranges[:, 0] <= ranges[:, 1]).all())
        and _within(of_head, len(ranges) - 1)
        and _within(tiles[:, 4:6], len(segments))
        and bool((runs >= 0).all())
        and _within(tiles[:, 2] - 1, TILE - 1)
        and _runs_within(tiles, problem.q_len)
        and _runs_within(segments, problem.kv_len)
        and bool((segments[:, 6] < masks[0]).all())
    )
    if sound and masks[0]:
        masked = segments[place, 6] >= 0
        owner, mine = owner[masked], segments[place[masked]]
        sound = _within(mine[:, 7] + tiles[owner, 2], 32 * masks[2]) and _within(mine[:, 8] + mine[:, 2], masks[1])
    if not sound:
        raise LongspanError(
            f"a program for the CPU kernels leaves its tensors: got {program!r} for {problem}; want tiles and segments "
            "within them. Next: clear the pattern cache that it came from, longspan.pattern_cache().clear()"
        )


def _within(values: Tensor, most: int) -> bool:
    return bool(((values >= 0) & (values <= most)).all())


def _runs_within(rows: Tensor, length: int) -> bool:
    """Whether runs that begin with columns index, step, count stay below `length`."""
    index, step, count = rows[:, 0], rows[:, 1], rows[:, 2]
    good = (index >= 0) & (step >= 1) & (count >= 0) & (step <= length) & (count <= length)
    return bool((good & ((count == 0) | (index + (count - 1) * step < length))).all())


@frozen
class Span:
    """One document: where it starts in query and key storage, its first query's position, and its lengths."""

    query_start: int
    key_start: int
    first: int
    queries: int
    keys: int


def spans(problem: Problem) -> list[Span]:
    """The problem's documents, or the whole of it."""
    if problem.documents is None:
        return [Span(0, 0, problem.query_offset, problem.q_len, problem.kv_len)]
    return [Span(a, a, 0, b - a, b - a) for a, b in pairwise(problem.documents) if b > a]


def covers(problem: Problem) -> bool:
    """Whether documents reach to the last query."""
    return problem.documents is None or problem.documents[-1] == problem.q_len


Part = tuple[Tensor, Tensor]
"""Tiles, whose last two columns number segments of this part, and its segments."""


def assemble(programs: Iterable[list[Part]], of_head: Tensor, covered: bool, masks: Tensor | None = None) -> Program:
    """One program of many parts: their segments are numbered anew, as all lie in one table."""
    tiles, segments, ranges = [], [], []
    tile_count = segment_count = 0
    for parts in programs:
        first = tile_count
        for part_tiles, part_segments in parts:
            part_tiles[:, 4:6] += segment_count
            tiles.append(part_tiles)
            segments.append(part_segments)
            tile_count += len(part_tiles)
            segment_count += len(part_segments)
        ranges.append((first, tile_count))
    return Program.of(
        torch.cat(tiles) if tiles else torch.zeros(0, 6, dtype=torch.int64, device="cpu"),
        torch.cat(segments) if segments else torch.zeros(0, 9, dtype=torch.int64, device="cpu"),
        integers(ranges),
        of_head,
        covered,
        masks,
    )


def columns(*values: Tensor | int) -> Tensor:
    """Columns side by side; numbers are repeated."""
    rows = next(len(value) for value in values if isinstance(value, Tensor))
    return torch.stack(
        [
            value if isinstance(value, Tensor) else torch.full((rows,), value, dtype=torch.int64, device="cpu")
            for value in values
        ],
        1,
    )
