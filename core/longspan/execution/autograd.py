"""The autograd node around a layout: one for the whole pattern, so that gradients are those of the joint softmax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from longspan.errors import ArgumentError, LongspanError
from longspan.execution.ordinary import undisturbed_gradient
from longspan.execution.shortage import spared
from longspan.numerics.dropout import Draw

__all__ = ["Differentiable", "Runner", "no_graph"]


Gradients = tuple[Tensor, Tensor, Tensor]


class Runner(Protocol):
    """What a plan gives to its node."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)`."""

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        draw: Draw | None,
        dlse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(dquery, dkey, dvalue)`."""


class Differentiable(Function):
    """`(out, lse) = runner.forward(query, key, value, draw)`, with gradients through both."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        runner: Runner,
        draw: Draw | None,
        in_graph: Callable[..., Gradients],
    ) -> tuple[Tensor, Tensor]:
        """Run, and save what the backward needs; `in_graph` is the backward for gradients that torch must dispatch."""
        out, lse = runner.forward(query, key, value, draw)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.runner, ctx.draw, ctx.in_graph = runner, draw, in_graph
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """The kernel contract's backward, with the joint out and lse."""
        query, key, value, out, lse = ctx.saved_tensors
        with torch.no_grad():
            dout = torch.zeros_like(out) if dout is None else dout
            if undisturbed_gradient(dout, dlse, out):
                grads = spared(partial(ctx.runner.backward, dout, query, key, value, out, lse, ctx.draw, dlse))
            else:
                grads = ctx.in_graph(ctx.draw, dout, dlse, query, key, value, out, lse)
        if torch.is_grad_enabled():  # create_graph=True
            last: Any = _Last.apply
            grads = last(query, key, value, dout, *grads)
        return (*grads, None, None, None)


def no_graph(*_: Any) -> Gradients:
    """The backward where no operator stands for the problem.

    Raises:
        ArgumentError: always.
    """
    raise ArgumentError(
        "the gradient of attention with TopKBlocks",
        "one that torch traces, maps or wraps",
        "a plain tensor",
        "run the forward in the same context too (torch.compile, torch.func, the dispatch mode)",
    )


class _Last(Function):
    """Passes gradients on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, dout: Tensor, *grads: Tensor) -> Any:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise LongspanError(
            "longspan.attention has no second derivative: got a gradient of its gradient; want at most one. Next: take "
            "create_graph=False, or write the attention with torch operators where you need it twice"
        )
