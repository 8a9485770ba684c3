"""The right answer to a case, and what naive torch of the same dtype makes of it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable

import torch
from attrs import field, frozen
from torch import Tensor

from longspan.numerics.dropout import Dropout
from longspan.spec.problem import Problem
from longspan.testing.oracle import oracle, visible
from longspan.testing.tensors import Inputs

__all__ = ["SEED", "Answer", "Three", "answer", "dense", "factors", "gradients", "known_answer", "sight"]

SEED = 20
"""The dropout seed of every case."""

Three = tuple[Tensor, Tensor, Tensor]
"""Of query, key and value."""


@frozen(eq=False)
class Answer:
    """The oracle's results in float64 on the CPU, and naive torch's in the dtype and on the device of the inputs.

    Both hold their graphs until `gradients` are asked for.
    """

    inputs: Three
    out: Tensor
    lse: Tensor
    naive_inputs: Three
    naive_out: Tensor
    naive_lse: Tensor
    _found: dict[str, tuple[Three, Three]] = field(factory=dict, init=False)

    def gradients(self, dout: Tensor, dlse: Tensor | None = None) -> tuple[Three, Three]:
        """The oracle's gradients and naive torch's; those of `out` alone are kept, and the graphs then dropped."""
        if "out" in self._found and dlse is None:
            return self._found["out"]
        cpu = None if dlse is None else dlse.cpu()
        want = gradients(self.out, self.lse, self.inputs, dout.cpu().double(), cpu)
        naive = gradients(self.naive_out, self.naive_lse, self.naive_inputs, dout, dlse)
        if dlse is None:
            self._found["out"] = want, naive
            self.forget()
        return want, naive

    def forget(self) -> None:
        """Drop the graphs."""
        for x in (self.out, self.lse, self.naive_out, self.naive_lse):
            x.detach_()

    @property
    def nbytes(self) -> int:
        """What its tensors take, about."""
        return 4 * sum(x.nbytes for x in (*self.inputs, *self.naive_inputs))


KEPT_BYTES = 256 * 2**20
_kept: OrderedDict[Hashable, Answer] = OrderedDict()


def known_answer(key: Hashable, problem: Problem, inputs: Inputs) -> Answer:
    """`answer`, made once for each key while memory lasts: backends have most of their cases in common."""
    known = _kept.pop(key, None)
    if known is None:
        known = answer(problem, inputs)
        if not problem.requires_grad:
            known.forget()
    _kept[key] = known
    while sum(kept.nbytes for kept in _kept.values()) > KEPT_BYTES and len(_kept) > 1:
        _kept.popitem(last=False)
    return known


def answer(problem: Problem, inputs: Inputs) -> Answer:
    """Both answers to a problem."""
    # Copies: what a kernel wrote to its inputs must not come in here.
    exact = _leaves(*(x.detach().to("cpu", torch.float64, copy=True) for x in inputs.qkv))
    naive = _leaves(*(x.detach().clone() for x in inputs.qkv))
    counts = sight(problem)
    dropped = factors(problem) if problem.dropout_p else None
    if dropped is None:
        out, lse = oracle(
            *exact,
            problem.pattern,
            scale=problem.scale,
            enable_gqa=True,
            is_causal=problem.is_causal,
            cu_seqlens=problem.documents,
            query_offset=problem.query_offset,
            return_lse=True,
        )
    else:  # the oracle has no dropout
        out, lse = dense(*exact, counts, problem.scale, dropped)
    return Answer(exact, out, lse, naive, *dense(*naive, counts, problem.scale, dropped))


def sight(problem: Problem) -> Tensor:
    """How often each query sees each key, `(heads, q_len, kv_len)`."""
    return visible(
        problem.pattern,
        problem.heads,
        problem.q_len,
        problem.kv_len,
        is_causal=problem.is_causal,
        cu_seqlens=problem.documents,
        query_offset=problem.query_offset,
    )


def dense(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, scale: float, dropped: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention as anyone would write it down, every step in the inputs' dtype.

    Args:
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: the shape of `key`.
        counts: how often each query sees each key, `(heads, q_len, kv_len)`.
        scale: factor on the scores.
        dropped: factors on the weights, `(batch, heads, q_len, kv_len)`.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    empty = (counts == 0).all(-1).to(query.device)
    # A key that is seen twice weighs twice: a factor on its softmax term, so a summand on its score.
    bias = counts.double().log().to(query.dtype).to(query.device)
    scores = (query @ key.transpose(-1, -2) * scale + bias).masked_fill(empty.unsqueeze(-1), 0.0)
    weights = scores.softmax(-1).masked_fill(empty.unsqueeze(-1), 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty, -math.inf)
    if dropped is not None:
        weights = weights * dropped.to(query.dtype).to(query.device)
    return weights @ value, lse


def factors(problem: Problem) -> Tensor:
    """What the dropout of seed `SEED` multiplies the weights with, `(batch, heads, q_len, kv_len)`, float64."""
    shape = problem.batch, problem.heads
    lines = torch.arange(problem.batch * problem.heads, dtype=torch.int64, device="cpu").view(shape)
    queries = (torch.arange(problem.q_len, dtype=torch.int64, device="cpu") + problem.query_offset).expand(*shape, -1)
    keys = torch.arange(problem.kv_len, dtype=torch.int64, device="cpu").expand(*shape, -1)
    every = slice(None)
    return Dropout(problem.dropout_p, SEED, lines, queries, keys).factors(every, every, every, torch.float64)


def gradients(
    out: Tensor, lse: Tensor, inputs: Three, dout: Tensor, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `out`, and of `lse` where it has one."""
    outputs, given = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
    grads = torch.autograd.grad(outputs, inputs, [x.to(y) for x, y in zip(given, outputs, strict=True)])
    return grads[0], grads[1], grads[2]


def _leaves(query: Tensor, key: Tensor, value: Tensor) -> Three:
    one, two, three = (x.detach().requires_grad_() for x in (query, key, value))
    return one, two, three
