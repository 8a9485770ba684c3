"""torch's own attention operators: those below `scaled_dot_product_attention` that also return the log-sum-exp.

On a CPU the aten flash operator, on CUDA the aten flash and memory-efficient ones; where those refuse, the core's
blockwise arithmetic. Called by name, so that what runs is what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longspan.plugin import Capabilities, Kernel, Problem, Reason, blockwise, hookimpl
from longspan_plugins.sdpa import cpu, cuda


@hookimpl
def longspan_capabilities() -> Capabilities:
    """Dense attention on any device that torch runs on."""
    return Capabilities(
        devices=("cpu", "cuda", "rocm", "mps", "xpu"),
        dtypes=("float16", "bfloat16", "float32", "float64"),
        patterns=("dense",),
        causal=True,
        mask=True,
        gqa=True,
        dropout=True,
        backward=True,
        deterministic=True,
        contains_nonfinite=("cpu",),
        tier=10,
    )


@hookimpl
def longspan_unsupported(problem: Problem) -> Iterable[Reason]:
    """bfloat16 is for devices that have it."""
    if problem.dtype == "bfloat16" and problem.device.type == "cuda" and not problem.device.matches("cuda>=8.0"):
        yield Reason("dtype", "dtype", "bfloat16", "float16 or float32 before sm_80", "query.half()")


@hookimpl
def longspan_kernel(problem: Problem) -> Kernel:
    """The operator that takes this problem.

    Dropout by position is beyond all of them, and so is a scale that is not positive: they mask with -inf before they
    multiply.
    """
    given: dict[str, Any] = {"is_causal": problem.is_causal, "scale": problem.scale}
    forward, backward, operator = _operators(problem)
    if forward is not cpu.forward:  # which takes masks itself
        forward, backward = _masking(forward, blockwise.forward), _masking(backward, blockwise.backward)
    return Kernel(partial(forward, **given), partial(backward, **given), (operator,), f"torch {torch.__version__}")


def _masking(run: Callable[..., Any], blocked: Callable[..., Any]) -> Callable[..., Any]:
    """An operator that takes no mask; with one the core's arithmetic runs."""

    def running(*tensors: Tensor, mask: Tensor | None = None, **given: Any) -> Any:
        return run(*tensors, **given) if mask is None else blocked(*tensors, mask=mask == 0, **given)

    return running


def _operators(problem: Problem) -> tuple[Callable[..., Any], Callable[..., Any], str]:
    device = problem.device.type
    if not problem.dropout_p and problem.scale > 0:
        if device == "cpu":
            return cpu.forward, cpu.backward, "aten::_scaled_dot_product_flash_attention_for_cpu"
        if device in ("cuda", "rocm") and _takes_flash(problem):
            return cuda.flash_forward, cuda.flash_backward, "aten::_scaled_dot_product_flash_attention"
        if device in ("cuda", "rocm") and problem.dtype != "float64" and problem.head_dim % 8 == 0:
            return cuda.efficient_forward, cuda.efficient_backward, "aten::_scaled_dot_product_efficient_attention"
    return blockwise.forward, blockwise.backward, "aten::amax"


def _takes_flash(problem: Problem) -> bool:
    recent = problem.device.type == "rocm" or problem.device.matches("cuda>=8.0")
    return recent and problem.dtype in ("float16", "bfloat16") and problem.head_dim % 8 == 0 and problem.head_dim <= 256
