"""The operators that stand for attention wherever torch dispatches: in graphs, under torch.func, under dispatch modes.

Ordinary eager calls never enter them: see `longspan.execution.kernel`. An operator's arguments are values that a
graph can hold: the pattern and the policy as text, the rest as numbers and tensors. The policy is read when the graph
is traced, and the plan is made, or found, when the operator first meets real tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level  # noqa: PLC2701 - torch has no public way to ask
from torch.autograd import Function
from torch.compiler import is_compiling

from longspan.errors import ArgumentError
from longspan.execution.kernel import refuse_forward_mode, refuse_tangents
from longspan.execution.runner import Gradients, Saved
from longspan.numerics.dropout import Draw, check_seed, signed
from longspan.numerics.tensors import wide_dtype
from longspan.patterns.text import decode
from longspan.registry.policy import in_force
from longspan.spec.inputs import Arguments, check_arguments, check_strided

if TYPE_CHECKING:
    from longspan.planning.plan import Plan

__all__ = ["attend_in_graph", "differentiate_in_graph", "find_plans_by", "serve_dtensors"]


_find: Callable[..., Plan] | None = None


def find_plans_by(find: Callable[..., Plan]) -> None:
    """Say how a plan is found: the planner stands above this module, and plans enter graphs too."""
    global _find
    _find = find


def _plan(query: Tensor, key: Tensor, value: Tensor, arguments: Arguments, policy: str) -> Plan:
    assert _find is not None, "longspan.planning.attention sets it on import"
    with in_force(policy):
        return _find(query, key, value, arguments, None)


@torch.library.custom_op("longspan::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    pattern: str,
    numbers: Sequence[int],
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    enable_gqa: bool,
    query_offset: int | None,
    policy: str,
) -> tuple[Tensor, Tensor]:
    rule = decode(pattern, numbers)
    arguments = Arguments(rule, is_causal, scale, dropout_p, enable_gqa, cu_seqlens, query_offset)
    made = _plan(query, key, value, arguments, policy)
    with torch.no_grad():
        out, lse = made.run(query, key, value, None if seed is None else int(seed))
    return out.contiguous(), lse.contiguous()


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty(query), query.new_empty(query.shape[:3], dtype=wide_dtype(query.dtype))


@torch.library.custom_op("longspan::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    pattern: str,
    numbers: Sequence[int],
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    enable_gqa: bool,
    query_offset: int | None,
    policy: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rule = decode(pattern, numbers)
    arguments = Arguments(rule, is_causal, scale, dropout_p, enable_gqa, cu_seqlens, query_offset)
    made = _plan(query, key, value, arguments, policy)
    with torch.no_grad():
        dq, dk, dv = made.backward(dout, query, key, value, out, lse, dlse=dlse, seed=0 if seed is None else int(seed))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_attention_backward.register_fake
def _(dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Any:
    return _empty(query), _empty(key), _empty(value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens, seed, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens, seed)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, gradients: Any = _attention_backward
) -> tuple[Any, ...]:
    query, key, value, out, lse, cu_seqlens, seed = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    grads = gradients(dout, dlse, query, key, value, out, lse, cu_seqlens, seed, *ctx.rest)
    return (*grads, *(None for _ in range(2 + len(ctx.rest))))


_attention.register_autograd(_backward, setup_context=_setup_context)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise ArgumentError(
        "longspan.attention", "a gradient of its gradient", "at most one derivative", "take create_graph=False"
    )


_attention_backward.register_autograd(_no_second_derivative)


class _Transformable(Function):
    """The operators again, for functorch: `torch.func.grad` does not see the autograd of a custom operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return _attention(*inputs)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_forward_mode()

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        return _backward(ctx, dout, dlse, _TransformableBackward.apply)


class _TransformableBackward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return _attention_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    backward = staticmethod(_no_second_derivative)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_forward_mode()


# vmap: the mapped dimension becomes part of the batch. With dropout it is a loop: each mapped entry numbers its batch
# entries from 0, as the same call outside of vmap does, and may have a seed of its own (randomness="different").


@_attention.register_vmap
def _(info: Any, in_dims: Any, *given: Any) -> Any:
    _refuse_mapped(in_dims[3])
    if given[4] is not None:
        return _one_by_one(_attention, info, in_dims, given), (0, 0)
    out, lse = _attention(*_fold(info, in_dims[:3], given[:3]), *given[3:])
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in (out, lse)), (0, 0)


@_attention_backward.register_vmap
def _(info: Any, in_dims: Any, *given: Any) -> Any:
    _refuse_mapped(in_dims[7])
    if given[8] is not None:
        return _one_by_one(_attention_backward, info, in_dims, given), (0, 0, 0)
    grads = _attention_backward(*_fold(info, in_dims[:7], given[:7]), *given[7:])
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in grads), (0, 0, 0)


def _one_by_one(operator: Any, info: Any, dims: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The operator for each mapped entry, results stacked."""
    results = []
    for number in range(info.batch_size):
        one = (x.select(d, number) if isinstance(d, int) else x for x, d in zip(given, dims, strict=True))
        results.append(operator(*one))
    return tuple(torch.stack(each) for each in zip(*results, strict=True))


def _fold(info: Any, dims: tuple[int | None, ...], tensors: tuple[Tensor | None, ...]) -> list[Any]:
    found: list[Tensor | None] = []
    for tensor, dim in zip(tensors, dims, strict=True):
        if tensor is None:
            found.append(None)
        elif dim is None:
            found.append(tensor.expand(info.batch_size, *tensor.shape).flatten(0, 1))
        else:
            found.append(tensor.movedim(dim, 0).flatten(0, 1))
    return found


def _refuse_mapped(dim: int | None) -> None:
    if dim is not None:
        got = "a dimension mapped by vmap"
        raise ArgumentError("cu_seqlens", got, "the same for all", "loop instead, or pass the same boundaries to all")


@cache
def _register_dtensors() -> None:
    from longspan.planning.sharding import serve

    serve()


def serve_dtensors() -> bool:
    """Register what the operators do with DTensors, where somebody uses these: their import takes long."""
    known = "torch.distributed.tensor" in sys.modules
    if known:
        _register_dtensors()
    return known


# What `torch.compiler.assume_constant_result` sets, so that a tracer runs it; to call that would import the compiler.
serve_dtensors._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attend_in_graph(
    query: Tensor, key: Tensor, value: Tensor, seed: int | None, arguments: Arguments, policy: str
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` by the operator that a graph holds, and that torch dispatches.

    Raises:
        ArgumentError: an argument that can be told to be wrong without looking into the tensors.
        ForwardModeError: a dual tensor.
    """
    if not is_compiling():
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            check_strided(name, tensor)
    refuse_tangents(query, key, value)
    serve_dtensors()
    check_arguments(arguments)
    check_seed(seed)
    attend: Any = _attention if maybe_current_level() is None else _Transformable.apply
    boundaries, drawn = _boundaries(arguments.cu_seqlens, query), _seed(arguments.dropout_p, seed)
    result: tuple[Tensor, Tensor] = attend(query, key, value, boundaries, drawn, *_flat(arguments), policy)
    return result


def differentiate_in_graph(
    arguments: Arguments, policy: str, saved: Saved, dout: Tensor, dlse: Tensor | None, draw: Draw | None
) -> Gradients:
    """`(dquery, dkey, dvalue)` by the backward's operator, for gradients of a forward that ran without operators.

    Raises:
        ForwardModeError: a dual gradient.
    """
    refuse_tangents(dout, dlse)
    boundaries = _boundaries(arguments.cu_seqlens, saved.query)
    drawn = _seed(arguments.dropout_p, 0 if draw is None else draw.seed)
    differentiate: Any = _attention_backward if maybe_current_level() is None else _TransformableBackward.apply
    result: Gradients = differentiate(dout, dlse, *saved, boundaries, drawn, *_flat(arguments), policy)
    return result


def _flat(arguments: Arguments) -> tuple[Any, ...]:
    """The arguments that stand between seed and policy in an operator's schema."""
    switches = arguments.is_causal, arguments.scale, arguments.dropout_p, arguments.enable_gqa
    return (*arguments.pattern.code, *switches, arguments.query_offset)


def _boundaries(cu_seqlens: Tensor | tuple[int, ...] | None, query: Any) -> Tensor | None:
    if cu_seqlens is None or isinstance(cu_seqlens, Tensor):
        return cu_seqlens
    return torch.tensor(cu_seqlens, dtype=torch.int64, device=query.device)


def _seed(dropout_p: float, seed: int | None) -> Tensor | None:
    if not dropout_p:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")
    return torch.tensor(signed(seed), dtype=torch.int64, device="cpu")


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
