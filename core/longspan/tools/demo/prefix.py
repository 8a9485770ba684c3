"""How many tokens a backend manages in the time it has: found by measuring on prefixes, never shown as a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from longspan.lowering.dense import lower
from longspan.patterns.topk.pattern import TopKBlocks, stand_in
from longspan.spec.problem import Problem

__all__ = ["START", "affordable_prefix", "growth", "prefixes"]

START = 2048
PROBE_MS = 500.0
"""A prefix that takes about this long tells what a longer one will take; a shorter one tells of overheads."""


def prefixes(length: int, start: int = START) -> Iterator[int]:
    """Prefix lengths that double from `start` up to the whole length."""
    tokens = min(start, length)
    while tokens < length:
        yield tokens
        tokens = min(2 * tokens, length)
    yield length


def growth(problem: Problem, start: int, end: int) -> float:
    """How many times the query-key pairs of the first `start` tokens those of the first `end` are."""
    return _pairs(problem, end) / max(1, _pairs(problem, start))


def affordable_prefix(problem: Problem, patience_ms: float, run_ms: Callable[[int], float]) -> int:
    """The longest prefix that is expected to stay within the patience, the shortest at least.

    `run_ms(tokens)` runs a prefix and returns its milliseconds. Prefixes are run while the next promises to be short;
    from the last one the time of longer ones is expected to grow with their query-key pairs.
    """
    ran, *longer = prefixes(problem.q_len)
    ms = run_ms(ran)
    while longer and ms * growth(problem, ran, longer[0]) <= PROBE_MS:
        ran = longer.pop(0)
        ms = run_ms(ran)
    return max((tokens for tokens in longer if ms * growth(problem, ran, tokens) <= patience_ms), default=ran)


def _pairs(problem: Problem, tokens: int) -> int:
    asked = problem.replace(q_len=tokens, kv_len=tokens)
    return lower(stand_in(asked) if isinstance(asked.pattern, TopKBlocks) else asked).pairs
