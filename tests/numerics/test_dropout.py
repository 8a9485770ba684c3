"""Dropout keyed by position: which (head, query, key) pairs are dropped follows from the seed and the positions alone.

A mask is made visible by the output itself: with equal scores and the identity as values, `out[i, j]` is the weight of
key `j` for query `i`, which is 0 for a dropped pair. Everything else is compared with attention written out by hand in
float64 with that mask. Statistics are taken with fixed seeds, at limits of five standard deviations.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import longspan as ls
import small
from longspan import blockwise
from longspan.execution import strided as execution
from longspan.testing.oracle import visible
from small import randn

qkv = partial(small.qkv, n=29, dim=8, grad=True)

BACKENDS = ("sdpa", "reference")
PATTERNS = {
    "dense": ls.Dense(),
    "all": ls.Dilated((8, 20), (1, 3)),
    "block": ls.Dilated((8, 20), (2, 3), offset="block"),
    "grouped": ls.Dilated((8, 20), (1, 3), heads="grouped"),
    "window": ls.SlidingWindow(6, 3),
    "one side": ls.SlidingWindow(5, 0),
}
LIMIT = 5.0
"""Standard deviations."""

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_pattern = pytest.mark.parametrize("name", PATTERNS)
either_causal = pytest.mark.parametrize("causal", [False, True])


def kept(seed, p=0.5, batch=2, heads=4, n=29, kv_len=None, pattern=None, backend="sdpa", dtype=torch.float64, **given):
    """(batch, heads, n, kv_len), bool: which pairs were seen and not dropped."""
    kv_len = n if kv_len is None else kv_len
    query = torch.zeros(batch, heads, n, kv_len, dtype=dtype)
    key = torch.zeros(batch, heads, kv_len, kv_len, dtype=dtype)
    value = torch.eye(kv_len, dtype=dtype).expand(batch, heads, kv_len, kv_len).contiguous()
    pattern = ls.Dense() if pattern is None else pattern
    return ls.attention(query, key, value, pattern, dropout_p=p, dropout_seed=seed, backend=backend, **given) != 0


def by_hand(q, k, v, mask, p, pattern=None, scale=None, **where):
    """(out, lse): softmax over the multiset of visible keys, each weight then 0 or divided by 1 - p."""
    heads, kv_len = q.shape[1], k.shape[2]
    counts = visible(pattern, heads, q.shape[2], kv_len, **where)
    keys, values = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ keys.mT) + counts.double().log()
    bare = (counts == 0).all(-1)
    lse = scores.masked_fill(bare[..., None], 0.0).logsumexp(-1)
    weights = (scores - lse[..., None]).exp() * mask / (1 - p)
    return weights @ values, lse.masked_fill(bare, -math.inf)


def assert_close(got, want, what, tolerance=1e-12):
    assert got.shape == want.shape and not got.isnan().any(), what
    assert torch.equal(got == -math.inf, want == -math.inf), what
    finite = want.isfinite()
    given = {"rtol": tolerance, "atol": tolerance, "msg": lambda said: f"{what}: {said}"}
    torch.testing.assert_close(got[finite].double(), want[finite], **given)


# --- exactness ------------------------------------------------------------------------------------------------------


@each_backend
@each_pattern
@either_causal
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_out_lse_and_gradients_are_those_of_the_masked_weights(backend, name, causal, kv_heads):
    """The backward redraws the forward's mask; the lse is that of the softmax before dropout, and has its gradient."""
    seed, p = 99, 0.4
    tensors = qkv(kv_heads=kv_heads)
    given = {"is_causal": causal, "enable_gqa": True, "backend": backend, "return_lse": True}
    out, lse = ls.attention(*tensors, PATTERNS[name], dropout_p=p, dropout_seed=seed, **given)
    want, want_lse = by_hand(*tensors, kept(seed, p), p, PATTERNS[name], is_causal=causal)
    assert_close(out, want, "out")
    assert_close(lse, want_lse, "lse")
    assert torch.equal(lse, ls.attention(*tensors, PATTERNS[name], **given)[1]) or backend == "sdpa"
    dout, dlse = randn(*out.shape, seed=7), randn(*lse.shape, seed=8)
    for outs, wants, douts in (((out,), (want,), (dout,)), ((out, lse), (want, want_lse), (dout, dlse))):
        found = torch.autograd.grad(outs, tensors, douts, retain_graph=True)
        right = torch.autograd.grad(wants, tensors, douts, retain_graph=True)
        for one, other, what in zip(found, right, ("dquery", "dkey", "dvalue"), strict=True):
            assert_close(one, other, what)


@each_backend
@either_causal
def test_documents_and_offsets_too(backend, causal):
    seed, p = 5, 0.3
    tensors, bounds = qkv(), (0, 4, 4, 17, 25)
    given = {"is_causal": causal, "backend": backend, "dropout_p": p, "dropout_seed": seed}
    got = ls.attention(*tensors, PATTERNS["all"], cu_seqlens=bounds, **given)
    want, _ = by_hand(*tensors, kept(seed, p), p, PATTERNS["all"], is_causal=causal, cu_seqlens=bounds)
    dout = randn(*got.shape, seed=7)
    assert_close(got, want, "documents")
    for one, other in zip(*(torch.autograd.grad(x, tensors, dout) for x in (got, want)), strict=True):
        assert_close(one, other, "gradients of documents")
    q, k, v = qkv(n=6, kv_len=29)
    got = ls.attention(q, k, v, PATTERNS["window"], query_offset=11, **given)
    mask = kept(seed, p, n=6, kv_len=29, query_offset=11)
    want, _ = by_hand(q, k, v, mask, p, PATTERNS["window"], is_causal=causal, query_offset=11)
    assert_close(got, want, "offset")


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_lower_precision_drops_the_same_pairs(backend, dtype):
    assert torch.equal(kept(3, 0.3, dtype=dtype, backend=backend), kept(3, 0.3))
    tensors = qkv(dtype=dtype)
    got = ls.attention(*tensors, PATTERNS["all"], dropout_p=0.3, dropout_seed=3, backend=backend)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    want, _ = by_hand(*exact, kept(3, 0.3), 0.3, PATTERNS["all"])
    tolerance = 8 * torch.finfo(dtype).eps
    assert got.dtype == dtype
    assert_close(got, want, "out", tolerance)
    dout = randn(*got.shape, seed=7, dtype=dtype)
    right = torch.autograd.grad(want, exact, dout.double())
    for one, other in zip(torch.autograd.grad(got, tensors, dout), right, strict=True):
        assert_close(one, other, "gradient", 2 * tolerance)


# --- the same pairs, whoever computes and however ---------------------------------------------------------------


@each_pattern
@either_causal
def test_both_backends_drop_the_same_pairs(name, causal):
    """Dense attention drops a pair if and only if any pattern that sees it does."""
    counts = visible(PATTERNS[name], 4, 29, 29, is_causal=causal) > 0
    full = kept(17)
    for backend in BACKENDS:
        assert torch.equal(kept(17, backend=backend), full)
        got = kept(17, pattern=PATTERNS[name], backend=backend, is_causal=causal)
        assert torch.equal(got, full & counts)


@each_backend
def test_a_window_that_covers_everything_is_dense(backend):
    tensors = qkv()
    given = {"dropout_p": 0.5, "dropout_seed": 4, "backend": backend}
    dense, wide = (ls.attention(*tensors, x, **given) for x in (ls.Dense(), ls.SlidingWindow(500, 500)))
    assert_close(wide, dense, "out")
    for one, other in zip(*(torch.autograd.grad(x.sum(), tensors) for x in (wide, dense)), strict=True):
        assert_close(one, other, "gradient")


@each_backend
@each_pattern
@pytest.mark.parametrize("budget", [1, 4096, 2**20])
def test_tiling_changes_nothing(backend, name, budget, monkeypatch):
    tensors, dout = qkv(batch=3, kv_heads=2), randn(3, 4, 29, 8, seed=7)
    given = {"dropout_p": 0.5, "dropout_seed": 4, "backend": backend, "enable_gqa": True, "is_causal": True}

    def run():
        out = ls.attention(*tensors, PATTERNS[name], **given)
        return out, *torch.autograd.grad(out, tensors, dout)

    want = run()
    monkeypatch.setattr(execution, "TEMPORARY", budget)
    monkeypatch.setattr(blockwise, "BUDGET", budget)
    for one, other in zip(run(), want, strict=True):
        assert_close(one, other, "in small pieces")


@each_backend
@each_pattern
@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "expanded"])
def test_memory_layout_changes_nothing(backend, name, layout):
    def laid(x):
        if layout == "transposed":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "sliced":
            return torch.nn.functional.pad(x, (1, 2, 3, 4, 1, 1))[:, 1:-1, 3:-4, 1:-2]
        if layout == "strided":
            return torch.stack([x, x], -1).flatten(-2)[..., ::2]
        return x[:1].expand_as(x)

    tensors = [x[:1].expand_as(x).contiguous() for x in qkv(grad=False)]
    given = {"dropout_p": 0.5, "dropout_seed": 4, "backend": backend, "is_causal": True}
    want = ls.attention(*tensors, PATTERNS[name], **given)
    assert_close(ls.attention(*map(laid, tensors), PATTERNS[name], **given), want, layout)
    assert not torch.equal(want[0], want[1]), "batch entries drop their own pairs"


@each_backend
def test_a_chunk_of_queries_drops_what_the_whole_does(backend):
    """As a decoder or a ring would compute it: rows of the whole, placed by `query_offset`."""
    whole = kept(11, backend=backend)
    for start, stop in ((0, 7), (7, 8), (8, 29)):
        chunk = kept(11, n=stop - start, kv_len=29, backend=backend, query_offset=start)
        assert torch.equal(chunk, whole[:, :, start:stop])


@each_backend
def test_shared_key_heads_drop_by_query_head(backend):
    q, k, v = qkv(kv_heads=2, grad=False)
    given = {"dropout_p": 0.5, "dropout_seed": 4, "backend": backend}
    repeated = (x.repeat_interleave(2, 1) for x in (k, v))
    assert_close(ls.attention(q, k, v, enable_gqa=True, **given), ls.attention(q, *repeated, **given), "out")


@each_backend
def test_plans_drop_the_same_pairs(backend):
    tensors = qkv()
    problem = ls.Problem.like(*tensors, PATTERNS["all"], is_causal=True, dropout_p=0.4)
    plan = ls.plan(problem, backend=backend)
    out, lse = plan(*tensors, dropout_seed=21)
    given = {"is_causal": True, "dropout_p": 0.4, "dropout_seed": 21, "backend": backend}
    assert torch.equal(out, ls.attention(*tensors, PATTERNS["all"], **given))
    dout = randn(*out.shape, seed=7)
    with torch.no_grad():
        kept_by_hand = plan.backward(dout, *tensors, out, lse, seed=21)
    for one, other in zip(torch.autograd.grad(out, tensors, dout), kept_by_hand, strict=True):
        assert torch.equal(one, other)


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_the_seed_decides():
    tensors = qkv(grad=False)
    given = {"dropout_p": 0.5}
    one = ls.attention(*tensors, dropout_seed=1, **given)
    assert torch.equal(one, ls.attention(*tensors, dropout_seed=1, **given))
    for other in (0, 2, -1, 2**31, 2**62, -(2**63), 2**63 - 1):
        assert not torch.equal(one, ls.attention(*tensors, dropout_seed=other, **given))


@pytest.mark.parametrize("bad", [1.5, True, "7", torch.tensor(3), (1,)], ids=repr)
def test_a_seed_that_is_no_integer_is_refused_by_name(bad):
    with pytest.raises(ls.ArgumentError, match="dropout_seed"):
        ls.attention(*qkv(grad=False), dropout_p=0.5, dropout_seed=bad)


def test_seeds_of_any_size_mean_the_same_compiled_or_not():
    """Eagerly a seed is taken modulo 2**64; a graph must do the same or refuse by name."""
    tensors, seed = qkv(grad=False), 2**63 + 5
    want = ls.attention(*tensors, dropout_p=0.5, dropout_seed=seed)
    run = torch.compile(
        lambda q, k, v: ls.attention(q, k, v, dropout_p=0.5, dropout_seed=seed), fullgraph=True, backend="eager"
    )
    try:
        got = run(*tensors)
    except Exception as error:  # noqa: BLE001 - dynamo wraps what it meets
        assert "dropout_seed: got" in str(error)
        return
    assert torch.equal(got, want)


@each_backend
def test_manual_seed_repeats(backend):
    tensors = qkv(grad=False)

    def run():
        return ls.attention(*tensors, PATTERNS["all"], dropout_p=0.5, backend=backend)

    torch.manual_seed(1)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(run(), first) and torch.equal(run(), second)
    torch.manual_seed(2)
    assert not torch.equal(run(), first)


def test_without_dropout_no_random_number_is_drawn():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    ls.attention(*qkv(), dropout_p=0.0)
    ls.attention(*qkv(), dropout_p=0.5, dropout_seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@each_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_mask(backend, reentrant):
    dout = randn(2, 4, 29, 8, seed=7)

    def attend(q, k, v):
        return ls.attention(q.sin(), k, v, PATTERNS["all"], is_causal=True, dropout_p=0.5, backend=backend)

    def gradients(through):
        tensors = qkv()
        torch.manual_seed(13)
        out = through(*tensors)
        torch.manual_seed(14)  # what happens between forward and backward does not matter
        out.backward(dout)
        return [out.detach(), *(x.grad for x in tensors)]

    plain = gradients(attend)
    again = gradients(lambda *tensors: checkpoint(attend, *tensors, use_reentrant=reentrant))
    for one, other in zip(again, plain, strict=True):
        assert torch.equal(one, other)


# --- compiled -------------------------------------------------------------------------------------------------------


@each_backend
def test_compiled_with_a_seed_it_drops_the_same_pairs(backend):
    tensors, dout = qkv(), randn(2, 4, 29, 8, seed=7)

    def attend(q, k, v, seed):
        given = {"dropout_p": 0.5, "dropout_seed": seed, "backend": backend}
        return ls.attention(q, k, v, PATTERNS["all"], is_causal=True, **given)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for seed in (3, 4, -5, 2**62):
        got, want = compiled(*tensors, seed), attend(*tensors, seed)
        assert torch.equal(got, want)
        for one, other in zip(*(torch.autograd.grad(x, tensors, dout) for x in (got, want)), strict=True):
            assert torch.equal(one, other)


def test_compiled_without_a_seed_the_backward_draws_the_forwards_mask():
    """The gradient with respect to the identity shows the mask that the backward drew."""
    n = 29
    compiled = torch.compile(lambda q, k, v: ls.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    query, key = (torch.zeros(2, 4, n, n, dtype=torch.float64) for _ in range(2))
    value = torch.eye(n, dtype=torch.float64).expand(2, 4, n, n).contiguous().requires_grad_()
    torch.manual_seed(0)
    first, second = compiled(query, key, value), compiled(query, key, value)
    assert not torch.equal(first, second)
    for out in (first, second):
        (gradient,) = torch.autograd.grad(out, value, torch.eye(n, dtype=torch.float64).expand(2, 4, n, n))
        assert torch.equal(gradient != 0, out.mT != 0)  # dV = P^T dO
        assert_close(gradient, out.detach().mT, "dvalue")
    torch.manual_seed(0)
    assert torch.equal(compiled(query, key, value), first)


def test_checkpointing_inside_a_compiled_function_repeats_the_mask():
    tensors, dout = qkv(), randn(2, 4, 29, 8, seed=7)

    def attend(q, k, v):
        return ls.attention(q.sin(), k, v, is_causal=True, dropout_p=0.5)

    compiled = torch.compile(
        lambda *tensors: checkpoint(attend, *tensors, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    results = []
    for run in (compiled, attend):
        torch.manual_seed(3)
        out = run(*tensors)
        results.append((out, *torch.autograd.grad(out, tensors, dout)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# --- statistics -----------------------------------------------------------------------------------------------------

SIZE = 192
STATISTICS_SEEDS = (0, 1, 2**40 + 7)


def sigmas(hits, trials, p):
    """How many standard deviations a count of successes is away from its mean."""
    return (hits - trials * p) / math.sqrt(trials * p * (1 - p))


def chi_square_sigmas(hits, trials, p):
    """The same for the chi-square over many counts."""
    statistic = ((hits.double() - trials * p) ** 2 / (trials * p * (1 - p))).sum().item()
    return (statistic - hits.numel()) / math.sqrt(2 * hits.numel())


@pytest.fixture(scope="module")
def masks():
    """Dropped pairs (batch 2, heads 4, SIZE, SIZE) by (seed, p)."""
    settings = product(STATISTICS_SEEDS, (0.1, 0.5, 0.9))
    return {(seed, p): ~kept(seed, p, n=SIZE, dtype=torch.float32) for seed, p in settings}


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", STATISTICS_SEEDS)
def test_the_drop_rate_is_p_everywhere(masks, seed, p):
    dropped = masks[seed, p]
    assert abs(sigmas(dropped.sum().item(), dropped.numel(), p)) < LIMIT, "in all"
    by = {
        "row": dropped.sum(-1),
        "column": dropped.sum(-2),
        "key over heads and queries": dropped.sum((0, 1, 2)),
        "query over heads and keys": dropped.sum((0, 1, 3)),
        "head": dropped.sum((-2, -1)),
        "diagonal": torch.stack([dropped.diagonal(i, -2, -1)[..., : SIZE // 2].sum() for i in range(SIZE // 2)]),
    }
    for name, hits in by.items():
        trials = dropped.numel() // hits.numel() if name != "diagonal" else 8 * SIZE // 2
        assert abs(chi_square_sigmas(hits, trials, p)) < LIMIT, f"by {name}"


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 16, 32, 64, 128])
def test_neighbours_are_independent(masks, p, lag):
    """Rows, columns and heads at any distance agree as often as independent ones would."""
    agree = p * p + (1 - p) * (1 - p)
    for seed in STATISTICS_SEEDS:
        x = masks[seed, p]
        pairs = {"rows": (x[:, :, lag:], x[:, :, :-lag]), "columns": (x[..., lag:], x[..., :-lag])}
        if lag < 8:
            lines = x.flatten(0, 1)  # batch entries and heads
            pairs["heads"] = (lines[lag:], lines[:-lag])
        pairs["rows and columns"] = (x[:, :, lag:, lag:], x[:, :, :-lag, :-lag])
        for name, (a, b) in pairs.items():
            same = (a == b).sum().item()
            assert abs(sigmas(same, a.numel(), agree)) < LIMIT, f"{name} of seed {seed}"


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_no_two_rows_or_columns_agree_too_much(masks, p):
    """Every pair of the 8 * SIZE rows, and of the columns, not only neighbours."""
    agree = p * p + (1 - p) * (1 - p)
    for seed in STATISTICS_SEEDS:
        for lines in (masks[seed, p].flatten(0, 2), masks[seed, p].mT.flatten(0, 2)):
            signs = lines.float() * 2 - 1
            same = (signs @ signs.T + SIZE) / 2
            upper = same[torch.triu(torch.ones_like(same, dtype=torch.bool), 1)]
            worst = (upper - SIZE * agree).abs().max() / math.sqrt(SIZE * agree * (1 - agree))
            assert worst < 8, "two lines nearly the same"


@pytest.mark.parametrize("seed", [0, 1, -1, 2, 7, 2**32, 2**62, -(2**63)])
def test_no_two_heads_queries_or_keys_share_their_mask(seed):
    """Zero too: a mixer that maps 0 to 0 makes (head 1, query 2) the twin of (head 2, query 1)."""
    dropped = ~kept(seed, 0.5, n=SIZE, dtype=torch.float32)
    for lines in (dropped.flatten(0, 2), dropped.mT.flatten(0, 2)):
        assert len(lines.unique(dim=0)) == len(lines)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_query_and_key_are_not_interchangeable(masks, p):
    upper = torch.ones(SIZE, SIZE, dtype=torch.bool).triu_(1)
    for seed in STATISTICS_SEEDS:
        x = masks[seed, p]
        same = (x == x.mT)[:, :, upper]
        assert abs(sigmas(same.sum().item(), same.numel(), p * p + (1 - p) * (1 - p))) < LIMIT


def test_the_corners_of_rectangles_are_independent(masks):
    """A hash that only mixes a row's number with a column's would give every rectangle an even number of drops."""
    for seed in STATISTICS_SEEDS:
        x = masks[seed, 0.5]
        for a, b in ((1, 1), (2, 5), (16, 16), (64, 3)):
            odd = x[:, :, a:, b:] ^ x[:, :, :-a, b:] ^ x[:, :, a:, :-b] ^ x[:, :, :-a, :-b]
            assert abs(sigmas(odd.sum().item(), odd.numel(), 0.5)) < LIMIT


@pytest.mark.parametrize("step", [1, 2, 4, 2**8, 2**16, 2**31, 2**32, 2**33, 2**48, -1, -7])
def test_neighbouring_seeds_are_independent(step):
    p, n = 0.5, 64
    for seed in (0, 123456789, -(2**62)):
        a, b = (kept(x, p, n=n, dtype=torch.float32) for x in (seed, seed + step))
        assert abs(sigmas((a == b).sum().item(), a.numel(), 0.5)) < LIMIT
        assert abs(sigmas((a == b.mT).sum().item(), a.numel(), 0.5)) < LIMIT
        for shift in (1, 2):
            same = (a[:, :, shift:] == b[:, :, :-shift]).sum().item()
            assert abs(sigmas(same, a[:, :, shift:].numel(), 0.5)) < LIMIT


def test_a_seed_is_not_the_position_in_disguise():
    """The first pair over many seeds is dropped as often as it should be."""
    p, seeds = 0.3, 600
    hits = torch.stack([~kept(seed, p, batch=1, heads=2, n=4) for seed in range(seeds)]).sum(0)
    assert abs(chi_square_sigmas(hits, seeds, p)) < LIMIT


@pytest.mark.parametrize("p", [1e-9, 0.01, 0.25, 0.999, 1 - 1e-12])
def test_rates_near_the_ends(p):
    dropped = ~kept(5, p, n=128, dtype=torch.float64)
    expected = dropped.numel() * p
    deviation = max(1.0, math.sqrt(expected * (1 - p)))
    assert abs(dropped.sum().item() - expected) < LIMIT * deviation
    q, k, v = qkv(grad=False)
    assert ls.attention(q, k, v, dropout_p=p, dropout_seed=1).isfinite().all()


def test_a_rate_of_zero_drops_nothing_and_an_int_will_do():
    tensors = qkv(grad=False)
    assert torch.equal(ls.attention(*tensors, dropout_p=0, dropout_seed=3), ls.attention(*tensors))


@each_backend
def test_the_mean_over_seeds_is_attention_without_dropout(backend):
    q, k, v = qkv(batch=1, heads=2, n=12, grad=False)
    runs = torch.stack(
        [ls.attention(q, k, v, dropout_p=0.3, dropout_seed=seed, backend=backend) for seed in range(800)]
    )
    error = (runs.mean(0) - ls.attention(q, k, v, backend=backend)).abs()
    assert (error < LIMIT * runs.std(0) / math.sqrt(len(runs))).all()
