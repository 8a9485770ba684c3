"""Block-sparse patterns as programs: a tile a block row, a segment for each run of full blocks or masked block."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.plugin import BlockCSR, BlockSparse, Problem
from longspan_plugins.cpu_fused.program import FAR, TILE, Part, Program, Span, assemble, columns, spans

__all__ = ["block_program", "packed"]


def block_program(problem: Problem) -> Program:
    """The program of a block-sparse problem."""
    pattern, documents = problem.pattern, spans(problem)
    assert isinstance(pattern, BlockSparse)  # the caller looked
    found = [
        pattern.csr(span.queries, span.keys, is_causal=problem.is_causal, query_offset=span.first, heads=problem.heads)
        for span in documents
    ]
    kinds: dict[tuple[int, ...], int] = {}
    of_head = [
        kinds.setdefault(tuple(blocks.of_head[head] for blocks in found), len(kinds)) for head in range(problem.heads)
    ]
    masks: list[Tensor] = []
    parts: dict[tuple[int, int], Part] = {}
    for number, (span, blocks) in enumerate(zip(documents, found, strict=True)):
        for which, csr in enumerate(blocks.layouts):
            parts[number, which] = _part(span, csr, sum(map(len, masks)))
            masks.append(csr.masks)
    programs = [[_copy(parts[number, which]) for number, which in enumerate(kind)] for kind in kinds]
    covered = problem.documents is None or problem.documents[-1] == problem.q_len
    return assemble(programs, torch.tensor(of_head, dtype=torch.int64, device="cpu"), covered, packed(masks))


def _copy(part: Part) -> Part:
    return part[0].clone(), part[1]


def _part(span: Span, csr: BlockCSR, first_mask: int) -> Part:
    size = csr.block_size
    rows = torch.repeat_interleave(torch.arange(csr.rows, dtype=torch.int64, device="cpu"), csr.indptr.diff())
    cols, mask_ids = csr.indices.long(), csr.mask_ids.long()
    full = mask_ids == 0
    follows = torch.zeros_like(full)
    follows[1:] = full[1:] & full[:-1] & (rows[1:] == rows[:-1]) & (cols[1:] == cols[:-1] + 1)
    starts = (~follows).nonzero().squeeze(1)
    blocks = torch.diff(starts, append=torch.tensor([len(cols)], dtype=torch.int64, device="cpu"))
    key = cols[starts] * size
    keys = torch.minimum(key + blocks * size, torch.tensor(span.keys, dtype=torch.int64, device="cpu")) - key
    mask = torch.where(full[starts], -1, mask_ids[starts] - 1 + first_mask)
    segment_rows = rows[starts]
    # The tiles: block rows cut to at most TILE rows, those at the ends as long as their queries.
    low = (torch.arange(csr.rows, dtype=torch.int64, device="cpu") + csr.first_row) * size
    high = torch.minimum(low + size, torch.tensor(span.first + span.queries, dtype=torch.int64, device="cpu"))
    low = low.clamp(min=span.first)
    many = (high - low + TILE - 1) // TILE
    row = torch.repeat_interleave(torch.arange(csr.rows, dtype=torch.int64, device="cpu"), many)
    within = torch.arange(len(row), dtype=torch.int64, device="cpu") - (many.cumsum(0) - many)[row]
    position = low[row] + within * TILE
    count = torch.minimum(high[row] - position, torch.tensor(TILE, dtype=torch.int64, device="cpu"))
    of_row = torch.bincount(segment_rows, minlength=csr.rows)
    ends = of_row[row].cumsum(0)
    tiles_out = columns(position - span.first + span.query_start, 1, count, position, ends - of_row[row], ends)
    # Each tile has its own segments: a mask's first query is the tile's.
    first = (of_row.cumsum(0) - of_row)[row]
    owner = torch.repeat_interleave(torch.arange(len(row), dtype=torch.int64, device="cpu"), of_row[row])
    pick = torch.arange(len(owner), dtype=torch.int64, device="cpu") - (ends - of_row[row])[owner] + first[owner]
    mask_query = (position - (row + csr.first_row) * size)[owner]
    start = key[pick]
    segments = columns(start + span.key_start, 1, keys[pick], start, FAR, FAR, mask[pick], mask_query, 0)
    return tiles_out, segments


def packed(masks: list[Tensor]) -> Tensor | None:
    """Masks `(masks, queries, keys)` as bits: `(masks, keys, words)` int32, bit q % 32 of word q // 32 for query q."""
    if not masks or not any(map(len, masks)):
        return None
    sizes = {one.shape[1] for one in masks}
    keys = max(sizes)
    words = -(-keys // 32)
    found = torch.zeros(sum(map(len, masks)), keys, words * 32, dtype=torch.bool, device="cpu")
    at = 0
    for one in masks:
        found[at : at + len(one), : one.shape[2], : one.shape[1]] = one.mT
        at += len(one)
    weights = torch.ones(32, dtype=torch.int64, device="cpu") << torch.arange(32, dtype=torch.int64, device="cpu")
    bits = (found.view(*found.shape[:2], words, 32) * weights).sum(-1)
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
