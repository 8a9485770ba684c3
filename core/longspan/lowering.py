"""Pattern to dense calls over strided views: nothing is gathered, nothing is padded.

A branch of a dilated pattern reads every `r`-th row of each segment, which is a strided view of the sequence, so each
(branch, offset) is one batched dense call over all full segments, plus one for the ragged tail. Where queries do not
start at the first key, a causal strip splits into a rectangle that sees everything and a causal square.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from attrs import frozen

from longspan.errors import ArgumentError
from longspan.layout import Call, Heads, Layout, Rows
from longspan.patterns import Dense, Dilated
from longspan.spec import Problem

__all__ = ["lower"]


@frozen
class _Branch:
    """One dilated branch for the heads that share an offset. Dense attention is the branch (N, 1, 0)."""

    heads: Heads
    segment: int
    rate: int
    offset: int


@frozen
class _Span:
    """One document: where it starts in query and key storage, and which positions of it are there."""

    query_start: int  # index of position `first` in the query tensor
    key_start: int  # index of position 0 in the key tensor
    first: int  # position of the first query
    queries: int
    keys: int


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
                for queries, keys, is_causal, first in _strips(span, branch, problem.is_causal):
                    store = first and number == 0
                    covering += store * branch.heads.count * queries.count * queries.length
                    for heads, kv_heads in _head_pairs(branch.heads, problem):
                        calls.append(Call(heads, kv_heads, queries, keys, is_causal, store))
    return Layout(tuple(calls), covering == problem.heads * problem.q_len)


def _groups(problem: Problem) -> list[list[_Branch]]:
    """Branches by the heads that run them. The first of each group stores its rows, the others merge into them."""
    pattern, heads = problem.pattern, problem.heads
    if 0 in (problem.batch, heads, problem.q_len, problem.kv_len):
        return []
    if isinstance(pattern, Dense):
        return [[_Branch(Heads(0, heads), max(problem.kv_len, problem.query_offset + problem.q_len), 1, 0)]]
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


def _spans(problem: Problem) -> list[_Span]:
    if problem.documents is None:
        return [_Span(0, 0, problem.query_offset, problem.q_len, problem.kv_len)]
    return [_Span(a, a, 0, b - a, b - a) for a, b in pairwise(problem.documents) if b > a]


def _strips(span: _Span, branch: _Branch, is_causal: bool) -> Iterator[tuple[Rows, Rows, bool, bool]]:
    """The dense strips of one branch over one document, as (queries, keys, is_causal, first)."""
    if branch.heads.count == 0:
        return
    w, r, s = branch.segment, branch.rate, branch.offset
    low, high = span.first, span.first + span.queries  # positions of the queries
    whole = range(-(-low // w), max(min(high, span.keys) // w, -(-low // w)))  # segments with all queries, all keys
    if whole and (rows := len(range(s, w, r))):
        start = whole.start * w + s
        yield (
            Rows(span.query_start + start - low, rows, r, len(whole), w),
            Rows(span.key_start + start, rows, r, len(whole), w),
            is_causal and rows > 1,
            True,
        )
    for number in range(low // w, -(-high // w)):
        if number not in whole:
            yield from _edge(span, branch, number * w, is_causal)


def _edge(span: _Span, branch: _Branch, start: int, is_causal: bool) -> Iterator[tuple[Rows, Rows, bool, bool]]:
    """One segment that lacks some of its queries or keys: its kept rows are numbered 0, 1, ... from `start`."""
    w, r, s = branch.segment, branch.rate, branch.offset
    end = start + w
    skipped = len(range(start + s, min(max(span.first, start), end), r))  # kept rows before the first query
    wanted = len(range(start + s, min(span.first + span.queries, end), r)) - skipped
    known = len(range(start + s, min(span.keys, end), r))

    def queries(first: int, count: int) -> Rows:
        return Rows(span.query_start + start + s + (skipped + first) * r - span.first, count, r)

    def keys(first: int, count: int) -> Rows:
        return Rows(span.key_start + start + s + first * r, count, r)

    if wanted <= 0 or known <= 0:
        return
    if not is_causal or wanted == 1:
        yield queries(0, wanted), keys(0, min(known, skipped + 1) if is_causal else known), False, True
        return
    before = min(skipped, known)  # keys that every query sees
    if before:
        yield queries(0, wanted), keys(0, before), False, True
    square = min(known - skipped, wanted)
    if square > 0:
        yield queries(0, square), keys(skipped, square), square > 1, not before
        if square < wanted:  # queries beyond the last key see all of them
            yield queries(square, wanted - square), keys(skipped, square), False, not before


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
