"""A plan: a resolved problem with its kernels made, ready to run as a bare callable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longspan.autograd import Differentiable
from longspan.buffers import Workspace
from longspan.discovery import registry
from longspan.errors import ArgumentError, PluginError
from longspan.execution import Step, run_backward, run_forward
from longspan.explain import explain
from longspan.layout import Call, Layout
from longspan.lowering import lower
from longspan.patterns import Dense
from longspan.resolve import demand
from longspan.spec import Capabilities, Kernel, Problem, Resolution

__all__ = ["Plan", "plan"]

Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Back = Callable[..., tuple[Tensor, Tensor, Tensor]]


def plan(problem: Problem, backend: str | None = None) -> Plan:
    """Choose a backend for the problem and make its kernels.

    Args:
        problem: what is to be computed.
        backend: exactly this backend; else the policy in force decides.

    Raises:
        BackendUnavailable: the named backend does not fit, or none does; the message holds the reasons.
        UnknownBackend: a name nobody registered.
    """
    resolution = explain(problem, backend=backend)
    return Plan(problem, resolution, demand(resolution))


class Plan:
    """Computes one problem with one backend: `out, lse = plan(query, key, value)`.

    `problem`, `resolution` and `layout` say what, by whom and how. Calling it runs no hook and reads no policy. It
    pickles as its problem and the backend's name.
    """

    def __init__(self, problem: Problem, resolution: Resolution, backend: str) -> None:
        self.problem = problem
        self.resolution = resolution
        self.backend = backend
        self._query_shape = torch.Size((problem.batch, problem.heads, problem.q_len, problem.head_dim))
        self._key_shape = torch.Size((problem.batch, problem.kv_heads, problem.kv_len, problem.head_dim))
        self._dtype: torch.dtype = getattr(torch, problem.dtype)
        self._device = "cuda" if problem.device.type == "rocm" else problem.device.type
        self.layout, self._forward, self._backward = _prepare(problem, backend)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Attention and its log-sum-exp.

        Args:
            query: `(batch, heads, q_len, head_dim)` as in the problem, any strides.
            key: `(batch, kv_heads, kv_len, head_dim)`.
            value: the shape of `key`.

        Returns:
            `out` of query's shape and dtype, `lse` `(batch, heads, q_len)`, natural log, float32 or float64.

        Raises:
            ArgumentError: a tensor is not what the plan was made for.
        """
        device = query.device
        if (
            query.shape != self._query_shape
            or key.shape != self._key_shape
            or value.shape != self._key_shape
            or not (query.dtype is key.dtype is value.dtype is self._dtype)
            or device.type != self._device
            or key.device != device
            or value.device != device
        ):
            self._refuse(query, key, value)
        return self.run(query, key, value)

    def run(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What a call does after its checks, for callers that have made them."""
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            apply: Any = Differentiable.apply
            out, lse = apply(query, key, value, self._forward, self._backward)
            return out, lse
        return self._forward(query, key, value)

    def _refuse(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            shape = self._query_shape if name == "query" else self._key_shape
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            want = f"{tuple(shape)} {self._dtype} on {self._device}, as planned"
            if tensor.shape != shape or tensor.dtype is not self._dtype or tensor.device != query.device:
                raise ArgumentError(name, got, want, "make a plan for these tensors with Problem.like")
        raise ArgumentError("query", f"on {query.device}", f"on {self._device}, as planned", "move the tensors")

    def __reduce__(self) -> tuple[Any, ...]:
        return plan, (self.problem, self.backend)

    def __repr__(self) -> str:
        return f"Plan({self.problem}: {self.backend}, {self.layout})"


def _prepare(problem: Problem, backend: str) -> tuple[Any, Run, Back]:
    """The layout, and the forward and backward that run it."""
    row = next(row for row in registry.backends() if row.name == backend and row.capabilities)
    can = row.capabilities
    assert can is not None  # the generator above asked for it
    layout = _layout(problem, backend)
    if _native(problem, can):
        kernel = _kernel(problem, layout, backend)
        return layout, kernel.forward, kernel.backward or _blockwise_backward(problem)
    if not isinstance(layout, Layout):
        raise PluginError(
            f"{backend}'s longspan_pattern returned {type(layout).__name__} for a pattern it does not declare. "
            f"Next: return None there, or add {problem.pattern.kind!r} to its Capabilities.patterns"
        )
    made: dict[Problem, Step] = {}
    steps = []
    for call in layout.calls:
        dense = _dense_problem(problem, call, can)
        if dense not in made:
            kernel = _kernel(dense, lower(dense), backend)
            made[dense] = Step(kernel, gqa=can.gqa, is_causal=dense.is_causal, scale=dense.scale)
        steps.append(made[dense])

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return run_forward(layout, steps, query, key, value)

    def backward(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return run_backward(layout, steps, *tensors)

    return layout, forward, backward


def _native(problem: Problem, can: Capabilities) -> bool:
    """Whether the backend's kernel takes the problem as it is."""
    shifted = problem.query_offset or problem.q_len != problem.kv_len
    return (
        problem.pattern.kind in can.patterns
        and 0 not in (problem.batch, problem.heads, problem.q_len, problem.kv_len)
        and (can.gqa or problem.heads == problem.kv_heads)
        and (can.documents or problem.documents is None)
        and (can.query_offset or not (shifted and (problem.is_causal or problem.pattern.positional)))
    )


def _layout(problem: Problem, backend: str) -> Any:
    cache = registry.lane(backend, "longspan_cache")(device=problem.device)
    layout = cache.get(problem)
    if layout is None:
        layout = registry.lane(backend, "longspan_pattern")(problem=problem)
        cache.put(problem, layout)
    return layout


def _kernel(problem: Problem, layout: Any, backend: str) -> Kernel:
    specs = registry.lane(backend, "longspan_buffers")(problem=problem, layout=layout)
    allocator = registry.lane(backend, "longspan_allocator")(device=problem.device)
    make = registry.lane(backend, "longspan_kernel")
    kernel = make(problem=problem, layout=layout, buffers=Workspace(specs, allocator))
    if isinstance(kernel, Kernel):
        return kernel
    if callable(kernel):
        return Kernel(kernel)
    raise PluginError(f"{backend}'s longspan_kernel returned {type(kernel).__name__}, want a callable or a Kernel")


def _dense_problem(problem: Problem, call: Call, can: Capabilities) -> Problem:
    """The dense problem that a call poses to the kernel; batch and heads as they come without folding."""
    return problem.replace(
        pattern=Dense(),
        batch=problem.batch * call.queries.count,
        heads=call.heads.count,
        kv_heads=call.kv_heads.count if can.gqa else call.heads.count,
        q_len=call.queries.length,
        kv_len=call.keys.length,
        is_causal=call.is_causal,
        documents=None,
        query_offset=0,
    )


def _blockwise_backward(problem: Problem) -> Back:
    """The core's backward, for a kernel that has none."""
    layout = lower(problem)

    def no_forward(*_: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("only the backward is asked for")

    steps = [Step(Kernel(no_forward), gqa=True, is_causal=call.is_causal, scale=problem.scale) for call in layout.calls]

    def backward(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return run_backward(layout, steps, *tensors)

    return backward
