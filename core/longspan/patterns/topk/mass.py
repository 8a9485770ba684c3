"""How much of dense attention's softmax mass chosen blocks keep: estimated from their scores, or measured."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.numerics.tensors import wide_dtype
from longspan.patterns.topk.scoring import BlockScoring

__all__ = ["estimated_mass", "measured_mass"]

BUDGET = 16 * 2**20
"""Bytes of token scores held at once."""


def estimated_mass(scores: Tensor, chosen: Tensor, scoring: BlockScoring) -> Tensor:
    """The kept share of `exp(score) * pairs`, summed over blocks: scores are taken for logarithms of a block's mean.

    Args:
        scores: `(batch, heads, query blocks, key blocks)`.
        chosen: the same shape, bool.
        scoring: the blocks.

    Returns:
        `(batch, heads)`: the mean over queries.
    """
    low, high = (one.to(scores.device) for one in scoring.grid.row_spans())
    seen = _visible_pairs(scoring).to(scores.device)
    logs = scores.masked_fill(seen == 0, -torch.inf) + seen.to(scores.dtype).log()
    kept = logs.masked_fill(~chosen, -torch.inf).logsumexp(-1)
    share = (kept - logs.logsumexp(-1)).exp()
    return (share * (high - low)).sum(-1) / max(1, scoring.q_len)


def measured_mass(query: Tensor, key: Tensor, chosen: Tensor, scoring: BlockScoring) -> Tensor:
    """`exp(lse_kept - lse_dense)` of every query, by all of its scores, a bounded number of rows at a time.

    Args:
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        chosen: `(batch, heads, query blocks, key blocks)` bool.
        scoring: the blocks.

    Returns:
        `(batch, heads, q_len)`; 1 where a query sees no key.
    """
    wide, size = wide_dtype(query.dtype), scoring.block_size
    share = torch.ones(query.shape[:3], dtype=wide, device=query.device)
    group = query.shape[1] // max(1, key.shape[1])
    rows = max(1, BUDGET // (max(1, scoring.columns * size) * wide.itemsize))
    for entry in range(query.shape[0] if scoring.kv_len else 0):
        for head in range(query.shape[1]):
            keys = key[entry, head // group].to(wide)
            for start in range(0, scoring.q_len, rows):
                stop = min(start + rows, scoring.q_len)
                position = torch.arange(start, stop, device=query.device, dtype=torch.int64) + scoring.query_offset
                seen = min(scoring.query_offset + stop, scoring.kv_len) if scoring.is_causal else scoring.kv_len
                scores = (query[entry, head, start:stop].to(wide) * scoring.scale) @ keys[:seen].T
                if scoring.is_causal:
                    first = scoring.query_offset + start
                    late = torch.arange(first, max(first, seen), device=query.device, dtype=torch.int64)
                    scores[:, first:].masked_fill_(late > position[:, None], -torch.inf)
                scores = torch.nn.functional.pad(scores, (0, -seen % size), value=-torch.inf)
                blocks = torch.unflatten(scores, 1, (-1, size)).logsumexp(-1)
                kept = chosen[entry, head, position // size - scoring.grid.first_row, : blocks.shape[1]]
                part = blocks.masked_fill(~kept, -torch.inf).logsumexp(-1)
                share[entry, head, start:stop] = (part - blocks.logsumexp(-1)).exp_()
    return share


def _visible_pairs(scoring: BlockScoring) -> Tensor:
    """How many pairs of each block a query sees: `(query blocks, key blocks)` int64."""
    grid = scoring.grid
    low, high = grid.row_spans()
    spans = grid.column_spans()
    pairs = (high - low)[:, None] * spans
    if scoring.is_causal:
        distance = grid.row_numbers()[:, None] - torch.arange(scoring.columns, dtype=torch.int64, device="cpu")
        triangle = _triangle(high[:, None], spans) - _triangle(low[:, None], spans)
        pairs = torch.where(distance == 0, triangle, pairs).masked_fill_(distance < 0, 0)
    return pairs


def _triangle(rows: Tensor, columns: Tensor) -> Tensor:
    """How many pairs the first rows of a block see of the key block at the same positions."""
    most = rows.minimum(columns)
    return most * (most + 1) // 2 + (rows - most) * columns
