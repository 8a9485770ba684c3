"""Workspace for kernels: who allocates it, and how a kernel asks for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from longspan.errors import PluginError
from longspan.spec import BufferSpec

__all__ = ["Allocator", "TorchAllocator", "Workspace"]


class Allocator(Protocol):
    """Provides workspace on a device."""

    def allocate(self, spec: BufferSpec, device: torch.device) -> Tensor:
        """Uninitialised memory of the spec's shape and dtype."""


class TorchAllocator:
    """The core's default: torch's own allocator."""

    def allocate(self, spec: BufferSpec, device: torch.device) -> Tensor:
        """`torch.empty`."""
        return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)


class Workspace:
    """The buffers that a kernel declared; it takes them while it runs, and gives them back by dropping them."""

    def __init__(self, specs: Iterable[BufferSpec], allocator: Allocator) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._allocator = allocator

    def take(self, name: str, device: torch.device) -> Tensor:
        """An uninitialised buffer for the duration of one call.

        Raises:
            PluginError: the kernel did not declare it.
        """
        if name not in self._specs:
            known = ", ".join(self._specs) or "none"
            raise PluginError(f"buffer {name!r} was not declared (declared: {known}). Next: add it to longspan_buffers")
        return self._allocator.allocate(self._specs[name], device)

    def __repr__(self) -> str:
        return f"Workspace({', '.join(self._specs)})"
