"""What a kernel must return, checked the first time it runs: a wrong shape would broadcast and go unnoticed.

And whose an exception is: one that a plugin raises keeps its type, and gets a note that names the backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longspan.errors import PluginError

__all__ = ["check_gradients", "check_result", "in_hook", "note_kernel"]

PLAN = "`longspan explain` lists who else fits"


def check_result(backend: str, result: Any, query: Tensor) -> None:
    """Refuse what is not `(out, lse)` of the kernel contract.

    Raises:
        PluginError: names the backend, what its kernel returned and what the contract wants.
    """
    lse_dtypes = (torch.float64,) if query.dtype == torch.float64 else (torch.float32, torch.float64)
    wanted = f"out {tuple(query.shape)} {query.dtype} and lse {tuple(query.shape[:3])} {lse_dtypes[0]}"
    if not isinstance(result, tuple | list) or len(result) != 2 or not all(isinstance(x, Tensor) for x in result):
        got = f"{type(result).__name__} of {len(result)}" if isinstance(result, tuple | list) else type(result).__name__
    else:
        out, lse = result
        right = out.shape == query.shape and out.dtype == query.dtype and _lies_like(query, out, lse)
        if right and lse.shape == query.shape[:3] and lse.dtype in lse_dtypes:
            return
        wanted += _place(query)
        got = f"out {tuple(out.shape)} {out.dtype}{_place(out)} and lse {tuple(lse.shape)} {lse.dtype}{_place(lse)}"
    raise PluginError(f"{backend}'s kernel returned {got}; want {wanted}. Next: fix the kernel")


def check_gradients(backend: str, result: Any, inputs: tuple[Tensor, ...]) -> None:
    """Refuse what is not `(dquery, dkey, dvalue)` in the shapes of query, key and value.

    Raises:
        PluginError: names the backend, what its backward returned and what the contract wants.
    """
    wanted = " and ".join(str(tuple(x.shape)) for x in inputs)
    if isinstance(result, tuple | list) and len(result) == 3 and all(isinstance(x, Tensor) for x in result):
        alike = all(x.shape == like.shape and x.is_floating_point() for x, like in zip(result, inputs, strict=True))
        if alike and _lies_like(inputs[0], *result):
            return
        wanted += _place(inputs[0])
        got = " and ".join(f"{tuple(x.shape)} {x.dtype}{_place(x)}" for x in result)
    else:
        got = f"{type(result).__name__} of {len(result)}" if isinstance(result, tuple | list) else type(result).__name__
    raise PluginError(f"{backend}'s backward returned {got}; want gradients {wanted}. Next: fix the kernel")


def _lies_like(like: Tensor, *tensors: Tensor) -> bool:
    return all(x.device == like.device and x.layout is torch.strided for x in tensors)


def _place(tensor: Tensor) -> str:
    return f" on {tensor.device}" + ("" if tensor.layout is torch.strided else f" ({tensor.layout})")


def note_kernel(error: Exception, backend: str) -> None:
    """Note on an exception that a backend's kernel raised it."""
    _note(error, f"raised by the kernel of longspan's backend {backend!r}; {PLAN}")


@contextmanager
def in_hook(backend: str, hook: str) -> Iterator[None]:
    """Note on an exception that a backend's hook raised it; longspan's own say whose they are."""
    try:
        yield
    except PluginError:
        raise
    except Exception as error:
        _note(error, f"raised by {hook} of longspan's backend {backend!r}; {PLAN}")
        raise


def _note(error: Exception, text: str) -> None:
    if text not in getattr(error, "__notes__", ()):  # one kernel may have called another
        error.add_note(text)
