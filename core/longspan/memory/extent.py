"""An extent: memory that an arena keeps in one piece, and the stream in whose order it may be reused."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

__all__ = ["GRANULE", "Extent", "Stream", "stream_of"]

GRANULE = 2 * 2**20
"""Bytes that an extent's size is a multiple of."""

Stream = tuple[torch.device, int]
"""A device, and the handle of a stream there (0 where there are no streams)."""


def stream_of(device: torch.device) -> Stream | None:
    """In whose order memory that is asked for now may be reused; None where it must not be.

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


class Extent:
    """Some bytes, and who has them. All but `allocate` and `as_tensor` is done with the arena's lock held.

    `reserved`: being handed out; `leased`: until the end of a `with` block, whoever refers to it; `doomed`: to be given
    up when it comes back; `used`: a number that grows with each use; `owner`: the reservation that used it last,
    0 for none.
    """

    __slots__ = ("_storage", "doomed", "leased", "owner", "reserved", "size", "stream", "used")

    def __init__(self, stream: Stream, size: int) -> None:
        self.stream, self.size = stream, -(-size // GRANULE) * GRANULE
        self.reserved = self.leased = self.doomed = False
        self.used = self.owner = 0
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
        self._storage = torch.empty(self.size, dtype=torch.uint8, device=self.stream[0]).untyped_storage()

    def is_free(self) -> bool:
        """Whether nobody has it: nothing but this object refers to the storage."""
        if self.reserved or self.leased or self._storage is None:
            return False
        references: int = torch._C._storage_Use_Count(self._storage._cdata)
        return references == 1

    def as_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new tensor on this memory: in inference mode an inference tensor, elsewhere none."""
        assert self._storage is not None
        strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return torch.empty(0, dtype=dtype, device=self.stream[0]).set_(self._storage, 0, shape, strides)

    def poison(self) -> None:
        """Fill with bytes of ones, which are NaN in every floating dtype."""
        self.as_tensor((self.size,), torch.uint8).fill_(255)

    def __repr__(self) -> str:
        state = "leased" if self.leased or self.reserved else "free" if self.is_free() else "in use"
        return f"Extent({self.size / 2**20:.0f} MiB on {self.stream[0]}, {state})"
