"""The autograd node around a layout: one for the whole pattern, so that gradients are those of the joint softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["Differentiable"]

Run = Callable[..., tuple[Tensor, Tensor]]
Back = Callable[..., tuple[Tensor, Tensor, Tensor]]


class Differentiable(Function):
    """`(out, lse) = forward(query, key, value)`, with `backward` from saved tensors; the lse takes no gradient yet."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, forward: Run, backward: Back
    ) -> tuple[Tensor, Tensor]:
        """Run, and save what the backward needs."""
        out, lse = forward(query, key, value)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.run = backward
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        """The kernel contract's backward, with the joint out and lse."""
        return (*ctx.run(dout, *ctx.saved_tensors), None, None)
