"""What a plan runs for a block-sparse pattern that its backend does not run natively."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from longspan.execution.autograd import Runner
from longspan.execution.blocks import run_block_backward, run_block_forward
from longspan.execution.strided import Step
from longspan.lowering.blocks import BlockLayout
from longspan.lowering.schedule import Job
from longspan.memory.workspace import Lender, Workspace
from longspan.numerics.dropout import Draw
from longspan.spec.backend import Kernel

__all__ = ["BlockRunner"]


class BlockRunner(Runner):
    """Runs a block-sparse layout with the kernels of dense problems."""

    quick = None

    def __init__(
        self,
        layout: BlockLayout,
        jobs: Sequence[Job],
        steps: Mapping[tuple[int, int], Step],
        scale: float,
        kernels: Iterable[Kernel] = (),
        lender: Lender | None = None,
    ) -> None:
        self.layout, self._jobs, self._steps, self._scale = layout, tuple(jobs), steps, scale
        self._memory = None if lender is None else Workspace((), lender)
        self._on: dict[torch.device, tuple[tuple[Job, ...], dict[tuple[int, int], Tensor]]] = {}
        self.operators = tuple(dict.fromkeys(name for kernel in kernels for name in kernel.operators))
        self.libraries = tuple(dict.fromkeys(kernel.library for kernel in kernels if kernel.library))
        self.own_backward = all(kernel.backward is not None for kernel in kernels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)`."""
        jobs, masks = self._there(query.device)
        return run_block_forward(jobs, masks, self._steps, self._scale, draw, query, key, value, self._memory)

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
        jobs, masks = self._there(query.device)
        given = dout, query, key, value, out, lse, dlse
        return run_block_backward(jobs, masks, self._steps, self._scale, draw, *given, self._memory)

    def _there(self, device: torch.device) -> tuple[tuple[Job, ...], dict[tuple[int, int], Tensor]]:
        """The jobs with their index and their masks on a device, moved there once."""
        if device not in self._on:
            with torch.inference_mode(False):  # they outlive the mode that a call happens to be made in
                masks = {
                    (number, which): csr.masks.to(device)
                    for number, found in enumerate(self.layout.blocks)
                    for which, csr in enumerate(found.layouts)
                }
                self._on[device] = tuple(job.on(device) for job in self._jobs), masks
        return self._on[device]
