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
from longspan_plugins.sdpa import cpu, cuda, tiles

PLAIN = "aten::amax"
"""What the profiler sees of the core's blockwise arithmetic."""


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
    """The operator that takes this problem; in float16 on a CPU it computes in float32, which is faster there."""
    half_is_slow = problem.device.type == "cpu" and problem.dtype == "float16"
    return widened(problem) if half_is_slow else _kernel(problem, *_operators(problem))


def widened(problem: Problem) -> Kernel:
    """Half precision stored, single precision computed, a tile at a time: for devices where half arithmetic is slow.

    Args:
        problem: a dense one, float16 or bfloat16, without dropout where the device is none of a CPU's.
    """
    forward, backward, operator = _operators(problem.replace(dtype="float32"))
    if operator != PLAIN:  # which widens its blocks itself
        forward, backward = partial(tiles.forward, forward), partial(tiles.backward, backward)
    return _kernel(problem, forward, backward, operator)


def _kernel(problem: Problem, forward: Callable[..., Any], backward: Callable[..., Any], operator: str) -> Kernel:
    given: dict[str, Any] = {"is_causal": problem.is_causal, "scale": problem.scale}
    return Kernel(partial(forward, **given), partial(backward, **given), (operator,), f"torch {torch.__version__}")


def _operators(problem: Problem) -> tuple[Callable[..., Any], Callable[..., Any], str]:
    """What takes this problem, forward and backward, with a mask or without, and the name that the profiler sees.

    Dropout by position is beyond all of torch's, and so is a scale that is not positive: they mask with -inf before
    they multiply.
    """
    device = problem.device.type
    forward: Callable[..., Any] = blockwise.forward
    backward: Callable[..., Any] = blockwise.backward
    operator = PLAIN
    if not problem.dropout_p and problem.scale > 0:
        if device == "cpu":
            return cpu.forward, cpu.backward, "aten::_scaled_dot_product_flash_attention_for_cpu"
        if device in ("cuda", "rocm") and _takes_flash(problem):
            operator = "aten::_scaled_dot_product_flash_attention"
            forward, backward = cuda.flash_forward, cuda.flash_backward
        elif device in ("cuda", "rocm") and problem.dtype != "float64" and problem.head_dim % 8 == 0:
            operator = "aten::_scaled_dot_product_efficient_attention"
            forward, backward = cuda.efficient_forward, cuda.efficient_backward
    return _masking(forward, blockwise.forward), _masking(backward, blockwise.backward), operator


def _masking(run: Callable[..., Any], blocked: Callable[..., Any]) -> Callable[..., Any]:
    """An operator that takes no mask; with one the core's arithmetic runs."""

    def running(*tensors: Tensor, mask: Tensor | None = None, **given: Any) -> Any:
        return run(*tensors, **given) if mask is None else blocked(*tensors, mask=mask == 0, **given)

    return running


def _takes_flash(problem: Problem) -> bool:
    recent = problem.device.type == "rocm" or problem.device.matches("cuda>=8.0")
    return recent and problem.dtype in ("float16", "bfloat16") and problem.head_dim % 8 == 0 and problem.head_dim <= 256
