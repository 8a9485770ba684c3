"""Workspace for kernels and for the core itself: who allocates it, how it is asked for, and what one call borrows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from math import prod
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from longspan.errors import PluginError
from longspan.memory.cached_layout import DeviceCopy
from longspan.memory.flatten import to_device
from longspan.spec.backend import BufferSpec

__all__ = [
    "Allocator",
    "FallbackAllocator",
    "KeepsCopies",
    "LeasingAllocator",
    "Pair",
    "Scratch",
    "TorchAllocator",
    "Workspace",
]


class Allocator(Protocol):
    """Provides workspace on a device."""

    def allocate(self, spec: BufferSpec, device: torch.device) -> Tensor:
        """Uninitialised memory of the spec's shape and dtype, nobody else's until the last tensor on it is dropped."""


class LeasingAllocator(Allocator, Protocol):
    """An allocator that knows when memory comes back. An arena's reservations are; the core wraps all others."""

    @property
    def threshold(self) -> int:
        """Bytes from which on it wants to be asked."""

    def lease(self, spec: BufferSpec, device: torch.device, *, always: bool = False) -> AbstractContextManager[Tensor]:
        """Memory for the time of a `with` block; with `always`, below the threshold too."""

    def release(self, tensor: Tensor) -> None:
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

    def release(self, tensor: Tensor) -> None:
        """Nothing to do: nothing is kept."""


KeepsCopies = Callable[[str, Any, torch.device], DeviceCopy | None]
"""Who keeps copies of a plan's values on devices, by name: a cache's `device_copy` for its layout."""


class Workspace:
    """The buffers that a kernel declared: it takes them while it runs, and gives them back by dropping them.

    What is in use is nobody else's: neither another thread's nor a later call's, and a buffer that a kernel returns or
    saves for its backward stays what it is. Reuse begins with the last reference's end.

    Args:
        specs: the buffers.
        allocator: who provides them.
        copies: who shares copies on devices with other plans; unless given, or where it declines, they are kept here.
    """

    def __init__(
        self, specs: Iterable[BufferSpec], allocator: LeasingAllocator, copies: KeepsCopies | None = None
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._allocator, self._copies = allocator, copies
        self._on_device: dict[tuple[str, torch.device], DeviceCopy] = {}

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

    def on_device(self, name: str, value: Any, device: torch.device) -> Any:
        """A value with its tensors on a device, moved there once: what a kernel made of its layout, and only reads.

        It stays there for as long as this workspace. The core's cache counts it as the layout's, gives it to every plan
        of the same problem, and moves it to the host when the last of them is gone and the device runs short of room.

        Args:
            name: of the value, in this workspace.
            value: attrs objects, tuples, lists and dicts of tensors on the CPU; the same at every call.
            device: that of a call's tensors.
        """
        copy = self._on_device.get((name, device))
        if copy is None:
            shared = None if self._copies is None else self._copies(name, value, device)
            copy = self._on_device[name, device] = shared or DeviceCopy(to_device(value, device))
        if copy.arriving:
            copy.wait()
        return copy.value

    def anew(self) -> Workspace:
        """Another one with the same buffers, which keeps no copies on devices yet and shares none."""
        return Workspace(self._specs.values(), self._allocator)

    def wants(self, size: int) -> bool:
        """Whether so many bytes are worth asking the allocator for."""
        return size >= self._allocator.threshold

    def release(self, tensors: Iterable[Tensor]) -> None:
        """A kernel gave these out: their memory, should it be a buffer's, is no workspace any more."""
        for tensor in tensors:
            self._allocator.release(tensor)

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


PAGE = 2**12
"""Bytes below which nobody is asked."""

_TORCH = Workspace((), TorchAllocator())


class Scratch:
    """Memory for a `with` block around the launches of one call.

    Args:
        workspace: who provides it; None, or for tensors of another class (fake ones, say): torch.
        like: a tensor of the call; memory is where it is.
        size: bytes that all launches together write to temporaries. Where the workspace does not want so few, each
            launch gets its temporaries from torch.
    """

    def __init__(self, workspace: Workspace | None, like: Tensor, size: int) -> None:
        self._workspace = _TORCH if workspace is None or type(like) is not Tensor else workspace
        self._device = like.device
        self.is_kept = size >= PAGE and self._workspace is not _TORCH and self._workspace.wants(size)
        self._leases: ExitStack | None = None
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def once(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for the whole call."""
        if not self.is_kept:
            return torch.empty(shape, dtype=dtype, device=self._device)
        return self._lease(name, shape, dtype, False)

    def again(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory until it is asked for by this name again, in the same place if it is large enough."""
        if not self.is_kept:
            return torch.empty(shape, dtype=dtype, device=self._device)
        count = prod(shape)
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < count:
            kept = self._kept[name, dtype] = self._lease(name, (count,), dtype, True)
        return kept[:count].view(shape)

    def flip(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with its rows (dimension 2) in reverse order."""
        if not self.is_kept:
            turned = tensor.flip(2)  # torch orders the strides of overlapping rows anew
            return turned if turned.stride(-1) == 1 else turned.contiguous()
        backwards = torch.arange(tensor.shape[2] - 1, -1, -1, device=tensor.device, dtype=torch.int64)
        return torch.index_select(tensor, 2, backwards, out=self.again(name, tuple(tensor.shape), tensor.dtype))

    def widen(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in this dtype."""
        if tensor.dtype is dtype or not self.is_kept:
            return tensor.to(dtype)
        return self.again(name, tuple(tensor.shape), dtype).copy_(tensor)

    def _lease(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, always: bool) -> Tensor:
        if self._leases is None:
            self._leases = ExitStack()
        return self._leases.enter_context(self._workspace.temporary(name, shape, dtype, self._device, always=always))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.clear()
        if self._leases is not None:
            self._leases.close()


class FallbackAllocator:
    """Asks a plugin's allocator, and falls back to the core's, for good, after its first exception or wrong tensor.

    Args:
        allocator: with `allocate(spec, device)`.
        fallback: the core's.
        report: told of that failure, once.
    """

    threshold = 0  # whoever replaces the allocator sees every request

    def __init__(self, allocator: Any, fallback: LeasingAllocator, report: Callable[[Exception], None]) -> None:
        self._allocator, self._fallback, self._report = allocator, fallback, report
        self._works = True

    def allocate(self, spec: BufferSpec, device: torch.device) -> Tensor:
        """Uninitialised memory of the spec's shape and dtype."""
        if self._works:
            try:
                return _checked(self._allocator.allocate(spec, device), spec, device)
            except Exception as error:  # noqa: BLE001 - whatever a plugin raises, the computation goes on
                self._works = False
                self._report(error)
        return self._fallback.allocate(spec, device)

    @contextmanager
    def lease(self, spec: BufferSpec, device: torch.device, *, always: bool = False) -> Iterator[Tensor]:
        """The same for the time of a `with` block; dropping it is giving it back."""
        yield self.allocate(spec, device)

    def release(self, tensor: Tensor) -> None:
        """The fallback's business; another allocator sees by itself who uses its memory."""
        self._fallback.release(tensor)

    def __repr__(self) -> str:
        return f"FallbackAllocator({self._allocator if self._works else self._fallback!r})"


def _checked(tensor: Any, spec: BufferSpec, device: torch.device) -> Tensor:
    dtype = getattr(torch, spec.dtype)
    if not isinstance(tensor, Tensor):
        raise PluginError(f"allocate() returned {type(tensor).__name__}. Next: return a torch.Tensor")
    here = tensor.device.type == device.type and device.index in (None, tensor.device.index)
    if tuple(tensor.shape) != tuple(spec.shape) or tensor.dtype is not dtype or not here or not tensor.is_contiguous():
        got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
        raise PluginError(f"allocate() returned {got}; want {spec.shape} {dtype} on {device}. Next: fix the allocator")
    return tensor
