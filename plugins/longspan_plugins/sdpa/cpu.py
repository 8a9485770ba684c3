"""torch's flash operator for CPUs, and what it gets wrong: NaN and inf reach hidden rows, long columns are lossy.

It takes float16 too, which `sdpa` widens before, as CPUs compute it many times slower.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from longspan.plugin import nonfinite
from longspan_plugins.sdpa.tiles import Tiling
from longspan_plugins.sdpa.tiles import backward as by_tiles

__all__ = ["backward", "forward"]

aten: Any = torch.ops.aten
_flash = aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
Gradients = tuple[Tensor, Tensor, Tensor]
ROWS = {torch.bfloat16: 1024, torch.float32: 4096}
"""Most query rows, of all heads that share a key head, whose gradients of keys and values the operator adds up.

It keeps these sums in the inputs' dtype: after 65,536 rows in bfloat16 7% are lost, where naive torch loses 0.2%. And
it adds the rows of heads that share keys one after the other.
"""
KEYS = 16_384
"""Most keys whose parts of a bfloat16 query's gradient the operator adds up: in the inputs' dtype, too."""


def forward(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`; `mask` `(1, 1, q_len, kv_len)` of query's dtype, 0 or -inf."""
    if mask is not None:
        return _masked(query, key, value, scale, mask)
    query, key, value = map(_disjoint, (query, key, value))
    out, lse = _flash(query, key, value, 0.0, is_causal, scale=scale)
    group = query.shape[1] // key.shape[1]
    if is_causal and not nonfinite.is_finite(out):  # the operator multiplies masked weights, and 0 times NaN is NaN
        out, lse = _flash(query, key, nonfinite.without(value, ~value.isfinite()), 0.0, True, scale=scale)
        out = nonfinite.add_taint(out, value.repeat_interleave(group, 1))
    if not lse.all() and not (
        nonfinite.is_finite(query) and nonfinite.is_finite(key)
    ):  # it makes rows whose scores are all NaN zero
        bad = (~key.isfinite()).any(-1).repeat_interleave(group, 1)
        seen = bad.cummax(-1).values if is_causal else bad.any(-1, keepdim=True)
        zeroed = (lse == 0) & ((~query.isfinite()).any(-1) | seen)
        out, lse = out.masked_fill(zeroed.unsqueeze(-1), math.nan), lse.masked_fill(zeroed, math.nan)
    if query.dtype == torch.bfloat16 and not math.isfinite(lse.sum()):  # and in bfloat16 those with a score of inf
        overflown = lse == math.inf
        out, lse = out.masked_fill(overflown.unsqueeze(-1), math.nan), lse.masked_fill(overflown, math.nan)
    return out, lse


def backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> Gradients:
    """Gradients for the joint `(out, lse)`."""
    if mask is not None:
        return _masked_backward(dout, query, key, value, out, lse, scale, mask)
    dout, query, key, value, out = map(_disjoint, (dout, query, key, value, out))

    def run(*tensors: Tensor) -> Gradients:
        return _gradients(*tensors, is_causal=is_causal, scale=scale)

    result = run(dout, query, key, value, out, lse)
    if is_causal and not nonfinite.is_finite(*result):
        return nonfinite.backward(run, dout, query, key, value, out, lse, scale=scale, mask=None)
    return result


def _gradients(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> Gradients:
    """The operator's, by tiles of `ROWS` query rows and `KEYS` keys where there are more."""
    group, q_len, kv_len = query.shape[1] // max(1, key.shape[1]), query.shape[2], key.shape[2]
    adds_up_well = query.dtype == torch.float64 or (query.dtype == torch.float32 and group == 1)
    most = KEYS if query.dtype == torch.bfloat16 else max(1, kv_len)
    given: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "mask": mask}
    if adds_up_well or not kv_len or (q_len * group <= ROWS[query.dtype] and kv_len <= most):
        return _by_operator(dout, query, key, value, out, lse, **given)
    tiles = Tiling(len(query), max(1, ROWS[query.dtype] // group), most)
    return by_tiles(_by_operator, dout, query, key, value, out, lse, tiles=tiles, dtype=query.dtype, **given)


def _by_operator(*tensors: Tensor, is_causal: bool, scale: float, mask: Tensor | None) -> Gradients:
    result: Gradients = _flash_backward(*tensors, 0.0, is_causal, attn_mask=mask, scale=scale)
    return result


def _masked(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> tuple[Tensor, Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _flash(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        if not lse.all():  # it says 0 for rows that see no key
            lse = lse.masked_fill((lse == 0) & (mask == -math.inf).all(-1), -math.inf)
        return out, lse

    query, key, value = map(_aligned, (query, key, value))
    out, lse = run(query, key, value)
    if nonfinite.is_finite(out, query, key, value) and not bool(lse.isnan().any()):
        return out, lse
    return nonfinite.forward(run, query, key, value, scale=scale, mask=mask == 0)


def _masked_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, mask: Tensor
) -> Gradients:
    def run(*tensors: Tensor) -> Gradients:
        return _gradients(*tensors, is_causal=False, scale=scale, mask=mask)

    dout, query, key, value, out, lse = map(_aligned, (dout, query, key, value, out, lse))
    gradients = run(dout, query, key, value, out, lse.masked_fill(lse == -math.inf, math.inf))  # for weights of 0
    if nonfinite.is_finite(*gradients):
        return gradients
    return nonfinite.backward(run, dout, query, key, value, out, lse, scale=scale, mask=mask == 0)


def _disjoint(tensor: Tensor) -> Tensor:
    """The tensor, copied where rows overlap within head_dim: torch gives results its strides, and orders these anew."""
    if tensor.is_contiguous():
        return tensor
    sizes, strides, dim = tensor.shape, tensor.stride(), tensor.shape[3]
    if any(size > 1 and 0 < stride < dim for size, stride in zip(sizes[:3], strides[:3], strict=True)):
        return tensor.contiguous()
    return tensor


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor as one without what is not finite would be: the bits of products depend on strides and alignment."""
    if tensor.is_contiguous() and tensor.data_ptr() % 64 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
