"""Lowering, judged by counting: the layout's calls, expanded pair by pair, must show each key to each query exactly as
often as the pattern's definition says."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import longspan as ls
from longspan.lowering.dense import lower
from longspan.lowering.layout import Layout

MODERATE = settings(deadline=None, max_examples=100)


# --- what a layout says ---------------------------------------------------------------------------------------------


def indices(rows, segment):
    return [rows.start + segment * rows.period + i * rows.stride for i in range(rows.length)]


def heads_of(heads):
    return [heads.start + i * heads.step for i in range(heads.count)]


def expand(layout, problem):
    """How often each key is shown to each query, `(heads, q_len, kv_len)`; and every rule of `Layout` and `Call`."""
    shown = torch.zeros(problem.heads, problem.q_len, problem.kv_len, dtype=torch.int64)
    touched = torch.zeros(problem.heads, problem.q_len, dtype=torch.bool)
    stored = torch.zeros_like(touched)
    group = problem.heads // max(problem.kv_heads, 1)
    for call in layout.calls:
        mine, theirs = heads_of(call.heads), heads_of(call.kv_heads)
        assert mine and theirs and len(mine) % len(theirs) == 0
        ratio = len(mine) // len(theirs)
        for place, head in enumerate(mine):
            assert 0 <= head < problem.heads
            assert theirs[place // ratio] == head // group, "a query head reads another's keys"
        assert call.queries.count == call.keys.count >= 1
        assert call.queries.length >= 1 and call.keys.length >= 1
        block = torch.ones(call.queries.length, call.keys.length, dtype=torch.int64)
        if call.is_causal:
            assert call.queries.length == call.keys.length
            block = block.tril()
        if getattr(call, "flipped", False):
            block = block.flip(0, 1)
        rows = [indices(call.queries, j) for j in range(call.queries.count)]
        flat = [row for segment in rows for row in segment]
        assert len(set(flat)) == len(flat), "segments of one call share rows: in place they would overwrite each other"
        assert min(flat) >= 0 and max(flat) < problem.q_len
        place = (torch.tensor(mine)[:, None], torch.tensor(flat))
        if call.first:
            assert not touched[place].any(), "stored over what was there"
            stored[place] = True
        touched[place] = True
        for j, row in enumerate(rows):
            keys = indices(call.keys, j)
            assert len(set(keys)) == len(keys)
            assert min(keys) >= 0 and max(keys) < problem.kv_len
            shown[torch.tensor(mine)[:, None, None], torch.tensor(row)[:, None], torch.tensor(keys)] += block
    if layout.covered:
        assert stored.all(), "a row would be left as uninitialised memory"
    assert layout.merges == any(not call.first for call in layout.calls)
    assert layout.pairs == shown.sum()
    return shown


# --- what the pattern says ------------------------------------------------------------------------------------------


def branches_of(pattern, heads, head):
    """`(w, r, s)` of each branch that a head runs; design, section Semantics."""
    pairs = list(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True))
    if pattern.heads == "all":
        per_offset = {"modulo": lambda r: head % r, "block": lambda r: head // -(-heads // r)}[pattern.offset]
        return [(w, r, per_offset(r)) for w, r in pairs]
    sizes = [heads // len(pairs) + (i < heads % len(pairs)) for i in range(len(pairs))]
    number = next(i for i in range(len(pairs)) if head < sum(sizes[: i + 1]))
    w, r = pairs[number]
    return [(w, r, number % r)]


def count(pattern, heads, head, q, k):
    if isinstance(pattern, ls.Dense):
        return 1
    if isinstance(pattern, ls.Dilated):
        return sum(
            q // w == k // w and (q % w) % r == s == (k % w) % r for w, r, s in branches_of(pattern, heads, head)
        )
    return q - pattern.left <= k <= q + pattern.right


def positions(bounds, length, offset):
    """(document, position) of each index; document None outside all of them."""
    if bounds is None:
        return [(0, offset + i) for i in range(length)]
    found = [(None, 0)] * length
    for number, (start, stop) in enumerate(pairwise(bounds)):
        for i in range(start, stop):
            found[i] = (number, i - start)
    return found


def defined(problem):
    """Straight from the definitions, one pair at a time."""
    queries = positions(problem.documents, problem.q_len, problem.query_offset)
    keys = positions(problem.documents, problem.kv_len, 0)
    return torch.tensor(
        [
            [
                [
                    count(problem.pattern, problem.heads, head, q, k)
                    if a is not None and a == b and (k <= q or not problem.is_causal)
                    else 0
                    for b, k in keys
                ]
                for a, q in queries
            ]
            for head in range(problem.heads)
        ],
        dtype=torch.int64,
    ).reshape(problem.heads, problem.q_len, problem.kv_len)


def check(problem):
    layout = lower(problem)
    assert isinstance(layout, Layout)
    hash(layout)
    shown = expand(layout, problem)
    want = defined(problem)
    wrong = (shown != want).nonzero()
    assert not len(wrong), (
        f"(head, query, key) {wrong[0].tolist()} is shown {shown[tuple(wrong[0])]} times, "
        f"defined {want[tuple(wrong[0])]}; {len(wrong)} wrong in all"
    )
    return layout


# --- hypothesis -----------------------------------------------------------------------------------------------------


@st.composite
def patterns(draw, windows=True):
    kinds = ["dense", "dilated", "dilated", "dilated"] + ["window"] * (windows and hasattr(ls, "SlidingWindow"))
    kind = draw(st.sampled_from(kinds))
    if kind == "dense":
        return ls.Dense()
    if kind == "window":
        reach = st.one_of(st.integers(0, 6), st.integers(0, 60))
        return ls.SlidingWindow(draw(reach), draw(reach))
    branches = draw(st.integers(1, 3))
    length = st.one_of(st.integers(1, 8), st.integers(1, 60))
    return ls.Dilated(
        tuple(draw(length) for _ in range(branches)),
        tuple(draw(st.one_of(st.integers(1, 4), st.integers(1, 12))) for _ in range(branches)),
        heads=draw(st.sampled_from(["all", "grouped"])),
        offset=draw(st.sampled_from(["modulo", "block"])),
    )


@st.composite
def problems(draw, kind):
    pattern = draw(patterns())
    least = len(pattern.segment_lengths) if isinstance(pattern, ls.Dilated) and pattern.heads == "grouped" else 1
    heads = draw(st.integers(least, 8))
    group = draw(st.sampled_from([g for g in range(1, heads + 1) if heads % g == 0]))
    q_len = draw(st.integers(1, 22))
    given_fields = {"kv_len": q_len}
    if kind == "offset":
        given_fields = {"kv_len": draw(st.integers(1, 26)), "query_offset": draw(st.integers(0, 30))}
    elif kind == "documents":
        cuts = sorted(draw(st.lists(st.integers(0, q_len), max_size=5)))
        given_fields = {"kv_len": q_len, "documents": (0, *cuts)}
    return ls.Problem(
        batch=1, heads=heads, kv_heads=heads // group, q_len=q_len, head_dim=4, pattern=pattern,
        is_causal=draw(st.booleans()), **given_fields,
    )  # fmt: skip


def dilated(lengths, rates, count, n, kv=None, causal=True, **changes):
    more = {name: changes.pop(name) for name in ("query_offset", "documents", "kv_heads") if name in changes}
    return ls.Problem(
        batch=1, heads=count, q_len=n, kv_len=kv or n, head_dim=4, is_causal=causal,
        pattern=ls.Dilated(lengths, rates, **changes), **more,
    )  # fmt: skip


@MODERATE
@given(problem=problems("square"))
@example(dilated((4,), (3,), 1, 10))  # rows that no branch covers
@example(dilated((3,), (7,), 5, 7))  # heads that get no rows
@example(dilated((3,), (7,), 12, 7, heads="all", offset="block"))
@example(dilated((5, 5), (2, 2), 4, 23))  # one branch twice
@example(dilated((10,), (2,), 2, 21, causal=False))  # a last segment of one token
@example(dilated((64,), (1,), 2, 5))  # a segment longer than the sequence
@example(dilated((2, 4, 8), (1, 2, 4), 12, 22, kv_heads=2))
@example(dilated((2, 4, 8), (1, 2, 4), 12, 22, kv_heads=4, heads="grouped"))
@example(dilated((4, 8), (3, 5), 6, 22, kv_heads=3, offset="block"))
def test_as_many_queries_as_keys(problem):
    check(problem)


@MODERATE
@given(problem=problems("offset"))
@example(dilated((4,), (1,), 1, 1, 9, query_offset=8))  # one token of decoding
@example(dilated((4,), (2,), 2, 1, 9, query_offset=8))
@example(dilated((4,), (1,), 1, 3, 9, query_offset=2))  # starts within a segment and ends in the next
@example(dilated((8,), (3,), 3, 5, 6, query_offset=1))  # queries beyond the last key
@example(dilated((4,), (1,), 1, 6, 3, query_offset=20))  # queries in segments without keys
@example(dilated((4, 16), (1, 3), 4, 7, 30, query_offset=23))
@example(ls.Problem(batch=1, heads=1, q_len=5, kv_len=9, head_dim=4, is_causal=True, query_offset=4))
@example(ls.Problem(batch=1, heads=1, q_len=9, kv_len=5, head_dim=4, is_causal=True, query_offset=0))
@example(ls.Problem(batch=1, heads=1, q_len=3, kv_len=3, head_dim=4, is_causal=True, query_offset=2))
@example(ls.Problem(batch=1, heads=1, q_len=3, kv_len=5, head_dim=4, is_causal=False, query_offset=9))
def test_queries_elsewhere_than_keys(problem):
    check(problem)


@MODERATE
@given(problem=problems("documents"))
@example(dilated((4,), (2,), 2, 12, documents=(0,)))  # no document at all
@example(dilated((4,), (2,), 2, 12, documents=(0, 0, 5, 5, 12)))  # empty ones
@example(dilated((4,), (1,), 2, 12, documents=(0, 7)))  # tokens after the last
@example(dilated((4,), (1,), 2, 12, documents=tuple(range(13))))  # one token each
def test_packed_documents(problem):
    check(problem)


@settings(deadline=None, max_examples=60)
@given(problem=st.one_of(problems("square"), problems("offset"), problems("documents")))
def test_the_definitions_here_are_those_of_the_oracle(problem):
    """Two readings of the design, written apart."""
    oracle = pytest.importorskip("longspan.testing.oracle")
    want = oracle.visible(
        problem.pattern, problem.heads, problem.q_len, problem.kv_len, is_causal=problem.is_causal,
        cu_seqlens=problem.documents, query_offset=problem.query_offset,
    )  # fmt: skip
    assert torch.equal(defined(problem), want)


# --- particular layouts ---------------------------------------------------------------------------------------------


def test_dense_attention_is_one_call_that_covers_everything():
    for causal in (False, True):
        layout = check(ls.Problem(batch=2, heads=6, kv_heads=2, q_len=20, head_dim=4, is_causal=causal))
        (call,) = layout.calls
        assert layout.covered and not layout.merges
        assert call.is_causal is causal
        assert (call.heads.count, call.kv_heads.count) == (6, 2)


def test_grouped_heads_never_merge():
    layout = check(dilated((4, 10, 22), (1, 2, 3), 12, 22, heads="grouped"))
    assert not layout.merges


def test_a_branch_that_covers_every_row_goes_first_wherever_it_stands():
    for lengths, rates in (((4, 16), (1, 2)), ((16, 4), (2, 1)), ((8, 6, 4), (4, 3, 1))):
        layout = check(dilated(lengths, rates, 4, 21))
        assert layout.covered, "an initial value would be written for nothing"


@pytest.mark.parametrize(("lengths", "rates"), [((4,), (2,)), ((4, 8), (2, 4)), ((3,), (9,))])
def test_rows_that_no_branch_covers_are_not_claimed(lengths, rates):
    assert not check(dilated(lengths, rates, 2, 13)).covered


@pytest.mark.parametrize("change", [{"batch": 0}, {"heads": 0, "kv_heads": 0}, {"q_len": 0}, {"kv_len": 0}])
def test_nothing_to_do_is_no_call(change):
    for pattern in (ls.Dense(), ls.Dilated((4,), (2,)), ls.Dilated((4,), (2,), offset="block")):
        problem = ls.Problem(batch=1, heads=2, q_len=5, head_dim=4, pattern=pattern).replace(**change)
        assert lower(problem).calls == ()
        expand(lower(problem), problem)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("word", ["all", "grouped"])
def test_the_number_of_calls_does_not_grow_with_the_sequence(causal, word):
    """One batched call for all whole segments of a (branch, offset), and a few for the ragged end."""
    pattern = ls.Dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12), heads=word)

    def calls(n):
        return len(lower(ls.Problem(batch=1, heads=12, q_len=n, head_dim=64, pattern=pattern, is_causal=causal)).calls)

    assert calls(2**20 + 77) <= 2 * sum(pattern.dilation_rates)
    assert calls(2**20) == calls(2**18)


def test_a_causal_square_counts_half():
    layout = lower(ls.Problem(batch=1, heads=3, q_len=100, head_dim=4, is_causal=True))
    assert layout.pairs == 3 * 100 * 101 // 2


def test_fewer_key_heads_keep_calls_together_where_the_sharing_is_regular():
    """Not one call a head: a kernel that knows shared key heads is to be asked once."""
    pattern = ls.Dilated((8,), (2,))
    regular = lower(ls.Problem(batch=1, heads=8, kv_heads=2, q_len=16, head_dim=4, pattern=pattern))
    assert len(regular.calls) == 2
    assert all(call.heads.count == 4 and call.kv_heads.count == 2 for call in regular.calls)


def test_a_pattern_that_the_core_does_not_know_is_refused():
    class Mine(ls.Pattern):
        kind = "mine"

    with pytest.raises(ls.ArgumentError, match="pattern"):
        lower(ls.Problem(batch=1, heads=1, q_len=4, head_dim=4, pattern=Mine()))


def test_a_layout_prints_what_it_costs():
    text = str(lower(ls.Problem(batch=1, heads=2, q_len=100, head_dim=4)))
    assert text.startswith("1 dense call, ")
    assert "20,000" in text
