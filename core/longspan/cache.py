"""The store that keeps layouts: bounded, least recently used first out."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Any, Protocol

from longspan.spec import Problem

__all__ = ["LayoutCache", "LayoutStore"]


class LayoutStore(Protocol):
    """Keeps layouts by problem."""

    def get(self, problem: Problem) -> Any | None:
        """The layout kept for this problem, or None."""

    def put(self, problem: Problem, layout: Any) -> None:
        """Keep a layout; may drop others."""


class LayoutCache:
    """The core's default store: the last `size` layouts, shared by all plans of a process."""

    def __init__(self, size: int = 256) -> None:
        self._kept: OrderedDict[Problem, Any] = OrderedDict()
        self._lock = Lock()
        self.size = size

    def get(self, problem: Problem) -> Any | None:
        """The layout kept for this problem, or None."""
        with self._lock:
            if problem not in self._kept:
                return None
            self._kept.move_to_end(problem)
            return self._kept[problem]

    def put(self, problem: Problem, layout: Any) -> None:
        """Keep a layout; the least recently used one goes when there are more than `size`."""
        with self._lock:
            self._kept[problem] = layout
            self._kept.move_to_end(problem)
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)

    def __repr__(self) -> str:
        return f"LayoutCache({len(self._kept)} of {self.size})"
