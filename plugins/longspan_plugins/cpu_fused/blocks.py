"""Block-sparse patterns as programs: a tile a block row, a segment for each run of full blocks or masked block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.plugin import BlockCSR, BlockSparse, HeadBlocks, Problem
from longspan_plugins.cpu_fused.program import FAR, TILE, Part, Program, Span, assemble, columns, covers, spans
from longspan_plugins.cpu_fused.table import counting, integers

__all__ = ["block_program", "packed"]


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
    return assemble(programs, integers(of_head), covers(problem), packed(masks))


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


def packed(masks: list[Tensor]) -> Tensor | None:
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
