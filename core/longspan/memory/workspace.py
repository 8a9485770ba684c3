"""Workspace for kernels and for the core itself: who allocates it, and how it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from longspan.errors import PluginError
from longspan.spec.backend import BufferSpec

__all__ = ["Allocator", "Lender", "Pair", "TorchAllocator", "Workspace"]


class Allocator(Protocol):
    """Provides workspace on a device."""

    def allocate(self, spec: BufferSpec, device: torch.device) -> Tensor:
        """Uninitialised memory of the spec's shape and dtype, nobody else's until the last tensor on it is dropped."""


class Lender(Allocator, Protocol):
    """An allocator that knows when memory comes back. `BufferArena`'s tenants are; the core wraps all others."""

    @property
    def threshold(self) -> int:
        """Bytes from which on it wants to be asked."""

    def lease(self, spec: BufferSpec, device: torch.device, *, always: bool = False) -> AbstractContextManager[Tensor]:
        """Memory for the time of a `with` block; with `always`, below the threshold too."""

    def disown(self, tensor: Tensor) -> None:
        """Never hand out the memory of this tensor again."""


class TorchAllocator:
    """torch's own allocator: nothing is kept."""

    threshold = 0

    def allocate(self, spec: BufferSpec, device: torch.device) -> Tensor:
        """`torch.empty`."""
        return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)

    @contextmanager
    def lease(self, spec: BufferSpec, device: torch.device, *, always: bool = False) -> Iterator[Tensor]:
        """`torch.empty`; dropping it is giving it back."""
        yield self.allocate(spec, device)

    def disown(self, tensor: Tensor) -> None:
        """Nothing to do: nothing is kept."""


class Workspace:
    """The buffers that a kernel declared: it takes them while it runs, and gives them back by dropping them.

    What is in use is nobody else's: neither another thread's nor a later call's, and a buffer that a kernel returns or
    saves for its backward stays what it is. Reuse begins with the last reference's end.
    """

    def __init__(self, specs: Iterable[BufferSpec], allocator: Lender) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._allocator = allocator

    def take(self, name: str, device: torch.device) -> Tensor:
        """An uninitialised buffer for the duration of one call.

        Raises:
            PluginError: the kernel did not declare it.
        """
        return self._allocator.allocate(self._spec(name), device)

    def lease(self, name: str, device: torch.device) -> AbstractContextManager[Tensor]:
        """An uninitialised buffer for the time of a `with` block, not to be used after it.

        Raises:
            PluginError: the kernel did not declare it.
        """
        return self._allocator.lease(self._spec(name), device)

    @contextmanager
    def pair(self, name: str, device: torch.device) -> Iterator[Pair]:
        """Two buffers alike for the time of a `with` block: one is read while the other is written, as in a ring.

        Raises:
            PluginError: the kernel did not declare it.
        """
        spec = self._spec(name)
        with (
            self._allocator.lease(spec, device, always=True) as front,
            self._allocator.lease(spec, device, always=True) as back,
        ):
            yield Pair(front, back)

    @contextmanager
    def temporary(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, always: bool = False
    ) -> Iterator[Tensor]:
        """Memory that the core needs for a while, undeclared.

        Args:
            name: for whoever provides it.
            shape: as usual.
            dtype: as usual.
            device: as usual.
            always: serve it below the allocator's threshold too, for what a call takes again and again.
        """
        if prod(shape) * dtype.itemsize < self._allocator.threshold and not always:
            yield torch.empty(shape, dtype=dtype, device=device)
            return
        spec = BufferSpec(name, tuple(shape), str(dtype).removeprefix("torch."))
        with self._allocator.lease(spec, device, always=always) as tensor:
            yield tensor

    def wants(self, size: int) -> bool:
        """Whether so many bytes are worth asking the allocator for."""
        return size >= self._allocator.threshold

    def disown(self, tensors: Iterable[Tensor]) -> None:
        """A kernel gave these out: their memory, should it be a buffer's, is no workspace any more."""
        for tensor in tensors:
            self._allocator.disown(tensor)

    def _spec(self, name: str) -> BufferSpec:
        if name not in self._specs:
            known = ", ".join(self._specs) or "none"
            raise PluginError(f"buffer {name!r} was not declared (declared: {known}). Next: add it to longspan_buffers")
        return self._specs[name]

    def __repr__(self) -> str:
        return f"Workspace({', '.join(self._specs)})"


class Pair:
    """Two buffers that change places: `front` is read while `back` is written."""

    def __init__(self, front: Tensor, back: Tensor) -> None:
        self.front, self.back = front, back

    def swap(self) -> None:
        """What was written is what is read next."""
        self.front, self.back = self.back, self.front

    def __repr__(self) -> str:
        return f"Pair({tuple(self.front.shape)}, {self.front.dtype})"
