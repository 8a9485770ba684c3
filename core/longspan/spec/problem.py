"""`Problem`: everything that decides which backend fits, frozen and checked."""

from __future__ import annotations

import math
from typing import Any, Never

import torch
from attrs import Factory, evolve, field, frozen

from longspan.errors import ArgumentError, check_integer, check_number
from longspan.spec.backend import DTYPES
from longspan.spec.device import Device
from longspan.spec.foreign import unknown_argument
from longspan.spec.inputs import Arguments, check_arguments, check_boundaries, check_inputs, check_pattern
from longspan.spec.pattern import Dense, Pattern

__all__ = ["Problem"]


def _device(value: Any) -> Device:
    return value if isinstance(value, Device) else Device.parse(str(value))


def _dtype(value: Any) -> str:
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ArgumentError("dtype", name, " or ".join(DTYPES), "cast the inputs, e.g. query.float()")
    return name


def _usual_scale(head_dim: Any) -> float:
    return 1.0 / math.sqrt(head_dim) if isinstance(head_dim, int) and head_dim > 0 else 1.0


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@frozen(kw_only=True, cache_hash=True)
class Problem:
    """Everything that decides which backend fits: shapes, dtype, device, pattern and arguments. Frozen and hashable.

    Lengths are in tokens. `scale` is always a number (1/sqrt(head_dim) unless given). `query_offset` is the position
    of the first query, 0 unless given; keys start at position 0.
    """

    batch: int
    heads: int
    q_len: int
    head_dim: int
    kv_heads: int = Factory(lambda self: self.heads, takes_self=True)
    kv_len: int = Factory(lambda self: self.q_len, takes_self=True)
    dtype: str = field(default="float32", converter=_dtype)
    device: Device = field(default=Device("cpu"), converter=_device)
    pattern: Pattern = Dense()
    is_causal: bool = False
    scale: float = Factory(lambda self: _usual_scale(self.head_dim), takes_self=True)
    dropout_p: float = 0.0
    documents: tuple[int, ...] | None = field(default=None, converter=_hashable)
    query_offset: int = 0
    requires_grad: bool = False
    deterministic: bool = False

    def __attrs_post_init__(self) -> None:
        _check_problem(self)

    @classmethod
    def like(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pattern: Pattern | None = None,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
        enable_gqa: bool = False,
        cu_seqlens: object = None,
        query_offset: int | None = None,
        **foreign: Never,
    ) -> Problem:
        """The problem that these tensors pose.

        Args:
            query: `(batch, heads, q_len, head_dim)`, any strides.
            key: `(batch, kv_heads, kv_len, head_dim)`.
            value: the shape of `key`.
            pattern: `Dense()` unless given.
            is_causal: key position <= query position.
            scale: factor on the scores, 1/sqrt(head_dim) unless given.
            dropout_p: probability of dropping a weight.
            enable_gqa: allow `kv_heads` to be a divisor of `heads`.
            cu_seqlens: boundaries of packed documents.
            query_offset: position of the first query; needed where `q_len != kv_len` and the result depends on
                positions.
            foreign: nothing; other arguments are refused, with longspan's word for them.

        Raises:
            ArgumentError: names the argument, what was given and what would do; for another library's argument, what
                longspan calls it.
        """
        if foreign:
            raise unknown_argument("Problem.like()", foreign, Arguments._fields)
        pattern = Dense() if pattern is None else pattern
        bounds: Any = cu_seqlens
        check_arguments(Arguments(pattern, is_causal, scale, dropout_p, enable_gqa, bounds, query_offset))
        fields = check_inputs(query, key, value, enable_gqa, cu_seqlens) | {"query_offset": query_offset or 0}
        if fields["q_len"] != fields["kv_len"] and query_offset is None and (is_causal or pattern.positional):
            last = fields["kv_len"] - fields["q_len"]
            raise ArgumentError(
                "query_offset",
                f"None with {fields['q_len']} queries and {fields['kv_len']} keys",
                "the position of the first query, for what depends on positions",
                "query_offset=0 aligns the first query with the first key (top left), "
                + (f"query_offset={last} the last with the last" if last >= 0 else "give more keys to align the last")
                + " (bottom right)",
            )
        return cls(
            device=Device.of(query.device),
            pattern=pattern,
            is_causal=is_causal,
            scale=_usual_scale(fields["head_dim"]) if scale is None else scale,
            dropout_p=dropout_p,
            requires_grad=torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **fields,
        )

    def replace(self, **changes: Any) -> Problem:
        """A copy with some fields changed."""
        return evolve(self, **changes)

    def __str__(self) -> str:
        shape = f"q=({self.batch},{self.heads},{self.q_len},{self.head_dim})"
        if (self.kv_heads, self.kv_len) != (self.heads, self.q_len):
            shape += f" kv=({self.batch},{self.kv_heads},{self.kv_len},{self.head_dim})"
        words = [self.pattern.spec, shape, self.dtype, self.device.name]
        words += ["causal"] if self.is_causal else []
        words += ["grad"] if self.requires_grad else []
        words += [f"dropout={self.dropout_p}"] if self.dropout_p else []
        words += ["documents"] if self.documents is not None else []
        return " ".join(words)


def _check_problem(problem: Problem) -> None:
    for name in ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "query_offset"):
        check_integer(name, getattr(problem, name), 1 if name == "head_dim" else 0)
    check_pattern(problem.pattern)
    if problem.kv_heads and problem.heads % problem.kv_heads:
        raise ArgumentError(
            "kv_heads",
            f"{problem.kv_heads} key heads for {problem.heads} query heads",
            "a divisor of the number of query heads",
            "repeat or drop key heads until they divide",
        )
    check_number("scale", problem.scale)
    if not 0.0 <= check_number("dropout_p", problem.dropout_p) < 1.0:
        raise ArgumentError("dropout_p", problem.dropout_p, "a probability of at least 0 and below 1")
    if problem.documents is not None:
        check_boundaries(problem.documents, problem.q_len, problem.kv_len)
    if problem.query_offset and problem.documents is not None:
        want = "0 or None with cu_seqlens: positions count from each document's start"
        raise ArgumentError("query_offset", problem.query_offset, want, "leave it out")
    problem.pattern.check(problem.heads)
