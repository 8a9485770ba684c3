"""Lower precision loses no more than naive torch of the same dtype, and bad numbers go no further than they may.

The error is the root mean square of the difference from the float64 oracle, relative to that of the oracle: at most
2 times (forward) and 3 times (gradients) what `softmax(q k^T) v` in the same dtype, with autograd, loses.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import product

import pytest
import torch

import longspan as ls
from longspan.execution import strided
from longspan.testing.oracle import oracle, visible
from small import randn

BACKENDS = ("sdpa", "reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PATTERNS = {
    "dense": ls.Dense(),
    "all": ls.Dilated((32, 64, 300), (1, 2, 5)),
    "grouped": ls.Dilated((32, 64), (1, 2), heads="grouped"),
    "window": ls.SlidingWindow(40, 20),
    "narrow": ls.SlidingWindow(9, 0),
}

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_pattern = pytest.mark.parametrize("name", PATTERNS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
either_causal = pytest.mark.parametrize("causal", [False, True])


def qkv(batch=1, heads=4, n=64, dim=16, kv_heads=None, dtype=torch.float64, grad=True, seed=0, size=1.0):
    shapes = (heads, kv_heads or heads, kv_heads or heads)
    made = [randn(batch, h, n, dim, seed=seed + i) for i, h in enumerate(shapes)]
    made = [(x * scale).to(dtype) for x, scale in zip(made, (size, size, 1.0), strict=True)]
    return [x.requires_grad_() for x in made] if grad else made


# --- how much is lost -------------------------------------------------------------------------------------------


def naive(q, k, v, pattern, **where):
    """What a user would write, in the dtype of the inputs: scores, mask, softmax, product."""
    heads, n, dim = q.shape[1:]
    counts = visible(pattern, heads, n, k.shape[2], **where).to(q.dtype)
    bare = (counts == 0).all(-1, keepdim=True)
    keys, values = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    scores = (q @ keys.mT) * dim**-0.5 + counts.masked_fill(bare, 1.0).log()
    return scores.softmax(-1).masked_fill(bare, 0.0) @ values


def lost(got, want):
    return ((got.detach().double() - want.detach()).square().mean() / want.detach().square().mean()).sqrt().item()


@each_backend
@each_pattern
@each_dtype
@either_causal
@pytest.mark.parametrize(
    "shape", [{}, {"n": 200, "dim": 64, "kv_heads": 1}, {"size": 3.0}], ids=["small", "shared key head", "peaked"]
)
def test_error_at_most_two_and_three_times_that_of_naive_torch(backend, name, dtype, causal, shape):
    """Peaked: scores of 9 standard deviations, where one key takes nearly all of the weight."""
    pattern = PATTERNS[name]
    tensors = qkv(dtype=dtype, **shape)
    dout = randn(*tensors[0].shape, seed=9, dtype=dtype)
    out = ls.attention(*tensors, pattern, is_causal=causal, backend=backend, enable_gqa=True)
    plain = naive(*tensors, pattern, is_causal=causal)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    want = oracle(*exact, pattern, is_causal=causal, enable_gqa=True)
    assert out.dtype == dtype
    assert lost(out, want) <= 2 * lost(plain, want), f"out: {lost(out, want):.3g}, naive {lost(plain, want):.3g}"
    found, plains = (torch.autograd.grad(x, tensors, dout) for x in (out, plain))
    wanted = torch.autograd.grad(want, exact, dout.double())
    for one, other, right, what in zip(found, plains, wanted, ("dquery", "dkey", "dvalue"), strict=True):
        assert one.dtype == dtype
        ours, theirs = lost(one, right), lost(other, right)
        assert ours <= 3 * theirs, f"{what}: {ours:.3g}, naive {theirs:.3g}"


LONG, FEW = 65536, 4
EVERY = ("cpu_fused", "sdpa", "reference", "block_sparse_batched", "torch_sparse")
LIMITS = {"out": 2.0, "lse": 2.0, "dquery": 3.0, "dkey": 3.0, "dvalue": 3.0}


def written(q, k, v, dout, scale, dtype):
    """Out, lse, dquery, dkey and dvalue as anyone would write them down in a dtype; key heads are shared."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    scores = q @ k.mT * scale
    out = scores.softmax(-1) @ v
    return out.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(out, (q, k, v), dout.to(dtype))


def answered(q, k, v, dout, scale, backend):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = ls.attention(q, k, v, scale=scale, backend=backend, return_lse=True, enable_gqa=True)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout)


@cache
def long_case(queries, keys, heads, dim, values, scale, dtype):
    """The tensors, the truth and what naive torch loses. All positive: running sums drift, and nothing cancels."""
    generator = torch.Generator().manual_seed(5)
    draw = torch.rand if values == "positive" else torch.randn
    shapes = [(1, heads, queries, dim), (1, 1, keys, dim), (1, 1, keys, dim), (1, heads, queries, dim)]
    tensors = [draw(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    truth = written(*tensors, scale, torch.float64)
    return tensors, truth, [lost(*pair) for pair in zip(written(*tensors, scale, dtype), truth, strict=True)]


def check_long(backend, *case):
    tensors, truth, plain = long_case(*case)
    for (name, limit), one, right, other in zip(
        LIMITS.items(), answered(*tensors, case[5], backend), truth, plain, strict=True
    ):
        ours = lost(one, right)
        assert ours <= limit * other, f"{name}: {ours:.3g}, naive {other:.3g}"


def takes(backend, dtype):
    problem = ls.Problem(batch=1, heads=1, q_len=FEW, kv_len=LONG, head_dim=32, dtype=str(dtype).removeprefix("torch."))
    return any(one.name == backend and one.ok for one in ls.explain(problem).candidates)


@pytest.mark.parametrize("values", ["normal", "positive"])
@pytest.mark.parametrize(("queries", "keys"), [(FEW, LONG), (LONG, FEW)], ids=["rows", "columns"])
@pytest.mark.parametrize(("backend", "dtype"), [pair for pair in product(EVERY, DTYPES) if takes(*pair)])
def test_long_rows_and_columns_lose_no_more_than_naive_torch(backend, dtype, queries, keys, values):
    """A row's out, lse and dquery are sums over 65,536 keys; a column's dkey and dvalue over as many queries."""
    check_long(backend, queries, keys, 1, 32, values, 32**-0.5, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_precision_query_sums_its_gradient_over_more_keys_in_float32(dtype):
    """torch's own operator adds it up in the inputs' dtype: 5 times what naive torch loses in bfloat16."""
    check_long("sdpa", 8, 262144, 1, 16, "normal", 0.25, dtype)


@pytest.mark.parametrize(("queries", "keys"), [(FEW, 4096), (4096, FEW)], ids=["rows", "columns"])
@pytest.mark.parametrize("values", ["normal", "positive"])
@pytest.mark.parametrize("dim", [256, 1024])
@pytest.mark.parametrize("backend", EVERY)
def test_wide_heads_lose_no_more_than_naive_torch(backend, dim, values, queries, keys):
    check_long(backend, queries, keys, 1, dim, values, dim**-0.5, torch.float32)


@pytest.mark.parametrize("backend", EVERY)
def test_columns_of_heads_that_share_keys(backend):
    check_long(backend, 16384, FEW, 4, 32, "positive", 32**-0.5, torch.float32)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("pattern", ["blocks", "window", "dilated"])
def test_columns_of_many_tiles(pattern, threads):
    """Many short tiles, or heads that share a key: more sums than single precision takes one after the other."""
    heads, n, keys = {"blocks": (1, 8192, 8), "window": (24, 384, 384), "dilated": (24, 384, 384)}[pattern]
    generator = torch.Generator().manual_seed(6)
    q, dout = (torch.rand((1, heads, n, 8), generator=generator) for _ in range(2))
    k, v = (torch.rand((1, 1, keys, 8), generator=generator) for _ in range(2))
    chosen = {
        "blocks": ls.global_blocks((0,), block_size=4),
        "window": ls.SlidingWindow(300, 300),
        "dilated": ls.Dilated((n, 2 * n), (1, 2)),
    }[pattern]
    counts = visible(chosen, heads, n, keys, query_offset=0)

    def gradients(dtype):
        tensors = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        scores = tensors[0] @ tensors[1].mT * 8**-0.5 + counts.to(dtype).log()
        return torch.autograd.grad(scores.softmax(-1) @ tensors[2], tensors, dout.to(dtype))

    tensors = [x.requires_grad_() for x in (q, k, v)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = ls.attention(*tensors, chosen, backend="cpu_fused", enable_gqa=True, query_offset=0)
        found = torch.autograd.grad(out, tensors, dout)
    finally:
        torch.set_num_threads(before)
    names = "dquery", "dkey", "dvalue"
    for name, one, other, right in zip(names, found, gradients(torch.float32), gradients(torch.float64), strict=True):
        ours, theirs = lost(one, right), lost(other, right)
        assert ours <= 3 * theirs, f"{name}: {ours:.3g}, naive {theirs:.3g}"


@pytest.mark.parametrize("scale", [2.0, 1.9])
@pytest.mark.parametrize("backend", ["cpu_fused", "sdpa"])
def test_one_key_with_all_of_the_weight_has_it_in_the_backward_too(backend, scale):
    """The backward's score is rounded as the forward's was: where the lse is a score, the weight is 1."""
    check_long(backend, 2048, FEW, 1, 64, "normal", scale, torch.float32)


@each_backend
@each_pattern
@each_dtype
def test_the_lse_is_as_good_as_its_dtype(backend, name, dtype):
    """Nearly float32's precision whatever the inputs': it decides how results merge."""
    tensors = qkv(dtype=dtype, n=100, grad=False)
    _, lse = ls.attention(*tensors, PATTERNS[name], is_causal=True, backend=backend, return_lse=True)
    want = oracle(*tensors, PATTERNS[name], is_causal=True, return_lse=True)[1]
    assert lse.dtype == torch.float32
    seen = want.isfinite()
    assert torch.equal(seen, lse.isfinite())
    limit = 1e-6 if dtype == torch.float32 else 3e-5  # torch's half-precision kernel takes a shorter exp
    assert (lse[seen] - want[seen]).abs().max() <= limit * want[seen].abs().max()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_merges_are_in_float32(backend, dtype):
    """Twelve branches that all see the same: merged in half precision, the error would grow with every branch."""
    tensors = qkv(dtype=dtype, grad=False)
    want = oracle(*tensors, is_causal=True)
    many = ls.attention(*tensors, ls.Dilated((64,) * 12, (1,) * 12), is_causal=True, backend=backend)
    once = ls.attention(*tensors, is_causal=True, backend=backend)
    assert lost(many, want) <= 1.5 * lost(once, want)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_many_calls_add_up_in_float32(backend, dtype):
    """One key that every tile of a window sees: its gradient is a sum over hundreds of rows."""
    tensors = qkv(n=300, dtype=dtype)
    pattern, dout = ls.Dilated((300,) * 8, (1,) * 8), randn(1, 4, 300, 16, seed=9, dtype=dtype).abs()
    exact = [x.detach().double().requires_grad_() for x in tensors]
    wanted = torch.autograd.grad(oracle(*exact), exact, dout.double())
    many, once = (
        torch.autograd.grad(ls.attention(*tensors, x, backend=backend), tensors, dout) for x in (pattern, ls.Dense())
    )
    for one, other, right in zip(many, once, wanted, strict=True):
        assert lost(one, right) <= 1.5 * lost(other, right) + torch.finfo(dtype).eps / 8


def test_what_is_merged_is_wider_than_half(monkeypatch):
    seen = set()
    original = strided.merge_

    def spy(out, lse, part, part_lse):
        seen.add((out.dtype, lse.dtype))
        original(out, lse, part, part_lse)

    monkeypatch.setattr(strided, "merge_", spy)
    for dtype, name in product((*DTYPES, torch.float64), PATTERNS):
        seen.clear()
        ls.attention(*qkv(n=100, dtype=dtype, grad=False), PATTERNS[name], is_causal=True, backend="reference")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert seen <= {(wide, wide)}
        assert seen or name in ("dense", "grouped")


# --- large logits -----------------------------------------------------------------------------------------------


@each_backend
@each_pattern
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_logits_of_ten_thousand_overflow_nothing(backend, name, dtype, logit):
    """Scores of that size, all alike but for what the dtype makes of them: sums of values with equal weights."""
    n, dim = 48, 16
    q = torch.full((1, 4, n, dim), 50.0, dtype=dtype, requires_grad=True)
    k = torch.full_like(q, logit / (50.0 * dim**0.5)).requires_grad_()
    v = randn(1, 4, n, dim, seed=3, dtype=dtype).requires_grad_()
    out, lse = ls.attention(q, k, v, PATTERNS[name], is_causal=True, backend=backend, return_lse=True)
    want, want_lse = oracle(q, k, v, PATTERNS[name], is_causal=True, return_lse=True)
    seen = want_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert want_lse[seen].abs().max() > 9e3
    assert ((lse - want_lse)[seen].abs() <= 2e-6 * 1e4).all()
    eps = max(torch.finfo(dtype).eps, 2e-6 * 1e4 / 4)  # the lse itself is rounded to float32, 1e-3 at this size
    assert (out - want).abs().max() <= 8 * (eps if dtype != torch.float64 else 1e-11)
    for gradient in torch.autograd.grad(out.float().sum(), (q, k, v)):
        assert gradient.isfinite().all()


@each_backend
@each_pattern
def test_one_logit_of_ten_thousand_takes_all_the_weight(backend, name):
    tensors = qkv(n=48, dtype=torch.float32, grad=False)
    q, k, v = tensors
    q[..., 0] = 100.0
    k[..., 0] = 0.0
    k[:, :, 5, 0] = 400.0  # scores of 1e4 for whoever sees key 5
    for x in (q, k, v):
        x.requires_grad_()
    out = ls.attention(q, k, v, PATTERNS[name], is_causal=True, backend=backend)
    rows = visible(PATTERNS[name], 4, 48, 48, is_causal=True)[:, :, 5] > 0
    assert rows.any()
    assert torch.equal(out[0][rows], v[0, :, 5:6].expand(4, 48, 16)[rows])
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


@each_backend
@pytest.mark.parametrize("name", ["dense", "all", "window"])
def test_a_mean_of_large_values_does_not_overflow_on_the_way(backend, name):
    """In float16 the sum over 64 keys is beyond the largest number; their mean is not."""
    n = 64
    q, k = qkv(n=n, dtype=torch.float16, grad=False)[:2]
    v = torch.full((1, 4, n, 16), 6e4, dtype=torch.float16)
    out = ls.attention(q, k, v, PATTERNS[name], is_causal=True, backend=backend)
    rows = visible(PATTERNS[name], 4, n, n, is_causal=True).sum(-1) > 0
    assert out.isfinite().all()
    torch.testing.assert_close(out[0][rows], v[0][rows], rtol=1e-2, atol=0)


# --- NaN and inf ------------------------------------------------------------------------------------------------

N, HEADS, DIM = 37, 4, 8
BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
PLACES = (0, 6, 21, N - 1)
SEEN_BY = {
    "dense, causal": (ls.Dense(), {"is_causal": True}),
    "all, causal": (ls.Dilated((8, 20), (1, 3)), {"is_causal": True}),
    "grouped": (ls.Dilated((8, 20), (1, 3), heads="grouped"), {}),
    "window": (ls.SlidingWindow(5, 2), {}),
    "window, causal": (ls.SlidingWindow(5, 0), {"is_causal": True}),
    "documents": (ls.Dense(), {"cu_seqlens": (0, 5, 20, 33)}),
    "documents, all, causal": (ls.Dilated((8, 20), (1, 3)), {"cu_seqlens": (0, 5, 20, 33), "is_causal": True}),
}

each_sight = pytest.mark.parametrize("sight", SEEN_BY)
each_bad = pytest.mark.parametrize("bad", BAD)
all_dtypes = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)


def poisoned(tensors, which, head, position, bad):
    """Copies, with one row of one tensor made bad: all of it for NaN, one number of it for inf."""
    copies = [x.detach().clone() for x in tensors]
    row = copies["qkv".index(which)][0, head, position]
    row[slice(None) if bad == "nan" else 0] = BAD[bad]
    return copies


def reached(which, head, position, sight, kv_heads):
    """(heads, N) bool: the rows whose results may depend on that row of query, key or value."""
    pattern, where = SEEN_BY[sight]
    rows = torch.zeros(HEADS, N, dtype=torch.bool)
    if which == "q":
        rows[head, position] = True
        return rows
    sharing = slice(head * (HEADS // kv_heads), (head + 1) * (HEADS // kv_heads))
    rows[sharing] = visible(pattern, HEADS, N, N, **where)[sharing, :, position] > 0
    return rows


@each_backend
@each_sight
@each_bad
@all_dtypes
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_bad_numbers_reach_only_the_rows_that_may_see_them(backend, sight, bad, dtype, which):
    pattern, where = SEEN_BY[sight]
    for kv_heads in (4, 2):
        tensors = qkv(n=N, dim=DIM, kv_heads=kv_heads, dtype=dtype, grad=False)
        given = {**where, "backend": backend, "return_lse": True, "enable_gqa": True}
        out, lse = ls.attention(*tensors, pattern, **given)
        for position in PLACES:
            new_out, new_lse = ls.attention(*poisoned(tensors, which, 1, position, bad), pattern, **given)
            others = ~reached(which, 1, position, sight, kv_heads)
            assert torch.equal(new_out[0][others], out[0][others]), f"out, from position {position}"
            assert torch.equal(new_lse[0][others], lse[0][others]), f"lse, from position {position}"
            if which == "v":
                assert torch.equal(new_lse, lse), "an lse knows no values"


@each_backend
@each_sight
@all_dtypes
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_nan_reaches_every_row_that_sees_it(backend, sight, dtype, which):
    """Swallowed, it would be a wrong number that looks like a right one."""
    pattern, where = SEEN_BY[sight]
    seen_any = False
    for kv_heads in (4, 2):
        tensors = qkv(n=N, dim=DIM, kv_heads=kv_heads, dtype=dtype, grad=False)
        given = {**where, "backend": backend, "return_lse": True, "enable_gqa": True}
        sighted = visible(pattern, HEADS, N, N, **where).sum(-1) > 0
        for position in PLACES:
            out, lse = ls.attention(*poisoned(tensors, which, 1, position, "nan"), pattern, **given)
            rows = reached(which, 1, position, sight, kv_heads) & sighted
            seen_any |= bool(rows.any())
            assert out[0][rows].isnan().all(), f"out, from position {position}: {out[0][rows]}"
            if which != "v":
                assert lse[0][rows].isnan().all(), f"lse, from position {position}"
    assert seen_any


@each_backend
@each_sight
@each_bad
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_bad_numbers_reach_only_the_query_gradients_that_may_see_them(backend, sight, bad, which):
    """A query's gradient comes from the keys that it sees."""
    pattern, where = SEEN_BY[sight]
    tensors = qkv(n=N, dim=DIM, dtype=torch.float32)
    dout = randn(1, HEADS, N, DIM, seed=9, dtype=torch.float32)
    (clean,) = torch.autograd.grad(ls.attention(*tensors, pattern, backend=backend, **where), tensors[0], dout)
    for position in PLACES:
        bads = [x.requires_grad_() for x in poisoned(tensors, which, 1, position, bad)]
        (found,) = torch.autograd.grad(ls.attention(*bads, pattern, backend=backend, **where), bads[0], dout)
        others = ~reached(which, 1, position, sight, HEADS)
        assert found[0][others].isfinite().all(), f"from position {position}"
        torch.testing.assert_close(found[0][others], clean[0][others], rtol=1e-4, atol=1e-5)


@each_backend
@each_sight
@pytest.mark.parametrize("which", ["q", "dout"])
def test_a_bad_query_reaches_only_the_gradients_of_the_keys_that_it_sees(backend, sight, which):
    """A key's gradient comes from the queries that see it: for a key that none of the bad rows sees, none is bad."""
    pattern, where = SEEN_BY[sight]
    tensors = qkv(n=N, dim=DIM, dtype=torch.float32)
    for position in PLACES:
        dout = randn(1, HEADS, N, DIM, seed=9, dtype=torch.float32)
        bads = [x.detach().clone() for x in tensors]
        (dout if which == "dout" else bads[0])[0, 1, position] = math.nan
        bads = [x.requires_grad_() for x in bads]
        found = torch.autograd.grad(ls.attention(*bads, pattern, backend=backend, **where), bads[1:], dout)
        seen = torch.zeros(HEADS, N, dtype=torch.bool)
        seen[1] = visible(pattern, HEADS, N, N, **where)[1, position] > 0
        for gradient, name in zip(found, ("dkey", "dvalue"), strict=True):
            assert gradient[0][~seen].isfinite().all(), f"{name}, from position {position}"


# --- rows that see nothing --------------------------------------------------------------------------------------

BLIND = {
    "dilated": (ls.Dilated((7,), (3,)), {}),
    "dilated, causal": (ls.Dilated((7, 20), (3, 4)), {"is_causal": True}),
    "rate above the segment": (ls.Dilated((3,), (5,)), {}),
    "outside of all documents": (ls.Dense(), {"cu_seqlens": (0, 5, 20)}),
    "no document at all": (ls.Dense(), {"cu_seqlens": (0,), "is_causal": True}),
    "empty documents alone": (ls.SlidingWindow(3, 1), {"cu_seqlens": (0, 0, 0)}),
    "beyond the window": (ls.SlidingWindow(3, 1), {"query_offset": 30}),
    "beyond the segment": (ls.Dilated((10,), (1,)), {"query_offset": 30}),
}


@each_backend
@all_dtypes
@pytest.mark.parametrize("case", BLIND)
def test_rows_that_see_nothing(backend, dtype, case):
    """out 0, lse -inf, gradient 0: also with a gradient through the lse, and whatever the hidden numbers are."""
    pattern, where = BLIND[case]
    tensors = qkv(n=N, dim=DIM, dtype=dtype)
    out, lse = ls.attention(*tensors, pattern, backend=backend, return_lse=True, **where)
    counts = visible(pattern, HEADS, N, N, **where)
    rows, keys = counts.sum(-1) == 0, counts.sum(-2) == 0
    assert rows.any()
    assert not out[0][rows].any() and (lse[0][rows] == -math.inf).all()
    assert out.isfinite().all() and not lse.isnan().any()
    assert torch.equal(lse[0] == -math.inf, rows)
    grads = torch.autograd.grad((out, lse), tensors, (torch.ones_like(out), torch.ones_like(lse)))
    for gradient, blind in zip(grads, (rows, keys, keys), strict=True):
        assert gradient.isfinite().all()
        assert not gradient[0][blind].any()
    bads = [x.detach().clone() for x in tensors]
    for x, blind in zip(bads, (rows, keys, keys), strict=True):
        x[0][blind] = math.nan
    again = ls.attention(*bads, pattern, backend=backend, return_lse=True, **where)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


# --- boundaries ---------------------------------------------------------------------------------------------------

BAD_BOUNDARIES = {
    "not sorted": ((0, 9, 5), "never fall"),
    "does not start at 0": ((1, 9), "first boundary of 0"),
    "ends beyond": ((0, N + 1), f"at most the sequence length, {N}"),
    "another device": (torch.tensor([0, 9], device="meta"), "on query's device"),
    "fractions": (torch.tensor([0.0, 9.0]), "integers"),
}


@each_backend
@each_pattern
@pytest.mark.parametrize("case", BAD_BOUNDARIES)
def test_boundaries_are_refused_by_name_before_any_launch(backend, name, case, monkeypatch):
    def launched(*_):
        raise AssertionError("launched")

    monkeypatch.setattr(strided.LoweredRunner, "forward", launched)
    bounds, said = BAD_BOUNDARIES[case]
    forms = [bounds, torch.tensor(bounds, dtype=torch.int32)] if isinstance(bounds, tuple) else [bounds]
    for form in forms:
        with pytest.raises(ls.ArgumentError, match=said) as caught:
            ls.attention(*qkv(n=N, dim=DIM), PATTERNS[name], is_causal=True, cu_seqlens=form, backend=backend)
        assert caught.value.argument == "cu_seqlens" and caught.value.fix


@each_backend
@each_pattern
@pytest.mark.parametrize("kv_heads", [3, 5, 8])
def test_a_group_that_does_not_divide_is_refused(backend, name, kv_heads):
    q, k, v = qkv(heads=6 if kv_heads == 5 else 4, kv_heads=kv_heads, n=20)
    with pytest.raises(ls.ArgumentError, match="divisor"):
        ls.attention(q, k, v, PATTERNS[name], enable_gqa=True, backend=backend)
