"""The common form of the FlashAttention packages: sequence before heads, and keyword names that differ by release."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longspan.plugin import Kernel, Problem

__all__ = ["kernel_of"]

Function = Callable[..., Any]


def kernel_of(problem: Problem, forward: Function, backward: Function, gradients_returned: bool = False) -> Kernel:
    """A kernel from a package's low-level forward and backward.

    Args:
        problem: the dense problem.
        forward: `(q, k, v, ...) -> (out, lse, ...)`, tensors `(batch, seq, heads, head_dim)`.
        backward: takes the joint out and lse by name.
        gradients_returned: the backward returns its gradients; else it writes them into `dq`, `dk`, `dv`.
    """
    words = {
        "dropout_p": 0.0,
        "softmax_scale": problem.scale,
        "causal": problem.is_causal,
        "is_causal": problem.is_causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
        "return_softmax": False,
        "return_lse": True,
        "deterministic": problem.deterministic,
    }
    if gradients_returned:  # FA4 takes None for no window
        words |= {"window_size_left": None, "window_size_right": None}
    forward_words, backward_words = _taken(forward, words), _taken(backward, words)

    def run_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, lse, *_ = forward(q, k, v, **forward_words)
        return out.transpose(1, 2), lse

    def run_backward(
        dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        do, q, k, v, o = (x.transpose(1, 2) for x in (dout, query, key, value, out))
        given = {"dout": do, "q": q, "k": k, "v": v, "out": o, "lse": lse, "softmax_lse": lse.contiguous()}
        if gradients_returned:
            dq, dk, dv, *_ = backward(**_taken(backward, given), **backward_words)
        else:
            dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
            backward(**_taken(backward, given), dq=dq, dk=dk, dv=dv, **backward_words)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    return Kernel(run_forward, run_backward)


def _taken(function: Function, words: dict[str, Any]) -> dict[str, Any]:
    """Those of the words that the function has parameters for."""
    function = getattr(function, "_init_fn", function)  # a custom operator keeps its Python function there
    names = inspect.signature(function).parameters
    return {name: value for name, value in words.items() if name in names}
