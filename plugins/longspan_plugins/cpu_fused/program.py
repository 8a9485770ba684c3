"""What the native kernels run: query tiles and, for each, the key segments that it attends to in one softmax.

A tile is up to 128 query rows at a regular step, a segment a run of keys at a regular step; both say at which positions
they stand, so that causality and windows are one comparison. Built with vectorised operations, in time and memory
proportional to the number of tiles and segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import lcm

import torch
from attrs import frozen
from torch import Tensor

from longspan.plugin import BlockSparse, Dense, Dilated, LongspanError, Problem, SlidingWindow
from longspan_plugins.cpu_fused.library import Library
from longspan_plugins.cpu_fused.table import Table

__all__ = ["FAR", "TILE", "Program", "check_program", "program_for"]

TILE = 128
FEW = 8
"""Queries that leave most lanes of a vector empty: torch's operators serve fewer."""
FAR = 2**60
"""A reach beyond every position: sums of the two are to fit 64 bits."""
MOST_BRANCHES, LONGEST_PERIOD = 32, 1024
"""What `dilated.h` holds: branches of a head, and the least common multiple of their rates."""


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
        """From tensors."""
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
        """Memory held."""
        held = (self.tiles, self.segments, self.ranges, self.of_head, self.masks)
        return sum(one.nbytes for one in held if one is not None)


def check_program(program: Program, problem: Problem) -> None:
    """Refuse a program that leads the kernels out of its tables, or out of tensors as long as the problem's.

    Raises:
        LongspanError: it does.
    """
    tiles, segments = program.tiles.tensor(), program.segments.tensor()
    ranges, of_head = program.ranges.tensor(), program.of_head.tensor()
    masks = (0, 0, 0) if program.masks is None else program.masks.shape
    runs = tiles[:, 5] - tiles[:, 4]
    owner = torch.repeat_interleave(torch.arange(len(tiles), dtype=torch.int64, device="cpu"), runs.clamp(min=0))
    place = torch.arange(len(owner), dtype=torch.int64, device="cpu") - (runs.cumsum(0) - runs - tiles[:, 4])[owner]
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


def program_for(problem: Problem, library: Library) -> Program | None:
    """The problem's program; None where tiles would be too small to pay: few queries, or few rows between cuts."""
    pattern = problem.pattern
    if max((span.queries for span in spans(problem)), default=0) < FEW or problem.query_offset >= FAR // 2:
        return None
    if isinstance(pattern, BlockSparse):
        from longspan_plugins.cpu_fused.blocks import block_program

        return block_program(problem)
    if isinstance(pattern, Dilated):
        return _dilated(problem, pattern, library)
    if isinstance(pattern, Dense):
        before, after = FAR, 0 if problem.is_causal else FAR
    elif isinstance(pattern, SlidingWindow):
        before, after = min(pattern.left, FAR), 0 if problem.is_causal else min(pattern.right, FAR)
    else:
        return None
    parts = [_banded(span, before, after) for span in spans(problem)]
    return assemble([parts], torch.zeros(problem.heads, dtype=torch.int64, device="cpu"), _covers(problem))


def _covers(problem: Problem) -> bool:
    """Whether documents reach to the last query."""
    return problem.documents is None or problem.documents[-1] == problem.q_len


Part = tuple[Tensor, Tensor]
"""Tiles, whose last two columns number segments of this part, and its segments."""


def assemble(programs: Iterable[list[Part]], of_head: Tensor, covered: bool, masks: Tensor | None = None) -> Program:
    """One program of many parts."""
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
        torch.tensor(ranges, dtype=torch.int64, device="cpu"),
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


def _banded(span: Span, before: int, after: int) -> Part:
    """Contiguous tiles, each with the one run of keys that any of its rows may see."""
    start = torch.arange(0, span.queries, TILE, dtype=torch.int64, device="cpu")
    count = (span.queries - start).clamp(max=TILE)
    position = start + span.first
    low = (position - before).clamp(min=0, max=span.keys) if before < FAR else torch.zeros_like(start)
    high = (position + count + after).clamp(max=span.keys) if after < FAR else torch.full_like(start, span.keys)
    number = torch.arange(len(start), dtype=torch.int64, device="cpu")
    tiles = columns(start + span.query_start, 1, count, position, number, number + 1)
    segments = columns(low + span.key_start, 1, (high - low).clamp(min=0), low, before, after, -1, 0, 0)
    return tiles, segments


# --------------------------------------------------------------------------------------------------------- dilated

Branch = tuple[int, int, int]
"""Segment length, rate and offset."""


def _dilated(problem: Problem, pattern: Dilated, library: Library) -> Program | None:
    """One softmax over all branches of a row: rows with the same branches and step are tiles of their own."""
    kinds: dict[tuple[Branch, ...], int] = {}
    of_head = torch.tensor(
        [kinds.setdefault(one, len(kinds)) for one in _branches_of_heads(pattern, problem.heads)],
        dtype=torch.int64,
        device="cpu",
    )
    period = lcm(*(r for branches in kinds for _, r, _ in branches))
    shortest = min(*pattern.segment_lengths, problem.kv_len)
    if (
        max(pattern.dilation_rates) > shortest
        or shortest // period < TILE // 4
        or period > LONGEST_PERIOD
        or len(pattern.segment_lengths) > MOST_BRANCHES
    ):
        return None
    documents = torch.tensor(
        [[s.query_start, s.key_start, s.first, s.queries, s.keys] for s in spans(problem)],
        dtype=torch.int64,
        device="cpu",
    )
    listings = [library.dilated(branches, documents, problem.is_causal) for branches in kinds]
    tiles, segments = (Table.blank(sum(one[i] for one in listings), width) for i, width in ((0, 6), (1, 9)))
    ranges, first, base = [], 0, 0
    for branches, (many, more, _, _) in zip(kinds, listings, strict=True):
        library.dilated(branches, documents, problem.is_causal, tiles.address + 48 * first, segments.address, base)
        ranges.append((first, first + many))
        first, base = first + many, base + more
    covered = all(rows == problem.q_len for _, _, rows, _ in listings)
    keys = sum(keys for *_, keys in listings)
    return Program(
        tiles,
        segments,
        Table.of(torch.tensor(ranges, dtype=torch.int64, device="cpu")),
        Table.of(of_head),
        covered,
        keys,
    )


def _branches_of_heads(pattern: Dilated, heads: int) -> Iterator[tuple[Branch, ...]]:
    lengths = (min(w, FAR) for w in pattern.segment_lengths)
    pairs = list(zip(lengths, pattern.dilation_rates, strict=True))
    if pattern.heads == "grouped":
        size, more = divmod(heads, len(pairs))
        for number, (w, r) in enumerate(pairs):
            for _ in range(size + (number < more)):
                yield ((w, r, number % r),)
        return
    for head in range(heads):
        yield tuple((w, r, head % r if pattern.offset == "modulo" else head // -(-heads // r)) for w, r in pairs)
