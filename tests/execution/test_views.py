"""Launch views: over tensors that hold their own indices, every launch reads and writes exactly what the call says."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import longspan as ls
from longspan.execution.strided import launches
from longspan.lowering.dense import lower
from longspan.lowering.layout import Call, Heads, Rows

MODERATE = settings(deadline=None, max_examples=120)


# --- tensors that hold their own indices ----------------------------------------------------------------------------

LAYOUTS = ("contiguous", "transposed", "sliced", "gapped", "expanded batch", "expanded heads", "sequence first", "odd")


def numbered(shape, layout):
    """A tensor of this shape, in this memory layout, every memory cell of which holds a number of its own."""
    batch, heads, n, dim = shape
    if layout == "transposed":
        return torch.arange(batch * heads * n * dim).view(batch, n, heads, dim).transpose(1, 2)
    if layout == "sliced":
        return torch.arange((batch + 1) * (heads + 2) * (n + 3) * (dim + 1)).view(
            batch + 1, heads + 2, n + 3, dim + 1
        )[1:, 1:-1, 2:-1, 1:]  # fmt: skip
    if layout == "gapped":
        return torch.arange(batch * heads * n * dim * 2).view(batch, heads, n, 2 * dim)[..., ::2]
    if layout == "expanded batch":
        return torch.arange(heads * n * dim).view(1, heads, n, dim).expand(shape)
    if layout == "expanded heads":
        return torch.arange(batch * n * dim).view(batch, 1, n, dim).expand(shape)
    if layout == "sequence first":
        return torch.arange(batch * heads * n * dim).view(n, batch, heads, dim).permute(1, 2, 0, 3)
    if layout == "odd":
        return torch.arange(batch * heads * n * dim).view(heads, dim, batch, n).permute(2, 0, 3, 1)
    return torch.arange(batch * heads * n * dim).view(shape)


def indices(rows, segment):
    return [rows.start + segment * rows.period + i * rows.stride for i in range(rows.length)]


def heads_of(heads):
    return [heads.start + i * heads.step for i in range(heads.count)]


def text(tensor):
    return tuple(tensor.flatten().tolist())


def wanted(call, batch, query, key, value, lse):
    """Every (query segment, key segment, value segment, lse segment) that the call is to compute."""
    mine, theirs = heads_of(call.heads), heads_of(call.kv_heads)
    ratio = len(mine) // len(theirs)
    found = Counter()
    for entry in range(batch):
        for place, head in enumerate(mine):
            for segment in range(call.queries.count):
                rows, keys = indices(call.queries, segment), indices(call.keys, segment)
                kv_head = theirs[place // ratio]
                found[
                    text(query[entry, head, rows]), text(key[entry, kv_head, keys]),
                    text(value[entry, kv_head, keys]), text(lse[entry, head, rows]),
                ] += 1  # fmt: skip
    return found


def launched(call, made, query, key, value, lse):
    """What the launches compute."""
    found = Counter()
    for block in made:
        q, k, v = block.query_side(query, 0), block.key_side(key, 2), block.key_side(value, 3)
        line = block.line_side(lse, 1)
        assert q.shape == block.query_shape and line.shape == block.query_shape[:3]
        assert k.shape == v.shape == block.key_shape
        assert q.shape[0] == k.shape[0] and q.shape[1] % k.shape[1] == 0
        assert q.shape[2:] == (call.queries.length, query.shape[3])
        assert k.shape[2:] == (call.keys.length, query.shape[3])
        assert q.untyped_storage().data_ptr() == query.untyped_storage().data_ptr(), "a copy, not a view"
        ratio = q.shape[1] // k.shape[1]
        for x in range(q.shape[0]):
            for y in range(q.shape[1]):
                at = x, y // ratio
                found[text(q[x, y]), text(k[at]), text(v[at]), text(line[x, y])] += 1
    return found


def gradients(call, made, key):
    """What adding a one for each use of a key row gives, in place, over the launches."""
    total = torch.zeros(key.shape, dtype=torch.int64)
    for block in made:
        view = block.key_side(total, 4, once=True)
        assert len(set(text(block.key_side(torch.arange(total.numel()).view(total.shape), 4, once=True)))) == (
            view.numel()
        ), "two places of one view are the same memory: in-place additions would be lost"
        part = torch.ones(block.key_shape, dtype=torch.int64) * (block.query_shape[1] // block.key_shape[1])
        view.add_(part if block.shared is None else part.sum(block.shared, keepdim=True))
    return total


def used(call, batch, key):
    total = torch.zeros(key.shape, dtype=torch.int64)
    theirs = heads_of(call.kv_heads)
    ratio = call.heads.count // len(theirs)
    for kv_head in theirs:
        for segment in range(call.keys.count):
            total[:, kv_head, indices(call.keys, segment)] += ratio
    return total


def check(call, batch, heads, kv_heads, q_len, kv_len, dim, gqa, budget, layouts):
    query = numbered((batch, heads, q_len, dim), layouts[0])
    key, value = (numbered((batch, kv_heads, kv_len, dim), layout) for layout in layouts[1:3])
    lse = numbered((batch, heads, q_len, 1), layouts[3])[..., 0]
    contiguous = torch.empty(key.shape).stride()
    queries = (query.stride(), (*lse.stride(), 1))
    made = launches(call, batch, dim, gqa, budget, queries, (key.stride(), value.stride(), contiguous))
    assert launched(call, made, query, key, value, lse) == wanted(call, batch, query, key, value, lse)
    assert torch.equal(gradients(call, made, key), used(call, batch, key))
    ratio = call.heads.count // call.kv_heads.count
    for block in made:
        if not gqa:
            assert block.query_shape[1] == block.key_shape[1], "this kernel takes as many key heads as query heads"
        elif ratio > 1:
            assert (block.query_shape[1], block.key_shape[1]) == (call.heads.count, call.kv_heads.count)
        lines = block.query_shape[0] * block.query_shape[1] * block.query_shape[2]
        cut = block.query_shape[0] if gqa and ratio > 1 else block.query_shape[1]
        assert lines <= budget or cut == 1, "cut no finer than it could be"
    return made


# --- hypothesis -----------------------------------------------------------------------------------------------------


@st.composite
def calls(draw):
    """Any call that the layout's words allow, and the tensors' sizes."""
    kv_count, ratio = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = Heads(draw(st.integers(0, 2)), kv_count * ratio, draw(st.integers(1, 3)))
    kv_heads = Heads(draw(st.integers(0, 2)), kv_count, draw(st.integers(1, 3)))
    segments = draw(st.integers(1, 3))

    def rows():
        length, stride = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        period = length * stride + draw(st.integers(0, 3)) if segments > 1 else draw(st.integers(0, 3))
        made = Rows(draw(st.integers(0, 3)), length, stride, segments, period)
        return made, made.start + (segments - 1) * period + (length - 1) * stride + 1 + draw(st.integers(0, 2))

    (queries, q_len), (keys, kv_len) = rows(), rows()
    sizes = {
        "heads": heads.start + (heads.count - 1) * heads.step + 1 + draw(st.integers(0, 1)),
        "kv_heads": kv_heads.start + (kv_count - 1) * kv_heads.step + 1 + draw(st.integers(0, 1)),
        "q_len": q_len, "kv_len": kv_len,
    }  # fmt: skip
    return Call(heads, kv_heads, queries, keys, False, True), sizes


layout_words = st.tuples(*(st.sampled_from(LAYOUTS) for _ in range(4)))
budgets = st.sampled_from([1, 2, 5, 16, 100, 2**20])


@MODERATE
@given(
    call_sizes=calls(), batch=st.integers(1, 3), dim=st.integers(1, 3), gqa=st.booleans(), budget=budgets,
    layouts=layout_words,
)  # fmt: skip
def test_any_call_over_any_tensors(call_sizes, batch, dim, gqa, budget, layouts):
    call, sizes = call_sizes
    check(call, batch, **sizes, dim=dim, gqa=gqa, budget=budget, layouts=layouts)


@MODERATE
@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 3), group=st.integers(1, 3), n=st.integers(1, 14),
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=2),
    causal=st.booleans(), gqa=st.booleans(), budget=budgets, layouts=layout_words,
)  # fmt: skip
@example(2, 2, 2, 12, [(4, 1)], True, False, 2**20, ("transposed",) * 4)
@example(3, 1, 3, 12, [(4, 2)], True, True, 1, ("expanded batch",) * 4)
def test_calls_of_real_layouts(batch, kv_heads, group, n, lengths, causal, gqa, budget, layouts):
    pattern = ls.Dilated(*zip(*lengths, strict=True))
    sizes = {"batch": batch, "heads": kv_heads * group, "kv_heads": kv_heads, "q_len": n, "kv_len": n}
    problem = ls.Problem(head_dim=2, pattern=pattern, is_causal=causal, **sizes)
    for call in lower(problem).calls:
        check(call, **sizes, dim=2, gqa=gqa, budget=budget, layouts=layouts)


# --- particular launches --------------------------------------------------------------------------------------------


def made_for(call, shape, key_shape, gqa=False, budget=2**20, layout="contiguous"):
    return check(
        call, shape[0], shape[1], key_shape[1], shape[2], key_shape[2], shape[3], gqa, budget, (layout,) * 4
    )  # fmt: skip


def dense(heads, kv_heads, n):
    return Call(Heads(0, heads), Heads(0, kv_heads), Rows(0, n), Rows(0, n), True, True)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_plain_attention_is_one_launch(layout):
    assert len(made_for(dense(4, 4, 9), (2, 4, 9, 3), (2, 4, 9, 3), layout=layout)) == 1


def test_segments_of_a_contiguous_tensor_fold_into_one_launch():
    call = Call(Heads(0, 4), Heads(0, 4), Rows(1, 3, 2, 4, 8), Rows(1, 3, 2, 4, 8), True, True)
    assert len(made_for(call, (2, 4, 32, 3), (2, 4, 32, 3))) == 1


def test_a_shared_key_head_is_read_in_place_and_summed_over():
    made = made_for(dense(6, 2, 5), (1, 6, 5, 3), (1, 2, 5, 3))
    for block in made:
        assert block.shared is not None
        key = torch.zeros(1, 2, 5, 3)
        view = block.key_side(key, 2)
        assert view.stride(block.shared) == 0, "repeated in memory"
        assert block.key_side(key, 2, once=True).shape[block.shared] == 1


def test_a_kernel_that_knows_shared_heads_gets_them_once():
    made = made_for(dense(6, 2, 5), (3, 6, 5, 3), (3, 2, 5, 3), gqa=True)
    assert len(made) == 1
    assert (made[0].query_shape[1], made[0].key_shape[1], made[0].shared) == (6, 2, None)


def test_a_small_budget_cuts_without_gaps_and_without_overlap():
    for budget in range(1, 70):
        made = made_for(dense(4, 4, 3), (5, 4, 3, 2), (5, 4, 3, 2), budget=budget, layout="transposed")
        assert sum(block.query_shape[0] * block.query_shape[1] for block in made) == 20


def test_a_budget_is_kept_where_the_work_can_be_cut():
    """Batch and heads of a contiguous tensor are one dimension: down to one line a launch."""
    for budget in (1, 3, 10, 100):
        made = made_for(dense(4, 4, 3), (5, 4, 3, 2), (5, 4, 3, 2), budget=budget)
        assert max(block.query_shape[0] * block.query_shape[1] * 3 for block in made) <= max(budget, 3)
