"""Workspace that is kept and handed out again: a large temporary then costs neither page faults nor an allocation.

A block is free when nothing but the arena refers to its storage, by torch's own count of references. So whatever still
uses it (a view, an output, a tensor saved for a backward) keeps it from being handed out again, and no caller has to be
trusted. A block that somebody kept beyond its lease is withdrawn: it is theirs, and leaves with them.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from attrs import frozen
from torch import Tensor

from longspan.memory.reservation import Account, Block, Place, Tenant, place_of
from longspan.spec.backend import BufferSpec

__all__ = ["ArenaStats", "BufferArena", "LIMIT", "THRESHOLD", "buffer_arena"]

THRESHOLD = 32 * 2**20
"""Bytes from which on the arena serves; torch's allocator serves what is smaller, where nothing was measured.

The C library's heap (glibc) gives 32 MiB and more back to the system each time, and keeps smaller pieces, warm.
"""
LIMIT = 2**30
"""Bytes that an arena holds at most; what would take it beyond is torch's to serve."""


@frozen
class ArenaStats:
    """What an arena holds and did. Bytes: `held` in all, `leased` of them in use, `peak` the most ever held.

    Requests: `reused` got memory that was there, `fresh` a new block, `passed` went on to torch's allocator. Blocks:
    `withdrawn` were kept by somebody beyond their lease, `dropped` were given back to torch. `shortages`: how often a
    call ran out of memory and all that nobody used was given back, so that it could run again.
    """

    held: int
    leased: int
    peak: int
    blocks: int
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
        self._blocks: list[Block] = []
        self._tenants: dict[int, Account] = {}
        self._left: deque[int] = deque()  # tenants that died while the lock was held, perhaps by this very thread
        self._numbers = itertools.count(1)
        self._held = self._peak = 0
        self._reused = self._fresh = self._passed = self._withdrawn = self._dropped = self._shortages = 0
        _arenas.add(self)

    def tenant(self, device: str = "cpu") -> Tenant:
        """An account on this arena for one plan; when the last that needed some memory dies, that memory goes.

        Args:
            device: the type of device that the plan is for.
        """
        return Tenant(self, next(self._numbers), device)

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

    def allocate(self, spec: BufferSpec, device: torch.device) -> Tensor:
        """Uninitialised memory, which comes back when the last tensor that uses it is dropped."""
        return self.serve(spec, device, 0)

    @contextmanager
    def lease(self, spec: BufferSpec, device: torch.device, *, always: bool = False) -> Iterator[Tensor]:
        """Uninitialised memory for the time of a `with` block; the tensor is empty after it.

        Args:
            spec: shape and dtype.
            device: where.
            always: serve it below the threshold too, for what a call takes again and again.
        """
        with self.lend(spec, device, always, 0) as tensor:
            yield tensor

    def disown(self, tensor: Tensor) -> None:
        """Give up the block behind this tensor, if it is one of the arena's: whoever got the tensor owns it now."""
        if not self._blocks:
            return
        address = tensor.untyped_storage().data_ptr()
        with self._lock:
            for block in [one for one in self._blocks if one.address == address]:
                self._forget(block)
                self._withdrawn += 1
        self._settle()

    def trim(self) -> int:
        """Give back to torch whatever nobody uses; how many bytes that were."""
        with self._lock:
            gone = [block for block in self._blocks if block.is_free()]
            self._drop(gone)
        self._settle()
        return sum(block.size for block in gone)

    def give_back(self) -> int:
        """`trim`, for a call that ran out of memory; counted in the statistics where that freed any."""
        freed = self.trim()
        if freed:
            with self._lock:
                self._shortages += 1
            self._settle()
        return freed

    @property
    def stats(self) -> ArenaStats:
        """What it holds now and did so far."""
        for _ in range(3):  # a plan may die while they are taken: what it alone needed is not to be counted
            self._settle()
            with self._lock:
                leased = sum(block.size for block in self._blocks if not block.is_free())
                counts = self._reused, self._fresh, self._passed, self._withdrawn, self._dropped, self._shortages
                found = ArenaStats(self._held, leased, self._peak, len(self._blocks), *counts)
            if not self._left:
                break
        self._settle()
        return found

    # -- for tenants

    def serve(self, spec: BufferSpec, device: torch.device, tenant: int) -> Tensor:
        """`allocate`, on a tenant's account."""
        return self._get(spec, device, tenant, False, False)[0]

    @contextmanager
    def lend(self, spec: BufferSpec, device: torch.device, always: bool, tenant: int) -> Iterator[Tensor]:
        """`lease`, on a tenant's account."""
        tensor, block = self._get(spec, device, tenant, always, True)
        try:
            yield tensor
        finally:
            if block is not None:
                self._return(tensor, block)

    def leave(self, tenant: int) -> None:
        """A tenant died, perhaps while this thread holds the lock: a garbage collection may come at any time."""
        self._left.append(tenant)
        self._settle()

    # -- within

    def _get(
        self, spec: BufferSpec, device: torch.device, tenant: int, always: bool, leased: bool
    ) -> tuple[Tensor, Block | None]:
        dtype: torch.dtype = getattr(torch, spec.dtype)
        size = prod(spec.shape) * dtype.itemsize
        fits = 0 < size <= self.limit and (always or size >= self.threshold_on(device.type))
        place = place_of(device) if fits else None
        block = None if place is None else self._find(place, size, tenant, leased)
        if block is None:
            self._passed += 1
            return torch.empty(spec.shape, dtype=dtype, device=device), None
        if self.poison:
            block.poison()
        tensor = block.as_tensor(spec.shape, dtype)
        block.reserved = False  # from here on the tensor, or the lease, keeps it
        return tensor, block

    def _find(self, place: Place, size: int, tenant: int, leased: bool) -> Block | None:
        """The smallest free block that is large enough; else a new one, in place of one that is too small."""
        gone: list[Block] = []
        with self._lock:
            free = [block for block in self._blocks if block.place == place and block.is_free()]
            block = min((one for one in free if one.size >= size), key=lambda one: one.size, default=None)
            if block is None:
                block = Block(place, size)
                if free:
                    gone.append(max(free, key=lambda one: one.size))
                others = (one for one in self._blocks if one.is_free() and one not in gone)
                for one in sorted(others, key=lambda one: one.used):
                    if self._held - sum(x.size for x in gone) + block.size <= self.limit:
                        break
                    gone.append(one)
                if self._held - sum(x.size for x in gone) + block.size > self.limit:
                    return None
                self._drop(gone)
                self._blocks.append(block)
                self._held += block.size
                self._peak = max(self._peak, self._held)
                self._fresh += 1
            else:
                self._reused += 1
            block.reserved, block.leased, block.used, block.tenant = True, leased, next(self._numbers), tenant
            self._charge(block)
        gone.clear()  # freed before the new one is allocated, and outside the lock
        self._settle()
        if not block.is_allocated:
            try:
                block.allocate()
            except BaseException:  # an interrupt too: its room is not to be counted
                with self._lock:
                    self._forget(block)
                raise
        return block

    def _return(self, tensor: Tensor, block: Block) -> None:
        """End a lease: its tensor becomes empty, so that a variable that outlives it can do no harm."""
        with torch.no_grad():
            tensor.set_()  # type: ignore[call-overload]
        with self._lock:
            block.leased = False
            if block in self._blocks:  # else it was disowned, or this is a child of a fork
                if not block.is_free():  # somebody kept a view
                    self._forget(block)
                    self._withdrawn += 1
                elif block.doomed:
                    self._drop([block])
                elif self.poison:
                    block.poison()
        self._settle()

    def _settle(self) -> None:
        """Do what tenants left to be done. Whoever holds the lock comes here after it."""
        while self._left and self._lock.acquire(blocking=False):
            try:
                gone: list[Block] = []
                while self._left:
                    if self._tenants.pop(self._left.popleft(), None) is not None:
                        gone += self._shrink()
            finally:
                self._lock.release()
            gone.clear()

    # -- with the lock held

    def _charge(self, block: Block) -> None:
        """Note what a tenant needs at once."""
        if block.tenant:
            account = self._tenants.setdefault(block.tenant, Account())
            mine = (one for one in self._blocks if one.tenant == block.tenant and one.place == block.place)
            account.note(block.place, block.size, sum(one.size for one in mine if one is block or not one.is_free()))

    def _shrink(self) -> list[Block]:
        """Drop what no living tenant needs."""
        gone: list[Block] = []
        for place in {block.place for block in self._blocks}:
            needs = [account.needs[place] for account in self._tenants.values() if place in account.needs]
            largest, most = (max(column) for column in zip(*needs, strict=True)) if needs else (0, 0)
            here = sorted((one for one in self._blocks if one.place == place), key=lambda one: one.used)
            held = sum(one.size for one in here)
            for block in sorted(here, key=lambda one: one.size <= largest):  # first those that nobody asks for
                if block.size > largest or held > most:
                    held -= block.size
                    if block.leased or block.reserved:
                        block.doomed = True
                    else:
                        gone.append(block)
        self._drop(gone)
        return gone

    def _drop(self, blocks: list[Block]) -> None:
        for block in blocks:
            self._forget(block)
            self._dropped += 1

    def _forget(self, block: Block) -> None:
        if block in self._blocks:
            self._blocks.remove(block)
            self._held -= block.size

    def forked(self) -> None:
        """In a child: the threads that leased are not here, and the lock may be theirs."""
        self._lock = threading.Lock()
        self._blocks, self._held = [], 0
        self._tenants.clear()

    def __repr__(self) -> str:
        return f"BufferArena({self._held / 2**20:.0f} of {self.limit / 2**20:.0f} MiB in {len(self._blocks)} blocks)"


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
