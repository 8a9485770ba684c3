"""Metamorphic tests: change what a query may not see, and its output must not change by one bit.

No numbers are compared with an oracle here; the oracle's `visible` says only who may see whom.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import longspan as ls
from longspan.testing.oracle import visible

BACKENDS = ("sdpa", "reference")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
PATTERNS = [
    ls.Dense(),
    ls.Dilated((16,), (1,)),
    ls.Dilated((8, 20, 64), (1, 2, 5)),
    ls.Dilated((12, 50), (2, 3), offset="block"),
    ls.Dilated((9, 30), (1, 4), heads="grouped"),
    ls.Dilated((5,), (9,)),
    *([ls.SlidingWindow(7, 3)] if hasattr(ls, "SlidingWindow") else []),
]
N, HEADS, DIM = 53, 4, 8
MODERATE = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
each_magnitude = pytest.mark.parametrize("magnitude", [1.0, 1e4])
either_causal = pytest.mark.parametrize("causal", [False, True])


def qkv(dtype, batch=2, heads=HEADS, n=N, dim=DIM, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, n, dim, generator=generator).to(dtype) for _ in range(3)]


def random_like(x, magnitude, seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    return (magnitude * torch.randn(x.shape, generator=generator)).to(x.dtype)


def edited(x, index, magnitude, seed=0):
    """A copy in which other random numbers stand at the index."""
    copy = x.clone()
    copy[index] = random_like(x[index], magnitude, seed)
    return copy


def run(q, k, v, pattern, backend, **arguments):
    return ls.attention(q, k, v, pattern, backend=backend, return_lse=True, **arguments)


# --- the future -----------------------------------------------------------------------------------------------------


@each_backend
@each_dtype
@each_pattern
@each_magnitude
def test_causal_outputs_do_not_depend_on_later_keys(backend, dtype, pattern, magnitude):
    q, k, v = qkv(dtype)
    out, lse = run(q, k, v, pattern, backend, is_causal=True)
    changed_anything = False
    for t in (0, 1, 8, 15, 16, 17, 40, N - 1):
        at = (slice(None), slice(None), t)
        for new_k, new_v in (
            (edited(k, at, magnitude), v),
            (k, edited(v, at, magnitude)),
            (edited(k, at, magnitude), edited(v, at, magnitude, seed=1)),
        ):
            new_out, new_lse = run(q, new_k, new_v, pattern, backend, is_causal=True)
            assert torch.equal(new_out[:, :, :t], out[:, :, :t]), f"token {t} leaks into outputs before it"
            assert torch.equal(new_lse[:, :, :t], lse[:, :, :t]), f"token {t} leaks into log-sum-exps before it"
            changed_anything |= not torch.equal(new_out[:, :, t:], out[:, :, t:])
    assert changed_anything, "no edit changed anything: the test sees nothing"


@each_backend
@each_dtype
@each_pattern
def test_causal_outputs_do_not_depend_on_the_whole_future(backend, dtype, pattern):
    q, k, v = qkv(dtype)
    out, _ = run(q, k, v, pattern, backend, is_causal=True)
    for t in (1, 9, 25, 52):
        future = (slice(None), slice(None), slice(t, None))
        new = [edited(x, future, 1e4, seed) for seed, x in enumerate((q, k, v))]
        new_out, _ = run(*new, pattern, backend, is_causal=True)
        assert torch.equal(new_out[:, :, :t], out[:, :, :t])


@each_backend
@each_dtype
@each_pattern
def test_a_mask_is_no_large_negative_number(backend, dtype, pattern):
    """Visible scores near -2e4: keys hidden by adding -1e4, a common trick, would outweigh the visible ones."""
    q, k, v = qkv(dtype)
    q, k = 100 * q.abs() + 10, -100 * k.abs() - 10
    out, lse = run(q, k, v, pattern, backend, is_causal=True)
    for t in (1, 9, 25, 52):
        future = (slice(None), slice(None), slice(t, None))
        new_out, new_lse = run(q, edited(k, future, 1.0), edited(v, future, 1.0), pattern, backend, is_causal=True)
        assert torch.equal(new_out[:, :, :t], out[:, :, :t])
        assert torch.equal(new_lse[:, :, :t], lse[:, :, :t])


@each_backend
@each_dtype
@each_pattern
def test_causal_gradients_stop_at_the_query(backend, dtype, pattern):
    """The loss of the first t outputs has no gradient at all at later tokens."""
    t = 20
    q, k, v = (x.requires_grad_() for x in qkv(dtype))
    out, _ = run(q, k, v, pattern, backend, is_causal=True)
    for gradient in torch.autograd.grad(out[:, :, :t].float().square().sum(), (q, k, v)):
        assert not gradient.isnan().any()
        assert torch.equal(gradient[:, :, t:], torch.zeros_like(gradient[:, :, t:]))


@each_backend
@MODERATE
@given(data=st.data())
def test_causal_dilated_of_any_shape(backend, data):
    branches = data.draw(st.integers(1, 3))
    word = data.draw(st.sampled_from(["all", "grouped"]))
    pattern = ls.Dilated(
        tuple(data.draw(st.integers(1, 150)) for _ in range(branches)),
        tuple(data.draw(st.integers(1, 12)) for _ in range(branches)),
        heads=word,
        offset=data.draw(st.sampled_from(["modulo", "block"])),
    )
    heads, n = data.draw(st.integers(branches, 6)), data.draw(st.integers(2, 120))
    t = data.draw(st.integers(1, n - 1))
    q, k, v = qkv(data.draw(st.sampled_from(DTYPES)), 1, heads, n, 4, data.draw(st.integers(0, 99)))
    future = (slice(None), slice(None), slice(t, None))
    out, lse = run(q, k, v, pattern, backend, is_causal=True)
    new_out, new_lse = run(q, edited(k, future, 1e4), edited(v, future, 1e4), pattern, backend, is_causal=True)
    assert torch.equal(new_out[:, :, :t], out[:, :, :t])
    assert torch.equal(new_lse[:, :, :t], lse[:, :, :t])


# --- the oracle's map -----------------------------------------------------------------------------------------------


@each_backend
@each_dtype
@each_pattern
@each_magnitude
@either_causal
def test_an_edited_key_reaches_only_the_rows_that_see_it(backend, dtype, pattern, magnitude, causal):
    q, k, v = qkv(dtype)
    out, lse = run(q, k, v, pattern, backend, is_causal=causal)
    counts = visible(pattern, HEADS, N, N, is_causal=causal)
    reached = torch.zeros(HEADS, N, dtype=torch.bool)
    for t in (0, 1, 7, 20, 33, 45, N - 1):
        at = (slice(None), slice(None), t)
        new_out, new_lse = run(
            q, edited(k, at, magnitude), edited(v, at, magnitude, seed=1), pattern, backend, is_causal=causal
        )
        blind = counts[:, :, t] == 0
        assert torch.equal(new_out[:, blind], out[:, blind]), f"rows that may not see key {t} changed"
        assert torch.equal(new_lse[:, blind], lse[:, blind]), f"log-sum-exps that may not see key {t} changed"
        if magnitude == 1.0 and dtype == torch.float64:  # an ordinary edit shows in every row that sees it
            changed = (new_out != out).any(-1).all(0)
            assert torch.equal(changed, ~blind), f"rows that see key {t} did not change"
        reached |= ~blind
    assert reached.any()


@each_backend
@each_dtype
@each_pattern
@either_causal
def test_an_edited_query_reaches_only_its_own_row(backend, dtype, pattern, causal):
    q, k, v = qkv(dtype)
    out, lse = run(q, k, v, pattern, backend, is_causal=causal)
    for t in (0, 1, 16, 33, N - 1):
        new_out, new_lse = run(edited(q, (slice(None), slice(None), t), 3.0), k, v, pattern, backend, is_causal=causal)
        others = torch.arange(N) != t
        assert torch.equal(new_out[:, :, others], out[:, :, others])
        assert torch.equal(new_lse[:, :, others], lse[:, :, others])


@each_backend
@each_dtype
@each_pattern
@either_causal
def test_heads_and_batch_entries_do_not_see_each_other(backend, dtype, pattern, causal):
    q, k, v = qkv(dtype, batch=3)
    out, lse = run(q, k, v, pattern, backend, is_causal=causal)
    for head in range(HEADS):
        new = [edited(x, (slice(None), head), 1e4, seed) for seed, x in enumerate((q, k, v))]
        new_out, new_lse = run(*new, pattern, backend, is_causal=causal)
        others = torch.arange(HEADS) != head
        assert torch.equal(new_out[:, others], out[:, others]), f"head {head} leaks into others"
        assert torch.equal(new_lse[:, others], lse[:, others])
    new = [edited(x, (1,), 1e4, seed) for seed, x in enumerate((q, k, v))]
    new_out, new_lse = run(*new, pattern, backend, is_causal=causal)
    assert torch.equal(new_out[[0, 2]], out[[0, 2]]), "batch entry 1 leaks into others"
    assert torch.equal(new_lse[[0, 2]], lse[[0, 2]])


# --- what must commute ----------------------------------------------------------------------------------------------
# A BLAS may sum in another order when memory is laid out otherwise, so from here on equal means float64 to 1e-12.


def assert_same(got, want):
    assert got.shape == want.shape and not got.isnan().any()
    assert torch.equal(got == -math.inf, want == -math.inf)
    finite = want.isfinite()
    error = (got[finite] - want[finite]).abs() / want[finite].abs().clamp(min=1)
    assert error.numel() == 0 or error.max() <= 1e-12


@each_backend
@each_pattern
@either_causal
def test_permuted_batch_permutes_outputs(backend, pattern, causal):
    q, k, v = qkv(torch.float64, batch=4)
    order = [2, 0, 3, 1]
    out, lse = run(q, k, v, pattern, backend, is_causal=causal)
    new_out, new_lse = run(q[order], k[order], v[order], pattern, backend, is_causal=causal)
    assert_same(new_out, out[order])
    assert_same(new_lse, lse[order])


@each_backend
@either_causal
@pytest.mark.parametrize(
    "pattern, order",
    [
        (ls.Dense(), [3, 1, 0, 5, 2, 4]),
        (ls.Dilated((8, 30), (1, 2)), [4, 5, 0, 3, 2, 1]),  # even stays even, odd stays odd
        (ls.Dilated((8, 30), (1, 2), offset="block"), [2, 0, 1, 4, 5, 3]),  # halves stay halves
        (ls.Dilated((8, 30), (1, 2), heads="grouped"), [2, 0, 1, 4, 5, 3]),
    ],
    ids=repr,
)
def test_heads_that_play_the_same_part_may_be_permuted(backend, pattern, order, causal):
    q, k, v = qkv(torch.float64, heads=6)
    out, lse = run(q, k, v, pattern, backend, is_causal=causal)
    new_out, new_lse = run(q[:, order], k[:, order], v[:, order], pattern, backend, is_causal=causal)
    assert_same(new_out, out[:, order])
    assert_same(new_lse, lse[:, order])


@each_backend
@either_causal
def test_the_first_group_alone_is_the_first_group(backend, causal):
    q, k, v = qkv(torch.float64, heads=5)
    out, lse = run(q, k, v, ls.Dilated((9, 30), (4, 3), heads="grouped"), backend, is_causal=causal)
    alone = ls.Dilated((9,), (4,), heads="grouped")
    new_out, new_lse = run(q[:, :3], k[:, :3], v[:, :3], alone, backend, is_causal=causal)
    assert_same(new_out, out[:, :3])
    assert_same(new_lse, lse[:, :3])


@each_backend
@either_causal
@pytest.mark.parametrize("heads_word", ["all", "grouped"])
def test_a_sequence_split_between_segments_is_two_sequences(backend, heads_word, causal):
    pattern = ls.Dilated((4, 12), (1, 5), heads=heads_word)  # every segment ends at a multiple of 12
    q, k, v = qkv(torch.float64)
    whole, whole_lse = run(q, k, v, pattern, backend, is_causal=causal)
    for part in (slice(0, 24), slice(24, None)):
        out, lse = run(q[:, :, part], k[:, :, part], v[:, :, part], pattern, backend, is_causal=causal)
        assert_same(out, whole[:, :, part])
        assert_same(lse, whole_lse[:, :, part])


@each_backend
@either_causal
def test_segments_longer_than_the_sequence_are_all_alike(backend, causal):
    q, k, v = qkv(torch.float64)
    outs = [run(q, k, v, ls.Dilated((w,), (3,)), backend, is_causal=causal)[0] for w in (N, N + 1, 10 * N)]
    assert_same(outs[1], outs[0])
    assert_same(outs[2], outs[0])


@each_backend
@either_causal
def test_rate_one_and_one_segment_is_dense(backend, causal):
    q, k, v = qkv(torch.float64)
    dense, dense_lse = run(q, k, v, ls.Dense(), backend, is_causal=causal)
    out, lse = run(q, k, v, ls.Dilated((N,), (1,)), backend, is_causal=causal)
    assert_same(out, dense)
    assert_same(lse, dense_lse)
    twice, twice_lse = run(q, k, v, ls.Dilated((N, N), (1, 1)), backend, is_causal=causal)
    assert_same(twice, dense)
    assert_same(twice_lse, dense_lse + math.log(2))
