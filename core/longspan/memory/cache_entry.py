"""What a cache keeps under one key, and what it says about itself."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple

import torch
from attrs import frozen
from torch import Tensor

from longspan.memory.flatten import Parcel
from longspan.memory.offload import Mark
from longspan.spec.problem import Problem

__all__ = ["CacheStats", "Entry", "LayoutKey", "PatternStats", "Queue", "pattern_of"]


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

    `host_bytes` and `device_bytes` are held now; `demotions` went from the device to the host, `promotions` came back,
    in `transfers` copies that took `transfer_seconds`. `patterns` splits hits, misses and bytes by the pattern's text.
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
    transfer_seconds: float
    patterns: Mapping[str, PatternStats]

    @property
    def hit_rate(self) -> float:
        """The share of look-ups that found something; 0 where there were none."""
        return self.hits / max(1, self.hits + self.misses)


class Entry:
    """A layout that is kept. `value` is it where everybody may have the same object, else None.

    `device_flats` are its buffers on devices while it is hot, and `host_flats` their copies on the host while it is
    cold; buffers that never move are in neither, but in the parcel. `moves`: there are others.
    """

    __slots__ = (
        "_rest",
        "device_flats",
        "hits",
        "host_flats",
        "key",
        "mark",
        "moves",
        "parcel",
        "pins",
        "used",
        "value",
    )

    def __init__(self, key: Hashable, parcel: Parcel, used: int, movable: Iterable[torch.device]) -> None:
        self.key, self.parcel, self.used = key, parcel, used
        self.hits = self.pins = 0
        self.value: Any = parcel.value() if parcel.is_plain else None
        self._rest = max(0, parcel.weight - sum(flat.numel() for flat in parcel.flats.values()))
        self.host_flats: dict[torch.device, Tensor] = {}
        self.mark: Mark | None = None
        self.device_flats = {at: parcel.flats.pop(at) for at in movable}
        self.moves = bool(self.device_flats)

    @property
    def device_bytes(self) -> int:
        """What it takes on devices."""
        return sum(flat.numel() for flat in self.device_flats.values())

    @property
    def host_bytes(self) -> int:
        """What it takes elsewhere."""
        packed = (*self.host_flats.values(), *self.parcel.flats.values())
        return self._rest + sum(flat.numel() for flat in packed)

    @property
    def is_cold(self) -> bool:
        """Whether its buffers are to be moved back before it is of use."""
        return bool(self.host_flats)


class Queue:
    """Entries by how long ago they were used. A use is not told to it: it looks when somebody has to go."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Entry]] = []
        self._count = 0

    def add(self, entry: Entry) -> None:
        """Count it in."""
        self._count += 1
        heappush(self._heap, (entry.used, self._count, entry))

    def take(self, among: Mapping[Hashable, Entry], *, hot: bool) -> Entry | None:
        """The least recently used entry that is not pinned; None where there is none.

        Args:
            among: entries that are still kept.
            hot: only those with buffers on a device.
        """
        pinned: list[Entry] = []
        found: Entry | None = None
        while self._heap and found is None:
            used, _, entry = heappop(self._heap)
            if among.get(entry.key) is not entry or (hot and not entry.device_flats):
                continue
            if entry.used != used:
                self.add(entry)
            elif entry.pins:
                pinned.append(entry)
            else:
                found = entry
        for entry in pinned:
            self.add(entry)
        return found

    def forget(self, among: Mapping[Hashable, Entry]) -> None:
        """Let go of entries that are gone, where they are many."""
        if len(self._heap) > 2 * len(among) + 64:
            self._heap = [one for one in self._heap if among.get(one[2].key) is one[2]]
            heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)


def pattern_of(key: Hashable) -> str:
    """The text of a key's pattern, as the statistics group it; empty where the key names no problem."""
    problem = key.problem if isinstance(key, LayoutKey) else key
    return problem.pattern.spec if isinstance(problem, Problem) else ""
