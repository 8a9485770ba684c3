"""Moving a cache's entries between devices and the host, and what that took."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from longspan.memory.cache_entry import Entry
from longspan.memory.offload import Mark, Mover

__all__ = ["Transfers"]

WATCHED = 64
"""Transfers whose time is not known yet, before they are asked again."""


class Transfers:
    """Moves entries up to their devices and down to the host. Called with the cache's lock held."""

    def __init__(self, mover_of: Callable[[torch.device], Mover | None]) -> None:
        self._mover_of = mover_of
        self._movers: dict[torch.device, Mover | None] = {}
        self._marks: list[Mark] = []
        self._seconds = 0.0
        self.count = self.promotions = self.demotions = 0

    def movable(self, devices: Iterable[torch.device]) -> list[torch.device]:
        """Those of the devices whose buffers can leave them."""
        return [at for at in devices if self._mover(at) is not None]

    def up(self, entries: Sequence[Entry]) -> None:
        """Bring cold entries to their devices, all by one transfer for each device."""
        for at in dict.fromkeys(at for entry in entries for at in entry.host_flats):
            mine = [entry for entry in entries if at in entry.host_flats]
            mover = self._mover(at)
            assert mover is not None  # else they would not have left
            flats, mark = mover.to_device([entry.host_flats[at] for entry in mine])
            self._watch(mark)
            for entry, flat in zip(mine, flats, strict=True):
                entry.mark = mark
                entry.device_flats[at] = flat
                del entry.host_flats[at]
        self.promotions += len(entries)

    def down(self, entry: Entry) -> None:
        """Bring an entry to the host."""
        for at, flat in list(entry.device_flats.items()):
            mover = self._mover(at)
            assert mover is not None
            entry.host_flats[at], mark = mover.to_host(flat)
            del entry.device_flats[at]
            self._watch(mark)
        self.demotions += 1

    def use(self, at: torch.device, flat: Tensor) -> None:
        """The current stream reads a buffer that is on this device."""
        if (mover := self._mover(at)) is not None:
            mover.use(flat)

    @property
    def seconds(self) -> float:
        """What finished transfers took."""
        done = [(mark, mark.seconds()) for mark in self._marks]
        self._seconds += sum(seconds for _, seconds in done if seconds is not None)
        self._marks = [mark for mark, seconds in done if seconds is None]
        return self._seconds

    def _mover(self, at: torch.device) -> Mover | None:
        if at not in self._movers:
            self._movers[at] = self._mover_of(at)
        return self._movers[at]

    def _watch(self, mark: Mark) -> None:
        self.count += 1
        self._marks.append(mark)
        if len(self._marks) > WATCHED:
            _ = self.seconds
