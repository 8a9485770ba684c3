"""Blocks chosen from content: the choice, its answer and gradients, what a scorer learns, what is kept, bad input."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import longspan as ls
from longspan.patterns.topk.pattern import stand_in
from small import assert_same, qkv, randn

MODERATE = settings(deadline=None, max_examples=40)
BACKENDS = ("sdpa", "reference", "block_sparse_batched", "torch_sparse")
CAUSAL = pytest.mark.parametrize("is_causal", [False, True])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def masked(q, k, v, mask, bias=0.0, scale=None):
    """Plain attention in float64 over the pairs of a mask: `(out, lse)`. A row without keys gives 0 and -inf."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT) * (q.shape[3] ** -0.5 if scale is None else scale) + bias
    scores = scores.masked_fill(~mask, -torch.inf)
    some = mask.any(-1, keepdim=True)
    weights = scores.masked_fill(~some, 0.0).softmax(-1).masked_fill(~some, 0.0)
    return weights @ v, scores.logsumexp(-1)


def by_hand(q, k, size, count, is_causal, offset=0, scale=None):
    """The default choice, block by block: `{(entry, head, absolute row): columns}`."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    last, columns = offset + q.shape[2], -(-k.shape[2] // size)
    found = {}
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kv = h // (q.shape[1] // k.shape[1])
            for row in range(offset // size, (last - 1) // size + 1):
                mine = q[b, h, max(row * size, offset) - offset : min((row + 1) * size, last) - offset]
                one = mine[0] if is_causal else mine.mean(0)
                score = {c: float(one @ k[b, kv, c * size : (c + 1) * size].mean(0)) * scale for c in range(columns)}
                if is_causal:
                    score = {c: s if c < row else torch.inf for c, s in score.items() if c <= row}
                found[b, h, row] = sorted(sorted(score, key=lambda c: -score[c])[:count])
    return found


def check(tensors, pattern, backend=None, rtol=1e-12, **given):
    """Attention, its lse and both gradients against plain attention over the pairs that the choice reports."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    wanted = [x.detach().clone().requires_grad_() for x in tensors]
    scale = given.get("scale")
    mask = pattern.choose(*tensors[:2], **given).to_dense()
    want, want_lse = masked(*wanted, mask, scale=scale)
    out, lse = ls.attention(*leaves, pattern, backend=backend, return_lse=True, **given)
    torch.testing.assert_close(out, want, rtol=rtol, atol=rtol, check_dtype=False)
    torch.testing.assert_close(lse, want_lse, rtol=rtol, atol=rtol, check_dtype=False)
    dout = randn(*out.shape, seed=7, dtype=out.dtype)
    dlse = randn(*lse.shape, seed=8, dtype=lse.dtype).masked_fill(want_lse == -torch.inf, 0.0)
    right = torch.autograd.grad((want, want_lse), wanted, (dout.double(), dlse.double()))
    for one, other in zip(torch.autograd.grad((out, lse), leaves, (dout, dlse)), right, strict=True):
        torch.testing.assert_close(one, other, rtol=10 * rtol, atol=10 * rtol)
    return mask


# --- the choice -------------------------------------------------------------------------------------------------------


@MODERATE
@given(
    size=st.integers(1, 9), n=st.integers(1, 30), extra=st.integers(0, 20), offset=st.integers(0, 15),
    count=st.integers(1, 4), is_causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_choice_is_the_one_made_by_hand(size, n, extra, offset, count, is_causal, seed):
    q, k = randn(2, 4, n, 5, seed=seed), randn(2, 2, n + extra, 5, seed=seed + 1)
    count = min(count, -(-k.shape[2] // size))
    pattern = ls.TopKBlocks(count, size)
    choice = pattern.choose(q, k, is_causal=is_causal, query_offset=offset, enable_gqa=True)
    dense = choice.to_dense()
    want = torch.zeros_like(dense)
    for (b, h, row), columns in by_hand(q, k, size, count, is_causal, offset).items():
        csr = choice.csr(b, h)
        at = csr.indptr[row - csr.first_row : row - csr.first_row + 2].tolist()
        assert csr.indices[at[0] : at[1]].tolist() == columns
        for column in columns:
            rows = slice(max(0, row * size - offset), max(0, (row + 1) * size - offset))
            want[b, h, rows, column * size : (column + 1) * size] = True
    if is_causal:
        want &= torch.arange(k.shape[2]) <= torch.arange(n)[:, None] + offset
    assert torch.equal(dense, want)
    for b in range(2):
        for h in range(4):
            assert torch.equal(choice.csr(b, h).to_dense(), want[b, h])


@CAUSAL
def test_of_equal_scores_the_first_blocks_are_kept(is_causal):
    q, k, _ = qkv(n=24)
    choice = ls.TopKBlocks(3, 4, lambda q, k, s: q.new_zeros(2, 4, 6, 6)).choose(q, k, is_causal=is_causal)
    own = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5]] if is_causal else [[0, 1, 2]] * 6
    assert [part.tolist() for part in choice.csr(1, 2).indices.split([len(one) for one in own])] == own


def test_a_scorer_gets_what_attention_got_and_how_the_blocks_lie():
    seen = []

    def scorer(query, key, scoring):
        seen.append((tuple(query.shape), tuple(key.shape), scoring, torch.is_grad_enabled()))
        return torch.zeros(2, 4, scoring.rows, scoring.columns)

    q, k, v = qkv(n=11, kv_heads=2, kv_len=21, grad=True)
    ls.attention(q, k, v, ls.TopKBlocks(1, 4, scorer), enable_gqa=True, query_offset=6, scale=0.3, is_causal=True)
    assert seen == [((2, 4, 11, 4), (2, 2, 21, 4), ls.BlockScoring(4, 11, 21, 6, True, 0.3), False)]
    assert (seen[0][2].rows, seen[0][2].columns) == (4, 6)
    assert seen[0][2].candidates().sum(1).tolist() == [2, 3, 4, 5]


# --- the answer -------------------------------------------------------------------------------------------------------


@CAUSAL
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [32, 45])
def test_the_answer_is_that_of_the_pairs_reported(n, backend, is_causal):
    mask = check(qkv(n=n, dim=8), ls.TopKBlocks(2, 8), backend, is_causal=is_causal)
    assert 0.1 < mask.double().mean() < 0.6


@CAUSAL
@pytest.mark.parametrize("backend", [None, "cpu_fused"])
@pytest.mark.parametrize("size", [16, 128, 200])
def test_the_native_path_gives_the_same(size, backend, is_causal):
    tensors = qkv(n=500, dim=16, kv_heads=2, dtype=torch.float32)
    check(tensors, ls.TopKBlocks(2, size), backend, rtol=2e-5, is_causal=is_causal, enable_gqa=True)


@CAUSAL
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_blocks_are_dense_attention(backend, is_causal):
    tensors = qkv(n=45, dim=8, grad=True)
    plain = ls.attention(*tensors, is_causal=is_causal, backend=backend, return_lse=True)
    found = ls.attention(*tensors, ls.TopKBlocks(6, 8), is_causal=is_causal, backend=backend, return_lse=True)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    dout = randn(2, 4, 45, 8, seed=5)
    for one, other in zip(*(torch.autograd.grad(x[0], tensors, dout) for x in (found, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "given",
    [
        {"scale": 0.7},
        {"query_offset": 13, "is_causal": True},
        {"query_offset": 60, "is_causal": True},
        {"query_offset": 3},
        {"enable_gqa": True, "is_causal": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_every_argument_is_honoured(backend, given):
    lengths = {"n": 21, "kv_len": 37} if "query_offset" in given else {"n": 37}
    check(qkv(dim=8, kv_heads=2 if "enable_gqa" in given else 4, **lengths), ls.TopKBlocks(2, 8), backend, **given)


@CAUSAL
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_documents_choose_and_attend_apart(backend, is_causal):
    bounds = (0, 19, 19, 22, 40)
    tensors = qkv(n=45, dim=8)
    pattern = ls.TopKBlocks(2, 8)
    check(tensors, pattern, backend, is_causal=is_causal, cu_seqlens=bounds)
    together = ls.attention(*tensors, pattern, is_causal=is_causal, cu_seqlens=bounds, backend=backend)
    alone = [
        ls.attention(*(x[:, :, a:b] for x in tensors), pattern if b - a > 8 else ls.TopKBlocks(1, 8),
                     is_causal=is_causal, backend=backend)
        for a, b in ((0, 19), (19, 22), (22, 40))
    ]  # fmt: skip
    torch.testing.assert_close(together[:, :, :40], torch.cat(alone, 2), rtol=1e-12, atol=1e-12)
    assert not together[:, :, 40:].any()


def test_transposed_views_and_empty_tensors():
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(n=37, dim=8)]
    check(tensors, ls.TopKBlocks(2, 8), "sdpa", is_causal=True)
    for shape in ((0, 4, 5, 8), (2, 0, 5, 8), (2, 4, 0, 8)):
        empty = torch.zeros(shape, requires_grad=True)
        assert ls.attention(empty, empty, empty, ls.TopKBlocks(2, 8)).shape == shape
    out, lse = ls.attention(randn(2, 4, 5, 8), *[randn(2, 4, 0, 8)] * 2, ls.TopKBlocks(2), query_offset=0,
                            return_lse=True)  # fmt: skip
    assert not out.any() and bool((lse == -torch.inf).all())


@pytest.mark.parametrize(("length", "bounds"), [(5, (0,)), (5, (0, 0)), (0, None)])
def test_where_nothing_can_be_chosen_gradients_are_zero(length, bounds):
    query = randn(1, 4, length, 8).requires_grad_()
    key, value = (randn(1, 2, length, 8).requires_grad_() for _ in range(2))
    out, lse = ls.attention(
        query, key, value, ls.TopKBlocks(2), cu_seqlens=bounds, enable_gqa=True, return_lse=True, backend="sdpa"
    )
    assert not out.any() and bool((lse == -torch.inf).all())
    for one in torch.autograd.grad(out.sum(), (query, key, value)):
        assert not one.any()


@CAUSAL
def test_dropout_drops_the_pairs_that_dense_attention_would(is_causal):
    tensors = qkv(n=32, dim=8, grad=True)
    given = {"is_causal": is_causal, "dropout_p": 0.4, "dropout_seed": 3}
    dout = randn(2, 4, 32, 8, seed=5)
    found = ls.attention(*tensors, ls.TopKBlocks(4, 8), **given, backend="sdpa")
    plain = ls.attention(*tensors, **given, backend="sdpa")
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(x, tensors, dout) for x in (found, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    fewer = ls.TopKBlocks(2, 8)
    same = [ls.attention(*tensors, fewer, **given, backend=name) for name in ("sdpa", "reference")]
    torch.testing.assert_close(*same, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(same[0], ls.attention(*tensors, fewer, is_causal=is_causal))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision(dtype):
    q, k, v = qkv(n=64, dim=16, dtype=dtype)
    pattern = ls.TopKBlocks(2, 16)
    out = ls.attention(q, k, v, pattern, is_causal=True)
    want, _ = masked(q, k, v, pattern.choose(q, k, is_causal=True).to_dense())
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), want, rtol=0.0, atol=4 * torch.finfo(dtype).eps)


# --- causality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BACKENDS, "cpu_fused"])
@pytest.mark.parametrize("mode", ["none", "soft"])
def test_no_row_feels_a_later_token(mode, backend):
    """Whatever becomes of the queries, keys and values from a token on, inside a block or at its edge: bit for bit."""
    dtype = torch.float32 if backend == "cpu_fused" else torch.float64
    tensors = qkv(n=45, dim=8, dtype=dtype)
    pattern = ls.TopKBlocks(3, 8, scorer_gradient=mode)

    def run(tensors):
        return ls.attention(*tensors, pattern, is_causal=True, backend=backend, return_lse=True)

    before = run(tensors)
    changed = 0
    for token in (1, 7, 8, 21, 24, 39, 44):
        other = [x.clone() for x in tensors]
        for seed, x in enumerate(other):
            x[:, :, token:] = 9 * randn(*x[:, :, token:].shape, seed=40 + seed, dtype=dtype)
        after = run(other)
        assert_same([x[:, :, :token] for x in after], [x[:, :, :token] for x in before])
        changed += not torch.equal(*(pattern.choose(x[0], x[1], is_causal=True).to_dense() for x in (tensors, other)))
    assert changed  # the edits were such that a leak would have shown


def test_no_gradient_comes_from_an_earlier_row():
    tensors = qkv(n=45, dim=8, grad=True)
    for mode in ("none", "soft", "straight_through"):
        out = ls.attention(*tensors, ls.TopKBlocks(3, 8, scorer_gradient=mode), is_causal=True, backend="sdpa")
        for grad in torch.autograd.grad(out[:, :, :21].sum(), tensors):
            assert not grad[:, :, 21:].any() and grad[:, :, :16].any()


# --- scorers that learn -----------------------------------------------------------------------------------------------


class Learned(torch.nn.Module):
    """A bilinear form of what stands for the blocks."""

    def __init__(self, dim, seed=11):
        super().__init__()
        self.weight = torch.nn.Parameter(randn(dim, dim, seed=seed))

    def forward(self, query, key, scoring):
        keys = scoring.pool(key).repeat_interleave(query.shape[1] // key.shape[1], 1)
        return scoring.represent(query) @ self.weight @ keys.mT


def log_shares(scores, choice, is_causal):
    """The log of `count * softmax(scores)` over kept blocks, but for a causal row's own; 0 elsewhere: by definition."""
    kept = choice.parts[0].chosen & ~(torch.eye(scores.shape[2], dtype=torch.bool) & is_causal)
    found = torch.zeros_like(scores)
    for at in kept.any(-1).nonzero().tolist():
        mine = kept[tuple(at)]
        found[tuple(at)] = found[tuple(at)].index_put((mine,), (mine.sum() * scores[tuple(at)][mine].softmax(0)).log())
    return found


def by_token(bias, size, n):
    """The same for pairs of tokens."""
    return bias.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :n, :n]


@CAUSAL
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_soft_is_attention_with_the_scores_as_a_bias(kv_heads, backend, is_causal):
    tensors = qkv(n=40, dim=8, kv_heads=kv_heads, grad=True)
    scorer = Learned(8)
    pattern = ls.TopKBlocks(3, 8, scorer, "soft")
    choice = pattern.choose(*tensors[:2], is_causal=is_causal, enable_gqa=True)
    scoring = ls.BlockScoring(8, 40, 40, 0, is_causal, 8**-0.5)
    bias = by_token(log_shares(scorer(*tensors[:2], scoring), choice, is_causal), 8, 40)
    want = masked(*tensors, choice.to_dense(), bias)
    found = ls.attention(*tensors, pattern, is_causal=is_causal, enable_gqa=True, backend=backend, return_lse=True)
    grads = randn(2, 4, 40, 8, seed=5), randn(2, 4, 40, seed=6)
    leaves = [*tensors, scorer.weight]
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for count in (1, 2):
        got, right = (torch.autograd.grad(x[:count], leaves, grads[:count], retain_graph=True) for x in (found, want))
        for one, other in zip(got, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        assert got[3].abs().max() > 1e-3
    with torch.no_grad():
        assert_same([ls.attention(*tensors, pattern, is_causal=is_causal, enable_gqa=True, backend=backend)],
                    [found[0].detach()])  # fmt: skip


@CAUSAL
def test_soft_passes_gradcheck(is_causal):
    q, k, v = qkv(batch=1, heads=2, n=11, dim=3, grad=True)
    weight = randn(3, 3, seed=11).requires_grad_()

    def attend(q, k, v, weight):
        def scorer(query, key, scoring):
            return scoring.represent(query) @ weight @ scoring.pool(key).mT

        pattern = ls.TopKBlocks(3 if is_causal else 2, 4, scorer, "soft")
        return ls.attention(q, k, v, pattern, is_causal=is_causal, backend="sdpa", return_lse=True)

    assert torch.autograd.gradcheck(attend, (q, k, v, weight))


@CAUSAL
def test_a_kept_block_passes_gradcheck(is_causal):
    tensors = qkv(batch=1, heads=2, n=11, dim=3, grad=True)
    pattern = ls.TopKBlocks(2, 4)
    assert torch.autograd.gradcheck(
        lambda *x: ls.attention(*x, pattern, is_causal=is_causal, backend="sdpa", return_lse=True), tensors
    )


@CAUSAL
def test_straight_through_is_hard_with_the_gradient_of_a_bias_at_zero(is_causal):
    tensors = qkv(n=37, dim=8, grad=True)
    scorer = Learned(8)
    hard = ls.attention(*tensors, ls.TopKBlocks(3, 8, scorer), is_causal=is_causal, return_lse=True, backend="sdpa")
    pattern = ls.TopKBlocks(3, 8, scorer, "straight_through")
    found = ls.attention(*tensors, pattern, is_causal=is_causal, return_lse=True, backend="sdpa")
    assert_same(found, hard)

    with torch.no_grad():
        choice = pattern.choose(*tensors[:2], is_causal=is_causal)
    scores = scorer(*(x.detach() for x in tensors[:2]), choice.parts[0].scoring)
    shares = log_shares(scores, choice, is_causal)
    bias = by_token(shares - shares.detach(), 8, 37)  # zero, with the gradient of the log shares
    want = masked(*(x.detach() for x in tensors), choice.to_dense(), bias)
    grads = randn(2, 4, 37, 8, seed=5), randn(2, 4, 37, seed=6)
    for count in (1, 2):
        (got,) = torch.autograd.grad(found[:count], [scorer.weight], grads[:count], retain_graph=True)
        (right,) = torch.autograd.grad(want[:count], [scorer.weight], grads[:count], retain_graph=True)
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)
        assert got.abs().max() > 1e-3


def test_query_key_and_value_have_the_hard_gradient_too_where_the_scorer_detaches():
    tensors = qkv(n=37, dim=8, grad=True)
    learned = Learned(8)

    def scorer(query, key, scoring):
        return learned(query.detach(), key.detach(), scoring)

    dout = randn(2, 4, 37, 8, seed=5)
    grads = [
        torch.autograd.grad(ls.attention(*tensors, ls.TopKBlocks(3, 8, scorer, mode), backend="sdpa"), tensors, dout)
        for mode in ("none", "straight_through")
    ]
    assert_same(*grads)


@pytest.mark.parametrize("mode", ["none", "straight_through", "soft"])
def test_who_gets_a_gradient(mode):
    """Under none the scorer gets none at all; under the others it does even where nothing else wants one."""
    scorer = Learned(8)
    out = ls.attention(*qkv(n=32, dim=8), ls.TopKBlocks(2, 8, scorer, mode), dropout_p=0.2)
    assert out.requires_grad == (mode != "none")
    if mode != "none":
        out.square().sum().backward()
        assert scorer.weight.grad.abs().max() > 1e-3
    tensors = qkv(n=32, dim=8, grad=True)
    out = ls.attention(*tensors, ls.TopKBlocks(2, 8, Learned(8), mode), cu_seqlens=(0, 20, 30))
    assert all(grad.any() for grad in torch.autograd.grad(out.square().sum(), tensors))


@pytest.mark.parametrize("mode", ["straight_through", "soft"])
def test_a_scorer_learns_which_blocks_are_worth_keeping(mode):
    """Token scores are alike everywhere, so attention itself cannot tell; marked blocks hold what the loss asks for."""
    marked = randn(6, 1, 8, 1, seed=3) > 0.4
    key = 0.1 * randn(6, 1, 64, 8)
    key[..., 0] += marked.double().repeat_interleave(8, 2)[..., 0]
    value = marked.double().repeat_interleave(8, 2).expand(6, 1, 64, 8)
    query = 0.01 * randn(6, 1, 64, 8, seed=1)
    query[..., 1] += 0.05
    scorer = Learned(8)
    scorer.weight.data[:, 0] = 0.0  # blind to the mark: what is kept is chance, and now and then marked
    pattern = ls.TopKBlocks(2, 8, scorer, mode)

    def hits():
        chosen = pattern.choose(query, key).parts[0].chosen
        return float((chosen * marked.mT).sum() / chosen.sum())

    before = hits()
    optimizer = torch.optim.Adam([scorer.weight], 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (-ls.attention(query, key, value, pattern).mean()).backward()
        optimizer.step()
    assert before < 0.4 and hits() > 0.7


def test_a_second_derivative_is_refused():
    q, k, v = qkv(n=16, dim=4, grad=True)
    for mode in ("none", "soft"):
        out = ls.attention(q, k, v, ls.TopKBlocks(2, 4, scorer_gradient=mode))
        with pytest.raises((ls.LongspanError, RuntimeError)):
            (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
            first.sum().backward()


# --- what is kept -----------------------------------------------------------------------------------------------------


@CAUSAL
@pytest.mark.parametrize("bounds", [None, (0, 19, 22, 40)])
def test_the_exact_mass_is_that_of_a_dense_softmax(bounds, is_causal):
    q, k, _ = qkv(n=40, dim=8, kv_heads=2)
    pattern = ls.TopKBlocks(2, 8)
    given = {"is_causal": is_causal, "cu_seqlens": bounds, "enable_gqa": True, "scale": 0.9}
    mask = pattern.choose(q, k, **given).to_dense()
    whole = torch.zeros(40, 40, dtype=torch.bool)
    for a, b in zip((bounds or (0, 40))[:-1], (bounds or (0, 40))[1:], strict=True):
        whole[a:b, a:b] = True
    whole &= torch.ones(40, 40, dtype=torch.bool).tril() | (not is_causal)
    scores = 0.9 * q @ k.repeat_interleave(2, 1).mT
    weights = scores.masked_fill(~whole, -torch.inf).softmax(-1)
    want = (weights * mask).sum(-1).mean(-1)
    found = pattern.mass(q, k, exact=True, **given)
    assert found.shape == (2, 4) and found.min() > 0.2 and found.max() < 1.0
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_the_exact_mass_holds_a_bounded_number_of_scores(monkeypatch):
    q, k, _ = qkv(n=64, dim=8)
    pattern = ls.TopKBlocks(2, 8)
    want = pattern.mass(q, k, exact=True, is_causal=True)
    monkeypatch.setattr("longspan.patterns.topk.choice.BUDGET", 7 * 64 * 8)
    torch.testing.assert_close(pattern.mass(q, k, exact=True, is_causal=True), want, rtol=1e-13, atol=1e-13)


@CAUSAL
def test_the_estimate_is_exact_where_scores_are_the_means_of_the_exponentials(is_causal):
    """With all queries of a block alike and all keys of a block alike, the default scorer's scores are such."""
    q, k = (randn(2, 3, 5, 6, seed=seed).repeat_interleave(8, 2) for seed in (0, 1))
    pattern = ls.TopKBlocks(2, 8)
    exact = pattern.mass(q, k, exact=True, is_causal=is_causal)
    if is_causal:  # rows of a block see the diagonal block in part, each its own, of which the estimate takes the mean
        torch.testing.assert_close(pattern.mass(q, k, is_causal=True), exact, rtol=0.05, atol=0.0)
    else:
        torch.testing.assert_close(pattern.mass(q, k), exact, rtol=1e-12, atol=1e-12)
    everything = ls.TopKBlocks(5, 8)
    for exact in (False, True):
        kept = everything.mass(q, k, exact=exact, is_causal=is_causal)
        torch.testing.assert_close(kept, torch.ones_like(kept), rtol=1e-12, atol=1e-12)


@CAUSAL
def test_the_estimate_weighs_blocks_by_the_pairs_that_are_seen(is_causal):
    """Equal scores: the share of pairs, with ragged ends and an offset."""
    pattern = ls.TopKBlocks(1, 8, lambda q, k, s: q.new_zeros(*q.shape[:2], s.rows, s.columns))
    q, k = randn(1, 2, 13, 4), randn(1, 2, 21, 4)
    choice = pattern.choose(q, k, is_causal=is_causal, query_offset=5)
    seen = torch.arange(21) <= torch.arange(13)[:, None] + 5 if is_causal else torch.ones(13, 21, dtype=torch.bool)
    row = (torch.arange(13) + 5) // 8
    want = 0.0
    for number in row.unique():
        mine = row == number
        want += choice.to_dense()[0, 0, mine].sum().double() / seen[mine].sum() * mine.sum() / 13
    torch.testing.assert_close(choice.mass(), want.expand(1, 2), rtol=1e-12, atol=1e-12)


# --- as a value, and by whom ------------------------------------------------------------------------------------------


def test_a_pattern_is_a_value():
    pattern = ls.TopKBlocks(4, 64)
    assert pattern == ls.TopKBlocks(4, 64) == pickle.loads(pickle.dumps(pattern))
    assert hash(pattern) == hash(ls.TopKBlocks(4, 64)) and pattern != ls.TopKBlocks(4, 32)
    assert ls.parse_pattern("topk_blocks:4:64") == pattern == ls.parse_pattern(pattern.spec)
    assert ls.parse_pattern("topk_blocks:4") == ls.TopKBlocks(4)
    scorer = Learned(4)
    assert ls.TopKBlocks(4, 64, scorer) == ls.TopKBlocks(4, 64, scorer) != ls.TopKBlocks(4, 64, Learned(4))
    assert repr(ls.TopKBlocks(4, 64, scorer, "soft")) == (
        "TopKBlocks(k=4, block_size=64, scorer=Learned, scorer_gradient='soft')"
    )
    assert ls.TopKBlocks(4, 64, scorer, "soft").spec == "topk_blocks:4:64:scorer=Learned:soft"


@CAUSAL
def test_the_resolution_says_that_it_is_an_approximation(is_causal):
    problem = ls.Problem.like(*qkv(n=64, dim=8, dtype=torch.float32), ls.TopKBlocks(2, 8), is_causal=is_causal)
    found = ls.explain(problem)
    assert found.problem == problem and "approximates dense attention" in found.notes[0]
    assert found.chosen in ("cpu_fused", "sdpa") and found["sdpa"].ok
    assert not any("approximates" in note for note in ls.explain(problem.replace(pattern=ls.Dense())).notes)
    refused = ls.explain(problem.replace(dtype="float64"), backend="cpu_fused")
    assert refused.chosen is None and refused["cpu_fused"].reasons[0].field == "dtype"


@MODERATE
@given(
    size=st.integers(1, 9), n=st.integers(1, 30), extra=st.integers(0, 20), offset=st.integers(0, 40),
    count=st.integers(1, 4), is_causal=st.booleans(),
)  # fmt: skip
def test_what_is_resolved_has_as_many_blocks_as_will_be_chosen(size, n, extra, offset, count, is_causal):
    q, k = randn(1, 1, n, 5), randn(1, 1, n + extra, 5, seed=1)
    pattern = ls.TopKBlocks(min(count, -(-k.shape[2] // size)), size)
    problem = ls.Problem.like(q, k, k, pattern, is_causal=is_causal, query_offset=offset)
    (weighed,) = stand_in(problem).pattern.csr(n, n + extra, query_offset=offset).layouts
    chosen = pattern.choose(q, k, is_causal=is_causal, query_offset=offset).csr(0, 0)
    assert torch.equal(weighed.indptr, chosen.indptr)


def test_a_plan_chooses_at_every_call():
    tensors = qkv(n=64, dim=8)
    other = [x.flip(2) for x in tensors]
    plan = ls.plan(ls.Problem.like(*tensors, ls.TopKBlocks(2, 8)), backend="sdpa")
    for mine in (tensors, other, tensors):
        want, _ = masked(*mine, ls.TopKBlocks(2, 8).choose(*mine[:2]).to_dense())
        torch.testing.assert_close(plan(*mine)[0], want, rtol=1e-12, atol=1e-12)
    assert "2 of 8 key blocks" in repr(plan) and plan.verify().ok
    again = pickle.loads(pickle.dumps(plan))
    assert_same(again(*tensors), plan(*tensors))


def test_a_plan_has_a_backward_of_its_own():
    tensors = qkv(n=45, dim=8, grad=True)
    plan = ls.plan(ls.Problem.like(*tensors, ls.TopKBlocks(2, 8), cu_seqlens=(0, 20, 45)), backend="sdpa")
    out, lse = plan(*tensors)
    dout = randn(2, 4, 45, 8, seed=5)
    want = torch.autograd.grad(out, tensors, dout)
    plain = [x.detach() for x in tensors]
    assert_same(plan.backward(dout, *plain, out.detach(), lse.detach()), want)


@pytest.mark.parametrize("given", [{}, {"is_causal": True}, {"cu_seqlens": (0, 20, 30)}, {"query_offset": 3}], ids=str)
def test_the_default_scorer_in_a_graph(given):
    torch._dynamo.reset()
    tensors = qkv(n=37, dim=8, grad=True)

    def attend(q, k, v):
        return ls.attention(q, k, v, ls.TopKBlocks(2, 8), **given)

    eager, traced = attend(*tensors), torch.compile(attend, backend="aot_eager", fullgraph=True)(*tensors)
    assert_same([traced], [eager])
    dout = randn(2, 4, 37, 8, seed=5)
    assert_same(*(torch.autograd.grad(x, tensors, dout) for x in (traced, eager)))


def test_vmap_maps_the_batch():
    tensors = qkv(n=37, dim=8, more=(3,))
    pattern = ls.TopKBlocks(2, 8)
    mapped = torch.vmap(lambda q, k, v: ls.attention(q, k, v, pattern))(*tensors)
    one_by_one = torch.stack([ls.attention(*(x[i] for x in tensors), pattern) for i in range(3)])
    torch.testing.assert_close(mapped, one_by_one, rtol=1e-12, atol=1e-12)


def test_a_choice_made_in_inference_mode_trains_later():
    tensors = qkv(n=37, dim=8)
    pattern = ls.TopKBlocks(2, 8)
    with torch.inference_mode():
        ls.attention(*tensors, pattern)
    check(tensors, pattern)


# --- bad input --------------------------------------------------------------------------------------------------------


def scores_of(shape=(2, 4, 4, 4), fill=0.0, **given):
    return lambda q, k, s: torch.full(shape, fill, **given)


def bad_at(value, row, column):
    def scorer(q, k, s):
        scores = torch.zeros(2, 4, 4, 4)
        scores[1, 2, row, column] = value
        return scores

    return scorer


BAD = {
    "NaN": (ls.TopKBlocks(2, 8, bad_at(torch.nan, 3, 0)), {}, r"got nan for batch entry 1, head 2, block \(3, 0\)"),
    "inf": (ls.TopKBlocks(2, 8, bad_at(-torch.inf, 1, 1)), {"is_causal": True}, r"scorer: got -inf .* block \(1, 1\)"),
    "a head missing": (ls.TopKBlocks(2, 8, scores_of((2, 3, 4, 4))), {}, r"scorer: got scores of shape \(2, 3, 4, 4\)"),
    "token scores": (ls.TopKBlocks(2, 8, lambda q, k, s: q @ k.mT), {}, r"floating tensor of shape \(2, 4, 4, 4\)"),
    "integers": (ls.TopKBlocks(2, 8, scores_of(dtype=torch.int64, fill=0)), {}, r"scorer: got scores .* torch.int64"),
    "another device": (ls.TopKBlocks(2, 8, scores_of(device="meta")), {}, r"scorer: got scores .* on meta"),
    "no tensor": (ls.TopKBlocks(2, 8, lambda q, k, s: None), {}, r"scorer: got a result of type NoneType"),
    "documents with dropout": (
        ls.TopKBlocks(1, 8), {"cu_seqlens": (0, 20, 32), "dropout_p": 0.5}, r"dropout_p: got 0.5; want 0.0 with cu_",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_use_is_refused_by_name(case):
    pattern, given, said = BAD[case]
    with pytest.raises(ls.ArgumentError, match=said):
        ls.attention(*qkv(n=32, dim=8), pattern, **given)


def test_nan_that_no_block_may_use_is_let_pass():
    tensors = qkv(n=32, dim=8)
    pattern = ls.TopKBlocks(2, 8, bad_at(torch.nan, 1, 2))
    assert ls.attention(*tensors, pattern, is_causal=True).isfinite().all()


def test_nan_in_a_key_is_blamed_on_the_key():
    q, k, v = qkv(n=32, dim=8)
    k[0, 0, 3] = torch.nan
    with pytest.raises(ls.ArgumentError, match="NaN and inf in query and key"):
        ls.attention(q, k, v, ls.TopKBlocks(2, 8))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: ls.TopKBlocks(0), "k: got 0"),
        (lambda: ls.TopKBlocks(True), "k: got True"),
        (lambda: ls.TopKBlocks(2.0), "k: got 2.0"),
        (lambda: ls.TopKBlocks(2, 0), "block_size: got 0"),
        (lambda: ls.TopKBlocks(2, 8, "mean"), "scorer: got 'mean'; want a callable"),
        (lambda: ls.TopKBlocks(2, 8, None, "hard"), "scorer_gradient: got 'hard'; want 'none' or 'straight_through'"),
        (lambda: ls.parse_pattern("topk_blocks:x"), "want topk_blocks:K"),
        (lambda: ls.parse_pattern("topk_blocks:4:64:scorer=Learned"), "want topk_blocks:K"),
        (lambda: ls.TopKBlocks(2, 8).choose(randn(2, 4, 9, 8), randn(2, 2, 9, 8)), "enable_gqa"),
        (lambda: ls.TopKBlocks(2, 8).choose(randn(2, 4, 9, 8), randn(2, 4, 19, 8)), "query_offset"),
    ],
)
def test_bad_patterns_are_refused_by_name(made, said):
    with pytest.raises(ls.ArgumentError, match=said):
        made()


@pytest.mark.parametrize("pattern", [ls.TopKBlocks(2, 8, scores_of()), ls.TopKBlocks(2, 8, None, "soft")], ids=repr)
def test_a_graph_refuses_what_it_cannot_hold(pattern):
    torch._dynamo.reset()
    with pytest.raises(ls.ArgumentError, match="default scorer and without its gradient"):
        torch.func.grad(lambda q: ls.attention(q, q, q, pattern).sum())(randn(2, 4, 32, 8))
    with pytest.raises(Exception, match="default scorer and without its gradient"):
        torch.compile(lambda q: ls.attention(q, q, q, pattern), backend="aot_eager")(randn(2, 4, 32, 8))
