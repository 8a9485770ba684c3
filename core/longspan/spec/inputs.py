"""Checks on what a user hands in: each refusal names the argument, what was given and what would do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from longspan.errors import ArgumentError, brief, is_integer
from longspan.spec.pattern import Pattern

__all__ = ["Arguments", "check_arguments", "check_boundaries", "check_inputs", "check_pattern", "check_strided"]

if TYPE_CHECKING:
    from longspan.spec.problem import Problem


class Arguments(NamedTuple):
    """What `longspan.attention` is told beside the tensors: its words, unchecked, as one value.

    A tuple and no attrs class, for it is made at every call: that costs a fifth of a microsecond.
    """

    pattern: Pattern
    is_causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    enable_gqa: bool = False
    cu_seqlens: torch.Tensor | tuple[int, ...] | None = None
    query_offset: int | None = None

    @classmethod
    def of(cls, problem: Problem) -> Arguments:
        """Those that lead to a problem."""
        shared = problem.kv_heads != problem.heads
        numbers = problem.is_causal, problem.scale, problem.dropout_p, shared
        return cls(problem.pattern, *numbers, problem.documents, problem.query_offset)


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_pattern(pattern: object) -> Pattern:
    """`pattern`, or `ArgumentError`: what it was given as by mistake, and how longspan says it."""
    if isinstance(pattern, Pattern):
        return pattern
    want = "a longspan pattern"
    if isinstance(pattern, type) and issubclass(pattern, Pattern):
        name = pattern.__name__
        raise ArgumentError(
            "pattern", f"the class {name}", want, f"make one, e.g. longspan.{_EXAMPLES.get(name, name)}"
        )
    if isinstance(pattern, str):
        raise ArgumentError("pattern", repr(pattern), want, f"longspan.parse_pattern({pattern!r}) reads one from text")
    if isinstance(pattern, torch.Tensor):
        fix = (
            "is_causal=True for a triangle, cu_seqlens for packed documents, longspan.SlidingWindow or BlockSparse for "
            "the rest; name the arguments, as the fourth of torch's attention is a mask"
        )
        raise ArgumentError("pattern", f"a tensor of shape {tuple(pattern.shape)}", f"{want}, not a mask", fix)
    if type(pattern).__name__ == "BlockMask":
        fix = "longspan.from_block_mask(block_mask)"
        raise ArgumentError("pattern", "FlexAttention's BlockMask", want, fix)
    raise ArgumentError("pattern", brief(pattern), want, "e.g. longspan.Dense()")


_EXAMPLES = {
    "Dense": "Dense()",
    "Dilated": "Dilated((2048, 4096), (1, 2))",
    "SlidingWindow": "SlidingWindow(256)",
    "BlockSparse": "local_blocks(1024)",
    "TopKBlocks": "TopKBlocks(16)",
}


def check_strided(name: str, tensor: object) -> None:
    """Refuse what is no tensor, and tensors that are sparse, nested or in another library's layout."""
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(name, type(tensor).__name__, "a torch.Tensor", f"torch.as_tensor({name})")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_mkldnn:
        kind = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise ArgumentError(name, kind, "a strided tensor (torch.strided)", "pass packed documents by cu_seqlens")


def check_inputs(query: Any, key: Any, value: Any, enable_gqa: bool, cu_seqlens: object) -> dict[str, Any]:
    """The fields of a `Problem` that follow from tensors, or `ArgumentError`.

    Query is `(batch, heads, q_len, head_dim)`, key and value are `(batch, kv_heads, kv_len, head_dim)`.
    """
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        check_strided(name, tensor)
        if tensor.dim() != 4:
            raise ArgumentError(name, f"shape {tuple(tensor.shape)}", "(batch, heads, seq, head_dim)", "add dimensions")
        if tensor.dtype not in _FLOATS:
            raise ArgumentError(
                name, str(tensor.dtype), "float16, bfloat16, float32 or float64", f"cast it, e.g. {name}.float()"
            )
    for name in ("key", "value"):
        tensor = named[name]
        if tensor.dtype != query.dtype:
            raise ArgumentError(name, str(tensor.dtype), f"query's dtype, {query.dtype}", f"{name}.to(query.dtype)")
        if tensor.device != query.device:
            raise ArgumentError(name, f"on {tensor.device}", f"on query's device, {query.device}", f"{name}.to(query)")
    batch, heads, q_len, head_dim = query.shape
    if key.shape != value.shape:
        raise ArgumentError("value", f"shape {tuple(value.shape)}", f"key's shape, {tuple(key.shape)}")
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ArgumentError(
            "key",
            f"shape {tuple(key.shape)}",
            f"query's batch and head_dim, as in ({batch}, kv_heads, kv_len, {head_dim})",
        )
    if key.shape[1] != heads:
        if not enable_gqa:
            raise ArgumentError(
                "key", f"{key.shape[1]} heads", f"query's {heads} heads", "pass enable_gqa=True for grouped queries"
            )
        if key.shape[1] == 0 or heads % key.shape[1]:
            raise ArgumentError(
                "key", f"{key.shape[1]} heads for {heads} query heads", "a divisor of the number of query heads"
            )
    return {
        "batch": batch,
        "heads": heads,
        "kv_heads": key.shape[1],
        "q_len": q_len,
        "kv_len": key.shape[2],
        "head_dim": head_dim,
        "dtype": query.dtype,
        "documents": None if cu_seqlens is None else _documents(cu_seqlens, query, key.shape[2]),
    }


def check_arguments(arguments: Arguments) -> None:
    """What can be said of the arguments without looking into the tensors, in code that a tracer follows."""
    given: tuple[Any, ...] = arguments  # anything, whatever the types say
    pattern, is_causal, scale, dropout_p, enable_gqa, cu_seqlens, query_offset = given
    check_pattern(pattern)
    for name, switch in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(switch, bool):
            raise ArgumentError(name, type(switch).__name__, "True or False")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise ArgumentError("scale", repr(scale), "a finite number")
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, int | float):
        raise ArgumentError("dropout_p", repr(dropout_p), "a finite number")
    if query_offset is not None and not is_integer(query_offset):
        raise ArgumentError("query_offset", repr(query_offset), "an integer position")
    if cu_seqlens is not None and not isinstance(cu_seqlens, torch.Tensor):
        whole = isinstance(cu_seqlens, list | tuple)
        if isinstance(cu_seqlens, list | tuple):
            for bound in cu_seqlens:
                whole = whole and is_integer(bound)
        if not whole:
            raise ArgumentError("cu_seqlens", repr(cu_seqlens), "an integer tensor or tuple, e.g. (0, 5, 9)")


def check_boundaries(bounds: Sequence[object], q_len: int, kv_len: int) -> tuple[int, ...]:
    """Boundaries of packed documents: integers from 0 on that never fall and end within the sequence."""
    name = "cu_seqlens"
    if not isinstance(bounds, list | tuple) or not all(type(bound) is int for bound in bounds):
        raise ArgumentError(name, repr(bounds), "an integer tensor or tuple, e.g. (0, 5, 9)")
    integers = tuple(bound for bound in bounds if isinstance(bound, int))
    if not integers or integers[0] != 0:
        raise ArgumentError(name, f"a start of {integers[:1]}", "a first boundary of 0", "put 0 in front")
    if any(a > b for a, b in pairwise(integers)):
        raise ArgumentError(name, str(integers), "boundaries that never fall", "sort them")
    if q_len != kv_len:
        raise ArgumentError(name, f"{q_len} queries and {kv_len} keys", "as many queries as keys")
    if integers[-1] > kv_len:
        raise ArgumentError(name, f"an end of {integers[-1]}", f"at most the sequence length, {kv_len}")
    return integers


def _documents(cu_seqlens: Any, query: torch.Tensor, kv_len: int) -> tuple[int, ...]:
    name = "cu_seqlens"
    if isinstance(cu_seqlens, torch.Tensor):
        if cu_seqlens.device != query.device:
            raise ArgumentError(
                name, f"on {cu_seqlens.device}", f"on query's device, {query.device}", "cu_seqlens.to(query.device)"
            )
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
            raise ArgumentError(name, f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}", "one dimension of integers")
        cu_seqlens = cu_seqlens.tolist()
    return check_boundaries(cu_seqlens, query.shape[2], kv_len)
