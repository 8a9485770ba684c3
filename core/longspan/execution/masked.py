"""The kernel of one slab of a masked layout: dense attention under a mask that is made when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longspan.execution.kernel import CheckedKernel
from longspan.lowering.masked import Slab
from longspan.memory.workspace import Workspace
from longspan.spec.backend import Kernel

__all__ = ["MaskedKernel"]

LEASED = 2**19
"""Elements from which on a mask's memory is kept from call to call: fresh pages would cost as much as writing it."""


class MaskedKernel(CheckedKernel):
    """A kernel under the mask of one slab, in memory from a workspace."""

    __slots__ = ("_memory", "slab")

    def __init__(
        self, kernel: Kernel, backend: str, *, gqa: bool, scale: float, slab: Slab, memory: Workspace | None = None
    ) -> None:
        super().__init__(kernel, backend, gqa=gqa, scale=scale)
        self.slab, self._memory = slab, memory

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        """The kernel's forward under the mask."""
        with self._mask(query) as mask:
            try:
                return super().forward(query, key, value, mask=mask, **given)
            finally:
                del mask  # else the memory behind it would not come back

    def backward(self, *tensors: Tensor, dlse: Tensor | None = None, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The kernel's backward under the mask, or the core's."""
        with self._mask(tensors[0]) as mask:
            try:
                if not self.differentiates(dlse):  # the core's takes what is seen
                    mask = mask == 0
                return super().backward(*tensors, dlse=dlse, mask=mask, **given)
            finally:
                del mask

    @contextmanager
    def _mask(self, like: Tensor) -> Iterator[Tensor]:
        """`(1, 1, queries, keys)` of this tensor's dtype, where it is."""
        rows, columns = self.slab.shape
        cpu = torch.device("cpu")
        if self._memory is None or rows * columns < LEASED:
            yield self.slab.fill(torch.empty(rows, columns, dtype=like.dtype, device=cpu)).to(like.device)
            return
        with self._memory.temporary("mask", (rows, columns), like.dtype, cpu, always=True) as memory:
            yield self.slab.fill(memory).to(like.device)
