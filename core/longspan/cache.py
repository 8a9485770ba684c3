"""The store that keeps layouts: bounded, least recently used first out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Protocol

__all__ = ["LayoutCache", "LayoutStore"]


class LayoutStore(Protocol):
    """Keeps layouts by a hashable key that says which problem and which backend they are for."""

    def get(self, key: Hashable) -> Any | None:
        """The layout kept under this key, or None."""

    def put(self, key: Hashable, layout: Any) -> None:
        """Keep a layout; may drop others."""


class LayoutCache:
    """The core's default store: the last `size` layouts, shared by all plans of a process.

    Without a lock: each step is atomic, and a lock that another thread holds at a fork would stay locked in the child.
    """

    def __init__(self, size: int = 256) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self.size = size

    def get(self, key: Hashable) -> Any | None:
        """The layout kept under this key, or None."""
        try:
            self._kept.move_to_end(key)
            return self._kept[key]
        except KeyError:
            return None

    def put(self, key: Hashable, layout: Any) -> None:
        """Keep a layout; the least recently used one goes when there are more than `size`."""
        self._kept[key] = layout
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)

    def __repr__(self) -> str:
        return f"LayoutCache({len(self._kept)} of {self.size})"
