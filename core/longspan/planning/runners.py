"""What a plan runs: one kernel for the whole problem, or the kernels of the dense calls that it was lowered to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from attrs import evolve
from torch import Tensor

from longspan.errors import PluginError, brief
from longspan.execution.autograd import Runner
from longspan.execution.blocks import BlockRunner
from longspan.execution.contract import check_gradients, check_result, in_hook, note_kernel
from longspan.execution.masked import MaskedStep
from longspan.execution.strided import Step, run_backward, run_forward
from longspan.execution.topk import ChoosingRunner, NothingKept
from longspan.lowering.blocks import BlockLayout
from longspan.lowering.cost import settle
from longspan.lowering.dense import as_dense, dense_problem, lay_blocks, lower
from longspan.lowering.layout import Layout
from longspan.lowering.masked import MaskedLayout
from longspan.lowering.schedule import dense_parts, schedule
from longspan.memory.cache import LayoutStore
from longspan.memory.workspace import KeepsCopies, LeasingAllocator, Workspace
from longspan.numerics.dropout import Draw
from longspan.numerics.tensors import unit_stride
from longspan.patterns.blocks.sparse import BlockSparse
from longspan.patterns.topk.pattern import TopKBlocks
from longspan.planning.providers import allocator_for, layout_of
from longspan.registry.discovery import registry
from longspan.registry.resolve import is_native
from longspan.spec.backend import BufferSpec, Forward, Kernel
from longspan.spec.problem import Problem

__all__ = ["DirectRunner", "LoweredRunner", "make_runner"]


def make_runner(
    problem: Problem, backend: str, pattern_cache: LayoutStore | None = None, *, weighs: bool = True
) -> DirectRunner | LoweredRunner | BlockRunner | ChoosingRunner:
    """Make the kernels of a backend for a problem: with `providers`, the only place where its hooks are called.

    Args:
        problem: what is to be computed.
        backend: by whom.
        pattern_cache: a store of layouts of the caller's own.
        weighs: a block-sparse pattern may run as dense attention under a mask where that costs less; not where blocks
            are chosen from content, of which later tokens would then decide how earlier ones are computed.

    Raises:
        PluginError: the backend returned what the hook contract does not allow.
    """
    if isinstance(problem.pattern, TopKBlocks):
        return ChoosingRunner(problem, partial(make_runner, backend=backend, pattern_cache=NothingKept(), weighs=False))
    can = registry.capabilities(backend)
    if not weighs:
        can = evolve(can, mask=False)
    if can.runs("dense") and (dense := as_dense(problem, may_be_causal=can.causal)) is not None:
        return make_runner(dense, backend, pattern_cache)
    layout, copies = layout_of(problem, backend, pattern_cache)
    if isinstance(problem.pattern, BlockSparse) and isinstance(layout, Layout):
        layout = lay_blocks(problem)  # dense attention is beyond this backend
    allocator = allocator_for(problem, backend)
    memory = Workspace((), allocator, copies)
    if is_native(problem, can) and (whole := _offered(problem, layout, backend, allocator, copies)):
        return DirectRunner(problem, layout, whole, backend, memory)
    if not isinstance(layout, Layout | BlockLayout):
        if not can.runs(problem.pattern.kind):
            raise PluginError(
                f"{backend}'s longspan_pattern returned {type(layout).__name__} for {problem.pattern.kind!r}, which it "
                "does not declare. Next: return None there, or declare it in Capabilities.patterns"
            )
        # The backend's own layout is for problems that its kernel takes natively.
        layout = lower(problem, may_be_causal=can.causal)
    kernels: list[Kernel] = []

    def kernel_for(dense: Problem) -> Kernel:
        kernels.append(_kernel(dense, lower(dense), backend, allocator))
        return kernels[-1]

    if isinstance(layout, BlockLayout):
        layout = settle(problem, layout, can)
    if isinstance(layout, BlockLayout):
        jobs = schedule(problem, layout)
        parts = {
            key: Step(kernel_for(dense), backend, gqa=can.gqa, is_causal=False, scale=dense.scale)
            for key, dense in dense_parts(problem, jobs).items()
        }
        return BlockRunner(layout, jobs, parts, problem.scale, kernels, memory=memory)
    made: dict[Problem, Kernel] = {}
    steps: list[Step] = []
    for number, call in enumerate(layout.calls):
        dense = dense_problem(problem, call, can.gqa)
        kernel = made[dense] = made.get(dense) or kernel_for(dense)
        if isinstance(layout, MaskedLayout):
            slab = layout.slabs[number]
            steps.append(MaskedStep(kernel, backend, gqa=can.gqa, scale=dense.scale, slab=slab, memory=memory))
        else:
            steps.append(Step(kernel, backend, gqa=can.gqa, is_causal=dense.is_causal, scale=dense.scale))
    return LoweredRunner(layout, steps, kernels, memory)


class LoweredRunner(Runner):
    """Runs a layout call by call."""

    quick = None

    def __init__(
        self, layout: Layout, steps: Sequence[Step], kernels: Iterable[Kernel] = (), memory: Workspace | None = None
    ) -> None:
        self.layout, self._steps, self._memory = layout, steps, memory
        self.operators = tuple(dict.fromkeys(name for kernel in kernels for name in kernel.operators))
        self.libraries = tuple(dict.fromkeys(kernel.library for kernel in kernels if kernel.library))
        self.own_backward = all(kernel.backward is not None for kernel in kernels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)`."""
        return run_forward(self.layout, self._steps, draw, query, key, value, self._memory)

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        draw: Draw | None,
        dlse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(dquery, dkey, dvalue)`."""
        return run_backward(self.layout, self._steps, draw, dout, query, key, value, out, lse, dlse, self._memory)


class DirectRunner(Runner):
    """Runs one kernel that takes the problem as it is."""

    def __init__(self, problem: Problem, layout: Any, kernel: Kernel, backend: str, memory: Workspace) -> None:
        self.layout, self._problem, self._backend, self._checked = layout, problem, backend, False
        self._memory = memory
        self._backward_checked = False
        self.quick: Forward | None = None
        self._kernel_forward, self._kernel_backward = kernel.forward, kernel.backward
        self.operators, self.libraries = kernel.operators, (kernel.library,) if kernel.library else ()
        self.own_backward = kernel.backward is not None
        self._lowered: LoweredRunner | BlockRunner | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)`."""
        if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
            query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
        try:
            result = self._kernel_forward(query, key, value)
        except Exception as error:
            note_kernel(error, self._backend)
            raise
        if not self._checked:
            check_result(self._backend, result, query)
            self._checked, self.quick = True, self._kernel_forward
        return result

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        draw: Draw | None,
        dlse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(dquery, dkey, dvalue)`."""
        if self._kernel_backward is not None and dlse is None:
            try:
                result = self._kernel_backward(*map(unit_stride, (dout, query, key, value, out)), lse)
            except Exception as error:
                note_kernel(error, self._backend)
                raise
            if not self._backward_checked:
                check_gradients(self._backend, result, (query, key, value))
                self._backward_checked = True
            return result
        if self._lowered is None:  # the core's backward: for kernels without one, and for a gradient of the lse
            self._lowered = _by_the_core(self._problem, self._memory)
        return self._lowered.backward(dout, query, key, value, out, lse, draw, dlse)


def _by_the_core(problem: Problem, memory: Workspace) -> LoweredRunner | BlockRunner:
    """A runner with the core's own backward."""
    layout = lower(problem)
    if isinstance(layout, BlockLayout):
        jobs = schedule(problem, layout)
        parts = {key: _blockwise(False, problem.scale) for key in dense_parts(problem, jobs)}
        return BlockRunner(layout, jobs, parts, problem.scale, memory=memory, name="blocks of the core's backward")
    return LoweredRunner(layout, [_blockwise(call.is_causal, problem.scale) for call in layout.calls], memory=memory)


def _blockwise(is_causal: bool, scale: float) -> Step:
    def forward(*_: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("only the backward is asked for")

    return Step(Kernel(forward), "the core", gqa=True, is_causal=is_causal, scale=scale)


def _kernel(problem: Problem, layout: Any, backend: str, allocator: LeasingAllocator) -> Kernel:
    kernel = _offered(problem, layout, backend, allocator)
    if kernel is None:
        raise PluginError(
            f"{backend}'s longspan_kernel returned None for {problem}; want a callable or a Kernel. "
            "Next: return the function that computes (out, lse), or refuse the problem in longspan_unsupported"
        )
    return kernel


def _offered(
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
    forward = _owning(kernel.forward, workspace)
    return evolve(kernel, forward=forward, backward=kernel.backward and _owning(kernel.backward, workspace))


def _specs(wanted: object, backend: str) -> tuple[BufferSpec, ...]:
    """What `longspan_buffers` returned, checked."""
    specs = tuple(wanted) if isinstance(wanted, Iterable) else (wanted,)
    if not all(isinstance(spec, BufferSpec) for spec in specs):
        raise PluginError(
            f"{backend}'s longspan_buffers returned {brief(wanted)}; want longspan.BufferSpecs. "
            "Next: return a list of longspan.BufferSpec(name, shape, dtype)"
        )
    return specs


def _owning(run: Callable[..., Any], workspace: Workspace) -> Callable[..., Any]:
    """A kernel with workspace might return some of it: what it returns is the caller's from then on."""

    def running(*tensors: Tensor, **given: Any) -> Any:
        results = run(*tensors, **given)
        if isinstance(results, tuple | list):  # else it is refused later
            workspace.release(one for one in results if isinstance(one, Tensor))
        return results

    return running
