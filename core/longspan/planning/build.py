"""Making what a plan runs: the only place where a backend's hooks are called, and the core serves where those fail.

The way is decided already (`lowering.route`); here the layout is found or made, workspace is arranged for, and kernels
are made: one for the whole problem, or one for each dense problem that it was lowered to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from longspan.errors import PluginError, brief
from longspan.execution.blocks import BlockRunner
from longspan.execution.chosen import ChosenBlocks
from longspan.execution.direct import DirectRunner, by_the_core
from longspan.execution.kernel import CheckedKernel, MaskedKernel, in_hook
from longspan.execution.runner import Gradients, Runner
from longspan.execution.strided import LoweredRunner
from longspan.execution.topk import ChoosingRunner, Way
from longspan.lowering.blocks import BlockLayout
from longspan.lowering.dense import lower
from longspan.lowering.layout import Layout
from longspan.lowering.masked import MaskedLayout
from longspan.lowering.route import Blocks, Lowering, Native, Route, lowered
from longspan.lowering.segments import Span
from longspan.memory.arena import BufferArena, buffer_arena
from longspan.memory.cache import LayoutStore, PatternCache, pattern_cache
from longspan.memory.cached_layout import LayoutKey
from longspan.memory.workspace import FallbackAllocator, KeepsCopies, LeasingAllocator, TorchAllocator, Workspace
from longspan.patterns.blocks.csr import HeadBlocks
from longspan.patterns.blocks.sparse import BlockSparse
from longspan.patterns.topk.choice import Part, layouts_of
from longspan.patterns.topk.pattern import TopKBlocks, scorings
from longspan.registry.discovery import DEFAULTS, registry
from longspan.registry.explain import explain
from longspan.registry.profile import current_profile
from longspan.spec.backend import BufferSpec, Kernel
from longspan.spec.device import Device
from longspan.spec.pattern import Dense
from longspan.spec.problem import Problem

__all__ = ["build"]


def build(
    lowering: Lowering,
    backend: str,
    store: LayoutStore | None = None,
    in_graph: Callable[..., Gradients] | None = None,
) -> tuple[Runner, Route]:
    """What a backend runs for a problem, and which way that is.

    Args:
        lowering: the problem's.
        backend: by whom.
        store: a store of layouts of the caller's own.
        in_graph: the backward by its operator, as of `Runner`.

    Raises:
        PluginError: the backend returned what the hook contract does not allow.
    """
    if not isinstance(lowering.asked.pattern, TopKBlocks):
        return _build(lowering, backend, store, in_graph)
    can, made, declined = registry.capabilities(backend), list[Kernel](), list[Problem]()

    def way(document: Problem) -> Way:
        return _way(document, backend, made, declined)

    runner = ChoosingRunner(lowering.asked, way, made)
    return runner, lowering.lowered(can) if declined else lowering.route(can)


class _NothingKept:
    """A store of layouts that keeps none: those of a content's choice do not come again."""

    def get(self, key: Any) -> None:
        """Nothing."""

    def put(self, key: Any, layout: Any) -> None:
        """Nothing."""


def _way(problem: Problem, backend: str, made: list[Kernel], declined: list[Problem]) -> Way:
    """How chosen blocks of one document are run: all of them as dense attention, else natively, else as dense problems.

    Kernels are added to `made`. A native kernel without `for_blocks` is bound to the blocks that it was made for, and
    would need its hooks at every call: where the backend runs dense problems too, those serve, and `declined` says so.
    """
    can, lowering = registry.capabilities(backend), Lowering(problem)
    route = lowering.route(can)
    whole: Runner | None = None
    if isinstance(route, Native) or isinstance(route.problem.pattern, Dense):
        whole, route = _build(lowering, backend, _NothingKept(), None)
        made += whole.kernels
    folded, allocator = lowering.problem, _allocator_for(problem, backend)

    def kernel(dense: Problem) -> CheckedKernel:
        made.append(_kernel(dense, lower(dense), backend, allocator))
        return CheckedKernel(made[-1], backend, gqa=can.gqa, scale=dense.scale)

    as_blocks = ChosenBlocks(folded, kernel, Workspace((), allocator))

    def as_dense(part: Part, chosen: Tensor) -> Runner:
        return whole if whole is not None and chosen is part.chosen else as_blocks(part, chosen)

    def natively(part: Part, chosen: Tensor) -> Runner:
        csrs = layouts_of(chosen, part.scoring)
        span = Span(0, 0, part.scoring.query_offset, part.scoring.q_len, part.scoring.kv_len)
        layout = BlockLayout((span,), (HeadBlocks(csrs, tuple(range(len(csrs)))),))
        native = for_blocks(layout) if for_blocks is not None else None
        if native is None:
            return as_blocks(part, chosen)
        return DirectRunner(layout, native, backend, folded.scale, partial(as_blocks, part, chosen))

    def made_anew(part: Part, chosen: Tensor) -> Runner:
        """By the hooks at every call: what is left for a backend with such a kernel, and none for dense problems."""
        pattern = BlockSparse(part.scoring.block_size, layouts_of(chosen, part.scoring))
        return _build(Lowering(folded.replace(pattern=pattern), may_mask=False), backend, _NothingKept(), None)[0]

    if isinstance(route.problem.pattern, Dense):
        return as_dense
    if isinstance(route, Native):
        assert whole is not None  # made above
        for_blocks = whole.kernels[0].for_blocks
        if for_blocks is not None:
            return natively
        parts = lowering.lowered(can).parts
        if not (can.runs("dense") and all(explain(part, backend=backend)[backend].ok for part in parts)):
            return made_anew
        del made[-len(whole.kernels) :]
        declined.append(problem)
    assert isinstance(problem.pattern, TopKBlocks)
    ((_, scoring),) = scorings(problem)
    as_blocks.prepare(scoring, problem.pattern.k)
    return as_blocks


def _build(
    lowering: Lowering, backend: str, store: LayoutStore | None, in_graph: Callable[..., Gradients] | None
) -> tuple[Runner, Route]:
    can = registry.capabilities(backend)
    lowering = lowering.of(can)
    problem, route = lowering.problem, lowering.route(can)
    layout, copies = _layout_of(lowering, backend, store)
    allocator = _allocator_for(problem, backend)
    memory = Workspace((), allocator, copies)
    if isinstance(route, Native):
        if whole := _kernel_or_none(problem, layout, backend, allocator, copies):
            core = partial(by_the_core, problem, memory)
            return DirectRunner(layout, whole, backend, problem.scale, core, in_graph), route
        route = lowering.lowered(can)
    if not isinstance(layout, Layout | BlockLayout) and not can.runs(problem.pattern.kind):
        raise PluginError(
            f"{backend}'s longspan_pattern returned {type(layout).__name__} for {problem.pattern.kind!r}, which it "
            "does not declare. Next: return None there, or declare it in Capabilities.patterns"
        )
    # The backend's own layout is for problems that its kernel takes natively; one of the core's kind may be another's.
    if isinstance(layout, type(lowering.layout)) and layout is not lowering.layout:
        route = lowered(problem, layout, lowering.means(can))
    made: dict[Problem, Kernel] = {}

    def kernel(dense: Problem) -> Kernel:
        if dense not in made:
            made[dense] = _kernel(dense, lower(dense), backend, allocator)
        return made[dense]

    if isinstance(route, Blocks):
        kernels = {
            lengths: CheckedKernel(kernel(dense), backend, gqa=can.gqa, scale=dense.scale)
            for lengths, dense in route.shapes.items()
        }
        every = tuple(made.values())
        return BlockRunner(route.layout, route.jobs, kernels, problem, memory, every, in_graph), route
    steps: list[CheckedKernel] = []
    slabs = route.layout.slabs if isinstance(route.layout, MaskedLayout) else ()
    for number, dense in enumerate(route.calls):
        known: dict[str, Any] = {"gqa": can.gqa, "scale": dense.scale}
        if slabs:
            steps.append(MaskedKernel(kernel(dense), backend, slab=slabs[number], memory=memory, **known))
        else:
            steps.append(CheckedKernel(kernel(dense), backend, is_causal=dense.is_causal, **known))
    return LoweredRunner(problem, route.layout, steps, memory, tuple(made.values()), in_graph), route


def _layout_of(lowering: Lowering, backend: str, own: LayoutStore | None) -> tuple[Any, KeepsCopies | None]:
    """The backend's layout of a problem, found, or made and kept; and who keeps copies of it on devices, if anybody.

    An error of a store of the caller's own is the caller's too. Without one, that of `longspan_cache` serves, or the
    core's where that fails.
    """
    problem = lowering.problem
    key = LayoutKey(problem, backend, _origin(backend, registry.generation), registry.generation)
    if own is not None:
        return _found_or_made(own, key, lowering)
    try:
        store = registry.lane(backend, "longspan_cache")(device=problem.device)
        layout = store.get(key)
    except Exception as error:  # noqa: BLE001 - whatever a plugin raises, the plan is made
        _note("longspan_cache", backend, error)
        return _found_or_made(pattern_cache(problem.device), key, lowering)
    if layout is None:
        layout = _made(lowering, backend)
        try:
            store.put(key, layout)
        except Exception as error:  # noqa: BLE001 - the same
            _note("longspan_cache", backend, error)
            store = pattern_cache(problem.device)
            store.put(key, layout)
    return layout, _copies(store, key, layout)


def _allocator_for(problem: Problem, backend: str) -> LeasingAllocator:
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


def _found_or_made(store: LayoutStore, key: LayoutKey, lowering: Lowering) -> tuple[Any, KeepsCopies | None]:
    layout = store.get(key)
    if layout is None:
        layout = _made(lowering, key.backend)
        store.put(key, layout)
    return layout, _copies(store, key, layout)


def _copies(store: LayoutStore, key: LayoutKey, layout: Any) -> KeepsCopies | None:
    return partial(store.device_copy, key, layout) if isinstance(store, PatternCache) else None


def _made(lowering: Lowering, backend: str) -> Any:
    # Its tensors outlive the mode that a plan happens to be made in.
    with torch.inference_mode(False), in_hook(backend, "longspan_pattern"):
        return registry.lane(backend, "longspan_pattern")(problem=lowering.problem, lower=lambda: lowering.layout)


@lru_cache(maxsize=256)
def _origin(backend: str, generation: int) -> str:
    """Distribution and version of who makes the layouts; empty where a plugin of this process has a hand in them."""
    impls = registry.lane(backend, "longspan_pattern").get_hookimpls()
    if any(impl.plugin_name not in (backend, DEFAULTS) for impl in impls):
        return ""
    row = next((one for one in registry.backends() if one.name == backend and one.state == "loaded"), None)
    return f"{row.distribution} {row.version}" if row is not None and row.distribution else ""


def _kernel(problem: Problem, layout: Any, backend: str, allocator: LeasingAllocator) -> Kernel:
    kernel = _kernel_or_none(problem, layout, backend, allocator)
    if kernel is None:
        raise PluginError(
            f"{backend}'s longspan_kernel returned None for {problem}; want a callable or a Kernel. "
            "Next: return the function that computes (out, lse), or refuse the problem in longspan_unsupported"
        )
    return kernel


def _kernel_or_none(
    problem: Problem, layout: Any, backend: str, allocator: LeasingAllocator, copies: KeepsCopies | None = None
) -> Kernel | None:
    """The backend's kernel; None where it would rather have the pattern lowered."""
    with in_hook(backend, "longspan_buffers"):
        wanted = registry.lane(backend, "longspan_buffers")(problem=problem, layout=layout)
    specs = _specs(wanted, backend)
    workspace = Workspace(specs, allocator, copies)
    with in_hook(backend, "longspan_kernel"):
        kernel = registry.lane(backend, "longspan_kernel")(problem=problem, layout=layout, buffers=workspace)
    if kernel is None:
        return None
    if not isinstance(kernel, Kernel):
        if not callable(kernel):
            raise PluginError(
                f"{backend}'s longspan_kernel returned {type(kernel).__name__}; want a callable or a Kernel. "
                "Next: return the function that computes (out, lse)"
            )
        kernel = Kernel(kernel)
    if not specs:
        return kernel
    forward = _releasing_results(kernel.forward, workspace)
    return evolve(kernel, forward=forward, backward=kernel.backward and _releasing_results(kernel.backward, workspace))


def _specs(wanted: object, backend: str) -> tuple[BufferSpec, ...]:
    """What `longspan_buffers` returned, checked."""
    specs = tuple(wanted) if isinstance(wanted, Iterable) else (wanted,)
    if not all(isinstance(spec, BufferSpec) for spec in specs):
        raise PluginError(
            f"{backend}'s longspan_buffers returned {brief(wanted)}; want longspan.BufferSpecs. "
            "Next: return a list of longspan.BufferSpec(name, shape, dtype)"
        )
    return specs


def _releasing_results(run: Callable[..., Any], workspace: Workspace) -> Callable[..., Any]:
    """A kernel with workspace might return some of it: what it returns is the caller's from then on."""

    def running(*tensors: Tensor, **given: Any) -> Any:
        results = run(*tensors, **given)
        if isinstance(results, tuple | list):  # else it is refused later
            workspace.release(one for one in results if isinstance(one, Tensor))
        return results

    return running
