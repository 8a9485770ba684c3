"""A layout that a cache keeps, under which key, and what a cache says about itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from attrs import define, frozen
from torch import Tensor

from longspan.memory.flatten import Packing, nbytes_of, pack
from longspan.memory.offload import Buffer, Offloader
from longspan.spec.problem import Problem

__all__ = ["CacheStats", "CachedLayout", "DeviceCopy", "LayoutKey", "PatternStats", "pattern_of"]


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
