"""`longspan.attention`: what a model calls."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Any, Literal, overload

import torch
from torch import Tensor

from longspan.discovery import registry
from longspan.patterns import Dense, Pattern
from longspan.plan import Plan, plan
from longspan.policy import fingerprint
from longspan.spec import Problem

__all__ = ["attention"]

_DENSE = Dense()
_KEPT = 512
_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
_lock = Lock()


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern = ...,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    enable_gqa: bool = ...,
    cu_seqlens: Tensor | tuple[int, ...] | None = ...,
    query_offset: int | None = ...,
    backend: str | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern = ...,
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    enable_gqa: bool = ...,
    cu_seqlens: Tensor | tuple[int, ...] | None = ...,
    query_offset: int | None = ...,
    backend: str | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern = _DENSE,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    cu_seqlens: Tensor | tuple[int, ...] | None = None,
    query_offset: int | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with any pattern, by whichever backend fits.

    Args:
        query: `(batch, heads, q_len, head_dim)`, any strides, floating.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: the shape of `key`.
        pattern: which keys a query may see: `Dense()`, `Dilated(...)`.
        is_causal: only keys whose position is at most the query's.
        scale: factor on the scores; 1/sqrt(head_dim) unless given.
        dropout_p: probability of dropping a weight.
        enable_gqa: allow fewer key heads than query heads; head `h` reads key head `h // (heads // kv_heads)`.
        cu_seqlens: boundaries of packed documents, `(0, end_1, ...)`; every pattern restarts at each.
        query_offset: position of the first query, for `q_len != kv_len`.
        backend: exactly this backend; an error where it does not fit. None: the policy in force, then auto.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        `out` of query's shape and dtype; with `return_lse` `(out, lse)`, lse `(batch, heads, q_len)`, natural log,
        float32 (float64 for float64 inputs). A query that may attend to nothing has out 0 and lse -inf.

    Raises:
        ArgumentError: an argument that nothing could honour.
        BackendUnavailable: the named backend does not fit, or none does; the message holds the reasons.
        UnknownBackend: a name nobody registered.
    """
    try:
        found = _plans.get(
            token := (
                query.shape,
                key.shape,
                value.shape,
                query.dtype,
                key.dtype,
                value.dtype,
                query.device,
                key.device,
                value.device,
                pattern,
                is_causal,
                scale,
                dropout_p,
                enable_gqa,
                None if cu_seqlens is None else tuple(cu_seqlens),
                query_offset,
                backend,
                torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
                torch.are_deterministic_algorithms_enabled(),
                registry.generation,
                fingerprint(),
            )
        )
    except (AttributeError, TypeError):  # no tensor, or not hashable: the checks below say which
        found, token = None, None
    if found is None:
        problem = Problem.like(
            query,
            key,
            value,
            pattern,
            is_causal=is_causal,
            scale=scale,
            dropout_p=dropout_p,
            enable_gqa=enable_gqa,
            cu_seqlens=cu_seqlens,
            query_offset=query_offset,
        )
        found = plan(problem, backend)
        _keep(token, found)
    out, lse = found.run(query, key, value)
    return (out, lse) if return_lse else out


def _keep(token: tuple[Any, ...] | None, made: Plan) -> None:
    """Keep the plan; the oldest goes. The generation in the token may be from before discovery: then it only ages."""
    if token is None:
        return
    with _lock:
        _plans[token] = made
        while len(_plans) > _KEPT:
            _plans.popitem(last=False)
