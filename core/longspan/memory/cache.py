"""The store that keeps layouts: bounded in bytes, least recently used first out, no lock where it finds something."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from longspan.errors import ArgumentError, warn_caller
from longspan.memory import cache_file
from longspan.memory.cache_entry import CacheStats, Entry, LayoutKey, PatternStats, Queue, pattern_of
from longspan.memory.flatten import Parcel
from longspan.memory.offload import Mover, mover_of
from longspan.memory.transfers import Transfers
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
    that nobody can change another's. Tensors on a CUDA device stay there while they are hot; the least recently used go
    to pinned host memory, and come back, without waiting, when they are asked for.

    Safe among threads: finding an entry takes no lock (its counts may then miss a hit or two), all else takes one. Safe
    among forks. It pickles and copies as an empty cache of the same size.

    `longspan.attention` keeps layouts in the shared ones, `longspan.pattern_cache(device)`. For one of your own, or for
    none (any object with `get` and `put` will do, and `get` may return None), make the plan yourself:
    `longspan.plan(problem, pattern_cache=mine)`.

    Args:
        limit: bytes on the host; pinned entries stay, even where they alone take more.
        device_limit: bytes on devices.
        most: layouts; pinned ones stay, even where they are more.
        mover_of: how bytes leave a device; for tests.
    """

    def __init__(
        self,
        limit: int = LIMIT,
        device_limit: int = DEVICE_LIMIT,
        most: int = MOST,
        *,
        mover_of: Callable[[torch.device], Mover | None] = mover_of,
    ) -> None:
        self.limit, self.device_limit, self.most = limit, device_limit, most
        self._transfers = Transfers(mover_of)
        self._lock = threading.RLock()
        self._clock = itertools.count(1)
        self._entries: dict[Hashable, Entry] = {}
        self._loaded: dict[Hashable, Any] = {}
        self._queue, self._hot = Queue(), Queue()
        self._host_bytes = self._device_bytes = 0
        self._misses = self._evictions = 0
        self._patterns: OrderedDict[str, list[int]] = OrderedDict()  # hits of entries that are gone, misses
        _caches.add(self)

    # -- finding and keeping

    def get(self, key: Hashable) -> Any | None:
        """The layout kept under this key, or None."""
        entry = self._entries.get(key)
        if entry is None:
            return self._missed(key)
        entry.used = next(self._clock)
        entry.hits += 1
        return entry.value if entry.value is not None else self._unpacked(entry)

    def put(self, key: Hashable, layout: Any) -> None:
        """Keep a copy of a layout under a key; the least recently used ones go where there is no room."""
        parcel = Parcel(layout)
        with self._lock:
            entry = Entry(key, parcel, next(self._clock), self._transfers.movable(list(parcel.flats)))
            old = self._entries.get(key)
            if old is not None:
                entry.pins = old.pins
                self._remove(old)
            self._entries[key] = entry
            self._count(entry, 1)
            self._queue.add(entry)
            if entry.device_flats:
                self._hot.add(entry)
            self._make_room()
            for queue in (self._queue, self._hot):
                queue.forget(self._entries)

    def get_batch(self, keys: Iterable[Hashable]) -> list[Any | None]:
        """The layouts kept under these keys; those that have to come back to a device come by one transfer."""
        keys = list(keys)
        self._promote(self._present(keys))
        return [self.get(key) for key in keys]

    def prefetch(self, keys: Iterable[Hashable]) -> int:
        """Start moving to the device what will be asked for; how many are on their way. A later `get` comes after it.

        Args:
            keys: keys, or problems, each of which stands for all of its keys.
        """
        wanted = [one for key in keys for one in self._matching(key)]
        return self._promote(self._present(wanted))

    def _present(self, keys: Iterable[Hashable]) -> list[Entry]:
        """Their entries; each looked up once, as another thread may push one out between two looks."""
        found = [self._entries.get(key) for key in keys]
        return [entry for entry in found if entry is not None]

    def pin(self, key: Hashable) -> None:
        """Keep an entry, where it is, until it is unpinned as often as it was pinned.

        Args:
            key: a key, or a problem, which stands for all of its keys.

        Raises:
            ArgumentError: nothing is kept under it.
        """
        with self._lock:
            for entry in self._known(key):
                entry.pins += 1

    def unpin(self, key: Hashable) -> None:
        """Undo one `pin`.

        Raises:
            ArgumentError: nothing is kept under it, or it is not pinned.
        """
        with self._lock:
            entries = self._known(key)
            if not any(entry.pins for entry in entries):
                raise ArgumentError("key", repr(key), "one that is pinned", "pin it before")
            for entry in entries:
                entry.pins = max(0, entry.pins - 1)
            self._make_room()

    def clear(self) -> None:
        """Forget everything but what was counted."""
        with self._lock:
            for entry in list(self._entries.values()):
                self._remove(entry)
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
        with self._lock:
            kept = [key for key in self._entries if isinstance(key, LayoutKey)]
        found = [(key, self._peek(key)) for key in kept if key.origin]
        written, foreign = cache_file.save(path, [(key, layout) for key, layout in found if layout is not None])
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
        found = cache_file.load(path)
        with self._lock:
            self._loaded.update({key._replace(generation=0): layout for key, layout in found})
        return len(found)

    # -- reading

    @property
    def stats(self) -> CacheStats:
        """What it holds and did, at a moment."""
        with self._lock:
            totals = {spec: [*counts, 0] for spec, counts in self._patterns.items()}
            for entry in self._entries.values():
                row = totals.setdefault(pattern_of(entry.key), [0, 0, 0])
                row[0] += entry.hits
                row[2] += entry.host_bytes + entry.device_bytes
            return CacheStats(
                hits=sum(row[0] for row in totals.values()),
                misses=self._misses,
                evictions=self._evictions,
                entries=len(self._entries),
                pinned=sum(entry.pins > 0 for entry in self._entries.values()),
                host_bytes=self._host_bytes,
                device_bytes=self._device_bytes,
                demotions=self._transfers.demotions,
                promotions=self._transfers.promotions,
                transfers=self._transfers.count,
                transfer_seconds=self._transfers.seconds,
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
        entry = self._entries.get(key)
        if entry is None:
            return None
        return entry.value if entry.value is not None else self._unpacked(entry)

    def _unpacked(self, entry: Entry) -> Any:
        """A copy, on the current stream."""
        if not entry.moves:
            return entry.parcel.value()
        with self._lock:
            self._promote([entry])
            device_flats, mark = dict(entry.device_flats), entry.mark
            if mark is not None:
                mark.wait()
            for at, flat in device_flats.items():
                self._transfers.use(at, flat)
        return entry.parcel.value({**entry.parcel.flats, **device_flats})

    def _promote(self, entries: Iterable[Entry]) -> int:
        """Move those that are cold to their devices; how many. They stay there, since somebody waits for them."""
        with self._lock:
            cold = list(dict.fromkeys(entry for entry in entries if entry.is_cold))
            if not cold:
                return 0
            kept = [entry for entry in cold if self._entries.get(entry.key) is entry]
            for entry in kept:
                self._count(entry, -1)
            self._transfers.up(cold)
            for entry in kept:
                self._count(entry, 1)
                entry.used = next(self._clock)
                entry.pins += 1
                self._hot.add(entry)
            self._make_room()
            for entry in kept:
                entry.pins -= 1
        return len(cold)

    def _make_room(self) -> None:
        """First down to the host, then out."""
        while self._device_bytes > self.device_limit and (entry := self._hot.take(self._entries, hot=True)):
            self._count(entry, -1)
            self._transfers.down(entry)
            self._count(entry, 1)
        while self._is_full() and (entry := self._queue.take(self._entries, hot=False)):
            self._remove(entry)
            self._evictions += 1

    def _is_full(self) -> bool:
        return self._host_bytes > self.limit or len(self._entries) > self.most

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.key]
        self._count(entry, -1)
        self._counts(entry.key)[0] += entry.hits

    def _count(self, entry: Entry, sign: int) -> None:
        self._host_bytes += sign * entry.host_bytes
        self._device_bytes += sign * entry.device_bytes

    def _counts(self, key: Hashable) -> list[int]:
        found = self._patterns.setdefault(pattern_of(key), [0, 0])
        while len(self._patterns) > PATTERNS:
            self._patterns.popitem(last=False)
        return found

    def _matching(self, key: Hashable) -> list[Hashable]:
        if key in self._entries or not isinstance(key, Problem):
            return [key]
        return [one for one in self.keys() if isinstance(one, LayoutKey) and one.problem == key]

    def _known(self, key: Hashable) -> list[Entry]:
        entries = [self._entries[one] for one in self._matching(key) if one in self._entries]
        if not entries:
            raise ArgumentError("key", repr(key), "one that is kept here", "plan the problem first, then pin it")
        return entries

    def forked(self) -> None:
        """In a child: the lock may be another thread's, and what that thread was counting is not finished."""
        self._lock = threading.RLock()
        self._queue, self._hot = Queue(), Queue()
        self._host_bytes = self._device_bytes = 0
        for entry in self._entries.values():
            self._count(entry, 1)
            self._queue.add(entry)
            if entry.device_flats:
                self._hot.add(entry)

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
