"""The gate to the kernels: what they read and write are addresses, so every tensor passes here before its own is taken.

C has no tensors, only memory: a tensor without memory of its own, in another dtype, on another device, with a sign that
torch has yet to apply, or with less storage than its shape says, would be read as if it were what was planned.
"""

from __future__ import annotations

from operator import mul

import torch
from torch import Tensor
from torch.nn import Parameter

from longspan.plugin import ArgumentError, LongspanError, Problem

__all__ = ["Passed", "check_made", "passed", "passed_inputs", "plain"]

Passed = tuple[Tensor, int, tuple[int, ...]]
"""A tensor that the kernels may read, which has to be held while they do; its address; its strides, in elements."""
PLAIN = frozenset({Tensor, Parameter})
OTHERS_MEMORY = "pass the plain tensor that holds the numbers (of a DTensor: its .to_local()), or name backend='sdpa'"


def passed(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Passed:
    """Let a tensor through.

    Args:
        name: what the caller knows it by.
        tensor: on the CPU, strided; its last dimension has no gaps where it has four.
        dtype: that the kernels take its numbers for.
        shape: that they take it to have.

    Raises:
        ArgumentError: it is something else, or its memory is not its own or less than its shape takes.
    """
    if type(tensor) not in PLAIN or tensor.is_neg():
        tensor = plain(name, tensor)
    if tensor.dtype is not dtype or not tensor.is_cpu or tensor.shape != shape:
        got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ArgumentError(name, got, f"{tuple(shape)} {dtype} on cpu", "make a plan for these tensors")
    strides = tensor.stride()  # raises where a layout has none
    address = tensor.data_ptr()
    if 0 in shape:
        return tensor, address, strides  # no number of it is read
    needed = (tensor.storage_offset() + 1 + sum(map(mul, shape, strides)) - sum(strides)) * dtype.itemsize
    held = tensor.untyped_storage().nbytes()
    if not address or needed > held:
        raise ArgumentError(
            name,
            f"a tensor whose storage holds {held:,} bytes" if address else "a tensor without memory",
            f"the {needed:,} bytes that its shape and strides reach",
            OTHERS_MEMORY if held >= needed else "fill it again: its storage was freed or cut while it was in use",
        )
    if len(shape) == 4 and strides[3] != 1 and shape[3] > 1:
        tensor = tensor.contiguous()
        return tensor, tensor.data_ptr(), tensor.stride()
    return tensor, address, strides


def passed_inputs(
    problem: Problem, dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Passed, Passed, Passed]:
    """Query, key and value of a plan: as long and as wide as the problem's, of as many entries and heads as they have.

    Raises:
        ArgumentError: see `passed`; or the heads of `query` are no multiple of those of `key`.
    """
    batch, heads = query.shape[:2]
    kv_heads = key.shape[1]
    if heads % kv_heads if kv_heads else heads:
        raise ArgumentError("key", f"{kv_heads} heads for {heads} query heads", "a divisor of the query's heads")
    of_key = batch, kv_heads, problem.kv_len, problem.head_dim
    return (
        passed("query", query, dtype, (batch, heads, problem.q_len, problem.head_dim)),
        passed("key", key, dtype, of_key),
        passed("value", value, dtype, of_key),
    )


def check_made(tensor: Tensor, dtype: torch.dtype) -> int:
    """The address of a tensor that was made for the kernels to write: a mode may have made another kind of it.

    Raises:
        LongspanError: it has no memory of its own, or is not what was asked for.
    """
    address = tensor.data_ptr() if type(tensor) is Tensor and tensor.is_cpu else 0
    if tensor.dtype is not dtype or not (address or 0 in tensor.shape) or not tensor.is_contiguous():
        raise LongspanError(
            f"a result made under a mode of torch's: got a {type(tensor).__name__} of {tensor.dtype} on "
            f"{tensor.device}; want {dtype} in memory of the CPU. Next: leave the mode, or {OTHERS_MEMORY}"
        )
    return address


def plain(name: str, tensor: Tensor) -> Tensor:
    """The same numbers as a tensor of torch's own class, with its signs applied.

    Raises:
        ArgumentError: they lie in another tensor.
    """
    kind = type(tensor)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise ArgumentError(name, f"a {kind.__name__}, whose numbers lie elsewhere", "a plain tensor", OTHERS_MEMORY)
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor).resolve_neg()
