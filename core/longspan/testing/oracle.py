"""The oracle: attention in float64, dense and obvious, by which every backend is judged.

For each head it counts how many times each query sees each key, by arithmetic on positions alone
(position, then segment, then offset in the segment), and takes the softmax over that multiset of keys.
It shares no code with the backends or with the lowering of patterns. It is slow and means to be.

Dilated attention is that of LongNet, arXiv 2307.02486, sections 2.2 and 2.3: mixing the branches by their
softmax denominators is one softmax over all their keys, in which a key seen by two branches counts twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

Integers = Sequence[int] | Tensor


def _branches(pattern: Any, heads: int, head: int) -> list[tuple[int, int, int]]:
    """The branches that one head runs, each as (segment length w, dilation rate r, offset s)."""
    pairs = list(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True))
    if pattern.heads == "all" and pattern.offset == "modulo":
        return [(w, r, head % r) for w, r in pairs]
    if pattern.heads == "all" and pattern.offset == "block":
        return [(w, r, head // math.ceil(heads / r)) for w, r in pairs]
    if pattern.heads == "grouped":
        if heads < len(pairs):
            raise ValueError(f"{len(pairs)} branches need as many heads or more, got {heads}: use heads='all'")
        size, remainder = divmod(heads, len(pairs))
        group_of_head = [i for i in range(len(pairs)) for _ in range(size + (i < remainder))]
        i = group_of_head[head]
        w, r = pairs[i]
        return [(w, r, i % r)]
    raise ValueError(
        f"heads={pattern.heads!r}, offset={pattern.offset!r} is no known choice: "
        "heads is 'all' or 'grouped', offset is 'modulo' or 'block'"
    )


def _times(pattern: Any, heads: int, head: int, query: Tensor, key: Tensor, lengths: Tensor) -> Tensor:
    """How many times the pattern shows key position (1, k) to query position (q, 1) in one head: (q, k), int64.

    ``lengths`` (q,): how many keys each query's document has, 0 for a query that is in none.
    """
    name = "Dense" if pattern is None else type(pattern).__name__
    counts = torch.zeros(query.shape[0], key.shape[1], dtype=torch.int64, device=key.device)
    if name == "Dense":
        counts += 1
    elif name == "SlidingWindow":
        counts += (key >= query - pattern.left) & (key <= query + pattern.right)
    elif name == "Dilated":
        for w, r, s in _branches(pattern, heads, head):
            same_segment = query // w == key // w
            counts += same_segment & (query % w % r == s) & (key % w % r == s)
    elif name == "BlockSparse":
        pattern.check(heads)
        for length in torch.unique(lengths[lengths > 0]).tolist():  # where blocks lie may depend on how many there are
            rows = lengths == length
            counts[rows] += pattern.allowed(query[rows], key, head, length)
    else:
        raise TypeError(f"the oracle does not know the pattern {name}: use Dense, Dilated, SlidingWindow, BlockSparse")
    return counts


def _locate(positions: Tensor, cu_seqlens: Integers | None) -> tuple[Tensor, Tensor]:
    """For each position in the packed sequence, its document (-1: in none) and its position in that document."""
    if cu_seqlens is None:
        return torch.zeros_like(positions), positions
    bounds = torch.as_tensor(cu_seqlens, dtype=torch.int64, device=positions.device)
    if bounds.ndim != 1 or len(bounds) == 0 or bool((bounds.diff() < 0).any()):
        raise ValueError("cu_seqlens must be one row of boundaries that never decrease, such as [0, 5, 12]")
    document = torch.searchsorted(bounds, positions, right=True) - 1  # the last boundary at or before the position
    inside = (document >= 0) & (document < len(bounds) - 1)
    start = bounds[document.clamp(min=0)]
    return torch.where(inside, document, -1), positions - start


class _Sight:
    """Who sees whom: built once for all heads, asked head by head so that memory stays at rows x kv_len."""

    def __init__(
        self,
        pattern: Any,
        heads: int,
        q_len: int,
        kv_len: int,
        is_causal: bool,
        cu_seqlens: Integers | None,
        query_offset: int | None,
        rows: Integers | None,
        device: torch.device | str | None,
    ) -> None:
        positional = is_causal or cu_seqlens is not None or type(pattern).__name__ not in ("NoneType", "Dense")
        if query_offset is None:
            if positional and q_len != kv_len:
                raise ValueError(
                    f"q_len is {q_len} and kv_len is {kv_len}: say where the queries are, query_offset=0 "
                    f"(they start where the keys start) or query_offset={kv_len - q_len} (they end where the keys end)"
                )
            query_offset = 0
        every_row = torch.arange(q_len, device=device, dtype=torch.int64)
        self.rows = every_row if rows is None else torch.as_tensor(rows, dtype=torch.int64, device=device)
        if self.rows.ndim != 1 or bool(((self.rows < 0) | (self.rows >= q_len)).any()):
            raise ValueError(f"rows must be one list of query indices from 0 to {q_len - 1}")
        q_document, q_position = _locate(query_offset + self.rows, cu_seqlens)
        k_document, k_position = _locate(torch.arange(kv_len, device=device, dtype=torch.int64), cu_seqlens)
        self.pattern, self.heads = pattern, heads
        self.query, self.key = q_position[:, None], k_position[None, :]
        self.allowed = (q_document[:, None] == k_document[None, :]) & (q_document[:, None] >= 0)
        self.lengths = self.allowed.sum(1)
        if is_causal:
            self.allowed &= self.key <= self.query

    def counts(self, head: int) -> Tensor:
        """The multiplicity of each key for each query in one head: (rows, kv_len), int64."""
        return _times(self.pattern, self.heads, head, self.query, self.key, self.lengths) * self.allowed


def visible(
    pattern: Any,
    heads: int,
    q_len: int,
    kv_len: int,
    *,
    is_causal: bool = False,
    cu_seqlens: Integers | None = None,
    query_offset: int | None = None,
    rows: Integers | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """How many times each query sees each key: int64, (heads, q_len, kv_len), or (heads, len(rows), kv_len).

    0 means not visible; 2 means that two branches of a ``Dilated(heads="all")`` show the key, which then
    weighs twice in the softmax. The arguments mean what they mean in :func:`oracle`, and raise what they
    raise there.
    """
    sight = _Sight(pattern, heads, q_len, kv_len, is_causal, cu_seqlens, query_offset, rows, device)
    return torch.stack([sight.counts(head) for head in range(heads)])


def _softmax(scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over a multiset: weights (batch, rows, kv_len) and natural-log lse (batch, rows).

    A row without a key gets weights 0 and lse -inf. Every value that such a row replaces is replaced before
    it is used, so autograd meets no inf - inf and no 0 / 0, and the gradient is exactly 0.
    """
    empty = (counts == 0).all(-1)
    scores = scores.masked_fill(counts == 0, -math.inf)
    top = scores.detach().amax(-1) if scores.shape[-1] else scores.new_zeros(scores.shape[:-1])
    top = top.masked_fill(empty, 0.0)  # a constant: shifting all the scores of a row changes no result
    terms = counts * torch.exp(scores - top[..., None])
    total = terms.sum(-1).masked_fill(empty, 1.0)
    return terms / total[..., None], (top + torch.log(total)).masked_fill(empty, -math.inf)


def _weighted_sum(weights: Tensor, value: Tensor, counts: Tensor) -> Tensor:
    """``weights @ value``, in which an inf or NaN value reaches exactly the rows that see its key (0 * NaN is NaN)."""
    finite = value.isfinite()
    out = weights @ value.masked_fill(~finite, 0.0)
    if not finite.all():
        seen = (counts > 0).to(value.dtype)
        for bad, where in ((math.inf, value == math.inf), (-math.inf, value == -math.inf), (math.nan, value.isnan())):
            out = torch.where(seen @ where.to(value.dtype) > 0, out + bad, out)
    return out


@overload
def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Any = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    cu_seqlens: Integers | None = None,
    query_offset: int | None = None,
    return_lse: Literal[False] = False,
    rows: Integers | None = None,
) -> Tensor: ...


@overload
def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Any = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    cu_seqlens: Integers | None = None,
    query_offset: int | None = None,
    return_lse: Literal[True],
    rows: Integers | None = None,
) -> tuple[Tensor, Tensor]: ...


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Any = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    cu_seqlens: Integers | None = None,
    query_offset: int | None = None,
    return_lse: bool = False,
    rows: Integers | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What ``longspan.attention`` must return: float64, dense, differentiable by ordinary autograd.

    Args:
        query: (batch, heads, q_len, head_dim), any floating dtype, any strides.
        key: (batch, kv_heads, kv_len, head_dim).
        value: (batch, kv_heads, kv_len, value_dim), on the same device; value_dim is head_dim as a rule.
        pattern: a ``Dense`` (the same as None), ``Dilated`` (LongNet, arXiv 2307.02486) or ``SlidingWindow``,
            known by its class's name and read by its public attributes; or a ``BlockSparse``, asked by its plain
            predicate ``allowed(query, key, head, kv_len)``.
        is_causal: a query sees only keys at its own position or before it.
        scale: what the scores are multiplied by; 1 / sqrt(head_dim) if None.
        dropout_p: must be 0.0.
        enable_gqa: allow fewer kv_heads than heads; head h then reads kv head h // (heads // kv_heads).
        cu_seqlens: the boundaries of the packed documents, such as [0, 5, 12], the same for every batch entry.
            Positions count from each document's start, a query sees keys of its own document alone, and a
            token before the first or after the last boundary sees nothing.
        query_offset: the position of the first query; the keys are at 0 to kv_len - 1. Needed when q_len and
            kv_len differ and anything depends on position.
        return_lse: also return the log-sum-exp of the scaled scores.
        rows: query indices, 0 to q_len - 1. Only these rows are computed, in this order; nothing larger than
            batch x len(rows) x kv_len is made, so a few rows of a very long sequence are cheap to check.

    Returns:
        out, float64, (batch, heads, q_len, value_dim), or len(rows) in place of q_len. With ``return_lse``
        also lse, float64, (batch, heads, q_len) or (batch, heads, len(rows)), natural log. A row that sees no
        key has out 0, lse -inf and gradient 0. An inf or NaN in the inputs reaches the forward result of
        exactly those rows that may see it.

    Raises:
        ValueError: dropout, shapes that do not belong together, fewer kv_heads without ``enable_gqa``, a
            missing ``query_offset``, boundaries that decrease, a row out of range, more branches than heads
            in a grouped pattern.
        TypeError: a pattern that the oracle does not know.
    """
    if dropout_p != 0.0:
        raise ValueError(f"the oracle has no dropout, got dropout_p={dropout_p}: pass dropout_p=0.0")
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError("query, key and value must have four dimensions: (batch, heads, seq, head_dim)")
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    if key.shape != (batch, kv_heads, kv_len, head_dim) or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not belong "
            "together: batch and head_dim must agree, and value must have key's heads and length"
        )
    if kv_heads != heads and not enable_gqa:
        raise ValueError(f"{heads} query heads and {kv_heads} key heads: pass enable_gqa=True if that is meant")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"{kv_heads} key heads do not divide {heads} query heads: choose a divisor")
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    sight = _Sight(pattern, heads, q_len, kv_len, is_causal, cu_seqlens, query_offset, rows, query.device)
    outs, lses = [], []
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        q = query[:, head].index_select(1, sight.rows).to(torch.float64)
        k = key[:, kv_head].to(torch.float64)
        v = value[:, kv_head].to(torch.float64)
        counts = sight.counts(head)
        weights, lse = _softmax(scale * (q @ k.transpose(-2, -1)), counts)
        outs.append(_weighted_sum(weights, v, counts))
        lses.append(lse)
    out = torch.stack(outs, dim=1)
    return (out, torch.stack(lses, dim=1)) if return_lse else out
