"""What a plan reserves of an arena: blocks of memory, and how many of them the plans that live need at once."""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import prod
from typing import Protocol

import torch
from attrs import define, field
from torch import Tensor

from longspan.spec.backend import BufferSpec

__all__ = ["GRANULE", "Account", "Block", "Place", "Tenant", "place_of"]

GRANULE = 2 * 2**20
"""Bytes that a block's size is a multiple of."""

Place = tuple[torch.device, int]
"""A device, and the stream in whose order its memory is used there (0 where there are no streams)."""


def place_of(device: torch.device) -> Place | None:
    """Where memory that is asked for now may be reused; None where it must not be.

    Memory that a CUDA graph uses is written at every replay, whatever became of it since: torch keeps a pool for each
    graph, and an arena must not stand in its way.
    """
    if device.type == "cpu":
        return device, 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        index = torch.cuda.current_device() if device.index is None else device.index  # type: ignore[redundant-expr]
        return torch.device("cuda", index), torch.cuda.current_stream(index).cuda_stream
    return None


class Block:
    """Some bytes, and who has them. All but `allocate` and `as_tensor` is done with the arena's lock held.

    `reserved`: being handed out; `leased`: until the end of a `with` block, whoever refers to it; `doomed`: to be given
    up when it comes back; `used`: a number that grows with each use; `tenant`: who used it last, 0 for nobody.
    """

    __slots__ = ("_storage", "doomed", "leased", "place", "reserved", "size", "tenant", "used")

    def __init__(self, place: Place, size: int) -> None:
        self.place, self.size = place, -(-size // GRANULE) * GRANULE
        self.reserved = self.leased = self.doomed = False
        self.used = self.tenant = 0
        self._storage: torch.UntypedStorage | None = None

    @property
    def is_allocated(self) -> bool:
        """Whether the memory is there."""
        return self._storage is not None

    @property
    def address(self) -> int:
        """Where the memory begins; 0 where there is none."""
        return 0 if self._storage is None else self._storage.data_ptr()

    def allocate(self) -> None:
        """Get the memory, from torch."""
        self._storage = torch.empty(self.size, dtype=torch.uint8, device=self.place[0]).untyped_storage()

    def is_free(self) -> bool:
        """Whether nobody has it: nothing but this block refers to the storage."""
        if self.reserved or self.leased or self._storage is None:
            return False
        references: int = torch._C._storage_Use_Count(self._storage._cdata)
        return references == 1

    def as_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new tensor on this memory: in inference mode an inference tensor, elsewhere none."""
        assert self._storage is not None
        strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return torch.empty(0, dtype=dtype, device=self.place[0]).set_(self._storage, 0, shape, strides)

    def poison(self) -> None:
        """Fill with bytes of ones, which are NaN in every floating dtype."""
        self.as_tensor((self.size,), torch.uint8).fill_(255)

    def __repr__(self) -> str:
        state = "leased" if self.leased or self.reserved else "free" if self.is_free() else "in use"
        return f"Block({self.size / 2**20:.0f} MiB on {self.place[0]}, {state})"


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
