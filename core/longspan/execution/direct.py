"""What a plan runs where one kernel takes the problem as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from longspan.execution.blocks import BlockRunner
from longspan.execution.kernel import CheckedKernel
from longspan.execution.runner import Gradients, Runner, Saved
from longspan.execution.strided import LoweredRunner
from longspan.lowering.blocks import BlockLayout
from longspan.lowering.dense import lower
from longspan.lowering.schedule import dense_parts, schedule
from longspan.memory.workspace import Workspace
from longspan.numerics.dropout import Draw
from longspan.numerics.tensors import unit_stride
from longspan.spec.backend import Kernel
from longspan.spec.problem import Problem

__all__ = ["DirectRunner", "by_the_core"]


class DirectRunner(Runner):
    """Runs one kernel that takes the problem as it is.

    Args:
        layout: the backend's own.
        kernel: see above.
        backend: whose.
        scale: factor on the scores.
        by_the_core: makes a runner with the core's backward, for kernels without one and for a gradient of the lse.
        in_graph: as of `Runner`.
    """

    def __init__(
        self,
        layout: Any,
        kernel: Kernel,
        backend: str,
        scale: float,
        by_the_core: Callable[[], Runner],
        in_graph: Callable[..., Gradients] | None = None,
    ) -> None:
        super().__init__(layout, (kernel,), in_graph)
        self._kernel = CheckedKernel(kernel, backend, scale=scale)
        self._by_the_core = by_the_core
        self._lowered: Runner | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)`."""
        result = self._kernel.forward(unit_stride(query), unit_stride(key), unit_stride(value))
        self.bare = self._kernel.bare
        return result

    def backward(self, saved: Saved, dout: Tensor, dlse: Tensor | None, draw: Draw | None) -> Gradients:
        """`(dquery, dkey, dvalue)`."""
        if self._kernel.differentiates(dlse):
            return self._kernel.backward(unit_stride(dout), *map(unit_stride, saved[:4]), saved.lse)
        if self._lowered is None:
            self._lowered = self._by_the_core()
        return self._lowered.backward(saved, dout, dlse, draw)


def by_the_core(problem: Problem, memory: Workspace) -> Runner:
    """A runner with the core's own backward."""
    layout = lower(problem)
    if isinstance(layout, BlockLayout):
        jobs = schedule(problem, layout)
        parts = {lengths: _backward_alone(problem.scale) for lengths in dense_parts(problem, jobs)}
        return BlockRunner(layout, jobs, parts, problem, memory, name="blocks of the core's backward")
    return LoweredRunner(
        problem, layout, [_backward_alone(problem.scale, call.is_causal) for call in layout.calls], memory
    )


def _backward_alone(scale: float, is_causal: bool = False) -> CheckedKernel:
    """The core's backward of a dense problem."""

    def unasked(*_: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("only the backward is asked for")

    return CheckedKernel(Kernel(unasked), "the core", scale=scale, is_causal=is_causal)
