"""`longspan.attention`: what a model calls, and the plans that it keeps.

A plan is made once for what a call was given, and found again by a dictionary look-up.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal, overload

import torch
from torch import Tensor

from longspan.errors import ArgumentError, brief
from longspan.execution.kernel import undisturbed
from longspan.planning.operators import attend_in_graph, find_plans_by
from longspan.planning.plan import Plan, follow_autocast, plan
from longspan.registry import policy
from longspan.registry.discovery import registry
from longspan.registry.policy import fingerprint, with_backend
from longspan.spec.foreign import unknown_argument
from longspan.spec.inputs import Arguments
from longspan.spec.pattern import Dense, Pattern
from longspan.spec.problem import Problem

__all__ = ["KEPT", "attention", "forget", "plan_for"]

_DENSE = Dense()
_ARGUMENTS = (*Arguments._fields, "dropout_seed", "backend", "return_lse")
"""The arguments beside the tensors."""

KEPT = 128
"""Plans kept; the oldest goes."""

_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | None = ...,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    enable_gqa: bool = ...,
    cu_seqlens: Tensor | tuple[int, ...] | None = ...,
    query_offset: int | None = ...,
    dropout_seed: int | None = ...,
    backend: str | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | None = ...,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    enable_gqa: bool = ...,
    cu_seqlens: Tensor | tuple[int, ...] | None = ...,
    query_offset: int | None = ...,
    dropout_seed: int | None = ...,
    backend: str | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | None = _DENSE,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    cu_seqlens: Tensor | tuple[int, ...] | None = None,
    query_offset: int | None = None,
    dropout_seed: int | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    **foreign: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with any pattern, by whichever backend fits.

    Args:
        query: `(batch, heads, q_len, head_dim)`, any strides, floating.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: the shape of `key`.
        pattern: which keys a query may see: `Dense()`, `Dilated(...)`, `SlidingWindow(...)`, `BlockSparse(...)`,
            `TopKBlocks(...)`.
        is_causal: only keys whose position is at most the query's.
        scale: factor on the scores; 1/sqrt(head_dim) unless given.
        dropout_p: probability of dropping a weight.
        enable_gqa: allow fewer key heads than query heads; head `h` reads key head `h // (heads // kv_heads)`.
        cu_seqlens: boundaries of packed documents, `(0, end_1, ...)`; every pattern restarts at each. Tokens after the
            last boundary are padding: they belong to no document, and have out 0 and lse -inf.
        query_offset: position of the first query, for `q_len != kv_len`.
        dropout_seed: which pairs to drop: the same seed drops the same (head, query, key) whatever the backend. Drawn
            from torch's default generator unless given.
        backend: exactly this backend; an error where it does not fit. None or "auto": the policy in force, then auto.
        return_lse: also return the log-sum-exp of the scaled scores.
        foreign: nothing; other arguments are refused, with longspan's word for them.

    Returns:
        `out` of query's shape and dtype; with `return_lse` `(out, lse)`, lse `(batch, heads, q_len)`, natural log,
        float32 (float64 for float64 inputs). A query that may attend to nothing has out 0 and lse -inf.

    Raises:
        ArgumentError: an argument that nothing could honour, or one that there is not (a `TypeError` too): the message
            has longspan's word for what other libraries call it.
        BackendUnavailable: the named backend does not fit, or none does; the message holds the reasons.
        UnknownBackend: a name nobody registered.
    """
    if foreign:
        raise unknown_argument("attention()", foreign, _ARGUMENTS)
    if pattern is None:
        pattern = _DENSE
    if return_lse is not True and return_lse is not False:
        raise ArgumentError("return_lse", brief(return_lse), "True or False")
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        query, key, value = follow_autocast(query, key, value)
    arguments = Arguments(pattern, is_causal, scale, dropout_p, enable_gqa, cu_seqlens, query_offset)
    if not undisturbed(query, key, value):
        named = with_backend(backend, policy.text)
        out, lse = attend_in_graph(query, key, value, dropout_seed, arguments, named)
    else:
        out, lse = plan_for(query, key, value, arguments, backend).run(query, key, value, dropout_seed)
    return (out, lse) if return_lse else out


def plan_for(query: Tensor, key: Tensor, value: Tensor, arguments: Arguments, backend: str | None) -> Plan:
    """The plan for these arguments of `attention` under the policy in force.

    Raises:
        ArgumentError, BackendUnavailable, UnknownBackend, PolicyError: as `attention`.
    """
    token: tuple[Any, ...] | None
    try:
        token = (
            query.shape,
            key.shape,
            value.shape,
            query.dtype,
            key.dtype,
            value.dtype,
            query.device,
            key.device,
            value.device,
            arguments if arguments.cu_seqlens is None else _hashable(arguments),
            tuple(map(type, arguments)),  # for 1 == 1.0 == True
            backend,
            torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
            torch.are_deterministic_algorithms_enabled(),
            registry.generation,
            fingerprint(),
        )
        found = _plans.get(token)
    except (AttributeError, TypeError, RuntimeError):  # no usual tensor, or not hashable: Problem.like says which
        found, token = None, None
    if found is not None:
        return found
    found = plan(Problem.like(query, key, value, **arguments._asdict()), backend)
    if token is not None:
        _plans[token] = found  # no lock: each step is atomic, and a fork could leave a lock locked
        while len(_plans) > KEPT:
            _plans.popitem(last=False)
    return found


find_plans_by(plan_for)


def forget() -> None:
    """Drop all plans that were kept, and with them what they alone held of the arena."""
    _plans.clear()


def _hashable(arguments: Arguments) -> tuple[Any, ...]:
    """Arguments with boundaries as a hashable value, with whatever else the checks look at."""
    bounds: Any = arguments.cu_seqlens
    if isinstance(bounds, Tensor):
        values: Any = bounds.device, bounds.dtype, bounds.dim(), tuple(bounds.flatten().tolist())
    else:
        values = tuple((type(one), one) for one in bounds)
    return (*arguments[:5], values, arguments.query_offset)
