"""torch's own attention operators: those below `scaled_dot_product_attention` that also return the log-sum-exp.

On a CPU the aten flash operator, on CUDA the aten flash and memory-efficient ones; where those refuse, the core's
blockwise arithmetic. Called by name, so that what runs is what was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longspan import Capabilities, Kernel, Problem, Reason, blockwise, hookimpl
from longspan_plugins.flash import aten as aten_flash

aten: Any = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


@hookimpl
def longspan_capabilities() -> Capabilities:
    """Dense attention on any device that torch runs on."""
    return Capabilities(
        devices=("cpu", "cuda", "rocm", "mps", "xpu"),
        dtypes=("float16", "bfloat16", "float32", "float64"),
        patterns=("dense",),
        causal=True,
        gqa=True,
        dropout=True,
        backward=True,
        deterministic=True,
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
    return Kernel(partial(forward, **given), partial(backward, **given), (operator,), f"torch {torch.__version__}")


def _operators(problem: Problem) -> tuple[Callable[..., Any], Callable[..., Any], str]:
    device = problem.device.type
    if not problem.dropout_p and problem.scale > 0:
        if device == "cpu":
            return _cpu_forward, _cpu_backward, "aten::_scaled_dot_product_flash_attention_for_cpu"
        if device in ("cuda", "rocm") and _takes_flash(problem):
            return aten_flash.forward, aten_flash.backward, "aten::_scaled_dot_product_flash_attention"
        if device in ("cuda", "rocm") and problem.dtype != "float64" and problem.head_dim % 8 == 0:
            return _efficient_forward, _efficient_backward, "aten::_scaled_dot_product_efficient_attention"
    return blockwise.forward, blockwise.backward, "aten::amax"


def _takes_flash(problem: Problem) -> bool:
    recent = problem.device.type == "rocm" or problem.device.matches("cuda>=8.0")
    return recent and problem.dtype in ("float16", "bfloat16") and problem.head_dim % 8 == 0 and problem.head_dim <= 256


# ------------------------------------------------------------------------------------------------------------- cpu

_cpu_flash = aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_flash_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _cpu_flash(query, key, value, 0.0, is_causal, scale=scale)
    group = query.shape[1] // key.shape[1]
    if is_causal and not _finite(out):  # the operator multiplies masked weights, and 0 times NaN is NaN
        out, lse = _cpu_flash(query, key, torch.where(value.isfinite(), value, 0.0), 0.0, True, scale=scale)
        out = out + blockwise.taint(value).repeat_interleave(group, 1)
    if not lse.all() and not (_finite(query) and _finite(key)):  # it makes rows whose scores are all NaN zero
        bad = (~key.isfinite()).any(-1).repeat_interleave(group, 1)
        seen = bad.cummax(-1).values if is_causal else bad.any(-1, keepdim=True)
        zeroed = (lse == 0) & ((~query.isfinite()).any(-1) | seen)
        out, lse = out.masked_fill(zeroed.unsqueeze(-1), math.nan), lse.masked_fill(zeroed, math.nan)
    return out, lse


def _cpu_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
) -> Gradients:
    result: Gradients = _cpu_flash_backward(dout, query, key, value, out, lse, 0.0, is_causal, scale=scale)
    if is_causal and not all(map(_finite, result)):
        return blockwise.backward(dout, query, key, value, out, lse, is_causal=True, scale=scale)
    return result


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite: mostly by their sum alone, which reads the tensor once and writes nothing.

    Not in another dtype: torch would sum a copy. A sum that overflows only costs the second look.
    """
    return math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


# ------------------------------------------------------------------------------------------------------------ cuda


def _efficient_forward(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    key, value = _repeated(query, key), _repeated(query, value)
    result = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, is_causal, scale=scale)
    return result[0], result[1][..., : query.shape[2]]  # the operator pads its rows to a multiple of 32


def _efficient_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
) -> Gradients:
    rows = query.shape[2]
    padded = lse.new_full((*lse.shape[:2], -(-rows // 32) * 32), torch.inf)
    padded[..., :rows] = lse
    state = torch.zeros((), dtype=torch.int64)  # of the dropout generator; unread without dropout
    kv_heads = key.shape[1]
    key, value = _repeated(query, key), _repeated(query, value)
    dquery, dkey, dvalue, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout,
        query,
        key,
        value,
        None,
        out,
        padded,
        state,
        state,
        0.0,
        [True, True, True, False],
        is_causal,
        scale=scale,
    )
    return dquery, *(x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dkey, dvalue))


def _repeated(query: Tensor, tensor: Tensor) -> Tensor:
    """Key heads as many as query heads, as the memory-efficient operator wants them."""
    return (
        tensor if tensor.shape[1] == query.shape[1] else tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1)
    )
