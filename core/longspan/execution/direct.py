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

__all__ = ["DirectRunner"]


class DirectRunner(Runner):
    """Runs one kernel that takes the problem as it is."""

    def __init__(
        self,
        problem: Problem,
        layout: Any,
        kernel: Kernel,
        backend: str,
        memory: Workspace,
        in_graph: Callable[..., Gradients] | None,
    ) -> None:
        super().__init__(layout, (kernel,), in_graph)
        self._problem, self._memory = problem, memory
        self._kernel = CheckedKernel(kernel, backend, scale=problem.scale)
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
        if self._lowered is None:  # the core's backward: for kernels without one, and for a gradient of the lse
            self._lowered = _by_the_core(self._problem, self._memory)
        return self._lowered.backward(saved, dout, dlse, draw)


def _by_the_core(problem: Problem, memory: Workspace) -> Runner:
    """A runner with the core's own backward."""

    def blockwise(is_causal: bool) -> CheckedKernel:
        return CheckedKernel(Kernel(_unasked), "the core", scale=problem.scale, is_causal=is_causal)

    layout = lower(problem)
    if isinstance(layout, BlockLayout):
        jobs = schedule(problem, layout)
        parts = {lengths: blockwise(False) for lengths in dense_parts(problem, jobs)}
        return BlockRunner(layout, jobs, parts, problem.scale, memory, name="blocks of the core's backward")
    return LoweredRunner(layout, [blockwise(call.is_causal) for call in layout.calls], memory)


def _unasked(*_: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("only the backward is asked for")
