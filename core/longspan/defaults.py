"""The core's own implementation of every hook, tried last: a backend is complete with capabilities and a kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from longspan.arena import BufferArena
from longspan.block_layout import BlockLayout
from longspan.buffers import Allocator
from longspan.cache import LayoutStore, PatternCache
from longspan.hookspecs import hookimpl
from longspan.layout import Layout
from longspan.lowering import lower
from longspan.spec import BufferSpec, Device, Problem, Reason

__all__ = ["Defaults", "buffer_arena", "pattern_cache"]

_arena = BufferArena()
_caches: dict[tuple[str, int | None], PatternCache] = {}


def pattern_cache(device: Device | str = "cpu") -> PatternCache:
    """The core's store of layouts for a device, which all plans share that were not given one of their own."""
    kind = device if isinstance(device, Device) else Device.parse(device)
    key = kind.type, kind.index  # a problem does not tell two devices of a kind apart, and a tensor does
    return _caches[key] if key in _caches else _caches.setdefault(key, PatternCache())


def buffer_arena() -> BufferArena:
    """The core's workspace, on any device."""
    return _arena


class Defaults:
    """Lowering, a bounded cache for each device and an arena for all."""

    @hookimpl(trylast=True)
    def longspan_unsupported(self, problem: Problem) -> Iterable[Reason]:
        """Nothing beyond what the capabilities say."""
        return ()

    @hookimpl(trylast=True)
    def longspan_pattern(self, problem: Problem) -> Layout | BlockLayout:
        """Lower to dense calls."""
        return lower(problem)

    @hookimpl(trylast=True)
    def longspan_cache(self, device: Device) -> LayoutStore:
        """One store for each device."""
        return pattern_cache(device)

    @hookimpl(trylast=True)
    def longspan_buffers(self, problem: Problem, layout: Any) -> Iterable[BufferSpec]:
        """No workspace."""
        return ()

    @hookimpl(trylast=True)
    def longspan_allocator(self, device: Device) -> Allocator:
        """The arena."""
        return buffer_arena()
