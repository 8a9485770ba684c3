"""Plans by what a call was given: made once, kept, found again by a dictionary look-up."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from longspan.planning.operators import find_plans_by
from longspan.planning.plan import Plan, plan
from longspan.registry.discovery import registry
from longspan.registry.policy import fingerprint
from longspan.spec.pattern import Pattern
from longspan.spec.problem import Problem

__all__ = ["KEPT", "forget", "plan_for"]

KEPT = 128
"""Plans kept; the oldest goes."""

_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()


def plan_for(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    enable_gqa: bool,
    cu_seqlens: Tensor | tuple[int, ...] | None,
    query_offset: int | None,
    backend: str | None,
) -> Plan:
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
            pattern,
            is_causal,
            scale,
            dropout_p,
            enable_gqa,
            (
                type(is_causal),
                type(scale),
                type(dropout_p),
                type(enable_gqa),
                type(query_offset),
            ),  # for 1 == 1.0 == True
            None if cu_seqlens is None else _boundaries(cu_seqlens),
            query_offset,
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
    if token is not None:
        _plans[token] = found  # no lock: each step is atomic, and a fork could leave a lock locked
        while len(_plans) > KEPT:
            _plans.popitem(last=False)
    return found


find_plans_by(plan_for)


def forget() -> None:
    """Drop all plans that were kept, and with them what they alone held of the arena."""
    _plans.clear()


def _boundaries(cu_seqlens: Any) -> Any:
    """Boundaries as a hashable value, with whatever else the checks look at."""
    if isinstance(cu_seqlens, Tensor):
        return (cu_seqlens.device, cu_seqlens.dtype, cu_seqlens.dim(), tuple(cu_seqlens.flatten().tolist()))
    return type(cu_seqlens), tuple((type(one), one) for one in cu_seqlens)
