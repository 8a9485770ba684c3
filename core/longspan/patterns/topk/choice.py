"""The choice of the best key blocks, as masks and as CSR layouts, and how much of the softmax mass it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from attrs import frozen
from torch import Tensor

from longspan.numerics.tensors import counting, wide_dtype
from longspan.patterns.blocks.csr import BlockCSR
from longspan.patterns.blocks.grid import on_cpu
from longspan.patterns.blocks.masks import FULL, MaskTable
from longspan.patterns.topk.scoring import BlockScoring, Scorer, scores_by
from longspan.spec.problem import Problem

__all__ = ["BlockChoice", "Part", "best", "choose", "estimated_mass", "layouts_of", "measured_mass", "states_of"]


def best(scores: Tensor, scoring: BlockScoring, k: int) -> Tensor:
    """The `k` best candidates of each row, or all of them where there are fewer; of equal scores the first.

    Under causality the row's own block is always among them.

    Args:
        scores: `(batch, heads, query blocks, key blocks)`, finite for candidates.
        scoring: the blocks.
        k: how many.

    Returns:
        The same shape, bool.
    """
    candidates = scoring.candidates(scores.device)
    scores = scores.masked_fill(~candidates, -torch.inf)
    if scoring.is_causal:
        row = torch.arange(scoring.rows, device=scores.device, dtype=torch.int64)
        own = row + scoring.grid.first_row
        there = own < scoring.columns  # queries may lie beyond the last key
        scores[:, :, row[there], own[there]] = torch.inf
    least = scores.topk(k, dim=-1).values[..., -1:]
    chosen = (scores >= least) & candidates
    if bool((chosen.sum(-1) > k).any()):  # which of equal scores are among the best may not be left to chance
        above = chosen & (scores > least)
        equal = chosen & (scores == least)
        chosen = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    return chosen


def choose(
    k: int, scorer: Scorer | None, scorings: Sequence[tuple[int, BlockScoring]], query: Tensor, key: Tensor
) -> tuple[Part, ...]:
    """The choice for each document; its scores have a gradient where one is being recorded."""
    parts = []
    for start, scoring in scorings:
        queries, keys = query, key
        if scoring.q_len != query.shape[2]:
            queries, keys = query[:, :, start : start + scoring.q_len], key[:, :, start : start + scoring.kv_len]
        scores = scores_by(scorer, queries, keys, scoring)
        with torch.no_grad():
            chosen = best(scores.detach(), scoring, min(k, scoring.columns))
        parts.append(Part(start, scoring, scores, chosen))
    return tuple(parts)


@on_cpu
def layouts_of(chosen: Tensor, scoring: BlockScoring) -> tuple[BlockCSR, ...]:
    """The layouts of every head of every batch entry, entry by entry; causal where the scoring is.

    Args:
        chosen: `(batch, heads, query blocks, key blocks)` bool.
        scoring: the blocks.
    """
    grid = scoring.grid
    with torch.inference_mode(False), torch.no_grad():  # they outlive the mode that a call happens to be made in
        flat = chosen.flatten(0, 1).flatten(1)
        line, keys = flat.nonzero(as_tuple=True)
        counts, keys = torch.bincount(line, minlength=len(flat)).tolist(), keys.cpu()
        table = MaskTable(grid.block_size)
        parts = zip(torch.split(keys, counts), torch.split(states_of(keys, scoring, table), counts), strict=True)
        return tuple(BlockCSR.of(grid, mine, state, table) for mine, state in parts)


def states_of(keys: Tensor, scoring: BlockScoring, table: MaskTable) -> Tensor:
    """The states of chosen blocks, given by their keys: full, but for those on the diagonal where it is causal."""
    if not scoring.is_causal:
        return torch.full_like(keys, FULL)
    grid = scoring.grid
    triangle = torch.ones(1, grid.block_size, grid.block_size, dtype=torch.bool, device="cpu").tril_()
    own = keys // grid.columns + grid.first_row == keys % grid.columns
    return torch.where(own, table.add(triangle), FULL)


@frozen(slots=False, eq=False, repr=False)
class Part:
    """The choice for one document, whose first token has the index `start`."""

    start: int
    scoring: BlockScoring
    scores: Tensor
    chosen: Tensor

    @cached_property
    def layouts(self) -> tuple[BlockCSR, ...]:
        """The layouts of every head of every batch entry, entry by entry."""
        return layouts_of(self.chosen, self.scoring)

    def dense(self) -> Tensor:
        """`(batch, heads, q_len, kv_len)` bool."""
        scoring = self.scoring
        position = torch.arange(scoring.q_len, device=self.chosen.device, dtype=torch.int64) + scoring.query_offset
        column = torch.arange(scoring.kv_len, device=self.chosen.device, dtype=torch.int64)
        row = position // scoring.block_size - scoring.grid.first_row
        kept = self.chosen[:, :, row][..., column // scoring.block_size]
        return kept & (column <= position[:, None]) if scoring.is_causal else kept

    def rounds(self) -> tuple[Tensor, Tensor]:
        """The chosen blocks one by one: columns `(batch, heads, query blocks, most)`, and which of them are there."""
        counts = self.chosen.sum(-1, keepdim=True)
        most = int(counts.max()) if self.chosen.numel() else 0
        columns = self.chosen.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :most]
        return columns, torch.arange(most, device=columns.device, dtype=torch.int64) < counts


@frozen(eq=False, repr=False)
class BlockChoice:
    """Which key blocks a `TopKBlocks` pattern keeps for given queries and keys; `TopKBlocks.choose` makes it.

    Args:
        problem: what is to be computed.
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        parts: the choice for each document (for the whole sequence where none are packed).
    """

    problem: Problem
    query: Tensor
    key: Tensor
    parts: tuple[Part, ...]

    def csr(self, entry: int, head: int, document: int = 0) -> BlockCSR:
        """The layout of one head of one batch entry, causal where the problem is."""
        return self.parts[document].layouts[entry * self.problem.heads + head]

    def to_dense(self) -> Tensor:
        """`(batch, heads, q_len, kv_len)` bool, True where a query sees a key. For oracles and small lengths."""
        kept = torch.zeros(*self.query.shape[:3], self.key.shape[2], dtype=torch.bool, device=self.query.device)
        for part in self.parts:
            queries = slice(part.start, part.start + part.scoring.q_len)
            keys = slice(part.start, part.start + part.scoring.kv_len)
            kept[:, :, queries, keys] = part.dense()
        return kept

    def mass(self, *, exact: bool = False) -> Tensor:
        """The share of dense attention's softmax mass that the chosen blocks keep: its mean over queries.

        Args:
            exact: False takes the block scores for the logarithm of a block's mean `exp` of token scores, which costs
                nothing. It leans upwards, since the scores that it adds up are those that the choice preferred, and
                says little of a scorer that was not made to mean that. True computes `exp(lse_kept -
                lse_dense)` for every query: all products of queries and keys, in memory that grows with the length.

        Returns:
            `(batch, heads)` from 0 to 1, float32 (float64 for float64). Queries outside all documents do not count.
        """

        def share(part: Part) -> Tensor:
            if not exact:
                return estimated_mass(part.scores, part.chosen, part.scoring)
            at = slice(part.start, part.start + part.scoring.q_len)
            there = slice(part.start, part.start + part.scoring.kv_len)
            query, key = self.query[:, :, at], self.key[:, :, there]
            return measured_mass(query, key, part.chosen, part.scoring).mean(-1)

        return self._mean(share)

    def _mean(self, share: Callable[[Part], Tensor]) -> Tensor:
        tokens = sum(part.scoring.q_len for part in self.parts)
        if not tokens:
            return torch.ones(self.query.shape[:2], device=self.query.device, dtype=wide_dtype(self.query.dtype))
        with torch.no_grad():
            return torch.stack([share(part) * (part.scoring.q_len / tokens) for part in self.parts]).sum(0)

    def __repr__(self) -> str:
        kept = sum(int(part.chosen.sum()) for part in self.parts)
        every = sum(part.chosen.numel() for part in self.parts)
        return (
            f"<BlockChoice {self.problem.pattern.spec}: {kept:,} of {every:,} blocks over {self.problem.batch} batch "
            f"entries and {self.problem.heads} heads>"
        )


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
    low, high = (span.to(scores.device) for span in scoring.grid.row_spans())
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
        distance = grid.row_numbers()[:, None] - counting(scoring.columns)
        triangle = _triangle(high[:, None], spans) - _triangle(low[:, None], spans)
        pairs = torch.where(distance == 0, triangle, pairs).masked_fill_(distance < 0, 0)
    return pairs


def _triangle(rows: Tensor, columns: Tensor) -> Tensor:
    """How many pairs the first rows of a block see of the key block at the same positions."""
    most = rows.minimum(columns)
    return most * (most + 1) // 2 + (rows - most) * columns
