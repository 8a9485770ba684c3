"""What a wrong result is instead: the answer to another question, whose name is the best hint that there is."""

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
from longspan.testing.outcome import Breach
from longspan.testing.tensors import Inputs

__all__ = ["diagnose"]

LOOSE = 4.0
"""How many times the allowance the guess may miss by: its own rounding is not the point."""


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
