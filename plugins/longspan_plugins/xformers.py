"""xformers' memory-efficient attention, with its log-sum-exp; what it refuses, it refuses in its own words."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from longspan.plugin import Capabilities, Kernel, Problem, Reason, hookimpl, install_line

SEEN = 128
"""Length at which a problem is shown to xformers when it is asked what it refuses: no answer depends on it."""


@hookimpl
def longspan_capabilities() -> Capabilities:
    """Dense attention on CUDA; the core's backward, as xformers' own wants its own packing of the log-sum-exp."""
    return Capabilities(
        devices=("cuda>=5.0", "rocm"),
        dtypes=("float16", "bfloat16", "float32"),
        patterns=("dense",),
        causal=True,
        head_dim_max=512,
        tier=20,
    )


@hookimpl
def longspan_unsupported(problem: Problem) -> Iterable[Reason]:
    """Whether the package is there, and each operator's own reasons if all refuse."""
    try:
        version("xformers")
    except PackageNotFoundError:
        fix = install_line("xformers>=0.0.30")
        yield Reason("package", "xformers", "not installed", "the package xformers", fix)
        return
    if problem.dtype == "bfloat16" and problem.device.type == "cuda" and not problem.device.matches("cuda>=8.0"):
        yield Reason("dtype", "dtype", "bfloat16", "float16 or float32 before sm_80", "query.half()")
    if problem.scale <= 0:
        yield Reason("scale", "scale", str(problem.scale), "a positive number", "scale the query instead")
    yield from _their_reasons(problem)


def _their_reasons(problem: Problem) -> list[Reason]:
    """What xformers' operators hold against the problem, if all of them hold something; read from their declarations.

    xformers asks the current device for its capability, and here the device may be one that this machine lacks.
    """
    from xformers.ops import fmha

    refusals = []
    for operator in (fmha.flash.FwOp, fmha.cutlass.FwOp):
        reasons = list(operator.shape_not_supported_reasons(SEEN, SEEN, problem.head_dim, problem.head_dim))
        if getattr(torch, problem.dtype) not in operator.SUPPORTED_DTYPES:
            reasons.append(f"dtype={problem.dtype} (supported: {operator.SUPPORTED_DTYPES})")
        capability, least = problem.device.capability, operator.CUDA_MINIMUM_COMPUTE_CAPABILITY
        if capability is not None and capability < least:
            reasons.append(f"requires device with capability >= {least} but yours has {capability} (too old)")
        if torch.version.cuda is not None and not operator.is_available():
            reasons.append("operator wasn't built - see `python -m xformers.info` for more info")
        if not reasons:
            return []
        refusals += [Reason("xformers", operator.NAME, reason, "what xformers supports") for reason in reasons]
    return refusals


@hookimpl
def longspan_kernel(problem: Problem) -> Kernel:
    """`memory_efficient_attention_forward_requires_grad`: the form that also returns the log-sum-exp."""
    from xformers.ops import fmha

    bias: Any = fmha.attn_bias.LowerTriangularMask() if problem.is_causal else None

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, bias, scale=problem.scale)
        return out.transpose(1, 2), lse[..., : query.shape[2]].to(torch.float32)

    return Kernel(forward)
