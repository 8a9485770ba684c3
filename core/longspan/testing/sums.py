"""The check of long rows and columns: sums over so many numbers that rounding grows with them.

The usual rule looks at the worst number, against a floor that leaves room for what naive torch is spared. Sums over
65,536 numbers one after the other stay below it. So what is lost is measured here by the root mean square of
got - oracle over that of the oracle, and held to what naive torch of the same dtype loses: at most `tolerance.FORWARD`
times that for out and lse, `tolerance.GRADIENT` times for gradients. Naive torch may be spared what the contract asks
of everyone else, whose results are rounded to their dtypes, and whose backward is given such rounded ones: where exact
arithmetic loses more in that way, this counts in place of naive torch's. Few numbers are right by luck: no limit is
below one eps of the lse's dtype, nor, for gradients, below half an |lse| eps, by which a rounded lse may put every
weight of a row off. In float64 the usual rule's 1e-12 is all that is promised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspan.testing import tolerance
from longspan.testing.answers import SEED, Answer, Three, sight
from longspan.testing.claims import Claim, backward_of
from longspan.testing.outcome import Breach, Measure
from longspan.testing.side_effects import only_read
from longspan.testing.workbench import Bench, Measures

__all__ = ["lost", "sums"]

EPS = torch.finfo(torch.float32).eps
"""Of the lse of every dtype that is judged by the mean error."""


def sums(bench: Bench) -> Measures:
    """Forward and backward, as every result is judged, and then by the mean error."""
    problem, made = bench.trained(bench.problem())
    inputs = bench.inputs(problem.requires_grad)
    with only_read(inputs):
        out, lse = made(*inputs.qkv, dropout_seed=SEED)
    right = bench.answer(problem, inputs)
    measures = bench.judged(out, lse, problem, inputs, right)
    lossy = bench.can.exact and inputs.query.dtype != torch.float64
    if lossy:
        rounded = right.out.detach().to(out.dtype), right.lse.detach().to(lse.dtype)
        measures += (
            _judge("forward", "out", out, right.out, right.naive_out, rounded[0], EPS, None),
            _judge("lse", "lse", lse, right.lse, right.naive_lse, rounded[1], EPS, None),
        )
    if not problem.requires_grad:
        return measures
    with only_read(inputs):
        got = torch.autograd.grad(out, inputs.qkv, inputs.dout)
    measures += bench.judged_backward(got, inputs, right)
    if not lossy:
        return measures
    claim = backward_of(bench.case.claim) if bench.can.backward else None
    floors = _rounded_gradients(right, inputs.dout, sight(problem), problem.scale)
    least = EPS * max(1.0, 0.5 * float(right.lse[right.lse.isfinite()].abs().max()))
    names, (want, naive) = ("dquery", "dkey", "dvalue"), right.gradients(inputs.dout)
    return measures + tuple(
        _judge("gradient", *given, least, claim) for given in zip(names, got, want, naive, floors, strict=True)
    )


def lost(got: Tensor, want: Tensor) -> float:
    """Root mean square of got - want over that of want, but for rows without keys."""
    got, want = got.detach().cpu().double(), want.detach()
    off, size = (x.masked_fill(want == -math.inf, 0.0).norm() for x in (got - want, want))
    return float(off / size.clamp(min=torch.finfo(want.dtype).tiny))


def _judge(
    what: str, name: str, got: Tensor, want: Tensor, naive: Tensor, rounded: Tensor, least: float, claim: Claim | None
) -> Measure:
    times = tolerance.GRADIENT if what == "gradient" else tolerance.FORWARD
    usual = max(lost(naive, want), lost(rounded, want))
    measure = Measure(what, lost(got, want), tolerance.allowed(naive.dtype, usual, times, least))
    if not measure.error <= measure.allowed:
        off = f"mean error {measure.error:.2g}, allowed {measure.allowed:.2g}"
        raise Breach(f"its {name} loses more than {times:g} times what naive torch does: {off}", measure, claim)
    return measure


def _rounded_gradients(right: Answer, dout: Tensor, counts: Tensor, scale: float) -> Three:
    """What exact arithmetic makes of the out and lse that a backward is given, rounded to the dtype of the inputs."""
    query, key, value = (x.detach() for x in right.inputs)
    dtype, given = dout.dtype, dout.cpu().double()
    out = right.out.detach().to(dtype).double()
    lse = right.lse.detach().float().double()
    seen = lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)
    weights = counts * torch.exp(query @ key.mT * scale - seen)
    slopes = weights * (given @ value.mT - (given * out).sum(-1, keepdim=True)) * scale
    dquery, dkey, dvalue = (x.to(dtype) for x in (slopes @ key, slopes.mT @ query, weights.mT @ given))
    return dquery, dkey, dvalue
