"""Attention as a fixed handful of batched products, whatever the number of blocks.

Blocks of one size are a batch: scores, softmax statistics and weighted sums are one launch each over all of them, at
most ten launches a forward in single precision (half precision adds its casts, queries without keys two). It holds all
scores at once. Patterns whose blocks are ragged or too many come from the core as dense launches of bounded size; rows
of very unequal numbers of blocks are batches of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from longspan.plugin import BlockLayout, Capabilities, Kernel, Problem, Reason, Workspace, hookimpl, nonfinite

SCORES = 2**28
"""Query-key pairs that one launch may hold."""


@hookimpl
def longspan_capabilities() -> Capabilities:
    """Dense blocks and block-sparse patterns on any device, with a backward of batched products too; by name."""
    return Capabilities(
        devices=("cpu", "cuda", "rocm", "mps", "xpu"),
        dtypes=("float16", "bfloat16", "float32", "float64"),
        patterns=("dense", "block_sparse"),
        causal=True,
        backward=True,
        deterministic=True,
        contains_nonfinite=("cpu",),
        opt_in=True,
    )


@hookimpl
def longspan_unsupported(problem: Problem) -> Iterable[Reason]:
    """A single block too large to hold."""
    pairs = problem.q_len * problem.kv_len
    if problem.pattern.kind == "dense" and pairs > SCORES:
        yield Reason("size", "q_len x kv_len", f"{pairs:,} scores a head", f"at most {SCORES:,}", "backend='sdpa'")


@hookimpl
def longspan_kernel(problem: Problem, layout: Any, buffers: Workspace) -> Kernel | None:
    """Batched products over all blocks; None for ragged ones, or more than can be held at once: they are lowered."""
    if isinstance(layout, BlockLayout):
        from longspan_plugins.block_sparse_batched.blocks import block_kernel

        def for_blocks(other: BlockLayout) -> Kernel | None:
            return block_kernel(problem, other, buffers.anew(), SCORES)

        kernel = block_kernel(problem, layout, buffers, SCORES)
        return kernel and evolve(kernel, for_blocks=for_blocks)
    return _dense_kernel(problem)


def _dense_kernel(problem: Problem) -> Kernel:
    from longspan_plugins.block_sparse_batched.blocks import gradients

    is_causal, scale = problem.is_causal, problem.scale
    wide = torch.float64 if problem.dtype == "float64" else torch.float32

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = _flattened(wide, query, key, value)
        scores = _scores(q, k, is_causal, scale)
        weights = scores.softmax(-1)
        lse = scores.amax(-1).sub_(weights.amax(-1).log_())
        tainted = is_causal and not math.isfinite(v.sum())  # a masked weight of 0 times NaN is NaN
        out = torch.bmm(weights, nonfinite.without(v, ~v.isfinite()) if tainted else v).view(query.shape)
        if tainted:
            out = nonfinite.add_taint(out, value)
        return out.to(query.dtype), lse.view(query.shape[:3])

    def run(
        dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, do, o = _flattened(wide, query, dout, out)
        k, v = _flattened(wide, key, value)
        weights = _scores(q, k, is_causal, scale).sub_(lse.reshape(*q.shape[:2], 1).to(wide)).exp_()
        both = zip(gradients(weights, do, q, k, v, o, scale), (query, key, value), strict=True)
        dquery, dkey, dvalue = (grad.view(like.shape).to(like.dtype) for grad, like in both)
        return dquery, dkey, dvalue

    def backward(
        dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = run(dout, query, key, value, out, lse)
        if not is_causal or nonfinite.is_finite(*grads):  # else hidden weights of 0 were multiplied with NaN
            return grads
        return nonfinite.backward(run, dout, query, key, value, out, lse, scale=scale, mask=None)

    return Kernel(forward, backward, ("aten::baddbmm", "aten::bmm"))


def _flattened(wide: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Tensors as `(batch * heads, rows, head_dim)`: views where they can be, else copied by a launch for all."""
    if all(x.stride(0) == x.shape[1] * x.stride(1) for x in tensors) or len({x.shape for x in tensors}) > 1:
        return [x.flatten(0, 1).to(wide) for x in tensors]
    return [x.flatten(0, 1) for x in torch.stack(tensors).to(wide).unbind()]


def _scores(q: Tensor, k: Tensor, is_causal: bool, scale: float) -> Tensor:
    scores = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0.0, alpha=scale)
    return scores.masked_fill_(_hidden(q.shape[1], q.device), -torch.inf) if is_causal else scores


@lru_cache(maxsize=16)
def _hidden(rows: int, device: torch.device) -> Tensor:
    """What causal rows may not see."""
    return torch.ones(rows, rows, dtype=torch.bool, device=device).triu_(1)
