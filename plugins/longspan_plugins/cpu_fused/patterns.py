"""The program of each pattern: bands of keys for dense attention and windows, branches for dilated, blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import lcm

import torch
from torch import Tensor

from longspan.plugin import BlockCSR, BlockSparse, Dense, Dilated, HeadBlocks, Problem, SlidingWindow
from longspan_plugins.cpu_fused.library import Library
from longspan_plugins.cpu_fused.program import FAR, TILE, Part, Program, Span, assemble, columns, covers, spans
from longspan_plugins.cpu_fused.table import Table, counting, integers

__all__ = ["block_program", "program_for"]

FEW = 8
"""Queries that leave most lanes of a vector empty: torch's operators serve fewer."""
MOST_BRANCHES, LONGEST_PERIOD = 32, 1024
"""What `dilated.h` holds: branches of a head, and the least common multiple of their rates."""


def program_for(problem: Problem, library: Library, blocks: Sequence[HeadBlocks] | None = None) -> Program | None:
    """The problem's program; None where tiles would be too small to pay: few queries, or few rows between cuts.

    `blocks` are those of a block-sparse pattern's documents, where somebody has them.
    """
    pattern = problem.pattern
    if max((span.queries for span in spans(problem)), default=0) < FEW or problem.query_offset >= FAR // 2:
        return None
    if isinstance(pattern, BlockSparse):
        return block_program(problem, blocks)
    if isinstance(pattern, Dilated):
        return _dilated(problem, pattern, library)
    if isinstance(pattern, Dense):
        before, after = FAR, 0 if problem.is_causal else FAR
    elif isinstance(pattern, SlidingWindow):
        before, after = min(pattern.left, FAR), 0 if problem.is_causal else min(pattern.right, FAR)
    else:
        return None
    parts = [_banded(span, before, after) for span in spans(problem)]
    return assemble([parts], torch.zeros(problem.heads, dtype=torch.int64, device="cpu"), covers(problem))


def _banded(span: Span, before: int, after: int) -> Part:
    """Contiguous tiles, each with the one run of keys that any of its rows may see."""
    start = counting(0, span.queries, TILE)
    count = (span.queries - start).clamp(max=TILE)
    position = start + span.first
    low = (position - before).clamp(min=0, max=span.keys) if before < FAR else torch.zeros_like(start)
    high = (position + count + after).clamp(max=span.keys) if after < FAR else torch.full_like(start, span.keys)
    number = counting(len(start))
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
        [kinds.setdefault(branches, len(kinds)) for branches in _branches_of_heads(pattern, problem.heads)],
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
    documents = integers([[s.query_start, s.key_start, s.first, s.queries, s.keys] for s in spans(problem)])
    listings = [library.dilated(branches, documents, problem.is_causal) for branches in kinds]
    tiles, segments = (Table.blank(sum(counts[i] for counts in listings), width) for i, width in ((0, 6), (1, 9)))
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
        Table.of(integers(ranges)),
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


# --------------------------------------------------------------------------------------------------------- block-sparse


def block_program(problem: Problem, given: Sequence[HeadBlocks] | None = None) -> Program:
    """The program of a block-sparse problem, of these blocks of its documents unless they are to be evaluated."""
    pattern, documents = problem.pattern, spans(problem)
    assert isinstance(pattern, BlockSparse)  # the caller looked
    evaluated = given or [
        pattern.csr(span.queries, span.keys, is_causal=problem.is_causal, query_offset=span.first, heads=problem.heads)
        for span in documents
    ]
    kinds: dict[tuple[int, ...], int] = {}
    of_head = [
        kinds.setdefault(tuple(blocks.of_head[head] for blocks in evaluated), len(kinds))
        for head in range(problem.heads)
    ]
    masks: list[Tensor] = []
    parts: dict[tuple[int, int], Part] = {}
    for number, (span, blocks) in enumerate(zip(documents, evaluated, strict=True)):
        for which, csr in enumerate(blocks.layouts):
            parts[number, which] = _part(span, csr, sum(map(len, masks)))
            masks.append(csr.masks)
    programs = [[_copy(parts[number, which]) for number, which in enumerate(kind)] for kind in kinds]
    return assemble(programs, integers(of_head), covers(problem), _packed(masks))


def _copy(part: Part) -> Part:
    return part[0].clone(), part[1]


def _part(span: Span, csr: BlockCSR, first_mask: int) -> Part:
    size = csr.block_size
    rows = torch.repeat_interleave(counting(csr.rows), csr.indptr.diff())
    cols, mask_ids = csr.indices.long(), csr.mask_ids.long()
    full = mask_ids == 0
    follows = torch.zeros_like(full)
    follows[1:] = full[1:] & full[:-1] & (rows[1:] == rows[:-1]) & (cols[1:] == cols[:-1] + 1)
    starts = (~follows).nonzero().squeeze(1)
    blocks = torch.diff(starts, append=integers([len(cols)]))
    key = cols[starts] * size
    keys = (key + blocks * size).clamp(max=span.keys) - key
    mask = torch.where(full[starts], -1, mask_ids[starts] - 1 + first_mask)
    segment_rows = rows[starts]
    # The tiles: block rows cut to at most TILE rows, those at the ends as long as their queries.
    low = (counting(csr.rows) + csr.first_row) * size
    high = (low + size).clamp(max=span.first + span.queries)
    low = low.clamp(min=span.first)
    many = (high - low + TILE - 1) // TILE
    row = torch.repeat_interleave(counting(csr.rows), many)
    within = counting(len(row)) - (many.cumsum(0) - many)[row]
    position = low[row] + within * TILE
    count = (high[row] - position).clamp(max=TILE)
    of_row = torch.bincount(segment_rows, minlength=csr.rows)
    ends = of_row[row].cumsum(0)
    tiles_out = columns(position - span.first + span.query_start, 1, count, position, ends - of_row[row], ends)
    # Each tile has its own segments: a mask's first query is the tile's.
    first = (of_row.cumsum(0) - of_row)[row]
    owner = torch.repeat_interleave(counting(len(row)), of_row[row])
    pick = counting(len(owner)) - (ends - of_row[row])[owner] + first[owner]
    mask_query = (position - (row + csr.first_row) * size)[owner]
    start = key[pick]
    segments = columns(start + span.key_start, 1, keys[pick], start, FAR, FAR, mask[pick], mask_query, 0)
    return tiles_out, segments


def _packed(masks: list[Tensor]) -> Tensor | None:
    """Masks `(masks, queries, keys)` as bits: `(masks, keys, words)` int32, bit q % 32 of word q // 32 for query q."""
    if not masks or not any(map(len, masks)):
        return None
    keys = max(some.shape[1] for some in masks)
    words = -(-keys // 32)
    seen = torch.zeros(sum(map(len, masks)), keys, words * 32, dtype=torch.bool, device="cpu")
    for rows, some in zip(torch.split(seen, [*map(len, masks)]), masks, strict=True):
        rows[:, : some.shape[2], : some.shape[1]] = some.mT
    bits = (seen.view(*seen.shape[:2], words, 32) * 2 ** counting(32)).sum(-1)
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
