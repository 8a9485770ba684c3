"""A table of integers that nobody can change: programs are kept and shared, and the kernels read addresses."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from longspan_plugins.cpu_fused.gate import check_made, plain

__all__ = ["Table", "counting", "integers"]


def counting(*ends: int) -> Tensor:
    """`torch.arange` in int64 on the CPU, whatever torch's defaults are."""
    return torch.arange(*ends, dtype=torch.int64, device="cpu")


def integers(values: Any) -> Tensor:
    """Numbers, or rows of them, as an int64 tensor on the CPU."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


@frozen(repr=False)
class Table:
    """The bytes of an integer tensor, with its shape and dtype."""

    data: bytes
    shape: tuple[int, ...]
    dtype: torch.dtype
    _address: int = field(init=False, eq=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_address", ctypes.cast(ctypes.c_char_p(self.data), ctypes.c_void_p).value or 0)

    @classmethod
    def of(cls, tensor: Tensor) -> Table:
        """A copy of the tensor's values."""
        tensor = plain("table", tensor).contiguous()  # blocks chosen from content are of the query's class
        address = check_made(tensor, tensor.dtype)
        return cls(ctypes.string_at(address, tensor.nbytes), tuple(tensor.shape), tensor.dtype)

    @classmethod
    def blank(cls, *shape: int) -> Table:
        """int64 values to be written through `address` by whoever asked for it, before anybody else sees it."""
        make = ctypes.pythonapi.PyBytes_FromStringAndSize  # the C interface's own way to make bytes and fill them after
        make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t)
        return cls(make(None, 8 * math.prod(shape)), shape, torch.int64)

    @property
    def address(self) -> int:
        """Where the values are, for as long as the table is held."""
        return self._address

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return len(self.data)

    def tensor(self) -> Tensor:
        """The values, as a tensor of the caller's own."""
        if not self.data:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        return torch.frombuffer(bytearray(self.data), dtype=self.dtype).view(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce__(self) -> tuple[type[Table], tuple[bytes, tuple[int, ...], torch.dtype]]:
        return type(self), (self.data, self.shape, self.dtype)  # an address is one process's

    def __repr__(self) -> str:
        return f"Table({' x '.join(map(str, self.shape))} {self.dtype})"
