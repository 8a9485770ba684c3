"""`attention.h`'s Job, as 64-bit words: every field is an integer, a double or an address."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

from torch import Tensor

__all__ = ["WORDS", "bits", "run", "strides"]

WORDS = 7 + 1 + 5 + 2 + 5 + 5 * 3 + 5 + 3 * 3 + 3 + 2 + 3 + 3 + 4
_Words = ctypes.c_int64 * WORDS


def bits(number: float) -> int:
    """A double's bits, as an integer."""
    return int(struct.unpack("q", struct.pack("d", number))[0])


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Batch, head and row strides, in elements."""
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]


def run(function: ctypes._NamedFuncPointer, words: Sequence[int]) -> None:
    """Call the library with a job. Releases the interpreter's lock.

    Raises:
        MemoryError: there was no memory for the threads' own buffers.
    """
    if function(ctypes.byref(_Words(*words))):
        raise MemoryError("no memory for attention's buffers. Next: use fewer threads, torch.set_num_threads(1)")
