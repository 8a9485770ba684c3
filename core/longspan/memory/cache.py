"""The store that keeps layouts: bounded in bytes, least recently used first out, no lock where it finds something."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

from longspan.errors import ArgumentError, warn_caller
from longspan.memory.cached_layout import (
    CachedLayout,
    CacheStats,
    DeviceCopy,
    LayoutKey,
    Offloader,
    PatternStats,
    load,
    offloader_for,
    pattern_of,
)
from longspan.spec.device import Device
from longspan.spec.problem import Problem

__all__ = ["DEVICE_LIMIT", "LIMIT", "LayoutStore", "PatternCache", "pattern_cache"]

LIMIT = 256 * 2**20
"""Bytes on the host."""
DEVICE_LIMIT = 64 * 2**20
"""Bytes on devices."""
MOST = 128
"""Layouts. Each is a small thing that lives long among large things that come and go, and holds their memory apart."""
PATTERNS = 1024
"""Patterns whose hits and misses are told apart; the oldest goes."""


class LayoutStore(Protocol):
    """Keeps layouts by a hashable key that says which problem and which backend they are for."""

    def get(self, key: Hashable) -> Any | None:
        """The layout kept under this key, or None."""

    def put(self, key: Hashable, layout: Any) -> None:
        """Keep a layout; may drop others."""


class PatternCache:
    """The core's store of layouts, one for each device, or a module's own.

    A layout of numbers is shared as it is: it is frozen. One with tensors is kept as a copy and given out as a copy, so
    that nobody can change another's. With a layout is kept what plans copied of it to a device, such as the indices of
    its blocks. What is on a CUDA device stays there while plans use it; of the rest the least recently used goes to
    pinned host memory, and comes back, without waiting, as a plan asks for the layout.

    Safe among threads: finding a frozen layout takes no lock (its counts may then miss a hit or two), all else takes
    one. Safe among forks. It pickles and copies as an empty cache of the same size.

    `longspan.attention` keeps layouts in the shared ones, `longspan.pattern_cache(device)`. For one of your own, or for
    none (any object with `get` and `put` will do, and `get` may return None), make the plan yourself:
    `longspan.plan(problem, pattern_cache=mine)`.

    Args:
        limit: bytes on the host; pinned entries stay, even where they alone take more.
        device_limit: bytes on devices; what is pinned and what plans use stays, even where it alone takes more.
        most: layouts; pinned ones stay, even where they are more.
        offloader_for: how bytes leave a device; for tests.
    """

    def __init__(
        self,
        limit: int = LIMIT,
        device_limit: int = DEVICE_LIMIT,
        most: int = MOST,
        *,
        offloader_for: Callable[[torch.device], Offloader | None] = offloader_for,
    ) -> None:
        self.limit, self.device_limit, self.most = limit, device_limit, most
        self._offloader = lru_cache(maxsize=None)(offloader_for)
        self._lock = threading.RLock()
        self._clock = itertools.count(1)
        self._entries: dict[Hashable, CachedLayout] = {}
        self._loaded: dict[Hashable, Any] = {}
        self._host_bytes = self._device_bytes = 0
        self._misses = self._evictions = self._demotions = self._promotions = self._transfers = 0
        self._patterns: OrderedDict[str, list[int]] = OrderedDict()  # hits of entries that are gone, misses
        _caches.add(self)

    # -- finding and keeping

    def get(self, key: Hashable) -> Any | None:
        """The layout kept under this key, or None. What plans had copied of it to a device begins to come back."""
        cached = self._entries.get(key)
        if cached is None:
            return self._missed(key)
        cached.used = next(self._clock)
        cached.hits += 1
        if cached.copies:
            self._promote([cached])
        return cached.value if cached.value is not None else self._value(cached)

    def put(self, key: Hashable, layout: Any) -> None:
        """Keep a copy of a layout under a key; the least recently used ones go where there is no room."""
        cached = CachedLayout(key, layout, next(self._clock), self._offloader)
        with self._lock:
            before = self._entries.get(key)
            if before is not None:
                cached.pins = before.pins
                self._remove(before)
            self._entries[key] = cached
            self._count(cached, 1)
            self._make_room()

    def prefetch(self, keys: Iterable[Hashable]) -> int:
        """Start moving to the device what will be asked for, by one transfer; how many layouts are on their way.

        Nobody waits: what uses them later comes after the transfer.

        Args:
            keys: keys, or problems, each of which stands for all of its keys.
        """
        present = (self._entries.get(one) for key in keys for one in self._matching(key))
        return self._promote([cached for cached in present if cached is not None])

    def device_copy(self, key: Hashable, layout: Any, name: str, value: Any, device: torch.device) -> DeviceCopy | None:
        """A value that was made of a layout kept here, with its tensors on a device: moved there once for all plans.

        It is counted as the layout's and goes with it, but stays on the device for as long as anybody holds it.

        Args:
            key: the layout's.
            layout: what `get` gave for it, or `put` took. One with tensors of its own is nobody else's: it has none.
            name: of the value, among those made of the layout.
            value: its tensors are on the CPU; used where this name has none yet.
            device: where the tensors are wanted.

        Returns:
            None where the layout is kept no longer, or bytes cannot leave the device: the copy is the caller's to make.
        """
        offloader = self._offloader(device)
        if offloader is None:
            return None
        with self._lock:
            cached = self._entries.get(key)
            if cached is None or layout is None or cached.value is not layout:
                return None
            self._count(cached, -1)
            cached.add_copy(name, device, value, offloader)
            self._count(cached, 1)
            self._promote([cached])
            return cached.copy(name, device)

    def pin(self, key: Hashable) -> None:
        """Keep a layout, where it is, until it is unpinned as often as it was pinned.

        Args:
            key: a key, or a problem, which stands for all of its keys.

        Raises:
            ArgumentError: nothing is kept under it.
        """
        with self._lock:
            for cached in self._known(key):
                cached.pins += 1

    def unpin(self, key: Hashable) -> None:
        """Undo one `pin`.

        Raises:
            ArgumentError: nothing is kept under it, or it is not pinned.
        """
        with self._lock:
            known = self._known(key)
            if not any(cached.pins for cached in known):
                raise ArgumentError("key", repr(key), "one that is pinned", "pin it before")
            for cached in known:
                cached.pins = max(0, cached.pins - 1)
            self._make_room()

    def clear(self) -> None:
        """Forget everything but what was counted."""
        with self._lock:
            for cached in list(self._entries.values()):
                self._remove(cached)
            self._loaded.clear()

    # -- on disk

    def save(self, path: str | Path) -> int:
        """Write the layouts that a release made, for a later process of the same release; how many that were.

        Layouts of objects that are not the core's, and of backends and extensions registered in this process, are left
        out: nobody could tell whether they are still right. A warning says how many of which backend, where there are
        any; `cpu_fused`, which `auto` takes on a CPU, is one whose layouts are its own, and made anew in milliseconds.

        Raises:
            ArgumentError: the file cannot be written.
            LongspanError: safetensors is not installed.
        """
        from longspan.memory import cache_file

        with self._lock:
            kept = [key for key in self._entries if isinstance(key, LayoutKey)]
        layouts = [(key, self._peek(key)) for key in kept if key.origin]
        written, foreign = cache_file.save(path, [(key, layout) for key, layout in layouts if layout is not None])
        left_out = Counter(key.backend for key in (*foreign, *(key for key in kept if not key.origin)))
        if left_out:
            listed = ", ".join(f"{count} of {backend}" for backend, count in sorted(left_out.items()))
            text = f"{path} holds {written} layouts; left out: {listed}, whose layouts are not the core's"
            what = "leave it, as they are made anew, or plan with a backend on the core's layouts (sdpa, say)"
            warn_caller(f"{text}. Next: {what}", UserWarning)
        return written

    def load(self, path: str | Path) -> int:
        """Read what `save` wrote; how many layouts that were: none, with a warning, where another release wrote it.

        Raises:
            ArgumentError: the file cannot be read, is damaged, is none of ours, or others may write to it.
            LongspanError: safetensors is not installed.
        """
        from longspan.memory import cache_file

        layouts = cache_file.load(path)
        with self._lock:
            self._loaded.update({key._replace(generation=0): layout for key, layout in layouts})
        return len(layouts)

    # -- reading

    @property
    def stats(self) -> CacheStats:
        """What it holds and did, at a moment."""
        with self._lock:
            totals = {spec: [*counts, 0] for spec, counts in self._patterns.items()}
            for cached in self._entries.values():
                row = totals.setdefault(pattern_of(cached.key), [0, 0, 0])
                row[0] += cached.hits
                row[2] += cached.host_bytes + cached.device_bytes
            return CacheStats(
                hits=sum(row[0] for row in totals.values()),
                misses=self._misses,
                evictions=self._evictions,
                entries=len(self._entries),
                pinned=sum(cached.pins > 0 for cached in self._entries.values()),
                host_bytes=self._host_bytes,
                device_bytes=self._device_bytes,
                demotions=self._demotions,
                promotions=self._promotions,
                transfers=self._transfers,
                patterns={spec: PatternStats(*row) for spec, row in totals.items()},
            )

    def keys(self) -> tuple[Hashable, ...]:
        """All keys, the oldest first."""
        with self._lock:
            return tuple(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    # -- within

    def _missed(self, key: Hashable) -> Any | None:
        if self._loaded and isinstance(key, LayoutKey) and key.origin:
            layout = self._loaded.pop(key._replace(generation=0), None)
            if layout is not None:
                self.put(key, layout)
                return self.get(key)
        with self._lock:
            self._misses += 1
            self._counts(key)[1] += 1
        return None

    def _peek(self, key: Hashable) -> Any | None:
        cached = self._entries.get(key)
        return None if cached is None else self._value(cached)

    def _value(self, cached: CachedLayout) -> Any:
        """What everybody has, or a copy, on the current stream."""
        if cached.value is not None:
            return cached.value
        with self._lock:
            self._promote([cached])
            data = cached.ready()
        return cached.unpack(data)

    def _promote(self, layouts: Iterable[CachedLayout]) -> int:
        """Move what is offloaded of them to its devices; of how many. It stays there, since somebody waits for it."""
        with self._lock:
            away = [cached for cached in dict.fromkeys(layouts) if cached.offloaded()]
            if not away:
                return 0
            kept = [cached for cached in away if self._entries.get(cached.key) is cached]
            for cached in kept:
                self._count(cached, -1)
            self._transfers += load([buffer for cached in away for buffer in cached.offloaded()])
            self._promotions += len(away)
            for cached in kept:
                self._count(cached, 1)
                cached.used = next(self._clock)
                cached.pins += 1
            self._make_room()
            for cached in kept:
                cached.pins -= 1
            return len(away)

    def _make_room(self) -> None:
        """First down to the host, then out."""
        while self._device_bytes > self.device_limit and (cached := self._oldest(idle=True)):
            self._count(cached, -1)
            for buffer in cached.idle():
                buffer.offload()
                self._transfers += 1
            self._demotions += 1
            self._count(cached, 1)
        while self._is_full() and (cached := self._oldest(idle=False)):
            self._remove(cached)
            self._evictions += 1

    def _oldest(self, *, idle: bool) -> CachedLayout | None:
        """The least recently used of those that are not pinned, or that have something idle on a device besides."""
        loose = (cached for cached in self._entries.values() if not cached.pins and (not idle or cached.idle()))
        return min(loose, key=lambda cached: cached.used, default=None)

    def _is_full(self) -> bool:
        return self._host_bytes > self.limit or len(self._entries) > self.most

    def _remove(self, cached: CachedLayout) -> None:
        del self._entries[cached.key]
        self._count(cached, -1)
        self._counts(cached.key)[0] += cached.hits

    def _count(self, cached: CachedLayout, sign: int) -> None:
        self._host_bytes += sign * cached.host_bytes
        self._device_bytes += sign * cached.device_bytes

    def _counts(self, key: Hashable) -> list[int]:
        """The hits of layouts that are gone, and the misses, of a key's pattern."""
        counts = self._patterns.setdefault(pattern_of(key), [0, 0])
        while len(self._patterns) > PATTERNS:
            self._patterns.popitem(last=False)
        return counts

    def _matching(self, key: Hashable) -> list[Hashable]:
        if key in self._entries or not isinstance(key, Problem):
            return [key]
        return [one for one in self.keys() if isinstance(one, LayoutKey) and one.problem == key]

    def _known(self, key: Hashable) -> list[CachedLayout]:
        known = [self._entries[one] for one in self._matching(key) if one in self._entries]
        if not known:
            raise ArgumentError("key", repr(key), "one that is kept here", "plan the problem first, then pin it")
        return known

    def forked(self) -> None:
        """In a child: the lock may be another thread's, and what that thread was counting is not finished."""
        self._lock = threading.RLock()
        self._host_bytes = self._device_bytes = 0
        for cached in self._entries.values():
            self._count(cached, 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit, self.device_limit, self.most)

    def __repr__(self) -> str:
        held = (self._host_bytes + self._device_bytes) / 2**20
        return f"PatternCache({len(self._entries)} layouts, {held:.1f} of {self.limit / 2**20:.0f} MiB)"


_caches: weakref.WeakSet[PatternCache] = weakref.WeakSet()


def _after_fork() -> None:
    for cache in _caches:
        cache.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_shared: dict[tuple[str, int | None], PatternCache] = {}


def pattern_cache(device: Device | str = "cpu") -> PatternCache:
    """The core's store of layouts for a device, which all plans share that were not given one of their own."""
    kind = device if isinstance(device, Device) else Device.parse(device)
    key = kind.type, kind.index  # a problem does not tell two devices of a kind apart, and a tensor does
    return _shared[key] if key in _shared else _shared.setdefault(key, PatternCache())
