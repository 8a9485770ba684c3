"""Moving bytes between a device and the host, without waiting: all that the cache knows of CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from longspan.memory.flatten import ALIGNMENT

__all__ = ["CudaMover", "Mark", "Mover", "mover_of"]


class Mark(Protocol):
    """A transfer under way, or done."""

    def wait(self) -> None:
        """Let what the current stream does next come after it."""

    def seconds(self) -> float | None:
        """How long it took; None while it is under way."""


class Mover(Protocol):
    """Moves flat buffers of bytes. It gives marks instead of waiting for what it starts."""

    def to_host(self, flat: Tensor) -> tuple[Tensor, Mark]:
        """A copy on the host, of what the current stream has written so far."""

    def to_device(self, flats: Sequence[Tensor]) -> tuple[list[Tensor], Mark]:
        """Copies on the device, by one transfer for all."""

    def use(self, flat: Tensor) -> None:
        """The current stream reads this buffer: its memory is not reused before that."""


class CudaMover:
    """Copies from and to pinned memory on a stream of its own, with an event at each end.

    Args:
        device: with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def to_host(self, flat: Tensor) -> tuple[Tensor, Mark]:
        """A pinned copy."""
        host = torch.empty(flat.shape, dtype=torch.uint8, pin_memory=True, device="cpu")
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            mark = _Events(self._stream)
            host.copy_(flat, non_blocking=True)
            mark.end()
        flat.record_stream(self._stream)
        return host, mark

    def to_device(self, flats: Sequence[Tensor]) -> tuple[list[Tensor], Mark]:
        """Several buffers travel as one, and are separate again on the device: each can be dropped by itself."""
        with torch.cuda.stream(self._stream):
            mark = _Events(self._stream)
            if len(flats) == 1:
                moved = [flats[0].to(self._device, non_blocking=True)]
            else:
                starts = [0]
                for flat in flats:
                    starts.append(starts[-1] + -(-flat.numel() // ALIGNMENT) * ALIGNMENT)
                staged = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True, device="cpu")
                self._stream.synchronize()  # what came from the device may still be on its way into these buffers
                for flat, start in zip(flats, starts, strict=False):
                    staged[start : start + flat.numel()].copy_(flat)
                together = staged.to(self._device, non_blocking=True)
                moved = [
                    together[start : start + flat.numel()].clone() for flat, start in zip(flats, starts, strict=False)
                ]
            mark.end()
        return moved, mark

    def use(self, flat: Tensor) -> None:
        """It was allocated on the mover's stream, or on another than the current one."""
        flat.record_stream(torch.cuda.current_stream(self._device))


class _Events:
    """The beginning and the end of a transfer on a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._events[0].record(stream)

    def end(self) -> None:
        self._events[1].record(self._stream)

    def wait(self) -> None:
        torch.cuda.current_stream(self._stream.device).wait_event(self._events[1])

    def seconds(self) -> float | None:
        if not self._events[1].query():  # type: ignore[no-untyped-call]
            return None
        return float(self._events[0].elapsed_time(self._events[1])) / 1e3


def mover_of(device: torch.device) -> Mover | None:
    """How bytes leave this device; None where there is but one tier."""
    return CudaMover(device) if device.type == "cuda" else None
