"""Offloading: bytes between a device and pinned host memory, without waiting. All that the cache knows of CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from longspan.memory.flatten import ALIGNMENT

__all__ = ["Buffer", "CopyEvent", "CudaOffloader", "Offloader", "load", "offloader_for"]


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
