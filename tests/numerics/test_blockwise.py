"""The core's own arithmetic, a block of rows at a time, against torch's attention written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan import blockwise

F = torch.nn.functional
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed)).to(dtype)


def plain(query, key, value, *, is_causal, scale):
    """`(out, lse)` in float64 with a mask of all rows at once; autograd does the rest."""
    query, key, value = (x.double() for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = scale * query @ key.transpose(-1, -2)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if is_causal else None
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out, scores.logsumexp(-1)


def gradients(query, key, value, dout, *, is_causal, scale):
    inputs = [x.detach().double().requires_grad_() for x in (query, key, value)]
    out, _ = plain(*inputs, is_causal=is_causal, scale=scale)
    return torch.autograd.grad(out, inputs, dout.double())


@pytest.fixture(params=[None, 1, 4096], ids=["usual budget", "no budget", "small budget"])
def budget(request, monkeypatch):
    """Where nothing fits, blocks are as small as they get."""
    if request.param is not None:
        monkeypatch.setattr(blockwise, "BUDGET", request.param)


def close(got, want, atol=1e-12):
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


SHAPES = [
    # batch, heads, kv_heads, q_len, kv_len, dim
    (1, 1, 1, 1, 1, 1), (2, 3, 3, 40, 40, 8), (1, 4, 2, 33, 33, 5), (3, 6, 1, 17, 17, 4), (2, 2, 2, 5, 50, 8),
    (2, 4, 2, 50, 5, 8), (1, 2, 1, 1, 70, 16), (2, 2, 2, 70, 1, 16), (5, 2, 2, 3, 3, 2), (1, 1, 1, 300, 300, 3),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_forward_and_backward(budget, shape, causal):
    batch, heads, kv_heads, q_len, kv_len, dim = shape
    q, dout = randn(batch, heads, q_len, dim, seed=1), randn(batch, heads, q_len, dim, seed=2)
    k, v = randn(batch, kv_heads, kv_len, dim, seed=3), randn(batch, kv_heads, kv_len, dim, seed=4)
    for scale in (1 / math.sqrt(dim), -0.7):
        out, lse = blockwise.forward(q, k, v, is_causal=causal, scale=scale)
        want, want_lse = plain(q, k, v, is_causal=causal, scale=scale)
        close(out, want)
        close(lse, want_lse)
        got = blockwise.backward(dout, q, k, v, out, lse, is_causal=causal, scale=scale)
        for one, other in zip(got, gradients(q, k, v, dout, is_causal=causal, scale=scale), strict=True):
            close(one, other)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3), group=st.integers(1, 3), kv_heads=st.integers(1, 3), q_len=st.integers(1, 40),
    kv_len=st.integers(1, 40), dim=st.sampled_from([1, 3, 8]), causal=st.booleans(),
    budget=st.sampled_from([1, 700, 5000, 2**24]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_in_any_blocks(batch, group, kv_heads, q_len, kv_len, dim, causal, budget, seed):
    q = randn(batch, group * kv_heads, q_len, dim, seed=seed)
    k, v = (randn(batch, kv_heads, kv_len, dim, seed=seed + i) for i in (1, 2))
    dout = randn(*q.shape, seed=seed + 3)
    usual = blockwise.BUDGET
    blockwise.BUDGET = budget
    try:
        out, lse = blockwise.forward(q, k, v, is_causal=causal, scale=0.6)
        got = blockwise.backward(dout, q, k, v, out, lse, is_causal=causal, scale=0.6)
    finally:
        blockwise.BUDGET = usual
    want, want_lse = plain(q, k, v, is_causal=causal, scale=0.6)
    close(out, want)
    close(lse, want_lse)
    for one, other in zip(got, gradients(q, k, v, dout, is_causal=causal, scale=0.6), strict=True):
        close(one, other)


@pytest.mark.parametrize("causal", [False, True])
def test_small_blocks_are_used_where_the_budget_is_small(monkeypatch, causal):
    """Otherwise the tests above would not test what they say."""
    seen = []
    real = torch.Tensor.amax

    def watched(scores, *args, **kwargs):
        seen.append(scores.numel())
        return real(scores, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "amax", watched)
    q, k, v = (randn(2, 2, 100, 4, seed=i) for i in range(3))
    blockwise.forward(q, k, v, is_causal=causal, scale=1.0)
    whole = len(seen)
    monkeypatch.setattr(blockwise, "BUDGET", 1)
    blockwise.forward(q, k, v, is_causal=causal, scale=1.0)
    assert len(seen) - whole > whole
    assert max(seen[whole:]) < max(seen[:whole])


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "strided": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "gapped": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "reversed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_strides_do_not_matter(budget, layout, causal):
    tensors = [randn(2, 4, 21, 6, seed=i) for i in range(4)]
    q, k, v, dout = tensors
    out, lse = blockwise.forward(q, k, v, is_causal=causal, scale=0.4)
    grads = blockwise.backward(dout, q, k, v, out, lse, is_causal=causal, scale=0.4)
    laid = [LAYOUTS[layout](x) for x in tensors]
    before = [x.clone() for x in laid]
    other, other_lse = blockwise.forward(*laid[:3], is_causal=causal, scale=0.4)
    others = blockwise.backward(laid[3], *laid[:3], LAYOUTS[layout](out), lse, is_causal=causal, scale=0.4)
    for x, y in zip((other, other_lse, *others), (out, lse, *grads), strict=True):
        close(x, y, 1e-13)
    for x, y in zip(laid, before, strict=True):
        assert torch.equal(x, y), "an input was written to"


def test_repeated_inputs():
    """Stride 0, as the core passes key heads that several query heads share, and as `out.sum()` makes gradients."""
    q = randn(2, 4, 9, 8)
    k, v = (randn(2, 1, 9, 8, seed=i).expand(2, 4, 9, 8) for i in (1, 2))
    dout = torch.ones((), dtype=torch.float64).expand(2, 4, 9, 8)
    out, lse = blockwise.forward(q, k, v, is_causal=True, scale=1.0)
    close(out, plain(q, k, v, is_causal=True, scale=1.0)[0])
    got = blockwise.backward(dout, q, k, v, out, lse, is_causal=True, scale=1.0)
    for one, other in zip(got, gradients(q, k, v, dout, is_causal=True, scale=1.0), strict=True):
        close(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dtypes(dtype, causal):
    """Arithmetic in float32 or wider: what is lost is one rounding of the result."""
    q, k, v, dout = (randn(2, 4, 33, 16, seed=i, dtype=dtype) for i in range(4))
    out, lse = blockwise.forward(q, k, v, is_causal=causal, scale=0.25)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (out.dtype, lse.dtype) == (dtype, wide)
    want, want_lse = plain(q, k, v, is_causal=causal, scale=0.25)
    eps = torch.finfo(dtype).eps
    close(lse, want_lse, 1e-5 if wide == torch.float32 else 1e-13)
    assert ((out.double() - want).abs() <= eps * want.abs() + 1e-5 * (eps > 1e-10) + 1e-13).all()
    got = blockwise.backward(dout, q, k, v, want.to(dtype), lse, is_causal=causal, scale=0.25)
    wants = gradients(q, k, v, dout, is_causal=causal, scale=0.25)
    for one, other, x in zip(got, wants, (q, k, v), strict=True):
        assert (one.dtype, one.shape) == (x.dtype, x.shape)
        assert (one.double() - other).abs().max() <= 8 * eps * other.abs().max()


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_to_do(shape, causal):
    batch, heads, q_len, kv_len = shape
    q, k = randn(batch, heads, q_len, 4), randn(batch, heads, kv_len, 4)
    out, lse = blockwise.forward(q, k, k, is_causal=causal, scale=1.0)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full(q.shape[:3], -math.inf, dtype=torch.float64))
    for one, x in zip(blockwise.backward(q, q, k, k, out, lse, is_causal=causal, scale=1.0), (q, k, k), strict=True):
        assert torch.equal(one, torch.zeros_like(x))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [100.0, -100.0])
def test_large_scores_overflow_nothing(causal, size):
    q, k, v, dout = (randn(1, 2, 30, 8, seed=i, dtype=torch.float32) for i in range(4))
    out, lse = blockwise.forward(size * q, size * k, v, is_causal=causal, scale=1.0)
    grads = blockwise.backward(dout, size * q, size * k, v, out, lse, is_causal=causal, scale=1.0)
    assert all(x.isfinite().all() for x in (out, lse, *grads))


class Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal):
        out, lse = blockwise.forward(q, k, v, is_causal=causal, scale=0.9)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx, dout):
        return *blockwise.backward(dout, *ctx.saved_tensors, is_causal=ctx.causal, scale=0.9), None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_gradcheck(budget, causal, kv_heads):
    q = randn(2, 2, 5, 3, seed=1).requires_grad_()
    k, v = (randn(2, kv_heads, 5, 3, seed=i).requires_grad_() for i in (2, 3))
    assert torch.autograd.gradcheck(lambda q, k, v: Blocks.apply(q, k, v, causal), (q, k, v))


def test_the_backward_takes_the_results_of_a_softmax_over_more_keys(budget):
    """What makes mixtures exact: gradients of the parts, given the joint out and lse, add up to the joint gradients."""
    q, k, v, dout = (randn(2, 4, 23, 6, seed=i) for i in range(4))
    out, lse = plain(q, k, v, is_causal=False, scale=0.5)
    want = gradients(q, k, v, dout, is_causal=False, scale=0.5)
    total = [torch.zeros_like(x) for x in (q, k, v)]
    for keys in (slice(0, 1), slice(1, 9), slice(9, 23)):
        dq, dk, dv = blockwise.backward(
            dout, q, k[:, :, keys], v[:, :, keys], out, lse, is_causal=False, scale=0.5
        )  # fmt: skip
        total[0] += dq
        total[1][:, :, keys] += dk
        total[2][:, :, keys] += dv
    for one, other in zip(total, want, strict=True):
        close(one, other)


def test_a_causal_backward_with_joint_results():
    """Twice the same causal square: every key counts twice, so the lse is larger by log 2, the output the same."""
    q, k, v, dout = (randn(1, 2, 12, 4, seed=i) for i in range(4))
    out, lse = plain(q, k, v, is_causal=True, scale=0.5)
    want = gradients(q, k, v, dout, is_causal=True, scale=0.5)
    half = blockwise.backward(dout, q, k, v, out, lse + math.log(2), is_causal=True, scale=0.5)
    for one, other in zip(half, want, strict=True):
        close(2 * one, other)


def test_results_are_not_views_of_the_inputs():
    q, k, v = (randn(1, 1, 1, 4, seed=i) for i in range(3))
    out, _ = blockwise.forward(q, k, v, is_causal=True, scale=1.0)
    before = v.clone()
    out.fill_(9.0)
    assert torch.equal(v, before)
