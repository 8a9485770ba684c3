"""Where a plan's layout is kept and its workspace comes from: by the hooks, and by the core where those fail."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch

from longspan.execution.contract import in_hook
from longspan.memory.arena import BufferArena, buffer_arena
from longspan.memory.cache import LayoutStore, PatternCache, pattern_cache
from longspan.memory.cached_layout import LayoutKey
from longspan.memory.workspace import FallbackAllocator, KeepsCopies, LeasingAllocator, TorchAllocator
from longspan.registry.discovery import DEFAULTS, registry
from longspan.registry.profile import current_profile
from longspan.spec.device import Device
from longspan.spec.problem import Problem

__all__ = ["layout_of", "allocator_for"]


def layout_of(problem: Problem, backend: str, own: LayoutStore | None = None) -> tuple[Any, KeepsCopies | None]:
    """The backend's layout of a problem, found, or made and kept; and who keeps copies of it on devices, if anybody.

    Args:
        problem: what is to be computed.
        backend: by whom.
        own: a store of the caller's; an error of its is the caller's too. Without one, that of `longspan_cache`, or
            the core's where that fails.
    """
    key = LayoutKey(problem, backend, _origin(backend, registry.generation), registry.generation)
    if own is not None:
        return _found_or_made(own, key)
    try:
        store = registry.lane(backend, "longspan_cache")(device=problem.device)
        layout = store.get(key)
    except Exception as error:  # noqa: BLE001 - whatever a plugin raises, the plan is made
        _note("longspan_cache", backend, error)
        return _found_or_made(pattern_cache(problem.device), key)
    if layout is None:
        layout = _made(problem, backend)
        try:
            store.put(key, layout)
        except Exception as error:  # noqa: BLE001 - the same
            _note("longspan_cache", backend, error)
            store = pattern_cache(problem.device)
            store.put(key, layout)
    return layout, _copies(store, key, layout)


def allocator_for(problem: Problem, backend: str) -> LeasingAllocator:
    """Who provides workspace to a plan of this backend."""
    try:
        allocator = registry.lane(backend, "longspan_allocator")(device=problem.device)
    except Exception as error:  # noqa: BLE001 - whatever a plugin raises, the plan is made
        _note("longspan_allocator", backend, error)
        allocator = buffer_arena()
    _calibrate(problem.device)
    if isinstance(allocator, BufferArena):
        return allocator.reserve(problem.device.type)
    if isinstance(allocator, TorchAllocator):
        return allocator
    name = registry.provider(backend, "longspan_allocator")
    report = partial(registry.note_fault, name, "longspan_allocator")
    return FallbackAllocator(allocator, buffer_arena().reserve(problem.device.type), report)


def _calibrate(device: Device) -> None:
    """Let the core's arena serve from where it was measured to pay on this device."""
    profile = current_profile(device.name)
    measured = None if profile is None else profile.workspace_threshold
    if measured is not None:
        buffer_arena().thresholds[device.type] = measured
    else:
        buffer_arena().thresholds.pop(device.type, None)


def _note(hook: str, backend: str, error: Exception) -> None:
    registry.note_fault(registry.provider(backend, hook), hook, error)


def _found_or_made(store: LayoutStore, key: LayoutKey) -> tuple[Any, KeepsCopies | None]:
    layout = store.get(key)
    if layout is None:
        layout = _made(key.problem, key.backend)
        store.put(key, layout)
    return layout, _copies(store, key, layout)


def _copies(store: LayoutStore, key: LayoutKey, layout: Any) -> KeepsCopies | None:
    return partial(store.device_copy, key, layout) if isinstance(store, PatternCache) else None


def _made(problem: Problem, backend: str) -> Any:
    # Its tensors outlive the mode that a plan happens to be made in.
    with torch.inference_mode(False), in_hook(backend, "longspan_pattern"):
        return registry.lane(backend, "longspan_pattern")(problem=problem)


@lru_cache(maxsize=256)
def _origin(backend: str, generation: int) -> str:
    """Distribution and version of who makes the layouts; empty where a plugin of this process has a hand in them."""
    impls = registry.lane(backend, "longspan_pattern").get_hookimpls()
    if any(impl.plugin_name not in (backend, DEFAULTS) for impl in impls):
        return ""
    row = next((one for one in registry.backends() if one.name == backend and one.state == "loaded"), None)
    return f"{row.distribution} {row.version}" if row is not None and row.distribution else ""
