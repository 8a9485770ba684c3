"""Joining partial results: a softmax over a set of keys, cut anywhere, merges into the softmax over all of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.numerics.merge import merge_

INF = math.inf


def generator(seed):
    return torch.Generator().manual_seed(seed)


def part(scores, values):
    """`(out, lse)` of a softmax over these keys, by its definition; no keys: 0 and -inf."""
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -INF)
    weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    return weights @ values, lse


def joined(parts, dtype=torch.float64):
    out, lse = (x.clone().to(dtype) for x in parts[0])
    for more, more_lse in parts[1:]:
        merge_(out, lse, more, more_lse)
    return out, lse


def case(rows=7, keys=30, dim=5, scale=1.0, seed=0):
    scores = scale * torch.randn(2, 3, rows, keys, dtype=torch.float64, generator=generator(seed))
    return scores, torch.randn(2, 3, keys, dim, dtype=torch.float64, generator=generator(seed + 1))


# --- against the joint softmax --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    cuts=st.lists(st.integers(0, 30), max_size=6).map(sorted),
    order=st.randoms(use_true_random=False),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1000.0]),
    seed=st.integers(0, 1000),
)
def test_any_cut_in_any_order_gives_the_joint_softmax(cuts, order, scale, seed):
    scores, values = case(scale=scale, seed=seed)
    want, want_lse = part(scores, values)
    edges = [0, *cuts, 30]
    pieces = [part(scores[..., a:b], values[:, :, a:b]) for a, b in pairwise(edges)]
    order.shuffle(pieces)
    out, lse = joined(pieces)
    assert not out.isnan().any()
    torch.testing.assert_close(lse, want_lse, rtol=1e-14, atol=1e-13)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)


def test_a_key_on_both_sides_counts_twice():
    scores, values = case()
    both = torch.cat([scores, scores[..., :4]], -1), torch.cat([values, values[:, :, :4]], -2)
    want, want_lse = part(*both)
    out, lse = joined([part(scores, values), part(scores[..., :4], values[:, :, :4])])
    torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-13)


def test_merging_with_itself_doubles_the_mass_and_keeps_the_output():
    scores, values = case()
    out, lse = part(scores, values)
    twice, twice_lse = joined([(out, lse), (out, lse)])
    torch.testing.assert_close(twice, out, rtol=0, atol=1e-15)
    torch.testing.assert_close(twice_lse, lse + math.log(2), rtol=0, atol=1e-14)


# --- nothing on one side or on both ---------------------------------------------------------------------------------


def test_two_empty_sides_stay_empty():
    out, lse = torch.zeros(2, 3, 4, 5), torch.full((2, 3, 4), -INF)
    merge_(out, lse, torch.zeros(2, 3, 4, 5), torch.full((2, 3, 4), -INF))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -INF))


def test_an_empty_side_changes_no_bit():
    scores, values = case()
    out, lse = part(scores, values)
    nothing, nothing_lse = torch.zeros_like(out), torch.full_like(lse, -INF)
    for first, second in (((out, lse), (nothing, nothing_lse)), ((nothing, nothing_lse), (out, lse))):
        got, got_lse = joined([first, second])
        assert torch.equal(got, out)
        assert torch.equal(got_lse, lse)


def test_empty_and_full_rows_side_by_side():
    out = torch.tensor([[1.0], [2.0], [0.0], [0.0]])
    lse = torch.tensor([0.0, 1.0, -INF, -INF])
    merge_(out, lse, torch.tensor([[3.0], [0.0], [4.0], [0.0]]), torch.tensor([0.0, -INF, 5.0, -INF]))
    torch.testing.assert_close(out, torch.tensor([[2.0], [2.0], [4.0], [0.0]]))
    torch.testing.assert_close(lse, torch.tensor([math.log(2), 1.0, 5.0, -INF]))


def test_no_rows_at_all():
    out, lse = torch.zeros(2, 3, 0, 5), torch.zeros(2, 3, 0)
    merge_(out, lse, torch.zeros(2, 3, 0, 5), torch.zeros(2, 3, 0))
    assert out.shape == (2, 3, 0, 5)


# --- extremes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("level", [1e4, -1e4, 1e30, -1e30])
def test_levels_at_which_exp_alone_would_overflow(dtype, level):
    out, lse = torch.full((1, 1), 2.0, dtype=dtype), torch.full((1,), level, dtype=dtype)
    merge_(out, lse, torch.full((1, 1), 4.0, dtype=dtype), torch.full((1,), level, dtype=dtype))
    assert out.item() == pytest.approx(3.0)
    assert lse.item() == pytest.approx(level + math.log(2), rel=1e-6)


def test_the_far_larger_side_wins_without_nan():
    out, lse = torch.full((1, 1), 2.0), torch.full((1,), -1e38)
    merge_(out, lse, torch.full((1, 1), 4.0), torch.full((1,), 1e38))
    assert (out.item(), lse.item()) == (4.0, pytest.approx(1e38))
    merge_(out, lse, torch.full((1, 1), 9.0), torch.full((1,), -1e38))
    assert (out.item(), lse.item()) == (4.0, pytest.approx(1e38))


@pytest.mark.parametrize("where", ["out", "part", "lse", "part_lse"])
def test_a_nan_comes_through_in_its_own_row_alone(where):
    tensors = {
        "out": torch.ones(4, 3), "lse": torch.zeros(4), "part": torch.ones(4, 3), "part_lse": torch.zeros(4)
    }  # fmt: skip
    tensors[where][2] = math.nan
    merge_(tensors["out"], tensors["lse"], tensors["part"], tensors["part_lse"])
    assert tensors["out"][2].isnan().all()
    assert tensors["out"][[0, 1, 3]].isfinite().all()
    assert tensors["lse"].isnan().tolist() == [False, False, "lse" in where, False]


def test_an_infinite_value_stays_infinite():
    out, lse = torch.tensor([[INF, 1.0]]), torch.zeros(1)
    merge_(out, lse, torch.tensor([[1.0, 1.0]]), torch.zeros(1))
    assert out[0, 0] == INF
    assert out[0, 1] == 1.0


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parts_merge_in_float32(dtype):
    """Forty parts of equal mass, of which bfloat16 sums would lose all but the first digits."""
    parts = [(torch.randn(6, 8, generator=generator(seed)).to(dtype), torch.zeros(6)) for seed in range(40)]
    out, lse = torch.zeros(6, 8), torch.full((6,), -INF)
    for more, more_lse in parts:
        before = more.clone()
        merge_(out, lse, more, more_lse)
        assert torch.equal(more, before), "a part was written to"
    assert out.dtype == torch.float32
    want = torch.stack([more.double() for more, _ in parts]).mean(0)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), torch.full((6,), math.log(40)).double(), rtol=0, atol=1e-5)


def test_an_lse_of_another_dtype_is_taken():
    out, lse = torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    merge_(out, lse, torch.zeros(3, 2), torch.zeros(3))
    torch.testing.assert_close(out, torch.full((3, 2), 0.5, dtype=torch.float64))
    assert lse.dtype == torch.float64


# --- in place, any strides ------------------------------------------------------------------------------------------


def test_merges_into_strided_views_and_touches_nothing_else():
    whole, whole_lse = torch.full((2, 9, 3, 8), 7.0), torch.full((2, 9, 3), 7.0)
    rows = slice(1, None, 2)
    out, lse = whole.transpose(1, 2)[:, 1:, rows, ::2], whole_lse.transpose(1, 2)[:, 1:, rows]
    scores, values = case(rows=4, dim=4)
    a, b = (part(scores[:, 1:, :, piece], values[:, 1:, piece]) for piece in (slice(0, 11), slice(11, 30)))
    out.copy_(a[0])
    lse.copy_(a[1])
    mask, mask_lse = torch.ones_like(whole, dtype=torch.bool), torch.ones_like(whole_lse, dtype=torch.bool)
    mask.transpose(1, 2)[:, 1:, rows, ::2] = False
    mask_lse.transpose(1, 2)[:, 1:, rows] = False
    merge_(out, lse, *b)
    want, want_lse = part(scores[:, 1:], values[:, 1:])
    torch.testing.assert_close(out, want.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, want_lse.float(), rtol=0, atol=1e-6)
    assert (whole[mask] == 7.0).all()
    assert (whole_lse[mask_lse] == 7.0).all()


def test_parts_may_be_strided_and_repeated_too():
    scores, values = case(rows=4, dim=4)
    want = joined([part(scores[..., :9], values[:, :, :9]), part(scores[..., 9:], values[:, :, 9:])])
    a, b = part(scores[..., :9], values[:, :, :9]), part(scores[..., 9:], values[:, :, 9:])
    turned = (
        b[0].transpose(-1, -2).contiguous().transpose(-1, -2),
        b[1].transpose(-1, -2).contiguous().transpose(-1, -2),
    )
    for x, y in zip(joined([a, turned]), want, strict=True):
        assert torch.equal(x, y)
    out, lse = torch.zeros(3, 4, 2), torch.zeros(3, 4)
    merge_(out, lse, torch.ones(1, 1, 1).expand(3, 4, 2), torch.zeros(1, 1).expand(3, 4))
    assert torch.equal(out, torch.full((3, 4, 2), 0.5))
