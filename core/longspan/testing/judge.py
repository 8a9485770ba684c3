"""Results against the oracle: shape, dtype, empty rows, NaN, and then the size of the error."""

from __future__ import annotations

import math

from torch import Tensor

from longspan.testing import tolerance
from longspan.testing.answers import Answer
from longspan.testing.claims import contract
from longspan.testing.outcome import Breach, Measure

__all__ = ["check_shapes", "judge_forward", "judge_gradients"]


def check_shapes(out: Tensor, lse: Tensor, query: Tensor) -> None:
    """Refuse results that are not of the contract's shape, dtype and device."""
    for name, got, shape, dtype in (
        ("out", out, query.shape, query.dtype),
        ("lse", lse, query.shape[:3], tolerance.wide(query.dtype)),
    ):
        if got.shape != shape or got.dtype != dtype or got.device != query.device:
            shown = f"{tuple(got.shape)} {got.dtype} on {got.device}"
            want = f"{tuple(shape)} {dtype} on {query.device}"
            raise Breach(f"{name} is {shown}, want {want}", claim=contract("out like query; lse float32 or float64"))


def judge_forward(out: Tensor, lse: Tensor, right: Answer, exact: bool = True) -> tuple[Measure, ...]:
    """Compare out and lse; out first, since a wrong out is the plainer fault.

    `exact=False`, for approximations, compares no numbers, only where there are any.
    """
    least = tolerance.floor(right.naive_out.dtype, right.lse.detach()) if exact else math.inf
    return (
        _judge("forward", "out", out, right.out, right.naive_out, tolerance.FORWARD, least),
        _judge("lse", "lse", lse, right.lse, right.naive_lse, tolerance.FORWARD, least),
    )


def judge_gradients(
    got: tuple[Tensor, ...],
    dout: Tensor,
    right: Answer,
    scale: float,
    dlse: Tensor | None = None,
    exact: bool = True,
) -> tuple[Measure, ...]:
    """Compare dquery, dkey and dvalue."""
    want, naive = right.gradients(dout, dlse)
    given = right.lse.detach(), right.out.detach(), dout, right.inputs[0], right.inputs[1], scale
    least = tolerance.gradient_floor(dout.dtype, *given) if exact else math.inf
    names = ("dquery", "dkey", "dvalue")
    return tuple(
        _judge("gradient", *four, tolerance.GRADIENT, least) for four in zip(names, got, want, naive, strict=True)
    )


def _judge(what: str, name: str, got: Tensor, want: Tensor, naive: Tensor, times: float, least: float) -> Measure:
    got, want = got.detach(), want.detach()
    if got.shape != want.shape:
        raise Breach(f"its {name} is {tuple(got.shape)}, want {tuple(want.shape)}")
    limit = tolerance.allowed(naive.dtype, tolerance.error(naive, want), times, least)
    measure = Measure(what, tolerance.error(got, want), limit)
    off = f"worst error {measure.error:.2g}, allowed {measure.allowed:.2g}"
    empty = (want == -math.inf).to(got.device)
    if (empty & (got != -math.inf)).any():
        raise Breach(f"its {name} is not -inf in rows without keys: {off}", measure)
    if (~empty & (got == -math.inf)).any():
        raise Breach(f"its {name} is -inf in rows that see keys: {off}", measure)
    if bad := int((~empty & ~got.isfinite()).sum()):
        raise Breach(f"its {name} is NaN or infinite in {bad} of {got.numel()} places: {off}", measure)
    if not measure.error <= measure.allowed:
        raise Breach(f"its {name} is not the oracle's: {off}", measure)
    return measure
