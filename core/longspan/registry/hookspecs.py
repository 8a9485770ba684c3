"""The hooks that make up longspan, and the core's own implementation of each. Name only the arguments that you use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pluggy

from longspan.lowering.blocks import BlockLayout
from longspan.lowering.layout import Layout
from longspan.memory.arena import buffer_arena
from longspan.memory.cache import LayoutStore, pattern_cache
from longspan.memory.workspace import Allocator, Workspace
from longspan.spec.backend import BufferSpec, Capabilities, Kernel, Reason
from longspan.spec.device import Device
from longspan.spec.problem import Problem

__all__ = ["API", "Defaults", "PROJECT", "hookimpl", "hookspec"]

PROJECT = "longspan"
API = 1
"""Version of this contract; a plugin says in `Capabilities.api` which one it was written for."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def longspan_capabilities() -> Capabilities:
    """What the backend can do. Static: no heavy import, no CUDA call. A plugin with this hook is a backend."""


@hookspec(firstresult=True)
def longspan_unsupported(problem: Problem) -> Iterable[Reason]:
    """Reasons against this problem that no field of `Capabilities` can state. Pure: touches no device."""


@hookspec(firstresult=True)
def longspan_pattern(problem: Problem, lower: Callable[[], Layout | BlockLayout]) -> Layout | Any:
    """Pattern generation: the layout of the problem's pattern for its shape and device.

    The core lowers to dense calls, a `Layout`, and block-sparse patterns to a `BlockLayout`: `lower()` returns that,
    made once. A backend that serves the pattern natively may return any value, which only its own `longspan_kernel`
    reads.
    """


@hookspec(firstresult=True)
def longspan_cache(device: Device) -> LayoutStore:
    """Caching: the store that keeps layouts for this device: `get(key)`, `put(key, layout)`, keys being hashable."""


@hookspec(firstresult=True)
def longspan_buffers(problem: Problem, layout: Any) -> Iterable[BufferSpec]:
    """Buffer allocation: the workspace that the kernel wants for this problem."""


@hookspec(firstresult=True)
def longspan_allocator(device: Device) -> Allocator:
    """Buffer allocation: who provides workspace on this device: `allocate(spec, device) -> Tensor`."""


@hookspec(firstresult=True)
def longspan_kernel(problem: Problem, layout: Any, buffers: Workspace) -> Kernel | Callable[..., Any] | None:
    """Kernel compute: `(query, key, value) -> (out, lse)`, or a `Kernel` with a backward.

    None for a problem that the backend would take natively, but would rather have lowered to dense ones.

    Called when a plan is made, never when it runs: heavy imports belong here. For a pattern that the backend does not
    declare, the core asks for kernels of the dense problems it lowers to: their `q_len`, `kv_len`, `head_dim`,
    `is_causal`, `scale` and `dtype` are exact, while the kernel may be called with any `batch` and `heads`.
    """


class Defaults:
    """Lowering, a bounded cache for each device and an arena for all, tried last.

    A backend is complete with capabilities and a kernel.
    """

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
