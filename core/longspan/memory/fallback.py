"""What stands between the core and an allocator of somebody else's: its first mistake is its last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longspan.errors import PluginError
from longspan.memory.workspace import Lender
from longspan.spec.backend import BufferSpec

__all__ = ["GuardedAllocator"]


class GuardedAllocator:
    """Asks a plugin's allocator, and after an exception or a wrong tensor the core's, for good.

    Args:
        allocator: with `allocate(spec, device)`.
        spare: the core's.
        report: told of the mistake, once.
    """

    threshold = 0  # whoever replaces the allocator sees every request

    def __init__(self, allocator: Any, spare: Lender, report: Callable[[Exception], None]) -> None:
        self._allocator, self._spare, self._report = allocator, spare, report
        self._works = True

    def allocate(self, spec: BufferSpec, device: torch.device) -> Tensor:
        """Uninitialised memory of the spec's shape and dtype."""
        if self._works:
            try:
                return _checked(self._allocator.allocate(spec, device), spec, device)
            except Exception as error:  # noqa: BLE001 - whatever a plugin raises, the computation goes on
                self._works = False
                self._report(error)
        return self._spare.allocate(spec, device)

    @contextmanager
    def lease(self, spec: BufferSpec, device: torch.device, *, always: bool = False) -> Iterator[Tensor]:
        """The same for the time of a `with` block; dropping it is giving it back."""
        yield self.allocate(spec, device)

    def disown(self, tensor: Tensor) -> None:
        """The spare's business; another allocator sees by itself who uses its memory."""
        self._spare.disown(tensor)

    def __repr__(self) -> str:
        return f"GuardedAllocator({self._allocator if self._works else self._spare!r})"


def _checked(found: Any, spec: BufferSpec, device: torch.device) -> Tensor:
    dtype = getattr(torch, spec.dtype)
    if not isinstance(found, Tensor):
        raise PluginError(f"allocate() returned {type(found).__name__}. Next: return a torch.Tensor")
    here = found.device.type == device.type and device.index in (None, found.device.index)
    if tuple(found.shape) != tuple(spec.shape) or found.dtype is not dtype or not here or not found.is_contiguous():
        got = f"{tuple(found.shape)} {found.dtype} on {found.device}, strides {found.stride()}"
        raise PluginError(f"allocate() returned {got}; want {spec.shape} {dtype} on {device}. Next: mend the allocator")
    return found
