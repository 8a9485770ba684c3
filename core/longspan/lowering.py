"""Pattern to dense calls over strided views: nothing is gathered, nothing is padded.

A branch of a dilated pattern reads every `r`-th row of each segment, which is a strided view of the sequence, so each
(branch, offset) is one batched dense call over all full segments, plus one for the ragged tail. A sliding window is two
batched calls, one of them upside down. Where queries do not start at the first key, a causal strip splits into a
rectangle that sees everything and a causal square.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from attrs import frozen

from longspan.errors import ArgumentError
from longspan.layout import Call, Heads, Layout
from longspan.patterns import Dense, Dilated, SlidingWindow
from longspan.spec import Problem
from longspan.strips import Span, Strip, segment_strips, window_strips

__all__ = ["dense_problem", "lower"]


@frozen
class _Branch:
    """What some heads compute: positions `s`, `s + r`, ... of each segment of `w`. Dense attention is (N, 1, 0)."""

    heads: Heads
    w: int
    r: int
    s: int

    def strips(self, span: Span, is_causal: bool) -> Iterator[Strip]:
        return segment_strips(span, self.w, self.r, self.s, is_causal) if self.heads.count else iter(())


@frozen
class _Window:
    """The sliding window that all heads compute."""

    heads: Heads
    left: int
    right: int

    def strips(self, span: Span, is_causal: bool) -> Iterator[Strip]:
        return window_strips(span, self.left, self.right, is_causal)


def lower(problem: Problem) -> Layout:
    """Lower the problem's pattern to dense calls.

    Returns:
        A layout whose calls together compute the pattern exactly.

    Raises:
        ArgumentError: the core cannot lower this pattern.
    """
    calls: list[Call] = []
    covering = 0
    for group in _groups(problem):
        for number, branch in enumerate(group):
            for span in _spans(problem):
                for strip in branch.strips(span, problem.is_causal):
                    store = strip.first and number == 0
                    covering += store * branch.heads.count * strip.queries.count * strip.queries.length
                    for heads, kv_heads in _head_pairs(branch.heads, problem):
                        calls.append(
                            Call(heads, kv_heads, strip.queries, strip.keys, strip.is_causal, store, strip.flipped)
                        )
    return Layout(tuple(calls), covering == problem.heads * problem.q_len)


def dense_problem(problem: Problem, call: Call, gqa: bool) -> Problem:
    """The dense problem that a call poses to a kernel, with batch and heads as they come without folding.

    Args:
        problem: the whole problem.
        call: one call of its layout.
        gqa: the kernel takes fewer key heads than query heads.
    """
    return problem.replace(
        pattern=Dense(),
        batch=problem.batch * call.queries.count,
        heads=call.heads.count,
        kv_heads=call.kv_heads.count if gqa else call.heads.count,
        q_len=call.queries.length,
        kv_len=call.keys.length,
        is_causal=call.is_causal,
        documents=None,
        query_offset=0,
    )


def _groups(problem: Problem) -> Sequence[Sequence[_Branch | _Window]]:
    """Branches by the heads that run them. The first of each group stores its rows, the others merge into them."""
    pattern, heads = problem.pattern, problem.heads
    if 0 in (problem.batch, heads, problem.q_len, problem.kv_len):
        return []
    if isinstance(pattern, Dense):
        return [[_Branch(Heads(0, heads), max(problem.kv_len, problem.query_offset + problem.q_len), 1, 0)]]
    if isinstance(pattern, SlidingWindow):
        return [[_Window(Heads(0, heads), pattern.left, pattern.right)]]
    if not isinstance(pattern, Dilated):
        raise ArgumentError("pattern", repr(pattern), "a pattern that the core can lower to dense calls")
    pairs = list(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True))
    if pattern.heads == "grouped":
        return [[branch] for branch in _grouped(pairs, heads)]
    # A branch that covers every row goes first: it stores, and no row needs an initial value.
    pairs.sort(key=lambda pair: pair[1] != 1)
    branches = [branch for w, r in pairs for branch in _offsets(w, r, heads, pattern.offset)]
    return [branches] if pairs[0][1] == 1 else [[_NOBODY, *branches]]


_NOBODY = _Branch(Heads(0, 0), 1, 1, 0)  # takes the storing place where no branch covers every row


def _grouped(pairs: list[tuple[int, int]], heads: int) -> Iterator[_Branch]:
    size, more = divmod(heads, len(pairs))
    start = 0
    for number, (w, r) in enumerate(pairs):
        count = size + (number < more)
        yield _Branch(Heads(start, count), w, r, number % r)
        start += count


def _offsets(w: int, r: int, heads: int, offset: str) -> Iterator[_Branch]:
    """The branch (w, r), once for each offset that some head uses."""
    if offset == "modulo":
        for s in range(min(r, heads)):
            yield _Branch(Heads(s, len(range(s, heads, r)), r), w, r, s)
        return
    block = -(-heads // r)
    for s in range(-(-heads // block)):
        yield _Branch(Heads(s * block, min(block, heads - s * block)), w, r, s)


def _spans(problem: Problem) -> list[Span]:
    if problem.documents is None:
        return [Span(0, 0, problem.query_offset, problem.q_len, problem.kv_len)]
    return [Span(a, a, 0, b - a, b - a) for a, b in pairwise(problem.documents) if b > a]


def _head_pairs(heads: Heads, problem: Problem) -> Iterator[tuple[Heads, Heads]]:
    """Query heads with their key heads, in runs where the sharing is regular."""
    group = problem.heads // problem.kv_heads
    first = heads.start // group
    if group == 1 or heads.step % group == 0:  # each query head has a key head of its own
        yield heads, Heads(first, heads.count, max(1, heads.step // group))
        return
    from_first = group % heads.step == 0 and heads.start - first * group < heads.step
    if from_first and heads.count % (group // heads.step) == 0:  # as many of each group's heads
        yield heads, Heads(first, heads.count // (group // heads.step))
        return
    numbers = range(heads.start, heads.start + heads.count * heads.step, heads.step)
    for kv_head in range(first, numbers[-1] // group + 1):
        mine = [number for number in numbers if number // group == kv_head]
        if mine:
            yield Heads(mine[0], len(mine), heads.step), Heads(kv_head, 1)
