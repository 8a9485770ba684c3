"""Activation checkpointing that keeps what attention returned: the rest is recomputed, attention is not run again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

__all__ = ["checkpoint"]

P = ParamSpec("P")
R = TypeVar("R")


def checkpoint(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function without keeping its activations, except the results of `longspan.attention` in it.

    The backward runs the function again to restore its activations. Attention's `(out, lse)`, as large as one
    activation, are kept: the second run costs no second attention, no second plan and no second resolution.

    Args:
        function: a module or function that calls `longspan.attention` or a plan.
        args: its arguments.
        kwargs: its keyword arguments.
    """

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        kept: Any = [torch.ops.longspan.attention.default]
        made: tuple[AbstractContextManager[Any], AbstractContextManager[Any]] = again(kept)
        return made

    again: Any = create_selective_checkpoint_contexts
    given: Any = kwargs
    result: R = torch_checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **given)
    return result
