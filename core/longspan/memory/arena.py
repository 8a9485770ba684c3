"""Workspace that is kept and handed out again: a large temporary then costs neither page faults nor an allocation.

An extent is free when nothing but the arena refers to its storage, by torch's own count of references. So whatever
still uses it (a view, an output, a tensor saved for a backward) keeps it from being handed out again, and no caller has
to be trusted. An extent that somebody kept beyond its lease is withdrawn: it is theirs, and leaves with them.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from math import prod

import torch
from attrs import frozen
from torch import Tensor

from longspan.memory.extent import Extent, Stream, stream_of
from longspan.spec.backend import BufferSpec

__all__ = ["ArenaStats", "BufferArena", "LIMIT", "Reservation", "THRESHOLD", "buffer_arena"]

THRESHOLD = 32 * 2**20
"""Bytes from which on the arena serves; torch's allocator serves what is smaller, where nothing was measured.

The C library's heap (glibc) gives 32 MiB and more back to the system each time, and keeps smaller pieces, warm.
"""
Need = tuple[int, int]
"""The largest extent that a reservation asked for on a stream, and the most bytes that it had there at once."""
LIMIT = 2**30
"""Bytes that an arena holds at most; what would take it beyond is torch's to serve."""


@frozen
class ArenaStats:
    """What an arena holds and did. Bytes: `held` in all, `leased` of them in use, `peak` the most ever held.

    Requests: `reused` got memory that was there, `fresh` a new extent, `passed` went on to torch's allocator. Extents:
    `withdrawn` were kept by somebody beyond their lease, `dropped` were given back to torch. `shortages`: how often a
    call ran out of memory and all that nobody used was given back, so that it could run again.
    """

    held: int
    leased: int
    peak: int
    extents: int
    reused: int
    fresh: int
    passed: int
    withdrawn: int
    dropped: int
    shortages: int = 0


class BufferArena:
    """Workspace on any device, reused across calls; an `Allocator`.

    Safe among threads: no lock is held while memory is allocated, and no request waits for another's memory. Memory is
    reused on the stream that it was allocated on, in whose order its uses are. While a CUDA graph is captured torch's
    allocator serves. A forked child starts with an empty arena.

    Args:
        threshold: bytes below which torch's allocator serves; `thresholds` holds others for types of devices on which
            they were measured.
        limit: bytes held at most.
        poison: fill what is handed out and what comes back with bytes of ones (NaN in floating dtypes), for tests.
    """

    def __init__(self, *, threshold: int = THRESHOLD, limit: int = LIMIT, poison: bool = False) -> None:
        self.threshold, self.limit, self.poison = threshold, limit, poison
        self.thresholds: dict[str, int] = {}
        self._forced: int | None = None
        self._lock = threading.Lock()
        self._extents: list[Extent] = []
        self._needs: dict[int, dict[Stream, Need]] = {}
        self._ended: deque[int] = deque()  # reservations that died while the lock was held, perhaps by this very thread
        self._numbers = itertools.count(1)
        self._held = self._peak = 0
        self._reused = self._fresh = self._passed = self._withdrawn = self._dropped = self._shortages = 0
        _arenas.add(self)

    def reserve(self, device: str = "cpu") -> Reservation:
        """A view of the arena for one plan; when the last plan that needed some memory dies, that memory goes.

        Args:
            device: the type of device that the plan is for.
        """
        return Reservation(self, next(self._numbers), device)

    def threshold_on(self, device: str) -> int:
        """Bytes from which on the arena serves on a type of device."""
        return self.thresholds.get(device, self.threshold) if self._forced is None else self._forced

    @contextmanager
    def serving_from(self, threshold: int) -> Iterator[None]:
        """Serve all threads from so many bytes on, on every device, for the time of a `with` block in one of them."""
        before, self._forced = self._forced, threshold
        try:
            yield
        finally:
            self._forced = before

    def allocate(self, spec: BufferSpec, device: torch.device, *, owner: int = 0) -> Tensor:
        """Uninitialised memory, which comes back when the last tensor that uses it is dropped; arguments as `lease`."""
        return self._get(spec, device, owner, False, False)[0]

    @contextmanager
    def lease(
        self, spec: BufferSpec, device: torch.device, *, always: bool = False, owner: int = 0
    ) -> Iterator[Tensor]:
        """Uninitialised memory for the time of a `with` block; the tensor is empty after it.

        Args:
            spec: shape and dtype.
            device: where.
            always: serve it below the threshold too, for what a call takes again and again.
            owner: the number of the reservation that needs it, 0 for none.
        """
        tensor, extent = self._get(spec, device, owner, always, True)
        try:
            yield tensor
        finally:
            if extent is not None:
                self._return(tensor, extent)

    def release(self, tensor: Tensor) -> None:
        """Give up the extent behind this tensor, if it is one of the arena's: whoever got the tensor owns it now."""
        if not self._extents:
            return
        address = tensor.untyped_storage().data_ptr()
        with self._lock:
            for extent in [one for one in self._extents if one.address == address]:
                self._forget(extent)
                self._withdrawn += 1
        self._drop_ended()

    def trim(self) -> int:
        """Give back to torch whatever nobody uses; how many bytes that were."""
        with self._lock:
            gone = [extent for extent in self._extents if extent.is_free()]
            self._drop(gone)
        self._drop_ended()
        return sum(extent.size for extent in gone)

    def give_back(self) -> int:
        """`trim`, for a call that ran out of memory; counted in the statistics where that freed any."""
        freed = self.trim()
        if freed:
            with self._lock:
                self._shortages += 1
            self._drop_ended()
        return freed

    @property
    def stats(self) -> ArenaStats:
        """What it holds now and did so far."""
        for _ in range(3):  # a plan may die while they are taken: what it alone needed is not to be counted
            self._drop_ended()
            with self._lock:
                leased = sum(extent.size for extent in self._extents if not extent.is_free())
                counts = self._reused, self._fresh, self._passed, self._withdrawn, self._dropped, self._shortages
                stats = ArenaStats(self._held, leased, self._peak, len(self._extents), *counts)
            if not self._ended:
                break
        self._drop_ended()
        return stats

    def leave(self, owner: int) -> None:
        """A reservation ended, perhaps while this thread holds the lock: a garbage collection may come at any time."""
        self._ended.append(owner)
        self._drop_ended()

    # -- within

    def _get(
        self, spec: BufferSpec, device: torch.device, owner: int, always: bool, leased: bool
    ) -> tuple[Tensor, Extent | None]:
        dtype: torch.dtype = getattr(torch, spec.dtype)
        size = prod(spec.shape) * dtype.itemsize
        fits = 0 < size <= self.limit and (always or size >= self.threshold_on(device.type))
        stream = stream_of(device) if fits else None
        extent = None if stream is None else self._find(stream, size, owner, leased)
        if extent is None:
            self._passed += 1
            return torch.empty(spec.shape, dtype=dtype, device=device), None
        if self.poison:
            extent.poison()
        tensor = extent.as_tensor(spec.shape, dtype)
        extent.reserved = False  # from here on the tensor, or the lease, keeps it
        return tensor, extent

    def _find(self, stream: Stream, size: int, owner: int, leased: bool) -> Extent | None:
        """The smallest free extent that is large enough; else a new one, in place of one that is too small."""
        gone: list[Extent] = []
        with self._lock:
            free = [extent for extent in self._extents if extent.stream == stream and extent.is_free()]
            extent = min((one for one in free if one.size >= size), key=lambda one: one.size, default=None)
            if extent is None:
                extent = Extent(stream, size)
                if free:
                    gone.append(max(free, key=lambda one: one.size))
                room = self.limit - self._held + sum(one.size for one in gone)
                others = (one for one in self._extents if one.is_free() and one not in gone)
                for other in sorted(others, key=lambda one: one.used):
                    if extent.size <= room:
                        break
                    gone.append(other)
                    room += other.size
                if extent.size > room:
                    return None
                self._drop(gone)
                self._extents.append(extent)
                self._held += extent.size
                self._peak = max(self._peak, self._held)
                self._fresh += 1
            else:
                self._reused += 1
            extent.reserved, extent.leased, extent.used, extent.owner = True, leased, next(self._numbers), owner
            self._charge(extent)
        gone.clear()  # freed before the new one is allocated, and outside the lock
        self._drop_ended()
        if not extent.is_allocated:
            try:
                extent.allocate()
            except BaseException:  # an interrupt too: its room is not to be counted
                with self._lock:
                    self._forget(extent)
                raise
        return extent

    def _return(self, tensor: Tensor, extent: Extent) -> None:
        """End a lease: its tensor becomes empty, so that a variable that outlives it can do no harm."""
        with torch.no_grad():
            tensor.set_()  # type: ignore[call-overload]
        with self._lock:
            extent.leased = False
            if extent in self._extents:  # else it was released, or this is a child of a fork
                if not extent.is_free():  # somebody kept a view
                    self._forget(extent)
                    self._withdrawn += 1
                elif extent.doomed:
                    self._drop([extent])
                elif self.poison:
                    extent.poison()
        self._drop_ended()

    def _drop_ended(self) -> None:
        """Drop what ended reservations needed. Whoever holds the lock comes here after it."""
        while self._ended and self._lock.acquire(blocking=False):
            try:
                gone: list[Extent] = []
                while self._ended:
                    if self._needs.pop(self._ended.popleft(), None) is not None:
                        gone += self._shrink()
            finally:
                self._lock.release()
            gone.clear()

    # -- with the lock held

    def _charge(self, extent: Extent) -> None:
        """Note what a reservation needs at once."""
        if extent.owner:
            needs = self._needs.setdefault(extent.owner, {})
            largest, most = needs.get(extent.stream, (0, 0))
            mine = (one for one in self._extents if one.owner == extent.owner and one.stream == extent.stream)
            at_once = sum(one.size for one in mine if one is extent or not one.is_free())
            needs[extent.stream] = max(largest, extent.size), max(most, at_once)

    def _shrink(self) -> list[Extent]:
        """Drop what no living reservation needs."""
        gone: list[Extent] = []
        for stream in {extent.stream for extent in self._extents}:
            needs = [needs[stream] for needs in self._needs.values() if stream in needs]
            largest, most = (max(column) for column in zip(*needs, strict=True)) if needs else (0, 0)
            here = sorted((one for one in self._extents if one.stream == stream), key=lambda one: one.used)
            held = sum(one.size for one in here)
            for extent in sorted(here, key=lambda one: one.size <= largest):  # first those that nobody asks for
                if extent.size > largest or held > most:
                    held -= extent.size
                    if extent.leased or extent.reserved:
                        extent.doomed = True
                    else:
                        gone.append(extent)
        self._drop(gone)
        return gone

    def _drop(self, extents: list[Extent]) -> None:
        for extent in extents:
            self._forget(extent)
            self._dropped += 1

    def _forget(self, extent: Extent) -> None:
        if extent in self._extents:
            self._extents.remove(extent)
            self._held -= extent.size

    def forked(self) -> None:
        """In a child: the threads that leased are not here, and the lock may be theirs."""
        self._lock = threading.Lock()
        self._extents, self._held = [], 0
        self._needs.clear()

    def __repr__(self) -> str:
        return f"BufferArena({self._held / 2**20:.0f} of {self.limit / 2**20:.0f} MiB in {len(self._extents)} extents)"


class Reservation:
    """An arena as one plan sees it; a `LeasingAllocator`. When it dies, what it alone needed is given back."""

    __slots__ = ("_arena", "_device", "_number")

    def __init__(self, arena: BufferArena, number: int, device: str = "cpu") -> None:
        self._arena, self._number, self._device = arena, number, device

    @property
    def threshold(self) -> int:
        """Bytes below which torch's allocator serves."""
        return self._arena.threshold_on(self._device)

    def allocate(self, spec: BufferSpec, device: torch.device) -> Tensor:
        """Uninitialised memory, which comes back when the last tensor that uses it is dropped."""
        return self._arena.allocate(spec, device, owner=self._number)

    def lease(self, spec: BufferSpec, device: torch.device, *, always: bool = False) -> AbstractContextManager[Tensor]:
        """Uninitialised memory for the time of a `with` block."""
        return self._arena.lease(spec, device, always=always, owner=self._number)

    def release(self, tensor: Tensor) -> None:
        """Give up the extent behind this tensor, if it is one of the arena's."""
        self._arena.release(tensor)

    def __del__(self) -> None:
        self._arena.leave(self._number)

    def __repr__(self) -> str:
        return f"Reservation {self._number} of {self._arena!r}"


_arenas: weakref.WeakSet[BufferArena] = weakref.WeakSet()


def _after_fork() -> None:
    for arena in _arenas:
        arena.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_arena = BufferArena()


def buffer_arena() -> BufferArena:
    """The core's workspace, on any device."""
    return _arena
