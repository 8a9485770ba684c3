"""torch's own flash operator: always there with a CUDA build of torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from longspan import Kernel, Problem
from longspan_plugins.flash.library import Library

__all__ = ["LIBRARY", "backward", "forward"]


def forward(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """`(out, lse)` by `aten::_scaled_dot_product_flash_attention`."""
    operator: Any = torch.ops.aten._scaled_dot_product_flash_attention
    result = operator(query, key, value, 0.0, is_causal, False, scale=scale)
    return result[0], result[1]


def backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dquery, dkey, dvalue)` by the operator's backward, which takes the joint out and lse."""
    operator: Any = torch.ops.aten._scaled_dot_product_flash_attention_backward
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of the dropout generator; unread without dropout
    lengths = query.shape[2], key.shape[2]
    result: tuple[Tensor, Tensor, Tensor] = operator(
        dout, query, key, value, out, lse.contiguous(), None, None, *lengths, 0.0, is_causal, state, state, scale=scale
    )
    return result


def _kernel(problem: Problem) -> Kernel:
    given: dict[str, Any] = {"is_causal": problem.is_causal, "scale": problem.scale}
    claim = ("aten::_scaled_dot_product_flash_attention",)
    return Kernel(partial(forward, **given), partial(backward, **given), claim)


LIBRARY = Library("torch", "torch", ("torch",), (8, 99), _kernel)
