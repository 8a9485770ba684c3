"""The core's own implementation of every hook, tried last: a backend is complete with capabilities and a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from longspan.lowering.blocks import BlockLayout
from longspan.lowering.layout import Layout
from longspan.memory.arena import buffer_arena
from longspan.memory.cache import LayoutStore, pattern_cache
from longspan.memory.workspace import Allocator
from longspan.registry.hookspecs import hookimpl
from longspan.spec.backend import BufferSpec, Reason
from longspan.spec.device import Device
from longspan.spec.problem import Problem

__all__ = ["Defaults"]


class Defaults:
    """Lowering, a bounded cache for each device and an arena for all."""

    @hookimpl(trylast=True)
    def longspan_unsupported(self, problem: Problem) -> Iterable[Reason]:
        """Nothing beyond what the capabilities say."""
        return ()

    @hookimpl(trylast=True)
    def longspan_pattern(self, lower: Callable[[], Layout | BlockLayout]) -> Layout | BlockLayout:
        """Lower to dense calls, block-sparse patterns to blocks."""
        return lower()

    @hookimpl(trylast=True)
    def longspan_cache(self, device: Device) -> LayoutStore:
        """One store for each device."""
        return pattern_cache(device)

    @hookimpl(trylast=True)
    def longspan_buffers(self, problem: Problem, layout: Any) -> Iterable[BufferSpec]:
        """A backend that declares no workspace gets none."""
        return ()

    @hookimpl(trylast=True)
    def longspan_allocator(self, device: Device) -> Allocator:
        """The arena, which all devices share."""
        return buffer_arena()
