"""A plan: a resolved problem with its kernels made, ready to run as a bare callable."""

from __future__ import annotations

from functools import partial
from typing import Any, Never

import torch
from torch import Tensor

from longspan.errors import ArgumentError
from longspan.execution.kernel import note_kernel, undisturbed, undisturbed_gradient
from longspan.execution.runner import Saved
from longspan.execution.shortage import give_back, once_more, spared
from longspan.lowering.route import Lowering
from longspan.memory.cache import LayoutStore
from longspan.numerics.dropout import Draw, check_seed, draw_seed
from longspan.numerics.tensors import wide_dtype
from longspan.planning.build import build
from longspan.planning.operators import attend_in_graph, differentiate_in_graph
from longspan.planning.verification import Verification, observe
from longspan.registry.discovery import registry
from longspan.registry.explain import check_problem, rerouted, resolution_for
from longspan.registry.policy import Policy
from longspan.registry.resolve import require
from longspan.spec.inputs import Arguments
from longspan.spec.problem import Problem
from longspan.spec.resolution import Resolution

__all__ = ["Plan", "follow_autocast", "plan"]


def plan(
    problem: Problem,
    backend: str | None = None,
    *rest: Never,
    pattern_cache: LayoutStore | None = None,
    **foreign: Never,
) -> Plan:
    """Choose a backend for the problem and make its kernels.

    Args:
        problem: what is to be computed.
        backend: exactly this backend; where it is None or "auto", the policy in force decides.
        rest: nothing; more than two arguments are refused.
        pattern_cache: where to keep the layout: a `PatternCache` of a module's own, say; the shared one unless given.
        foreign: nothing; other arguments are refused, with where longspan has them.

    Raises:
        BackendUnavailable: the named backend does not fit, or none does; the message holds the reasons.
        UnknownBackend: a name nobody registered.
        ArgumentError: tensors in place of a problem.
    """
    check_problem("plan", problem, rest, foreign, ("backend", "pattern_cache"))
    for _ in range(2):  # a backend may learn what this machine lacks while its kernels are made: then choose again
        generation, lowering = registry.generation, Lowering(problem)
        made = Plan(lowering, resolution_for(lowering, backend), pattern_cache)
        if registry.generation == generation:
            break
    return made


class Plan:
    """Computes one problem with one backend: `out, lse = plan(query, key, value)`.

    `problem`, `resolution`, `backend` and `layout` say what, why, by whom and how. Calling it runs no hook and reads no
    policy. It pickles as its problem and the backend's name.
    """

    def __init__(self, lowering: Lowering, resolution: Resolution, pattern_cache: LayoutStore | None = None) -> None:
        self.problem = problem = lowering.asked
        self.backend = backend = require(resolution)
        self._query_shape = torch.Size((problem.batch, problem.heads, problem.q_len, problem.head_dim))
        self._key_shape = torch.Size((problem.batch, problem.kv_heads, problem.kv_len, problem.head_dim))
        self._dtype: torch.dtype = getattr(torch, problem.dtype)
        self._device = "cuda" if problem.device.type == "rocm" else problem.device.type
        self._usual_device = torch.device(self._device)  # comparing it is cheaper than reading a type
        self._dropout_p = problem.dropout_p
        self._in_graph = Arguments.of(problem), Policy(backend, "argument").text
        self._runner, route = build(lowering, backend, pattern_cache, partial(differentiate_in_graph, *self._in_graph))
        self.resolution = rerouted(resolution, route)
        self.layout = self._runner.layout

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, dropout_seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention and its log-sum-exp.

        Args:
            query: `(batch, heads, q_len, head_dim)` as in the problem, any strides.
            key: `(batch, kv_heads, kv_len, head_dim)`.
            value: the shape of `key`.
            dropout_seed: which pairs to drop, for a problem with dropout; drawn from torch's generator unless given.

        Returns:
            `out` of query's shape and dtype, `lse` `(batch, heads, q_len)`, natural log, float32 or float64.

        Raises:
            ArgumentError: a tensor is not what the plan was made for.
        """
        try:
            device = query.device
            right = (
                query.shape == self._query_shape
                and key.shape == self._key_shape
                and value.shape == self._key_shape
                and query.dtype is key.dtype is value.dtype is self._dtype
                and (device == self._usual_device or device.type == self._device)
                and key.device == device
                and value.device == device
            )
        except AttributeError:  # no tensor
            right = False
        if not right:
            query, key, value = self._check(*follow_autocast(query, key, value))
        if not undisturbed(query, key, value):
            return attend_in_graph(query, key, value, dropout_seed, *self._in_graph)
        return self.run(query, key, value, dropout_seed)

    def run(self, query: Tensor, key: Tensor, value: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """What a call does after its checks, for callers that have made them."""
        draw = None
        if seed is not None:
            check_seed(seed)
        if self._dropout_p:
            draw = Draw(self._dropout_p, draw_seed() if seed is None else seed, self.problem.query_offset)
        try:
            return self._run(query, key, value, draw)
        except Exception as error:
            if not (freed := give_back(error)):
                raise
        return once_more(partial(self._run, query, key, value, draw), freed)

    def _run(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        runner = self._runner
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return runner.attend(query, key, value, draw)
        if (
            runner.bare is None
            or not (query.is_contiguous() or query.stride(3) == 1)  # the first is cheaper to ask
            or not (key.is_contiguous() or key.stride(3) == 1)
            or not (value.is_contiguous() or value.stride(3) == 1)
        ):
            return runner.forward(query, key, value, draw)
        try:
            return runner.bare(query, key, value)
        except Exception as error:
            note_kernel(error, self.backend)
            raise

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        dlse: Tensor | None = None,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients `(dquery, dkey, dvalue)`, for callers that keep what the forward gave them.

        Args:
            dout: the gradient with respect to `out`, of its shape and dtype.
            query: as the forward took it, and so are `key` and `value`.
            key: see `query`.
            value: see `query`.
            out: what the forward returned, or that of a softmax over more keys.
            lse: see `out`; float32, or float64 for float64 inputs.
            dlse: the gradient with respect to `lse`, of its shape and dtype, if there is any.
            seed: the forward's dropout seed.

        Raises:
            ArgumentError: a tensor is not what the plan was made for.
        """
        check_seed(seed)
        self._check(query, key, value)
        self._check_results(dout, query, out, lse, dlse)
        draw = Draw(self.problem.dropout_p, seed, self.problem.query_offset) if self.problem.dropout_p else None
        saved = Saved(query, key, value, out, lse)
        if not (undisturbed(query, key, value) and undisturbed_gradient(dout, dlse, out)):
            return self._runner.in_graph(saved, dout, dlse, draw)
        return spared(partial(self._runner.backward, saved, dout, dlse, draw))

    def verify(self) -> Verification:
        """Run once on random inputs under the profiler, and compare the operators that ran with those claimed.

        `print(plan.verify())` says which operator served; `.ok` is False where another one did.
        """
        device = torch.device(self._device, self.problem.device.index or 0) if self._device != "cpu" else "cpu"
        shapes = (self._query_shape, self._key_shape, self._key_shape)
        tensors = [torch.randn(shape, device=device, dtype=torch.float32).to(self._dtype) for shape in shapes]
        with torch.no_grad():
            return observe(self.backend, self._runner.operators, lambda: self(*tensors))

    @property
    def libraries(self) -> tuple[str, ...]:
        """Which libraries, with their versions, serve the kernels, as far as the backend says."""
        return self._runner.libraries

    @property
    def own_backward(self) -> bool:
        """Whether the backend's kernels bring a backward of their own; else the core's blockwise backward serves."""
        return self._runner.own_backward

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, Tensor):
                raise ArgumentError(name, type(tensor).__name__, "a torch.Tensor", f"torch.as_tensor({name})")
            shape = self._query_shape if name == "query" else self._key_shape
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, {tensor.layout}"
            want = f"{tuple(shape)} {self._dtype} on {self._device}, torch.strided, as planned"
            here = tensor.device.type == self._device and tensor.device == query.device
            here = here and tensor.layout is torch.strided
            if tensor.shape != shape or tensor.dtype is not self._dtype or not here:
                raise ArgumentError(name, got, want, "make a plan for these tensors with Problem.like")
        return query, key, value

    def _check_results(self, dout: Tensor, query: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> None:
        """Refuse what the forward of these queries cannot have returned, and gradients of something else."""
        device, wide = query.device, wide_dtype(self._dtype)
        for name, tensor, shape, dtype in (
            ("dout", dout, self._query_shape, self._dtype),
            ("out", out, self._query_shape, self._dtype),
            ("lse", lse, self._query_shape[:3], wide),
            ("dlse", dlse, self._query_shape[:3], wide),
        ):
            if tensor is None and name == "dlse":
                continue
            if not isinstance(tensor, Tensor):
                raise ArgumentError(name, type(tensor).__name__, "a torch.Tensor", f"torch.as_tensor({name})")
            dense = tensor.layout is torch.strided
            if tensor.shape != shape or tensor.dtype is not dtype or tensor.device != device or not dense:
                got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, {tensor.layout}"
                want = f"{tuple(shape)} {dtype} on {device}, torch.strided, as the forward's"
                raise ArgumentError(name, got, want, "pass what this plan's forward returned, and gradients like it")

    def __reduce__(self) -> tuple[Any, ...]:
        return plan, (self.problem, self.backend)

    def __repr__(self) -> str:
        return f"Plan({self.problem}: {self.backend}, {self.layout})"


def follow_autocast(query: Any, key: Any, value: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Cast to autocast's dtype where it is enabled for query's device; float64 stays, as everywhere under autocast."""
    if not all(isinstance(tensor, Tensor) for tensor in (query, key, value)):
        return query, key, value  # to be refused by whoever checks
    kind = query.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype is not torch.float64
        return tensor.to(dtype) if eligible else tensor

    return cast(query), cast(key), cast(value)
