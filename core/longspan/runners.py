"""What a plan runs: one kernel for the whole problem, or the kernels of the dense calls that it was lowered to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from longspan.autograd import Runner
from longspan.buffers import Workspace
from longspan.contract import check_gradients, check_result
from longspan.discovery import registry
from longspan.dropout import Draw
from longspan.errors import PluginError
from longspan.execution import Step, run_backward, run_forward
from longspan.layout import Call, Layout
from longspan.lowering import dense_problem, lower
from longspan.resolve import is_native
from longspan.spec import Forward, Kernel, Problem

__all__ = ["DirectRunner", "LoweredRunner", "make_runner"]


def make_runner(problem: Problem, backend: str) -> DirectRunner | LoweredRunner:
    """Make the kernels of a backend for a problem: the only place where the hooks of a lane are called.

    Raises:
        PluginError: the backend returned what the hook contract does not allow.
    """
    can = registry.capabilities(backend)
    layout = _layout(problem, backend)
    if is_native(problem, can):
        return DirectRunner(problem, layout, _kernel(problem, layout, backend), backend)
    if not isinstance(layout, Layout):
        if not can.runs(problem.pattern.kind):
            raise PluginError(
                f"{backend}'s longspan_pattern returned {type(layout).__name__} for {problem.pattern.kind!r}, which it "
                "does not declare. Next: return None there, or declare it in Capabilities.patterns"
            )
        layout = lower(problem)  # the backend's own layout is for problems that its kernel takes natively
    made: dict[Problem, Step] = {}
    kernels: list[Kernel] = []
    steps = []
    for call in layout.calls:
        dense = dense_problem(problem, call, can.gqa)
        if dense not in made:
            kernel = _kernel(dense, lower(dense), backend)
            kernels.append(kernel)
            made[dense] = Step(kernel, backend, gqa=can.gqa, is_causal=dense.is_causal, scale=dense.scale)
        steps.append(made[dense])
    return LoweredRunner(layout, steps, kernels)


class LoweredRunner(Runner):
    """Runs a layout call by call."""

    quick = None

    def __init__(self, layout: Layout, steps: Sequence[Step], kernels: Iterable[Kernel] = ()) -> None:
        self.layout, self._steps = layout, steps
        self.operators = tuple(dict.fromkeys(name for kernel in kernels for name in kernel.operators))
        self.libraries = tuple(dict.fromkeys(kernel.library for kernel in kernels if kernel.library))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)`."""
        return run_forward(self.layout, self._steps, draw, query, key, value)

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
        return run_backward(self.layout, self._steps, draw, dout, query, key, value, out, lse, dlse)


class DirectRunner(Runner):
    """Runs one kernel that takes the problem as it is."""

    def __init__(self, problem: Problem, layout: Any, kernel: Kernel, backend: str) -> None:
        self.layout, self._problem, self._backend, self._checked = layout, problem, backend, False
        self._backward_checked = False
        self.quick: Forward | None = None
        self._kernel_forward, self._kernel_backward = kernel.forward, kernel.backward
        self.operators, self.libraries = kernel.operators, (kernel.library,) if kernel.library else ()
        self._lowered: LoweredRunner | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)`."""
        if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
            query, key, value = _unit(query), _unit(key), _unit(value)
        result = self._kernel_forward(query, key, value)
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
            result = self._kernel_backward(*map(_unit, (dout, query, key, value, out)), lse)
            if not self._backward_checked:
                check_gradients(self._backend, result, (query, key, value))
                self._backward_checked = True
            return result
        if self._lowered is None:  # the core's backward: for kernels without one, and for a gradient of the lse
            layout = lower(self._problem)
            self._lowered = LoweredRunner(layout, [_blockwise(call, self._problem.scale) for call in layout.calls])
        return self._lowered.backward(dout, query, key, value, out, lse, draw, dlse)


def _blockwise(call: Call, scale: float) -> Step:
    def forward(*_: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("only the backward is asked for")

    return Step(Kernel(forward), "the core", gqa=True, is_causal=call.is_causal, scale=scale)


def _unit(tensor: Tensor) -> Tensor:
    """Kernels may rely on a last dimension without gaps."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _layout(problem: Problem, backend: str) -> Any:
    cache = registry.lane(backend, "longspan_cache")(device=problem.device)
    key = (problem, backend, registry.generation)  # a backend may lay out a pattern in its own way
    layout = cache.get(key)
    if layout is None:
        layout = registry.lane(backend, "longspan_pattern")(problem=problem)
        cache.put(key, layout)
    return layout


def _kernel(problem: Problem, layout: Any, backend: str) -> Kernel:
    specs = registry.lane(backend, "longspan_buffers")(problem=problem, layout=layout)
    allocator = registry.lane(backend, "longspan_allocator")(device=problem.device)
    make = registry.lane(backend, "longspan_kernel")
    kernel = make(problem=problem, layout=layout, buffers=Workspace(specs, allocator))
    if isinstance(kernel, Kernel):
        return kernel
    if callable(kernel):
        return Kernel(kernel)
    raise PluginError(
        f"{backend}'s longspan_kernel returned {type(kernel).__name__}; want a callable or a Kernel. "
        "Next: return the function that computes (out, lse)"
    )
