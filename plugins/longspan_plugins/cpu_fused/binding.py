"""`attention.h`'s Job, as 64-bit words: every field is an integer, a double or an address."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Sequence

__all__ = ["WORDS", "bits", "run"]

WORDS = 7 + 1 + 5 + 2 + 5 + 5 * 3 + 5 + 3 * 3 + 3 + 2 + 3 + 3 + 4 + 1


def bits(number: float) -> int:
    """A double's bits, as an integer."""
    return int(struct.unpack("q", struct.pack("d", number))[0])


def run(function: ctypes._NamedFuncPointer, words: Sequence[int]) -> None:
    """Call the library with a job. Releases the interpreter's lock.

    Raises:
        MemoryError: there was no memory for the threads' own buffers.
    """
    job = array("q", words)  # a third of what a ctypes array of so many numbers costs
    if len(job) != WORDS:
        raise ValueError(f"a job of {len(job)} words, want {WORDS}")
    if function(job.buffer_info()[0]):
        raise MemoryError("no memory for attention's buffers. Next: use fewer threads, torch.set_num_threads(1)")
