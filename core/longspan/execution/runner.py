"""The contract of what a plan runs, and the autograd node around it: one for the whole pattern.

One node makes the gradients those of the joint softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from longspan.errors import ArgumentError, LongspanError
from longspan.execution.kernel import undisturbed_gradient
from longspan.execution.shortage import spared
from longspan.numerics.dropout import Draw
from longspan.spec.backend import Forward, Kernel

__all__ = ["Differentiable", "Gradients", "Runner", "Saved", "no_graph"]

Gradients = tuple[Tensor, Tensor, Tensor]


class Saved(NamedTuple):
    """What a backward needs of its forward: the tensors that it took, and what it returned.

    `out` and `lse` may be those of a softmax over more keys than `key` holds.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor


class Runner:
    """What a plan runs.

    `layout` is how, `bare` the kernel that takes the problem whole, once its first result was checked; it may be called
    in place of `forward` without dropout, for tensors whose last dimension has no gaps.
    `operators` and `libraries` are what the kernels claim; `own_backward`: all bring a backward of their own.

    Args:
        layout: see above.
        kernels: what runs.
        in_graph: the backward for gradients that torch must dispatch, given `(saved, dout, dlse, draw)`.
    """

    bare: Forward | None = None

    def __init__(
        self, layout: Any, kernels: Sequence[Kernel] = (), in_graph: Callable[..., Gradients] | None = None
    ) -> None:
        self.layout, self.kernels = layout, tuple(kernels)
        self.in_graph = no_graph if in_graph is None else in_graph
        self.operators = tuple(dict.fromkeys(name for kernel in kernels for name in kernel.operators))
        self.libraries = tuple(dict.fromkeys(kernel.library for kernel in kernels if kernel.library))
        self.own_backward = all(kernel.backward is not None for kernel in kernels)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)`, recorded by autograd where that is on."""
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            apply: Any = Differentiable.apply
            out, lse = apply(query, key, value, self, draw)
            return out, lse
        return self.forward(query, key, value, draw)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)`, where query, key and value need no gradient."""
        raise NotImplementedError

    def backward(self, saved: Saved, dout: Tensor, dlse: Tensor | None, draw: Draw | None) -> Gradients:
        """`(dquery, dkey, dvalue)`."""
        raise NotImplementedError


class Differentiable(Function):
    """`(out, lse) = runner.forward(query, key, value, draw)`, with gradients through both."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, runner: Runner, draw: Draw | None
    ) -> tuple[Tensor, Tensor]:
        """Run, and save what the backward needs."""
        out, lse = runner.forward(query, key, value, draw)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.runner, ctx.draw = runner, draw
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """The kernel contract's backward, with the joint out and lse."""
        saved, runner = Saved(*ctx.saved_tensors), ctx.runner
        with torch.no_grad():
            dout = torch.zeros_like(saved.out) if dout is None else dout
            if undisturbed_gradient(dout, dlse, saved.out):
                grads = spared(partial(runner.backward, saved, dout, dlse, ctx.draw))
            else:
                grads = runner.in_graph(saved, dout, dlse, ctx.draw)
        if torch.is_grad_enabled():  # create_graph=True
            last: Any = _Last.apply
            grads = last(saved.query, saved.key, saved.value, dout, *grads)
        return (*grads, None, None)


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
