"""A layout that a cache keeps, under which key, how it is offloaded, and what a cache says about itself.

Offloading moves bytes between a device and pinned host memory, without waiting. All that the cache knows of CUDA.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from attrs import define, frozen
from torch import Tensor

from longspan.memory.flatten import ALIGNMENT, Packing, nbytes_of, pack
from longspan.spec.problem import Problem

__all__ = [
    "Buffer",
    "CacheStats",
    "CachedLayout",
    "CopyEvent",
    "CudaOffloader",
    "DeviceCopy",
    "LayoutKey",
    "Offloader",
    "PatternStats",
    "load",
    "offloader_for",
    "pattern_of",
]


class LayoutKey(NamedTuple):
    """Under what a plan keeps its layout.

    `origin` says which release made it (distribution and version), empty where that cannot be known; `generation` is
    the registry's, which grows whenever a plugin comes or goes.
    """

    problem: Problem
    backend: str
    origin: str = ""
    generation: int = 0


@frozen
class PatternStats:
    """What a cache did for one pattern; `bytes` it takes now."""

    hits: int = 0
    misses: int = 0
    bytes: int = 0


@frozen
class CacheStats:
    """What a cache holds and did.

    `host_bytes` and `device_bytes` are held now; `demotions` to the host and `promotions` to a device are moves of a
    layout, or of what was copied of it, in `transfers` transfers. `patterns` splits hits, misses and bytes by the
    pattern's text.
    """

    hits: int
    misses: int
    evictions: int
    entries: int
    pinned: int
    host_bytes: int
    device_bytes: int
    demotions: int
    promotions: int
    transfers: int
    patterns: Mapping[str, PatternStats]

    @property
    def hit_rate(self) -> float:
        """The share of look-ups that found something; 0 where there were none."""
        return self.hits / max(1, self.hits + self.misses)


class CopyEvent(Protocol):
    """The end of a copy."""

    def wait(self) -> bool:
        """Let what the current stream does next come after it; whether it is over, so that nobody need wait again."""


class Offloader(Protocol):
    """Copies flat buffers of bytes between its device and the host, and gives events instead of waiting."""

    def to_host(self, data: Tensor) -> Tensor:
        """A copy on the host, of what the current stream has written so far; later copies from it come after it."""

    def to_device(self, data: Sequence[Tensor]) -> tuple[list[Tensor], CopyEvent]:
        """Copies on the device, by one transfer for all."""

    def use(self, data: Tensor) -> None:
        """The current stream reads this buffer: its memory is not reused before that."""


class CudaOffloader:
    """Copies from and to pinned memory on a stream of its own, with an event at the end.

    Args:
        device: with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def to_host(self, data: Tensor) -> Tensor:
        """A pinned copy."""
        host = torch.empty(data.shape, dtype=torch.uint8, pin_memory=True, device="cpu")
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(data, non_blocking=True)
        data.record_stream(self._stream)
        return host

    def to_device(self, data: Sequence[Tensor]) -> tuple[list[Tensor], CopyEvent]:
        """Several buffers travel as one, and are separate again on the device: each can be dropped by itself."""
        with torch.cuda.stream(self._stream):
            if len(data) == 1:
                copies = [data[0].to(self._device, non_blocking=True)]
            else:
                starts = [0]
                for flat in data:
                    starts.append(starts[-1] + -(-flat.numel() // ALIGNMENT) * ALIGNMENT)
                staged = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True, device="cpu")
                self._stream.synchronize()  # what came from the device may still be on its way into these buffers
                for flat, start in zip(data, starts, strict=False):
                    staged[start : start + flat.numel()].copy_(flat)
                joined = staged.to(self._device, non_blocking=True)
                copies = [joined[start : start + x.numel()].clone() for x, start in zip(data, starts, strict=False)]
            return copies, _CudaEvent(self._stream)

    def use(self, data: Tensor) -> None:
        """It was allocated on the offloader's stream, or on another than the current one."""
        data.record_stream(torch.cuda.current_stream(self._device))


class _CudaEvent:
    """What a stream was given so far."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._device, self._event = stream.device, torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def wait(self) -> bool:
        if torch.cuda.is_current_stream_capturing():  # torch synchronises before a capture begins
            return False
        if self._event.query():  # type: ignore[no-untyped-call]
            return True
        torch.cuda.current_stream(self._device).wait_event(self._event)
        return False


def offloader_for(device: torch.device) -> Offloader | None:
    """How bytes leave this device; None where they stay."""
    return CudaOffloader(device) if device.type == "cuda" else None


class Buffer:
    """Bytes that a device uses: `data` is there, or on the host while `is_offloaded`, or where no offloader is."""

    __slots__ = ("_event", "data", "is_offloaded", "offloader")

    def __init__(self, data: Tensor, offloader: Offloader | None, *, is_offloaded: bool = False) -> None:
        self.data, self.offloader, self.is_offloaded = data, offloader, is_offloaded
        self._event: CopyEvent | None = None

    @property
    def is_movable(self) -> bool:
        """Whether it is on a device that it can leave."""
        return self.offloader is not None and not self.is_offloaded

    def offload(self) -> None:
        """Move it to the host."""
        assert self.offloader is not None  # it is movable
        self.data, self.is_offloaded, self._event = self.offloader.to_host(self.data), True, None

    def use(self) -> bool:
        """Before the current stream reads it; whether it is there, so that nobody need wait for it again."""
        if self.offloader is None:
            return True
        if self._event is not None and self._event.wait():
            self._event = None
        self.offloader.use(self.data)
        return self._event is None


def load(buffers: Sequence[Buffer]) -> int:
    """Move offloaded buffers to their devices; how many transfers that took, which is one for each device."""
    offloaders = dict.fromkeys(buffer.offloader for buffer in buffers)
    for offloader in offloaders:
        assert offloader is not None  # else they would not have left
        mine = [buffer for buffer in buffers if buffer.offloader is offloader]
        with torch.inference_mode(False):  # they outlive the mode that a call happens to be made in
            copies, event = offloader.to_device([buffer.data for buffer in mine])
        for buffer, data in zip(mine, copies, strict=True):
            buffer.data, buffer.is_offloaded, buffer._event = data, False, event
    return len(offloaders)


@define(eq=False)
class DeviceCopy:
    """A value with its tensors on a device, which nobody changes. While anybody holds it, its memory stays there."""

    value: Any
    arriving: tuple[Buffer, ...] = ()

    def wait(self) -> None:
        """Let what the current stream does next come after the transfer, if that is not over."""
        self.arriving = tuple(buffer for buffer in self.arriving if not buffer.use())


@define(eq=False)
class _KeptCopy:
    """What a cache has of a device copy: how it is packed, its buffers, and what was given out of it."""

    packing: Packing
    buffers: dict[torch.device, Buffer]
    given: weakref.ref[DeviceCopy] | None = None

    @property
    def is_used(self) -> bool:
        return self.given is not None and self.given() is not None


class CachedLayout:
    """A layout that is kept, and what was copied of it to devices.

    `value` is it where everybody may have the same object, else None: everybody then gets a copy. `used` is a number
    that grows with each use; `copies` are by name and device.
    """

    __slots__ = ("_buffers", "_packing", "_rest", "copies", "hits", "key", "pins", "used", "value")

    def __init__(
        self, key: Hashable, layout: Any, used: int, offloader_for: Callable[[torch.device], Offloader | None]
    ) -> None:
        self.key, self.used = key, used
        self.hits = self.pins = 0
        self._packing, data = pack(layout)
        self.value: Any = layout if self._packing.is_shared else None
        self._buffers = {at: Buffer(flat, offloader_for(at)) for at, flat in data.items()}
        self._rest = max(0, nbytes_of(layout) - sum(flat.numel() for flat in data.values()))
        self.copies: dict[tuple[str, torch.device], _KeptCopy] = {}

    @property
    def device_bytes(self) -> int:
        """What it takes on devices."""
        return sum(buffer.data.numel() for buffer in self._all_buffers() if buffer.is_movable)

    @property
    def host_bytes(self) -> int:
        """What it takes elsewhere."""
        return self._rest + sum(buffer.data.numel() for buffer in self._all_buffers() if not buffer.is_movable)

    def offloaded(self) -> list[Buffer]:
        """What is to be moved back before it is of use."""
        return [buffer for buffer in self._all_buffers() if buffer.is_offloaded]

    def idle(self) -> list[Buffer]:
        """What could leave its device: nobody uses it."""
        idle = [*self._buffers.values()]
        for copy in self.copies.values():
            if not copy.is_used:
                idle += copy.buffers.values()
        return [buffer for buffer in idle if buffer.is_movable]

    def ready(self) -> dict[torch.device, Tensor]:
        """Its own buffers, for the current stream to read."""
        for buffer in self._buffers.values():
            buffer.use()
        return {at: buffer.data for at, buffer in self._buffers.items()}

    def unpack(self, data: Mapping[torch.device, Tensor]) -> Any:
        """The layout, with tensors on copies of these buffers."""
        with torch.inference_mode(False), torch.no_grad():
            return self._packing.unpack({at: flat.clone() for at, flat in data.items()})

    def add_copy(self, name: str, device: torch.device, value: Any, offloader: Offloader) -> None:
        """Keep a value with its tensors, which are on the CPU, for a device; nothing is moved yet."""
        if (name, device) not in self.copies:
            packing, data = pack(value)
            buffers = {at: Buffer(flat, offloader, is_offloaded=True) for at, flat in data.items()}
            self.copies[name, device] = _KeptCopy(packing, buffers)

    def copy(self, name: str, device: torch.device) -> DeviceCopy:
        """What was added under this name, and is on its device by now: one object for all who hold it."""
        kept = self.copies[name, device]
        given = None if kept.given is None else kept.given()
        if given is None:
            data = {at: buffer.data for at, buffer in kept.buffers.items()}
            given = DeviceCopy(kept.packing.unpack(data), tuple(kept.buffers.values()))
            kept.given = weakref.ref(given)
        return given

    def _all_buffers(self) -> Iterator[Buffer]:
        yield from self._buffers.values()
        for copy in self.copies.values():
            yield from copy.buffers.values()


def pattern_of(key: Hashable) -> str:
    """The text of a key's pattern, as the statistics group it; empty where the key names no problem."""
    problem = key.problem if isinstance(key, LayoutKey) else key
    return problem.pattern.spec if isinstance(problem, Problem) else ""
