"""Pattern to dense calls over strided views: nothing is gathered, nothing is padded.

A branch of a dilated pattern reads every `r`-th row of each segment, which is a strided view of the sequence, so each
(branch, offset) is one batched dense call over all full segments, plus one for the ragged tail. A sliding window is two
batched calls, one of them upside down. Where queries do not start at the first key, a causal segment splits into a
rectangle that sees everything and a causal square. A block-sparse pattern becomes a `BlockLayout`, whose blocks are
gathered where they do not lie side by side; where it keeps everything, it is dense attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from attrs import frozen

from longspan.errors import ArgumentError
from longspan.lowering.blocks import BlockLayout
from longspan.lowering.layout import Call, Heads, Layout
from longspan.lowering.segments import Segment, Span, dilated_segments, window_segments
from longspan.patterns.blocks.sparse import BlockSparse
from longspan.patterns.dilated import Dilated
from longspan.patterns.window import SlidingWindow
from longspan.spec.pattern import Dense
from longspan.spec.problem import Problem

__all__ = ["as_dense", "dense_problem", "head_pairs", "lay_blocks", "lower"]


@frozen
class _Branch:
    """What some heads compute: positions `s`, `s + r`, ... of each segment of `w`. Dense attention is (N, 1, 0)."""

    heads: Heads
    w: int
    r: int
    s: int

    def segments(self, span: Span, is_causal: bool) -> Iterator[Segment]:
        return dilated_segments(span, self.w, self.r, self.s, is_causal) if self.heads.count else iter(())


@frozen
class _Window:
    """The sliding window that all heads compute."""

    heads: Heads
    left: int
    right: int

    def segments(self, span: Span, is_causal: bool) -> Iterator[Segment]:
        return window_segments(span, self.left, self.right, is_causal)


def lower(problem: Problem, *, may_be_causal: bool = True) -> Layout | BlockLayout:
    """Lower the problem's pattern to dense calls.

    Args:
        problem: what is to be computed.
        may_be_causal: the kernel takes causal dense problems even where the problem itself is not causal.

    Returns:
        A layout whose calls together compute the pattern exactly. For a block-sparse pattern a `BlockLayout`, or dense
        attention's where the pattern keeps every pair, or every pair of the causal triangle.

    Raises:
        ArgumentError: the core cannot lower this pattern.
    """
    if isinstance(problem.pattern, BlockSparse):
        layout = lay_blocks(problem)
        whole = as_dense(problem, layout, may_be_causal=may_be_causal)
        return layout if whole is None else lower(whole)
    calls: list[Call] = []
    covering = 0
    for group in _groups(problem):
        for number, branch in enumerate(group):
            for span in _spans(problem):
                for part in branch.segments(span, problem.is_causal):
                    store = part.first and number == 0
                    covering += store * branch.heads.count * part.queries.count * part.queries.length
                    for heads, kv_heads in head_pairs(branch.heads, problem):
                        calls.append(
                            Call(heads, kv_heads, part.queries, part.keys, part.is_causal, store, part.flipped)
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


def head_pairs(heads: Heads, problem: Problem) -> Iterator[tuple[Heads, Heads]]:
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


# ------------------------------------------------------------------------------------------------------- block-sparse


def lay_blocks(problem: Problem) -> BlockLayout:
    """The blocks of a block-sparse problem, even where they are all there are."""
    pattern = problem.pattern
    assert isinstance(pattern, BlockSparse)
    if 0 in (problem.batch, problem.heads, problem.q_len, problem.kv_len):
        return BlockLayout((), ())
    spans = tuple(_spans(problem))
    with torch.inference_mode(False), torch.device("cpu"):  # it outlives the mode that it happens to be made in
        found = {
            (span.queries, span.keys, span.first): pattern.csr(
                span.queries, span.keys, is_causal=problem.is_causal, query_offset=span.first, heads=problem.heads
            )
            for span in spans
        }
    blocks = tuple(found[span.queries, span.keys, span.first] for span in spans)
    return BlockLayout(spans, blocks)


def as_dense(problem: Problem, layout: BlockLayout, *, may_be_causal: bool = True) -> Problem | None:
    """The dense problem that keeps exactly the pairs of a block-sparse one, if there is one: nothing is faster then."""
    pairs = list(zip(layout.spans, layout.blocks, strict=True))
    dense = problem.replace(pattern=Dense(), is_causal=False)
    if all(csr.pairs == span.queries * span.keys for span, found in pairs for csr in found.layouts):
        return dense
    if not (problem.is_causal or may_be_causal):
        return None
    if not all(csr.pairs == _triangle(span) for span, found in pairs for csr in found.layouts):
        return None
    dense = dense.replace(is_causal=True)
    if problem.is_causal or lay_blocks(problem.replace(is_causal=True)).pairs == layout.pairs:  # nothing lies above it
        return dense
    return None


def _triangle(span: Span) -> int:
    """How many pairs a causal triangle keeps."""
    low, high = min(span.first, span.keys), min(span.end, span.keys)  # queries beyond the last key see all keys
    return (high * (high + 1) - low * (low + 1)) // 2 + (span.queries - (high - low)) * span.keys
