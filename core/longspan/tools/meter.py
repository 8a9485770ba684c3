"""Time, memory and page faults of a call, measured or not stated: nothing here estimates."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch

__all__ = ["PeakMemory", "faults", "kernel_bytes", "measure", "resident", "return_freed_memory", "timed"]

T = TypeVar("T")

CHEAP_MS = 2_000.0
"""A call is repeated, for a median, while all its repetitions stay within this."""


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The call's result and its wall-clock milliseconds, to the end of what it started on the device."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, 1e3 * (time.perf_counter() - start)


def measure(call: Callable[[], object], device: torch.device, first: float | None = None) -> tuple[float, int]:
    """The median milliseconds of up to three calls, as many as are cheap, and their number.

    `first`: milliseconds of a run that was measured already, which counts as one.
    """
    times = [first if first is not None else timed(call, device)[1]]
    while len(times) < 3 and times[0] * len(times) < CHEAP_MS:
        times.append(timed(call, device)[1])
    return statistics.median(times), len(times)


class PeakMemory:
    """The most memory held during a `with` block beyond what was held before it: `mib`, None where unknown.

    On CUDA it is what torch's allocator handed out; on a CPU it is the process's resident memory, from the kernel's own
    high-water mark (Linux), which misses no peak however short. Elsewhere it stays None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None
        self.mib: float | None = None

    def __enter__(self) -> Self:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif self._device.type == "cpu":
            return_freed_memory()
            self._before = _reset_high_water()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        peak: int | None = None
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        elif self._device.type == "cpu":
            peak = _high_water()
        if self._before is not None and peak is not None:
            self.mib = max(0, peak - self._before) / 2**20


def faults() -> int:
    """Page faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident() -> int:
    """Bytes of memory that this process has now (Linux)."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def return_freed_memory() -> None:
    """Give freed heap back to the system: reused in silence, it would hide what the next call takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _reset_high_water() -> int | None:
    """Lower the high-water mark to what is resident now, and return it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _high_water()


def _high_water() -> int | None:
    return kernel_bytes("/proc/self/status", "VmHWM:")


def kernel_bytes(path: str, name: str) -> int | None:
    """Bytes by the line of this name in a file of the kernel's (Linux); None where there is none."""
    try:
        lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith(name)]
    return int(sizes[0]) * 1024 if sizes else None
