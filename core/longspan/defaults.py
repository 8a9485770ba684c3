"""The core's own implementation of every hook, tried last: a backend is complete with capabilities and a kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from longspan.buffers import Allocator, TorchAllocator
from longspan.cache import LayoutCache, LayoutStore
from longspan.hookspecs import hookimpl
from longspan.layout import Layout
from longspan.lowering import lower
from longspan.spec import BufferSpec, Device, Problem, Reason

__all__ = ["Defaults"]


class Defaults:
    """Lowering, a bounded cache and torch's allocator."""

    def __init__(self) -> None:
        self._cache = LayoutCache()
        self._allocator = TorchAllocator()

    @hookimpl(trylast=True)
    def longspan_unsupported(self, problem: Problem) -> Iterable[Reason]:
        """Nothing beyond what the capabilities say."""
        return ()

    @hookimpl(trylast=True)
    def longspan_pattern(self, problem: Problem) -> Layout:
        """Lower to dense calls."""
        return lower(problem)

    @hookimpl(trylast=True)
    def longspan_cache(self, device: Device) -> LayoutStore:
        """One store for all devices."""
        return self._cache

    @hookimpl(trylast=True)
    def longspan_buffers(self, problem: Problem, layout: Any) -> Iterable[BufferSpec]:
        """No workspace."""
        return ()

    @hookimpl(trylast=True)
    def longspan_allocator(self, device: Device) -> Allocator:
        """torch's own."""
        return self._allocator
