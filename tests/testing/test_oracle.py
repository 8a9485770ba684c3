"""The oracle against things that share no code with it: numbers worked by hand, loops over positions, torch's SDPA.

The oracle knows a pattern by its class's name and public attributes, so plain stand-ins serve here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longspan.testing.oracle import oracle, visible

QUICK = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Dense:
    pass


@dataclass(frozen=True)
class Dilated:
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    heads: str = "all"
    offset: str = "modulo"


@dataclass(frozen=True)
class SlidingWindow:
    left: int
    right: int


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(batch, heads, n, dim, kv_heads=None, kv_len=None, seed=0):
    kv_heads, kv_len = kv_heads or heads, n if kv_len is None else kv_len
    return (
        randn(batch, heads, n, dim, seed=seed),
        randn(batch, kv_heads, kv_len, dim, seed=seed + 1),
        randn(batch, kv_heads, kv_len, dim, seed=seed + 2),
    )


def assert_close(got, want, tolerance=1e-12):
    assert got.shape == want.shape
    assert got.dtype == torch.float64
    assert not got.isnan().any()
    assert torch.equal(got == -math.inf, want == -math.inf)
    finite = want.isfinite()
    error = (got[finite] - want[finite]).abs() / want[finite].abs().clamp(min=1)
    assert error.numel() == 0 or error.max() <= tolerance


# --- loops: the definitions of the paper, one position at a time ---------------------------------------------------


def loop_softmax(q_row, keys, values, positions, scale):
    """(out, denominator) of one query over the keys at `positions`, by math.exp and Python sums."""
    dim = len(q_row)
    terms = {j: math.exp(scale * sum(q_row[d] * keys[j][d] for d in range(dim))) for j in positions}
    total = sum(terms.values())
    out = [sum(terms[j] * values[j][d] for j in positions) / total if total else 0.0 for d in range(dim)]
    return out, total


def loop_segments(n, w, r, s):
    """The kept positions of each segment: cut the sequence, then slice the piece."""
    return [list(range(start, min(start + w, n)))[s::r] for start in range(0, n, w)]


def loop_longnet(q, k, v, branches_of_head, causal, scale):
    """Each branch's own softmax, then LongNet's mixture with alpha_i = s_i / sum_j s_j (arXiv 2307.02486, 2.2)."""
    batch, heads, n, dim = q.shape
    out = torch.zeros(batch, heads, n, dim, dtype=torch.float64)
    lse = torch.full((batch, heads, n), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            Q, K, V = q[b, h].tolist(), k[b, h].tolist(), v[b, h].tolist()
            for p in range(n):
                results = []
                for w, r, s in branches_of_head[h]:
                    for kept in loop_segments(n, w, r, s):
                        if p in kept:
                            results.append(loop_softmax(Q[p], K, V, [j for j in kept if j <= p or not causal], scale))
                if results:
                    denominator = sum(total for _, total in results)
                    for d in range(dim):
                        out[b, h, p, d] = sum(total / denominator * o[d] for o, total in results)
                    lse[b, h, p] = math.log(denominator)
    return out, lse


# --- numbers worked by hand -----------------------------------------------------------------------------------------


def test_two_keys_by_hand():
    # scores ln 1 and ln 3: weights 1/4 and 3/4, lse ln 4
    q = torch.tensor([[[[1.0]]]])
    k = torch.tensor([[[[0.0], [math.log(3.0)]]]], dtype=torch.float64)
    v = torch.tensor([[[[8.0], [16.0]]]])
    out, lse = oracle(q, k, v, Dense(), scale=1.0, return_lse=True)
    assert out.item() == pytest.approx(8 / 4 + 16 * 3 / 4, abs=1e-14)
    assert lse.item() == pytest.approx(math.log(4), abs=1e-14)


def test_scale_default_is_one_over_root_head_dim():
    q, k, v = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    k[0, 0, 0] = 1.0  # q.k = 4, times 1/2
    _, lse = oracle(q, k, v, return_lse=True)
    assert lse.item() == pytest.approx(math.log(math.exp(2) + 1), abs=1e-14)


def test_causal_averages_by_hand():
    zeros, v = torch.zeros(1, 1, 4, 1), torch.tensor([6.0, 12.0, 0.0, 2.0]).view(1, 1, 4, 1)
    out, lse = oracle(zeros, zeros, v, is_causal=True, return_lse=True)
    assert out.flatten().tolist() == pytest.approx([6, 9, 6, 5], abs=1e-14)
    assert lse.flatten().tolist() == pytest.approx([math.log(n) for n in (1, 2, 3, 4)], abs=1e-14)


def test_key_seen_by_two_branches_counts_twice():
    pattern = Dilated((2, 4), (1, 2))
    assert visible(pattern, 1, 4, 4).tolist() == [[[2, 1, 1, 0], [1, 1, 0, 0], [1, 0, 2, 1], [0, 0, 1, 1]]]
    zeros, v = torch.zeros(1, 1, 4, 1), torch.tensor([4.0, 8.0, 12.0, 100.0]).view(1, 1, 4, 1)
    out, lse = oracle(zeros, zeros, v, pattern, return_lse=True)
    assert out[0, 0, 0].item() == pytest.approx((2 * 4 + 8 + 12) / 4, abs=1e-14)
    assert lse[0, 0, 0].item() == pytest.approx(math.log(4), abs=1e-14)
    assert out[0, 0, 2].item() == pytest.approx((4 + 2 * 12 + 100) / 4, abs=1e-13)


def test_causal_dilated_table():
    counts = visible(Dilated((2, 4), (1, 2)), 1, 4, 4, is_causal=True)
    assert counts.tolist() == [[[2, 0, 0, 0], [1, 1, 0, 0], [1, 0, 2, 0], [0, 0, 1, 1]]]


def test_heads_take_the_offsets_of_the_paper():
    # one segment of 4, rate 2: even heads keep 0 and 2, odd heads keep 1 and 3
    counts = visible(Dilated((4,), (2,)), 3, 4, 4)
    even = [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    odd = [[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]]
    assert counts.tolist() == [even, odd, even]


def kept(pattern, heads, n):
    """The positions that see anything, head by head."""
    counts = visible(pattern, heads, n, n)
    return [counts[h].any(-1).nonzero().flatten().tolist() for h in range(heads)]


def test_block_offset_is_head_over_ceil_heads_over_rate():
    # 5 heads, rate 3: ceil(5 / 3) = 2, so the offsets are 0 0 1 1 2
    assert kept(Dilated((6,), (3,), offset="block"), 5, 6) == [[0, 3], [0, 3], [1, 4], [1, 4], [2, 5]]
    assert kept(Dilated((6,), (3,), offset="modulo"), 5, 6) == [[0, 3], [1, 4], [2, 5], [0, 3], [1, 4]]


def test_grouped_heads_split_in_order_the_remainder_first():
    # 5 heads on 3 branches: 2, 2, 1; offsets i mod r_i = 0 mod 1, 1 mod 2, 2 mod 2
    pattern = Dilated((2, 4, 8), (1, 2, 2), heads="grouped")
    every, odd, even = list(range(8)), [1, 3, 5, 7], [0, 2, 4, 6]
    assert kept(pattern, 5, 8) == [every, every, odd, odd, even]
    counts = visible(pattern, 5, 8, 8)
    assert counts[0, 5].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert counts[2, 5].tolist() == [0, 0, 0, 0, 0, 1, 0, 1]
    assert counts[4, 4].tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
    assert counts.max() == 1


def test_grouped_ignores_the_head_offset_rule():
    modulo = visible(Dilated((5, 9), (2, 3), "grouped", "modulo"), 7, 13, 13)
    block = visible(Dilated((5, 9), (2, 3), "grouped", "block"), 7, 13, 13)
    assert torch.equal(modulo, block)


def test_ragged_last_segment_and_rate_above_length():
    # segments 0..2, 3..5, 6; offset 1 keeps the second of each: 1, 4, and nothing of the last
    assert kept(Dilated((3,), (5,)), 2, 7) == [[0, 3, 6], [1, 4]]
    # an offset that no position of any segment reaches serves nobody
    assert kept(Dilated((3,), (5,)), 5, 7)[3:] == [[], []]
    # a segment longer than the sequence is one segment
    assert torch.equal(visible(Dilated((1000,), (1,)), 1, 7, 7), torch.ones(1, 7, 7, dtype=torch.int64))


def test_window_keeps_both_ends():
    counts = visible(SlidingWindow(2, 1), 1, 5, 5)
    assert counts.tolist() == [[[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]]


# --- loops over positions -------------------------------------------------------------------------------------------


@QUICK
@given(data=st.data())
def test_dilated_is_the_papers_mixture(data):
    n, heads = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 4))
    branches = data.draw(st.integers(1, 3))
    lengths = tuple(data.draw(st.integers(1, 17)) for _ in range(branches))
    rates = tuple(data.draw(st.integers(1, 6)) for _ in range(branches))
    offset, causal = data.draw(st.sampled_from(["modulo", "block"])), data.draw(st.booleans())
    of_head = [
        [(w, r, h % r if offset == "modulo" else h // -(-heads // r)) for w, r in zip(lengths, rates, strict=True)]
        for h in range(heads)
    ]
    q, k, v = qkv(2, heads, n, 2, seed=data.draw(st.integers(0, 99)))
    out, lse = oracle(q, k, v, Dilated(lengths, rates, "all", offset), is_causal=causal, scale=0.7, return_lse=True)
    want_out, want_lse = loop_longnet(q, k, v, of_head, causal, 0.7)
    assert_close(out, want_out)
    assert_close(lse, want_lse)


@pytest.mark.parametrize("causal", [False, True])
def test_grouped_is_one_branch_a_head(causal):
    q, k, v = qkv(1, 5, 11, 3)
    of_head = [[(3, 1, 0)], [(3, 1, 0)], [(7, 2, 1)], [(7, 2, 1)], [(40, 3, 2)]]
    pattern = Dilated((3, 7, 40), (1, 2, 3), heads="grouped")
    out, lse = oracle(q, k, v, pattern, is_causal=causal, scale=0.5, return_lse=True)
    want_out, want_lse = loop_longnet(q, k, v, of_head, causal, 0.5)
    assert_close(out, want_out)
    assert_close(lse, want_lse)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left, right", [(0, 0), (2, 0), (0, 3), (3, 1), (50, 50)])
def test_window_is_a_loop(left, right, causal):
    n = 9
    q, k, v = qkv(1, 1, n, 2)
    out = oracle(q, k, v, SlidingWindow(left, right), is_causal=causal, scale=1.0)
    Q, K, V = q[0, 0].tolist(), k[0, 0].tolist(), v[0, 0].tolist()
    for i in range(n):
        see = [j for j in range(n) if i - left <= j <= i + right and (j <= i or not causal)]
        assert out[0, 0, i].tolist() == pytest.approx(loop_softmax(Q[i], K, V, see, 1.0)[0], abs=1e-12)


# --- torch's own SDPA for dense -------------------------------------------------------------------------------------


def grads(out, dout, *inputs):
    return torch.autograd.grad(out, inputs, dout)


@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n, dim", [(1, 1), (7, 3), (33, 16)])
def test_dense_is_sdpa_forward_and_backward(n, dim, causal, kv_heads):
    q, k, v = (x.requires_grad_() for x in qkv(2, 6, n, dim, kv_heads))
    out, dout = oracle(q, k, v, Dense(), is_causal=causal, enable_gqa=True), randn(2, 6, n, dim, seed=9)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert_close(out, want)
    for got, expected in zip(grads(out, dout, q, k, v), grads(want, dout, q, k, v), strict=True):
        assert_close(got, expected)
    assert torch.equal(oracle(q, k, v, None, is_causal=causal, enable_gqa=True), out)


@pytest.mark.parametrize("query_offset", [0, 3, 8, 20])
@pytest.mark.parametrize("causal", [False, True])
def test_dense_with_offset_is_sdpa_with_a_mask(query_offset, causal):
    q, k, v = qkv(2, 3, 5, 4, kv_len=13)
    mask = torch.tensor([[j <= query_offset + i or not causal for j in range(13)] for i in range(5)])
    out = oracle(q, k, v, is_causal=causal, query_offset=query_offset, scale=0.3)
    assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3))


def test_dense_needs_no_offset_when_nothing_depends_on_position():
    q, k, v = qkv(1, 1, 2, 4, kv_len=5)
    assert_close(oracle(q, k, v), F.scaled_dot_product_attention(q, k, v))


# --- properties -----------------------------------------------------------------------------------------------------

PATTERNS = [
    Dense(),
    Dilated((4, 9), (1, 3)),
    Dilated((5, 30), (2, 4), offset="block"),
    Dilated((3, 8, 6), (2, 3, 7), heads="grouped"),
    SlidingWindow(3, 2),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_weights_sum_to_one_and_stay_on_visible_keys(pattern, causal):
    n, heads = 17, 4
    q, k, _ = qkv(2, heads, n, 3)
    identity = torch.eye(n, dtype=torch.float64).expand(2, heads, n, n)
    weights = oracle(q, k, identity, pattern, is_causal=causal)
    counts = visible(pattern, heads, n, n, is_causal=causal)
    covered = counts.sum(-1) > 0
    assert_close(weights.sum(-1), covered.to(torch.float64).expand(2, heads, n), 1e-14)
    assert torch.equal(weights > 0, (counts > 0).expand(2, heads, n, n))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_documents_are_separate_calls(pattern, causal):
    q, k, v = qkv(1, 4, 22, 3)
    bounds = [2, 9, 9, 19]  # two tokens before, an empty document, three tokens after
    out, lse = oracle(q, k, v, pattern, is_causal=causal, cu_seqlens=bounds, return_lse=True)
    for start, stop in ((2, 9), (9, 19)):
        part = slice(start, stop)
        want = oracle(q[:, :, part], k[:, :, part], v[:, :, part], pattern, is_causal=causal, return_lse=True)
        assert_close(out[:, :, part], want[0])
        assert_close(lse[:, :, part], want[1])
    for outside in (slice(0, 2), slice(19, 22)):
        assert torch.equal(out[:, :, outside], torch.zeros_like(out[:, :, outside]))
        assert bool((lse[:, :, outside] == -math.inf).all())
    again = oracle(q, k, v, pattern, is_causal=causal, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    assert torch.equal(out, again)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_query_offset_and_rows_pick_rows_of_the_square(pattern, causal):
    q, k, v = qkv(2, 4, 23, 3)
    out, lse = oracle(q, k, v, pattern, is_causal=causal, return_lse=True)
    late_out, late_lse = oracle(q[:, :, 15:], k, v, pattern, is_causal=causal, query_offset=15, return_lse=True)
    assert_close(late_out, out[:, :, 15:].contiguous())
    assert_close(late_lse, lse[:, :, 15:].contiguous())
    rows = [22, 0, 7, 7]
    some_out, some_lse = oracle(q, k, v, pattern, is_causal=causal, rows=rows, return_lse=True)
    assert_close(some_out, out[:, :, rows])
    assert_close(some_lse, lse[:, :, rows])
    square = visible(pattern, 4, 23, 23, is_causal=causal)
    assert torch.equal(visible(pattern, 4, 23, 23, is_causal=causal, rows=torch.tensor(rows)), square[:, rows])
    two = oracle(q[:, :, 15:], k, v, pattern, is_causal=causal, query_offset=15, rows=[0, 7])
    assert_close(two, out[:, :, [15, 22]])


def test_rows_of_a_long_sequence_are_cheap():
    # a square of 131072 would need 137 GB; the keys that the row sees are listed here by hand
    n = 131072
    q, k, v = qkv(1, 1, n, 2)
    row = 100_000
    out = oracle(q, k, v, Dilated((2048, n), (1, 32)), is_causal=True, rows=[row])
    see = list(range(row - row % 2048, row + 1)) + list(range(0, row + 1, 32))
    scores = (k[0, 0, see] @ q[0, 0, row]) / math.sqrt(2)
    assert_close(out[0, 0, 0], torch.softmax(scores, 0) @ v[0, 0, see])


def test_rows_without_keys_are_zero_and_have_no_gradient():
    pattern = Dilated((4,), (3,))  # head 0 keeps 0, 3, 4, 7, 8; head 1 keeps 1, 5, 9
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 10, 3))
    out, lse = oracle(q, k, v, pattern, return_lse=True)
    unseen = visible(pattern, 2, 10, 10).sum(-1) == 0
    assert unseen.tolist()[0] == [False, True, True, False, False, True, True, False, False, True]
    assert torch.equal(out[0][unseen], torch.zeros_like(out[0][unseen]))
    assert bool((lse[0][unseen] == -math.inf).all()) and bool(lse[0][~unseen].isfinite().all())
    for x in grads(out, randn(*out.shape, seed=5), q, k, v):
        assert not x.isnan().any()
        assert torch.equal(x[0][unseen], torch.zeros_like(x[0][unseen]))
        assert bool((x[0][~unseen] != 0).any())


@pytest.mark.parametrize("q_len, kv_len", [(0, 3), (3, 0), (0, 0)])
def test_empty_lengths(q_len, kv_len):
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, q_len, 3, kv_len=kv_len))
    out, lse = oracle(q, k, v, return_lse=True)
    assert out.shape == (1, 2, q_len, 3) and lse.shape == (1, 2, q_len)
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -math.inf).all())
    assert all(not x.isnan().any() for x in grads(out, torch.ones_like(out), q, k, v))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_gradcheck(pattern, causal):
    q, k, v = (x.requires_grad_() for x in qkv(1, 4, 7, 2))
    covered = visible(pattern, 4, 7, 7, is_causal=causal).sum(-1) > 0

    def function(q, k, v):
        out, lse = oracle(q, k, v, pattern, is_causal=causal, return_lse=True)
        return out, lse[:, covered]

    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_bad_numbers_reach_only_rows_that_see_them(pattern, causal, which, bad):
    n, heads, t = 13, 4, 6
    q, k, v = qkv(1, heads, n, 3)
    clean = oracle(q, k, v, pattern, is_causal=causal)
    {"query": q, "key": k, "value": v}[which][:, :, t, 1] = bad
    out, lse = oracle(q, k, v, pattern, is_causal=causal, return_lse=True)
    counts = visible(pattern, heads, n, n, is_causal=causal)
    reached = counts[:, :, t] > 0 if which != "query" else torch.zeros(heads, n, dtype=torch.bool)
    if which == "query":
        reached[:, t] = counts[:, t].sum(-1) > 0
    assert reached.any()
    assert torch.equal(out[0][~reached], clean[0][~reached])
    assert not lse[0][~reached].isnan().any()
    if which == "value":
        assert not out[0][reached][:, 1].isfinite().any()
        assert torch.equal(out[0][reached][:, [0, 2]], clean[0][reached][:, [0, 2]])
    elif math.isnan(bad):
        assert out[0][reached].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float64(dtype):
    q, k, v = (x.to(dtype) for x in qkv(1, 2, 9, 4))
    out, lse = oracle(q, k, v, is_causal=True, return_lse=True)
    assert out.dtype == lse.dtype == torch.float64
    assert torch.equal(out, oracle(q.double(), k.double(), v.double(), is_causal=True))


def test_large_scores_do_not_overflow():
    q = torch.tensor([1e4, -1e4]).view(1, 1, 2, 1)
    k, v = torch.tensor([1e4, 0.0]).view(1, 1, 2, 1), torch.tensor([3.0, 5.0]).view(1, 1, 2, 1)
    out, lse = oracle(q, k, v, return_lse=True)
    assert out.flatten().tolist() == [3.0, 5.0]
    assert lse.flatten().tolist() == [1e8, 0.0]


# --- refusals -------------------------------------------------------------------------------------------------------


class Mystery:
    pass


@pytest.mark.parametrize(
    "error, match, change",
    [
        (ValueError, "dropout_p=0.0", {"dropout_p": 0.1}),
        (ValueError, "query_offset=0 .*query_offset=3", {"q_len": 5, "is_causal": True}),
        (ValueError, "query_offset=0", {"q_len": 5, "pattern": SlidingWindow(1, 1)}),
        (ValueError, "query_offset=0", {"q_len": 5, "cu_seqlens": [0, 8]}),
        (ValueError, "enable_gqa=True", {"kv_heads": 2}),
        (ValueError, "divisor", {"kv_heads": 3, "enable_gqa": True}),
        (ValueError, "never decrease", {"cu_seqlens": [0, 5, 3]}),
        (ValueError, "rows", {"rows": [8]}),
        (ValueError, "rows", {"rows": [-1]}),
        (ValueError, "heads='all'", {"pattern": Dilated((1,) * 5, (1,) * 5, heads="grouped")}),
        (ValueError, "no known choice", {"pattern": Dilated((1,), (1,), heads="some")}),
        (TypeError, "Mystery", {"pattern": Mystery()}),
    ],
)
def test_refuses_and_says_what_to_do(error, match, change):
    change = dict(change)
    q, k, v = qkv(1, 4, change.pop("q_len", 8), 3, change.pop("kv_heads", 4), 8)
    with pytest.raises(error, match=match):
        oracle(q, k, v, change.pop("pattern", Dense()), **change)


def test_refuses_shapes_that_do_not_belong_together():
    q, k, v = qkv(2, 4, 8, 3)
    for bad in ((q[0], k, v), (q, k[:1], v), (q, k, v[:, :, 1:]), (q, k[..., :2], v)):
        with pytest.raises(ValueError, match=r"dimensions|together"):
            oracle(*bad)
