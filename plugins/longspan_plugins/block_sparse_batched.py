"""Attention as a fixed handful of batched products, whatever the number of blocks.

Blocks of one size are a batch: scores, softmax statistics and weighted sums are one launch each over all of them, at
most ten launches a forward. It holds the scores of a launch at once, so the core hands it launches of bounded size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from longspan import Capabilities, Kernel, Problem, Reason, blockwise, hookimpl

SCORES = 2**28
"""Query-key pairs that one launch may hold."""


@hookimpl
def longspan_capabilities() -> Capabilities:
    """Dense blocks on any device, with a backward of batched products too; by name."""
    return Capabilities(
        devices=("cpu", "cuda", "rocm", "mps", "xpu"),
        dtypes=("float16", "bfloat16", "float32", "float64"),
        patterns=("dense",),
        causal=True,
        gqa=True,
        backward=True,
        deterministic=True,
        opt_in=True,
    )


@hookimpl
def longspan_unsupported(problem: Problem) -> Iterable[Reason]:
    """A single block too large to hold."""
    pairs = problem.q_len * problem.kv_len
    if problem.pattern.kind == "dense" and pairs > SCORES:
        yield Reason("size", "q_len x kv_len", f"{pairs:,} scores a head", f"at most {SCORES:,}", "backend='sdpa'")


@hookimpl
def longspan_kernel(problem: Problem) -> Kernel:
    """Batched products over all blocks."""
    is_causal, scale = problem.is_causal, problem.scale
    wide = torch.float64 if problem.dtype == "float64" else torch.float32

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        shape = query.shape
        scores = _scores(query, key, wide, is_causal, scale)
        logs = scores.log_softmax(-1)
        lse = scores.amax(-1).sub_(logs.amax(-1))
        v = _blocks(value, wide)
        tainted = is_causal and not math.isfinite(v.sum())  # a masked weight of 0 times NaN is NaN
        out = torch.bmm(logs.exp_(), torch.where(v.isfinite(), v, 0.0) if tainted else v).view(shape)
        if tainted:
            out += blockwise.taint(value).repeat_interleave(shape[1] // value.shape[1], 1)
        return out.to(query.dtype), lse.view(shape[:3])

    def backward(
        dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        k, v = _blocks(key, wide), _blocks(value, wide)
        q, do, o = (_grouped(x, key, wide) for x in (query, dout, out))
        weights = _scores(query, key, wide, is_causal, scale)
        weights = weights.sub_(lse.reshape(*weights.shape[:2], 1).to(wide)).exp_()
        slope = (do @ v.mT).sub_((do * o).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
        dquery, dkey, dvalue = slope @ k, slope.mT @ q, weights.mT @ do
        return tuple(  # type: ignore[return-value]
            x.view(like.shape).to(like.dtype) for x, like in ((dquery, query), (dkey, key), (dvalue, value))
        )

    return Kernel(forward, backward, ("aten::baddbmm", "aten::bmm"))


def _blocks(tensor: Tensor, wide: torch.dtype) -> Tensor:
    """`(batch * heads, rows, head_dim)`."""
    return tensor.flatten(0, 1).to(wide)


def _grouped(tensor: Tensor, key: Tensor, wide: torch.dtype) -> Tensor:
    """Query rows that share a key head, one head after the other: as many blocks as `key` has."""
    return tensor.reshape(key.shape[0] * key.shape[1], -1, tensor.shape[-1]).to(wide)


def _scores(query: Tensor, key: Tensor, wide: torch.dtype, is_causal: bool, scale: float) -> Tensor:
    q, k = _grouped(query, key, wide), _blocks(key, wide)
    scores = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0.0, alpha=scale)
    if is_causal:
        scores.masked_fill_(_hidden(query.shape[2], q.shape[1], query.device), -torch.inf)
    return scores


@lru_cache(maxsize=16)
def _hidden(rows: int, grouped: int, device: torch.device) -> Tensor:
    """What causal rows may not see, once for each query head that shares a key head."""
    return torch.ones(rows, rows, dtype=torch.bool, device=device).triu_(1).repeat(grouped // rows, 1)
