"""What a scorer of blocks is given and must return, and the scorer that is used unless another one is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from attrs import frozen
from torch import Tensor

from longspan.errors import ArgumentError
from longspan.numerics.tensors import wide_dtype
from longspan.patterns.blocks.grid import Grid

__all__ = ["BlockScoring", "Scorer", "mean_scores", "scores_by"]


@frozen(slots=False)
class BlockScoring:
    """The blocks that are scored: those of the whole sequence, or of one document where documents are packed.

    Query block `i` holds the queries at positions `(first_row + i) * block_size` on, as far as they exist; key block
    `j` the keys at positions `j * block_size` on.

    Args:
        block_size: tokens a block, each way.
        q_len: queries, at positions `query_offset` on.
        kv_len: keys, at positions 0 on.
        query_offset: position of the first query.
        is_causal: only keys at the query's position or before it.
        scale: factor on the scores of tokens.
    """

    block_size: int
    q_len: int
    kv_len: int
    query_offset: int
    is_causal: bool
    scale: float

    @cached_property
    def grid(self) -> Grid:
        """The grid that the blocks lie on."""
        return Grid(self.block_size, self.q_len, self.kv_len, self.query_offset)

    @cached_property
    def rows(self) -> int:
        """How many query blocks there are."""
        return self.grid.rows

    @cached_property
    def columns(self) -> int:
        """How many key blocks there are."""
        return self.grid.columns

    def represent(self, query: Tensor) -> Tensor:
        """One query for each query block: the mean of its queries, or, under causality, its first query.

        Under causality a mean would let a row of the block feel the queries after it; the first query comes before
        none of them.

        Args:
            query: `(batch, heads, q_len, head_dim)`.

        Returns:
            `(batch, heads, query blocks, head_dim)`, float32 (float64 for float64).
        """
        if self.is_causal:
            first = torch.arange(self.rows, device=query.device, dtype=torch.int64) * self.block_size
            first = (first - self.query_offset % self.block_size).clamp_(min=0)
            return query.index_select(2, first).to(wide_dtype(query.dtype))
        return _means(query, -self.query_offset % self.block_size, self.block_size)

    def pool(self, key: Tensor) -> Tensor:
        """The mean of each block's keys.

        Args:
            key: `(batch, kv_heads, kv_len, head_dim)`.

        Returns:
            `(batch, kv_heads, key blocks, head_dim)`, float32 (float64 for float64).
        """
        return _means(key, 0, self.block_size)

    def candidates(self, device: torch.device | None = None) -> Tensor:
        """Which blocks may be chosen: `(query blocks, key blocks)` bool; under causality none after the row's own."""
        every = torch.ones(self.rows, self.columns, dtype=torch.bool, device=device)
        return every.tril_(self.grid.first_row) if self.is_causal else every


Scorer = Callable[[Tensor, Tensor, BlockScoring], Tensor]
"""`scorer(query, key, scoring)` -> `(batch, heads, query blocks, key blocks)`, floating, on query's device."""


def mean_scores(query: Tensor, key: Tensor, scoring: BlockScoring) -> Tensor:
    """The scaled dot product of each query block's `represent` and each key block's mean."""
    rows, keys = scoring.represent(query), scoring.pool(key)
    batch, kv_heads = keys.shape[:2]
    grouped = rows.reshape(batch, kv_heads, -1, rows.shape[3])  # heads that share a key head, as further rows
    return ((grouped * scoring.scale) @ keys.mT).view(*rows.shape[:3], scoring.columns)


def scores_by(scorer: Scorer | None, query: Tensor, key: Tensor, scoring: BlockScoring) -> Tensor:
    """The scorer's scores, in float32 (float64 for float64 queries), checked where they decide anything.

    Raises:
        ArgumentError: no tensor, the wrong shape, dtype or device, a NaN or inf for a block that may be chosen.
    """
    scores = (scorer or mean_scores)(query, key, scoring)
    shape = (*query.shape[:2], scoring.rows, scoring.columns)
    want = f"a floating tensor of shape {shape} (batch, heads, query blocks, key blocks) on {query.device}"
    if not isinstance(scores, Tensor):
        raise ArgumentError("scorer", f"a result of type {type(scores).__name__}", want, "return the scores alone")
    if scores.shape != shape or not scores.is_floating_point() or scores.device != query.device:
        got = f"scores of shape {tuple(scores.shape)}, {scores.dtype}, on {scores.device}"
        raise ArgumentError("scorer", got, want, "score every query block of every head against every key block")
    scores = scores.to(wide_dtype(query.dtype))
    bad = scoring.candidates(query.device).logical_and(scores.detach().isfinite().logical_not_())
    if bool(bad.any()):
        entry, head, row, column = bad.nonzero()[0].tolist()
        got = f"{float(scores[entry, head, row, column])} for batch entry {entry}, head {head}, block ({row}, {column})"
        fix = "fix the scorer" if scorer else "look for NaN and inf in query and key: means are scored"
        raise ArgumentError("scorer", got, "finite scores for all blocks that may be chosen", fix)
    return scores


def _means(tensor: Tensor, lead: int, size: int) -> Tensor:
    """Means of `(batch, heads, n, width)` over blocks of `size` tokens, of which the first is cut to `lead` if any."""
    wide = wide_dtype(tensor.dtype)
    lead = min(lead, tensor.shape[2])
    whole = (tensor.shape[2] - lead) // size
    stop = lead + whole * size
    parts = [tensor[:, :, :lead].mean(2, keepdim=True, dtype=wide)] if lead else []
    parts.append(torch.unflatten(tensor[:, :, lead:stop], 2, (whole, size)).mean(3, dtype=wide))
    if stop < tensor.shape[2]:
        parts.append(tensor[:, :, stop:].mean(2, keepdim=True, dtype=wide))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
