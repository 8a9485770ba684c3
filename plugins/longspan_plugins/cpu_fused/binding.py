"""`attention.h`'s Job, field by field, as 64-bit words: integers, doubles and addresses."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from types import SimpleNamespace

from longspan_plugins.cpu_fused.gate import Passed

__all__ = ["AT", "FIELDS", "WORDS", "bits", "job", "places", "put", "run"]

FIELDS = {
    **dict.fromkeys(("batch", "heads", "group", "dim", "kind", "threads", "parts", "scale"), 1),
    **dict.fromkeys(("tiles", "segments", "programs", "program_of_head", "masks", "mask_keys", "mask_words"), 1),
    **dict.fromkeys(("query", "key", "value", "out", "lse"), 1),
    **dict.fromkeys(("query_at", "key_at", "value_at", "out_at", "lse_at"), 3),
    **dict.fromkeys(("dout", "dlse", "dquery", "shares", "sums", "run"), 1),
    **dict.fromkeys(("dout_at", "dlse_at", "dquery_at"), 3),
    **dict.fromkeys(("lines", "query_positions", "key_positions"), 1),
    **{"lines_at": 2, "query_positions_at": 3, "key_positions_at": 3},
    **dict.fromkeys(("seed", "keep", "threshold", "failed"), 1),
}
"""The fields in their order, and how many words each takes."""
WORDS = sum(FIELDS.values())
AT = SimpleNamespace(**dict(zip(FIELDS, accumulate(FIELDS.values(), initial=0), strict=False)))
"""The place of each field's first word."""
Places = tuple[int, int, int, int]


def bits(number: float) -> int:
    """A double's bits, as an integer."""
    return int(struct.unpack("q", struct.pack("d", number))[0])


def job(**values: int) -> array[int]:
    """A job with some fields filled in, the others 0. A copy of it, `job[:]`, costs next to nothing."""
    words = array("q", bytes(8 * WORDS))
    for name, value in values.items():
        words[getattr(AT, name)] = value
    return words


def places(*tensors: str) -> tuple[Places, ...]:
    """Where the addresses of these tensors and their strides go, for `put`."""
    starts = [(getattr(AT, name), getattr(AT, f"{name}_at")) for name in tensors]
    return tuple((address, first, first + 1, first + 2) for address, first in starts)


def put(words: array[int], where: Sequence[Places], tensors: Iterable[Passed]) -> None:
    """Write down the addresses of tensors, and the strides of their first three dimensions."""
    for (address_at, batch_at, head_at, row_at), (_, address, strides) in zip(where, tensors, strict=True):
        words[address_at] = address
        words[batch_at] = strides[0]
        words[head_at] = strides[1]
        words[row_at] = strides[2]


def run(function: ctypes._NamedFuncPointer, words: array[int]) -> None:
    """Call the library with a job. Releases the interpreter's lock.

    Raises:
        MemoryError: there was no memory for the threads' own buffers.
    """
    if function(words.buffer_info()[0]):
        raise MemoryError("no memory for attention's buffers. Next: use fewer threads, torch.set_num_threads(1)")
