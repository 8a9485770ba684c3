"""`longspan.attention` against the oracle, in float64 to 1e-12, forward and backward, with every built-in backend.

The tolerance is relative to max(1, |oracle|), element by element. Shapes come from hypothesis: lengths that are a
multiple of nothing, segments above and below the length, rates above the segment, every layout in memory.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import longspan as ls
from longspan.testing.oracle import oracle, visible

BACKENDS = ("sdpa", "reference")
TOLERANCE = 1e-12
LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "expanded")
MODERATE = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
either_causal = pytest.mark.parametrize("causal", [False, True])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def tensor(batch, heads, n, dim, layout, seed):
    """(batch, heads, n, dim), random, laid out in memory as asked."""
    if layout == "transposed":
        return randn(batch, n, heads, dim, seed=seed).transpose(1, 2)
    if layout == "sliced":  # out of a longer, wider tensor with more heads
        return randn(batch, heads + 2, n + 5, dim + 3, seed=seed)[:, 1:-1, 2 : n + 2, 3:]
    if layout == "strided":  # the last dimension is not dense
        return randn(batch, heads, n, 2 * dim, seed=seed)[..., ::2]
    if layout == "expanded":  # every batch entry is the same memory
        return randn(1, heads, n, dim, seed=seed).expand(batch, heads, n, dim)
    return randn(batch, heads, n, dim, seed=seed)


def assert_close(got, want, what):
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, oracle {tuple(want.shape)}"
    assert got.dtype == want.dtype == torch.float64, f"{what}: {got.dtype}"
    assert not got.isnan().any(), f"{what}: NaN"
    assert torch.equal(got == -math.inf, want == -math.inf), f"{what}: -inf in other places than the oracle's"
    finite = want.isfinite()
    error = (got[finite] - want[finite]).abs() / want[finite].abs().clamp(min=1)
    worst = error.max().item() if error.numel() else 0.0
    assert worst <= TOLERANCE, f"{what}: off by {worst:.3g}, in {int((error > TOLERANCE).sum())} of {want.numel()}"


def check(q, k, v, pattern, backend, dout_layout="contiguous", **arguments):
    """out, lse and the three gradients of one call, all against the oracle."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    before = [x.detach().clone() for x in (q, k, v)]
    out, lse = ls.attention(q, k, v, pattern, backend=backend, return_lse=True, **arguments)
    want, want_lse = oracle(q, k, v, pattern, return_lse=True, **arguments)
    assert_close(out, want, "out")
    assert_close(lse, want_lse, "lse")
    dout = tensor(*want.shape, dout_layout, seed=77)
    losses = [("", (out,), (want,), (dout,))]
    if lse.requires_grad:  # a gradient that arrives at out and lse together
        losses.append((" through lse", (out, lse), (want, want_lse), (dout, randn(*want_lse.shape, seed=78))))
    for through, outputs, want_outputs, douts in losses:
        got_grads = torch.autograd.grad(outputs, (q, k, v), douts, retain_graph=True)
        want_grads = torch.autograd.grad(want_outputs, (q, k, v), douts, retain_graph=True)
        for got_grad, want_grad, name in zip(got_grads, want_grads, ("dquery", "dkey", "dvalue"), strict=True):
            assert_close(got_grad, want_grad, name + through)
    alone = ls.attention(q, k, v, pattern, backend=backend, **arguments)
    assert_close(alone, want, "out without return_lse")
    for x, copy in zip((q, k, v), before, strict=True):
        assert torch.equal(x, copy), "an input was written to"


lengths = st.integers(1, 300)
batches = st.integers(1, 3)
head_dims = st.sampled_from([1, 3, 5, 8, 16, 33])
layouts = st.tuples(*(st.sampled_from(LAYOUTS) for _ in range(4)))
scales = st.sampled_from([None, None, 0.05, 1.0, 0.0, -0.3])
seeds = st.integers(0, 2**16)


@st.composite
def dilated(draw, heads_word=None):
    """(pattern, heads): a grouped pattern with at least one head a branch."""
    branches = draw(st.integers(1, 3))
    segment = st.one_of(st.integers(1, 12), st.integers(1, 450))
    rate = st.one_of(st.integers(1, 5), st.integers(1, 40))
    segment_lengths = tuple(draw(segment) for _ in range(branches))
    dilation_rates = tuple(draw(rate) for _ in range(branches))
    word = heads_word or draw(st.sampled_from(["all", "grouped"]))
    heads = draw(st.integers(branches if word == "grouped" else 1, 12))
    offset = draw(st.sampled_from(["modulo", "block"]))
    return ls.Dilated(segment_lengths, dilation_rates, heads=word, offset=offset), heads


# --- hypothesis ---------------------------------------------------------------------------------------------------


@each_backend
@MODERATE
@given(
    pattern_heads=dilated(), n=lengths, batch=batches, dim=head_dims, causal=st.booleans(),
    scale=scales, layout=layouts, seed=seeds,
)  # fmt: skip
@example((ls.Dilated((4,), (3,)), 1), 10, 1, 3, False, None, ("contiguous",) * 4, 0)  # rows without keys
@example((ls.Dilated((3,), (7,)), 5), 7, 2, 3, True, None, ("contiguous",) * 4, 0)  # heads without rows
@example((ls.Dilated((64, 128, 256), (1, 2, 4)), 4), 256, 1, 8, True, None, ("transposed",) * 4, 0)  # the tidy case
@example((ls.Dilated((300, 7), (1, 1)), 2), 257, 1, 8, True, None, ("contiguous",) * 4, 0)  # keys counted twice
@example((ls.Dilated((1,), (1,)), 3), 50, 2, 3, True, None, ("contiguous",) * 4, 0)  # segments of one
@example((ls.Dilated((5, 5), (2, 2)), 2), 23, 1, 3, True, None, ("contiguous",) * 4, 0)  # one branch twice
@example((ls.Dilated((9, 30), (2, 3), "grouped"), 2), 1, 1, 1, True, None, ("contiguous",) * 4, 0)  # one token
@example((ls.Dilated((10,), (2,)), 2), 21, 1, 3, False, None, ("contiguous",) * 4, 0)  # last segment: one token
def test_dilated(backend, pattern_heads, n, batch, dim, causal, scale, layout, seed):
    pattern, heads = pattern_heads
    q, k, v = (tensor(batch, heads, n, dim, layout[i], seed + i) for i in range(3))
    check(q, k, v, pattern, backend, layout[3], is_causal=causal, scale=scale)


@each_backend
@MODERATE
@given(
    n=lengths, heads=st.integers(1, 12), batch=batches, dim=head_dims, causal=st.booleans(),
    scale=scales, layout=layouts, seed=seeds,
)  # fmt: skip
def test_dense(backend, n, heads, batch, dim, causal, scale, layout, seed):
    q, k, v = (tensor(batch, heads, n, dim, layout[i], seed + i) for i in range(3))
    check(q, k, v, ls.Dense(), backend, layout[3], is_causal=causal, scale=scale)


@each_backend
@MODERATE
@given(data=st.data())
def test_everything_together(backend, data):
    """Any pattern with packed documents or a query offset, and fewer key heads than query heads."""
    widths = st.integers(0, 150)
    plain = [st.just(ls.Dense()), st.builds(ls.SlidingWindow, widths, widths)]
    pattern, heads = data.draw(st.one_of(dilated(), st.tuples(st.one_of(plain), st.integers(1, 8))))
    kv_heads = data.draw(st.sampled_from([count for count in range(1, heads + 1) if heads % count == 0]))
    q_len = kv_len = data.draw(st.integers(1, 120))
    arguments = {"is_causal": data.draw(st.booleans()), "enable_gqa": kv_heads != heads}
    if data.draw(st.booleans()):
        cuts = sorted(data.draw(st.lists(st.integers(0, kv_len), max_size=5)))
        arguments["cu_seqlens"] = torch.tensor([0, *cuts], dtype=torch.int32)
    else:
        q_len, arguments["query_offset"] = data.draw(st.integers(1, 120)), data.draw(st.integers(0, 150))
    batch, dim, layout, seed = (data.draw(x) for x in (st.integers(1, 2), head_dims, layouts, seeds))
    q = tensor(batch, heads, q_len, dim, layout[0], seed)
    k, v = (tensor(batch, kv_heads, kv_len, dim, layout[i], seed + i) for i in (1, 2))
    check(q, k, v, pattern, backend, layout[3], **arguments)


# --- particular cases ---------------------------------------------------------------------------------------------

SOME_PATTERNS = [ls.Dense(), ls.Dilated((5, 16), (1, 3)), ls.Dilated((5, 16), (1, 3), heads="grouped")]
each_pattern = pytest.mark.parametrize("pattern", SOME_PATTERNS, ids=repr)


@each_backend
@either_causal
@each_pattern
@pytest.mark.parametrize("place", ["query", "key", "value", "dout"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_each_tensor(backend, pattern, causal, place, layout):
    where = {name: layout if name == place else "contiguous" for name in ("query", "key", "value", "dout")}
    q, k, v = (tensor(2, 3, 40, 5, where[name], i) for i, name in enumerate(("query", "key", "value")))
    check(q, k, v, pattern, backend, where["dout"], is_causal=causal)


@each_backend
@either_causal
@each_pattern
@pytest.mark.parametrize("scale", [0.0, -0.3, -1e-9, 1e-300, 2.5])
def test_scale_of_any_sign(backend, pattern, causal, scale):
    q, k, v = (tensor(2, 3, 40, 5, "contiguous", i) for i in range(3))
    check(q, k, v, pattern, backend, is_causal=causal, scale=scale)


@each_backend
@each_pattern
def test_gradient_of_a_plain_sum(backend, pattern):
    """`out.sum().backward()` hands the backward a dout whose strides are all 0."""
    q, k, v = (tensor(2, 3, 40, 5, "contiguous", i).requires_grad_() for i in range(3))
    got = torch.autograd.grad(ls.attention(q, k, v, pattern, is_causal=True, backend=backend).sum(), (q, k, v))
    want = torch.autograd.grad(oracle(q, k, v, pattern, is_causal=True).sum(), (q, k, v))
    for a, b, name in zip(got, want, ("dquery", "dkey", "dvalue"), strict=True):
        assert_close(a, b, name)


@each_backend
@each_pattern
def test_second_derivatives_are_right_or_refused(backend, pattern):
    q, k, v = (tensor(1, 3, 20, 5, "contiguous", i).requires_grad_() for i in range(3))

    def second(function, **arguments):
        out = function(q, k, v, pattern, is_causal=True, **arguments)
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q)[0]

    try:
        got = second(ls.attention, backend=backend)
    except (RuntimeError, ls.LongspanError) as refusal:  # a silent zero would be worse
        assert "second derivative" in str(refusal) or "differentiate twice" in str(refusal)
        return
    assert_close(got, second(oracle), "second derivative")


@each_backend
@each_pattern
def test_lse_claims_no_gradient_that_it_does_not_have(backend, pattern):
    q, k, v = (tensor(1, 3, 20, 5, "contiguous", i).requires_grad_() for i in range(3))
    _, lse = ls.attention(q, k, v, pattern, backend=backend, return_lse=True)
    if lse.requires_grad:
        seen = lse.detach().isfinite()
        want = oracle(q, k, v, pattern, return_lse=True)[1]
        pairs = zip(*(torch.autograd.grad(x[seen].sum(), (q, k)) for x in (lse, want)), strict=True)
        for (got, expected), name in zip(pairs, ("dquery", "dkey"), strict=True):
            assert_close(got, expected, name)


@each_backend
@either_causal
def test_grouped_with_twelve_heads_and_five_branches_serves_every_head(backend, causal):
    n, heads = 130, 12
    pattern = ls.Dilated((16, 32, 64, 100, 200), (1, 2, 4, 6, 8), heads="grouped")
    q, k, v = (tensor(2, heads, n, 8, "contiguous", i) for i in range(3))
    out = ls.attention(q, k, v, pattern, is_causal=causal, backend=backend)
    for head in range(heads):
        assert out[:, head].abs().sum() > 0, f"head {head} is served by no branch"
    check(q, k, v, pattern, backend, is_causal=causal)


@each_backend
@pytest.mark.parametrize("heads", [2, 3, 4, 5, 7, 12])
def test_grouped_remainder_goes_to_the_first_groups(backend, heads):
    pattern = ls.Dilated((8, 24), (1, 3), heads="grouped")
    q, k, v = (tensor(1, heads, 50, 4, "contiguous", i) for i in range(3))
    check(q, k, v, pattern, backend, is_causal=True)


@each_backend
@either_causal
def test_lse_is_minus_inf_where_no_branch_covers_the_row(backend, causal):
    n, heads = 29, 3
    pattern = ls.Dilated((6, 11), (3, 4))
    q, k, v = (tensor(2, heads, n, 5, "contiguous", i).requires_grad_() for i in range(3))
    out, lse = ls.attention(q, k, v, pattern, is_causal=causal, backend=backend, return_lse=True)
    bare = (visible(pattern, heads, n, n, is_causal=causal).sum(-1) == 0).expand(2, heads, n)
    assert bare.any() and not bare.all()
    assert torch.equal(lse == -math.inf, bare) and not lse.isnan().any()
    assert torch.equal(out[bare], torch.zeros_like(out[bare]))
    for gradient in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert torch.equal(gradient[bare], torch.zeros_like(gradient[bare]))


@each_backend
def test_nobody_sees_anything(backend):
    pattern = ls.Dilated((3,), (5,), heads="all")  # head 3 and head 4 ask for an offset that no segment has
    q, k, v = (tensor(1, 5, 8, 3, "contiguous", i) for i in range(3))
    check(q, k, v, pattern, backend, is_causal=True)
    out = ls.attention(q, k, v, pattern, is_causal=True, backend=backend)
    assert torch.equal(out[:, 3:], torch.zeros_like(out[:, 3:]))


@each_backend
@pytest.mark.parametrize("magnitude", [1e-3, 8.0])
def test_scores_of_any_size(backend, magnitude):
    """At 8, scores reach 200 and the branches' denominators differ by a hundred e-folds."""
    pattern = ls.Dilated((8, 64), (1, 4))
    q, k, v = (tensor(1, 2, 70, 16, "contiguous", i) for i in range(3))
    check(q * magnitude, k * magnitude, v, pattern, backend, is_causal=True)


@each_backend
def test_huge_scores_overflow_nothing(backend):
    """Scores of 1e5, of which float64 keeps only 1e-11: the lse alone, which is as large, is compared."""
    pattern = ls.Dilated((8, 64), (1, 4))
    q, k, v = (tensor(1, 2, 70, 16, "contiguous", i) for i in range(3))
    q, k, v = ((x * size).requires_grad_() for x, size in ((q, 300.0), (k, 300.0), (v, 1.0)))
    out, lse = ls.attention(q, k, v, pattern, is_causal=True, backend=backend, return_lse=True)
    assert_close(lse, oracle(q, k, v, pattern, is_causal=True, return_lse=True)[1], "lse")
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), (q, k, v)))


@each_backend
def test_default_pattern_is_dense_and_may_be_passed_by_position_or_name(backend):
    q, k, v = (tensor(1, 2, 9, 4, "contiguous", i) for i in range(3))
    want = oracle(q, k, v)
    assert_close(ls.attention(q, k, v, backend=backend), want, "no pattern")
    assert_close(ls.attention(q, k, v, ls.Dense(), backend=backend), want, "by position")
    assert_close(ls.attention(q, k, v, pattern=ls.Dense(), backend=backend), want, "by name")


@each_backend
@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_of_some_inputs_alone(backend, needs):
    pattern = ls.Dilated((7, 20), (1, 3))
    inputs = [tensor(2, 3, 25, 4, "contiguous", i) for i in range(3)]
    for i in needs:
        inputs[i].requires_grad_()
    dout = tensor(2, 3, 25, 4, "transposed", 5)
    wanted = [inputs[i] for i in needs]
    got = torch.autograd.grad(ls.attention(*inputs, pattern, is_causal=True, backend=backend), wanted, dout)
    want = torch.autograd.grad(oracle(*inputs, pattern, is_causal=True), wanted, dout)
    for a, b, i in zip(got, want, needs, strict=True):
        assert_close(a, b, f"gradient of input {i}")


@each_backend
def test_one_tensor_in_all_three_places(backend):
    x = tensor(2, 2, 33, 4, "transposed", 1).requires_grad_()
    pattern = ls.Dilated((10, 40), (2, 3))
    got = ls.attention(x, x, x, pattern, is_causal=True, backend=backend)
    want = oracle(x, x, x, pattern, is_causal=True)
    assert_close(got, want, "out")
    dout = tensor(2, 2, 33, 4, "contiguous", 2)
    assert_close(torch.autograd.grad(got, x, dout)[0], torch.autograd.grad(want, x, dout)[0], "gradient")


@each_backend
def test_gradients_accumulate_and_repeat(backend):
    """Two backward passes through one graph, and two calls with one plan, give the same bits."""
    pattern = ls.Dilated((7, 20), (1, 3))
    q, k, v = (tensor(1, 3, 25, 4, "contiguous", i).requires_grad_() for i in range(3))
    dout = tensor(1, 3, 25, 4, "contiguous", 5)
    out = ls.attention(q, k, v, pattern, is_causal=True, backend=backend)
    first = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), dout)
    again = ls.attention(q, k, v, pattern, is_causal=True, backend=backend)
    assert torch.equal(out, again)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# --- gradcheck ----------------------------------------------------------------------------------------------------


@each_backend
@either_causal
@pytest.mark.parametrize(
    "pattern",
    [
        ls.Dense(),
        ls.Dilated((3,), (1,)),
        ls.Dilated((3, 5), (1, 2)),
        ls.Dilated((2, 4, 9), (1, 2, 3), offset="block"),
        ls.Dilated((4, 3), (3, 5)),
        ls.Dilated((2, 7), (1, 2), heads="grouped"),
    ],
    ids=repr,
)
def test_gradcheck(backend, pattern, causal):
    q, k, v = (tensor(1, 3, 6, 2, "contiguous", i).requires_grad_() for i in range(3))
    assert torch.autograd.gradcheck(
        lambda q, k, v: ls.attention(q, k, v, pattern, is_causal=causal, backend=backend), (q, k, v)
    )


# --- every other argument: honoured or refused, never ignored -----------------------------------------------------

REFUSALS = (ls.BackendUnavailable, ValueError, NotImplementedError)


def check_honoured_or_refused(q, k, v, pattern, backend, **arguments):
    try:
        ls.attention(q, k, v, pattern, backend=backend, **arguments)
    except REFUSALS as refusal:
        assert str(refusal), "a refusal must say why"
        pytest.skip(f"refused, as it may: {refusal}")
    check(q, k, v, pattern, backend, **arguments)


@each_backend
@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@either_causal
@each_pattern
def test_fewer_key_heads(backend, pattern, causal, kv_heads):
    q = tensor(2, 6, 27, 4, "contiguous", 0)
    k, v = (tensor(2, kv_heads, 27, 4, "transposed", i) for i in (1, 2))
    check_honoured_or_refused(q, k, v, pattern, backend, is_causal=causal, enable_gqa=True)


@each_backend
@pytest.mark.parametrize("bounds", [[0, 23], [0, 6, 7, 23], [0, 6, 6, 20], [0, 1]])
@either_causal
@each_pattern
def test_packed_documents(backend, pattern, causal, bounds):
    q, k, v = (tensor(1, 4, 23, 4, "contiguous", i) for i in range(3))
    check_honoured_or_refused(q, k, v, pattern, backend, is_causal=causal, cu_seqlens=torch.tensor(bounds))


@each_backend
@pytest.mark.parametrize(
    "q_len, kv_len, query_offset", [(1, 20, 19), (6, 20, 14), (6, 20, 0), (6, 20, 3), (20, 6, 0), (9, 9, 2)]
)
@either_causal
@each_pattern
def test_query_offset(backend, pattern, causal, q_len, kv_len, query_offset):
    q = tensor(2, 4, q_len, 4, "contiguous", 0)
    k, v = (tensor(2, 4, kv_len, 4, "contiguous", i) for i in (1, 2))
    check_honoured_or_refused(q, k, v, pattern, backend, is_causal=causal, query_offset=query_offset)


@each_backend
def test_dense_with_other_lengths_needs_no_offset(backend):
    q = tensor(2, 3, 5, 4, "contiguous", 0)
    k, v = (tensor(2, 3, 14, 4, "contiguous", i) for i in (1, 2))
    check_honoured_or_refused(q, k, v, ls.Dense(), backend)


@each_backend
@pytest.mark.parametrize(
    "pattern, causal", [(ls.Dense(), True), (ls.Dilated((5,), (2,)), False), (ls.Dilated((5,), (2,)), True)]
)
def test_other_lengths_without_an_offset_are_refused(backend, pattern, causal):
    q = tensor(1, 2, 5, 4, "contiguous", 0)
    k, v = (tensor(1, 2, 14, 4, "contiguous", i) for i in (1, 2))
    with pytest.raises(ValueError, match="query_offset"):
        ls.attention(q, k, v, pattern, is_causal=causal, backend=backend)


@each_backend
def test_more_branches_than_heads_in_a_grouped_pattern_is_refused(backend):
    q, k, v = (tensor(1, 2, 9, 4, "contiguous", i) for i in range(3))
    with pytest.raises(ValueError, match="heads"):
        ls.attention(q, k, v, ls.Dilated((3, 4, 5), (1, 1, 1), heads="grouped"), backend=backend)


@each_backend
@each_pattern
def test_dropout_is_never_ignored(backend, pattern):
    q, k, v = (tensor(1, 2, 64, 8, "contiguous", i) for i in range(3))
    try:
        dropped = ls.attention(q, k, v, pattern, dropout_p=0.5, backend=backend)
    except REFUSALS as refusal:
        assert "dropout" in str(refusal)
        return
    assert not torch.allclose(dropped, ls.attention(q, k, v, pattern, backend=backend))


@each_backend
@pytest.mark.parametrize(
    "batch, heads, q_len, kv_len", [(0, 2, 5, 5), (1, 2, 0, 0), (1, 2, 0, 4), (1, 2, 4, 0), (0, 2, 5, 0)]
)
def test_empty_tensors(backend, batch, heads, q_len, kv_len):
    q = tensor(batch, heads, q_len, 4, "contiguous", 0)
    k, v = (tensor(batch, heads, kv_len, 4, "contiguous", i) for i in (1, 2))
    check_honoured_or_refused(q, k, v, ls.Dense(), backend)


@each_backend
@either_causal
@pytest.mark.parametrize("left, right", [(0, 0), (4, 0), (0, 4), (7, 3), (500, 500)])
def test_sliding_window(backend, left, right, causal):
    q, k, v = (tensor(2, 3, 41, 4, "transposed", i) for i in range(3))
    check_honoured_or_refused(q, k, v, ls.SlidingWindow(left, right), backend, is_causal=causal)


@pytest.mark.parametrize("backend", ["cpu_fused", "sdpa", "reference", "block_sparse_batched", "torch_sparse"])
@pytest.mark.parametrize("n", [2, 15, 40])
@pytest.mark.parametrize("step", [1, 2])
def test_rows_that_overlap(backend, n, step):
    """Windows of one signal, as unfold makes them: two dimensions of a stride below head_dim."""
    dim = 16
    overlapping = [randn(n * step + dim, seed=seed).float().unfold(0, dim, step)[:n][None, None] for seed in range(4)]
    assert overlapping[0].stride()[2:] == (step, 1)
    for pattern in (ls.Dense(), ls.SlidingWindow(9)):
        found, want = (
            torch.func.vjp(lambda *x, p=pattern: ls.attention(*x, p, is_causal=True, backend=backend), *given[:3])
            for given in (overlapping, [x.contiguous() for x in overlapping])
        )
        torch.testing.assert_close(found[0], want[0], rtol=1e-5, atol=1e-5)
        for one, other in zip(found[1](overlapping[3]), want[1](overlapping[3].contiguous()), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        leaves = [x.detach().requires_grad_() for x in overlapping[:3]]
        ls.attention(*leaves, pattern, is_causal=True, backend=backend).backward(overlapping[3])
        for leaf, other in zip(leaves, want[1](overlapping[3].contiguous()), strict=True):
            torch.testing.assert_close(leaf.grad, other, rtol=1e-5, atol=1e-5)
