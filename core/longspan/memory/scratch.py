"""The temporaries of one call: given back when it ends, however it ends."""

from __future__ import annotations

from contextlib import ExitStack
from math import prod
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from longspan.memory.workspace import TorchAllocator, Workspace
from longspan.numerics.tensors import unit_stride

__all__ = ["Scratch"]

_TORCH = Workspace((), TorchAllocator())


class Scratch:
    """Memory for a `with` block around the launches of one call.

    Args:
        workspace: who provides it; None, or for tensors of another class (fake ones, say): torch.
        like: a tensor of the call; memory is where it is.
        size: bytes that all launches together write to temporaries. Where the workspace does not want so few, each
            launch gets its temporaries from torch.
    """

    def __init__(self, workspace: Workspace | None, like: Tensor, size: int) -> None:
        self._workspace = _TORCH if workspace is None or type(like) is not Tensor else workspace
        self._device = like.device
        self.is_kept = self._workspace is not _TORCH and self._workspace.wants(size)
        self._leases: ExitStack | None = None
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def once(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for the whole call."""
        if not self.is_kept:
            return torch.empty(shape, dtype=dtype, device=self._device)
        return self._lease(name, shape, dtype, False)

    def again(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory until it is asked for by this name again, in the same place if it is large enough."""
        if not self.is_kept:
            return torch.empty(shape, dtype=dtype, device=self._device)
        count = prod(shape)
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < count:
            kept = self._kept[name, dtype] = self._lease(name, (count,), dtype, True)
        return kept[:count].view(shape)

    def flip(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with its rows (dimension 2) in reverse order."""
        if not self.is_kept:
            return unit_stride(tensor.flip(2))  # torch orders the strides of overlapping rows anew
        backwards = torch.arange(tensor.shape[2] - 1, -1, -1, device=tensor.device, dtype=torch.int64)
        return torch.index_select(tensor, 2, backwards, out=self.again(name, tuple(tensor.shape), tensor.dtype))

    def widen(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in this dtype."""
        if tensor.dtype is dtype or not self.is_kept:
            return tensor.to(dtype)
        return self.again(name, tuple(tensor.shape), dtype).copy_(tensor)

    def _lease(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, always: bool) -> Tensor:
        if self._leases is None:
            self._leases = ExitStack()
        return self._leases.enter_context(self._workspace.temporary(name, shape, dtype, self._device, always=always))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.clear()
        if self._leases is not None:
            self._leases.close()
