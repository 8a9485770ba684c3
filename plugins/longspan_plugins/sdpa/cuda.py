"""torch's operators for CUDA and ROCm, flash and memory-efficient: both backwards take a joint out and lse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["efficient_backward", "efficient_forward", "flash_backward", "flash_forward"]

aten: Any = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


def flash_forward(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """`(out, lse)` by `aten::_scaled_dot_product_flash_attention`."""
    result = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)
    return result[0], result[1]


def flash_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
) -> Gradients:
    """`(dquery, dkey, dvalue)` by that operator's backward."""
    run = aten._scaled_dot_product_flash_attention_backward
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of the dropout generator; unread without dropout
    lengths = query.shape[2], key.shape[2]
    result: Gradients = run(
        dout, query, key, value, out, lse.contiguous(), None, None, *lengths, 0.0, is_causal, state, state, scale=scale
    )
    return result


def efficient_forward(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` by `aten::_scaled_dot_product_efficient_attention`."""
    key, value = _repeated(query, key), _repeated(query, value)
    result = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, is_causal, scale=scale)
    return result[0], result[1][..., : query.shape[2]]  # the operator pads its rows to a multiple of 32


def efficient_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
) -> Gradients:
    """`(dquery, dkey, dvalue)` by that operator's backward, for the joint out and lse."""
    rows = query.shape[2]
    padded = lse.new_full((*lse.shape[:2], -(-rows // 32) * 32), torch.inf)
    padded[..., :rows] = lse
    state = torch.zeros((), dtype=torch.int64, device="cpu")  # of the dropout generator; unread without dropout
    kv_heads = key.shape[1]
    key, value = _repeated(query, key), _repeated(query, value)
    run, wanted = aten._scaled_dot_product_efficient_attention_backward, [True, True, True, False]
    saved = dout, query, key, value, None, out, padded, state, state
    dquery, dkey, dvalue, _ = run(*saved, 0.0, wanted, is_causal, scale=scale)
    return dquery, *(x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dkey, dvalue))


def _repeated(query: Tensor, tensor: Tensor) -> Tensor:
    """Key heads as many as query heads, as the memory-efficient operator wants them."""
    group = query.shape[1] // tensor.shape[1]
    return tensor if group == 1 else tensor.repeat_interleave(group, 1)
