"""A plan's account on an arena: what it needs at once, so that memory goes when the plans that need it are gone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from attrs import define, field
from torch import Tensor

from longspan.memory.block import Place
from longspan.spec.backend import BufferSpec

__all__ = ["Account", "Tenant"]


class Landlord(Protocol):
    """What a tenant needs of its arena."""

    def threshold_on(self, device: str) -> int:
        """Bytes from which on it serves there."""

    def serve(self, spec: BufferSpec, device: torch.device, tenant: int) -> Tensor:
        """Memory until it is dropped."""

    def lend(self, spec: BufferSpec, device: torch.device, always: bool, tenant: int) -> AbstractContextManager[Tensor]:
        """Memory for a `with` block."""

    def disown(self, tensor: Tensor) -> None:
        """Give up the block behind a tensor."""

    def leave(self, tenant: int) -> None:
        """The tenant is gone."""


@define
class Account:
    """For each place the largest block that a tenant asked for, and the most bytes that it had at once."""

    needs: dict[Place, tuple[int, int]] = field(factory=dict)

    def note(self, place: Place, size: int, at_once: int) -> None:
        """A request that was served."""
        largest, most = self.needs.get(place, (0, 0))
        self.needs[place] = max(largest, size), max(most, at_once)


class Tenant:
    """An arena as one plan sees it; an `Allocator`. When it dies, what it alone needed is given back."""

    __slots__ = ("_arena", "_device", "_number")

    def __init__(self, arena: Landlord, number: int, device: str = "cpu") -> None:
        self._arena, self._number, self._device = arena, number, device

    @property
    def threshold(self) -> int:
        """Bytes below which torch's allocator serves."""
        return self._arena.threshold_on(self._device)

    def allocate(self, spec: BufferSpec, device: torch.device) -> Tensor:
        """Uninitialised memory, which comes back when the last tensor that uses it is dropped."""
        return self._arena.serve(spec, device, self._number)

    def lease(self, spec: BufferSpec, device: torch.device, *, always: bool = False) -> AbstractContextManager[Tensor]:
        """Uninitialised memory for the time of a `with` block."""
        return self._arena.lend(spec, device, always, self._number)

    def disown(self, tensor: Tensor) -> None:
        """Give up the block behind this tensor, if it is one of the arena's."""
        self._arena.disown(tensor)

    def __del__(self) -> None:
        self._arena.leave(self._number)

    def __repr__(self) -> str:
        return f"Tenant {self._number} of {self._arena!r}"
