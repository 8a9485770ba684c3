"""Results against the oracle: shape, dtype, empty rows, NaN, and then the size of the error.

A wrong result may be the answer to another question, whose name is the best hint that there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from attrs import evolve
from torch import Tensor

from longspan.spec.backend import Capabilities
from longspan.spec.problem import Problem
from longspan.testing import tolerance
from longspan.testing.answers import Answer, answer
from longspan.testing.claims import Claim, claim_of, contract
from longspan.testing.outcome import Breach, Measure
from longspan.testing.tensors import Inputs

__all__ = ["check_shapes", "diagnose", "judge_forward", "judge_gradients"]

LOOSE = 4.0
"""How many times the allowance a diagnosis may miss by: its own rounding is not the point."""


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


def diagnose(
    breach: Breach, problem: Problem, inputs: Inputs, got: tuple[Tensor, Tensor], right: Answer, can: Capabilities
) -> Breach:
    """The same breach with the claim that is to blame, where the result is a wrong question's right answer."""
    if breach.measure is None:
        return breach
    limit = LOOSE * breach.measure.allowed
    place = 0 if breach.measure.what == "forward" else 1
    truth = (right.out.detach(), right.lse.detach())[place]
    for claim, words, guess in _guesses(problem, inputs, can):
        other = guess()[place]
        if tolerance.error(got[place], other) <= limit < tolerance.error(other, truth):
            return Breach(f"{breach.what}; it is {words}", breach.measure, claim)
    return breach


Guess = Callable[[], tuple[Tensor, Tensor]]


def _guesses(problem: Problem, inputs: Inputs, can: Capabilities) -> Iterator[tuple[Claim, str, Guess]]:
    def of(changed: Problem, given: Inputs = inputs) -> Guess:
        def guess() -> tuple[Tensor, Tensor]:
            guessed = answer(changed, given)
            return guessed.out.detach(), guessed.lse.detach()

        return guess

    def in_base_two() -> tuple[Tensor, Tensor]:
        out, lse = of(problem)()
        return out, lse / math.log(2)

    natural = contract("lse in natural log", "multiply the lse by math.log(2)")
    yield natural, "that in base 2", in_base_two
    if problem.is_causal:
        yield claim_of("causal", problem, can), "that of is_causal=False", of(problem.replace(is_causal=False))
        if problem.q_len != problem.kv_len and (last := problem.kv_len - problem.q_len) >= 0:
            aligned = of(problem.replace(query_offset=last))
            yield claim_of("query_offset", problem, can), "that of queries that end where the keys end", aligned
    if problem.dropout_p:
        yield claim_of("dropout", problem, can), "that of dropout_p=0.0", of(problem.replace(dropout_p=0.0))
    if problem.documents is not None:
        yield claim_of("documents", problem, can), "that of one document", of(problem.replace(documents=None))
    usual = problem.head_dim**-0.5
    scaled = contract("the scores are multiplied by problem.scale", "pass problem.scale on to the kernel")
    for scale, words in ((usual, "1/sqrt(head_dim)"), (problem.scale * usual, "problem.scale/sqrt(head_dim)")):
        if scale != problem.scale:
            yield scaled, f"that of scale={words}", of(problem.replace(scale=scale))
    if 1 < problem.kv_heads < problem.heads:
        wrong = [head % problem.kv_heads for head in range(problem.heads)]
        given = evolve(inputs, key=inputs.key[:, wrong], value=inputs.value[:, wrong])
        words = "that of key head h % kv_heads, want h // (heads // kv_heads)"
        yield claim_of("gqa", problem, can), words, of(problem.replace(kv_heads=problem.heads), given)
