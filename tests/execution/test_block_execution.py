"""Block-sparse patterns on dense kernels: the oracle's answer and gradients, for every builder and composition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import longspan as ls
from drawn import patterns, single
from longspan import blockwise
from longspan.lowering import cost
from longspan.lowering.blocks import BlockLayout
from longspan.memory import cache_file
from longspan.memory.arena import BufferArena
from longspan.memory.cache import PatternCache
from longspan.memory.cached_layout import LayoutKey
from longspan.planning.attention import forget
from longspan.testing import oracle
from longspan.testing.answers import Answer, dense
from longspan.testing.judge import judge_forward, judge_gradients
from longspan.testing.oracle import visible
from small import assert_same, qkv, randn

MODERATE = settings(deadline=None, max_examples=60)
BACKENDS = ("sdpa", "reference", "block_sparse_batched", "torch_sparse")

BUILT = {
    "local": ls.local_blocks(11, 3, 8),
    "local-inner": ls.local_blocks(30, 0, 4),
    "global": ls.global_blocks((0, -1), 8),
    "tokens": ls.global_tokens((0, 13), 8) & ls.local_blocks(40, 40, 8),
    "strided": ls.strided_blocks(3, 4),
    "dilated": ls.dilated_blocks(2, 2, 8),
    "hierarchical": ls.hierarchical_blocks(2, 4),
    "random": ls.random_blocks(0.3, 8, seed=3),
    "bigbird": ls.bigbird(block_size=4),
    "longformer": ls.longformer(14, (0, 20), 8),
    "gaps": ls.random_blocks(0.2, 4, seed=1) & ~ls.local_blocks(9, 9, 4),
    "per-head": ls.per_head([ls.local_blocks(6, 0, 4), ls.random_blocks(0.3, 8), ls.local_blocks(6, 0, 4), ls.Dense()]),
}


@pytest.fixture(autouse=True)
def as_blocks(monkeypatch):
    """Whatever it costs; test_block_masked.py has the other way."""
    monkeypatch.setattr(cost, "model", lambda *_: None)
    forget()
    yield
    forget()


def answer(tensors, pattern, **given):
    """The oracle's `(out, lse)` in float64."""
    return oracle(*tensors, pattern, return_lse=True, **given)


def check(tensors, pattern, backend, rtol=1e-12, **given):
    """Forward, and the gradient of both results."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = ls.attention(*leaves, pattern, backend=backend, return_lse=True, **given)
    wanted = [x.detach().clone().requires_grad_() for x in tensors]
    want, want_lse = answer(wanted, pattern, **given)
    torch.testing.assert_close(out, want, rtol=rtol, atol=rtol)
    torch.testing.assert_close(lse, want_lse, rtol=rtol, atol=rtol)
    dout = randn(*out.shape, seed=7)
    # The gradient of a row that sees nothing is 0, whatever its lse is sent.
    dlse = randn(*lse.shape, seed=8).masked_fill(want_lse == -torch.inf, 0.0)
    for grads in ((dout,), (dout, dlse)):
        got = torch.autograd.grad((out, lse)[: len(grads)], leaves, grads, retain_graph=True)
        right = torch.autograd.grad((want, want_lse)[: len(grads)], wanted, grads, retain_graph=True)
        for one, other in zip(got, right, strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)


# --- the answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", BUILT)
def test_every_builder_on_every_dense_kernel(name, is_causal, backend):
    tensors = qkv(n=45, dim=8)
    check(tensors, BUILT[name], backend, is_causal=is_causal)


@MODERATE
@given(
    pattern=single,
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    offset=st.integers(0, 25),
    is_causal=st.booleans(),
    shared=st.sampled_from((1, 2)),
)
@example(pattern=ls.local_blocks(9, 9, 4), n=31, m=22, offset=3, is_causal=False, shared=2)
@example(pattern=ls.random_blocks(0.5, 8), n=9, m=30, offset=21, is_causal=True, shared=1)
@example(pattern=ls.global_blocks((-1,), 8), n=20, m=21, offset=1, is_causal=False, shared=1)
def test_compositions_shapes_and_offsets(pattern, n, m, offset, is_causal, shared):
    tensors = qkv(batch=2, heads=2 * shared, kv_heads=2, n=n, kv_len=m, dim=4)
    given = {"is_causal": is_causal, "query_offset": offset, "enable_gqa": shared > 1}
    for backend in ("sdpa", "reference"):
        check(tensors, pattern, backend, **given)


@MODERATE
@given(pattern=patterns, n=st.integers(1, 40), is_causal=st.booleans())
def test_weights_of_every_row_sum_to_one(pattern, n, is_causal):
    query, key, value = qkv(batch=1, heads=3, n=n, dim=4)
    out, lse = ls.attention(
        query, key, torch.ones_like(value), pattern, is_causal=is_causal, backend="sdpa", return_lse=True
    )
    empty = ~pattern.to_dense(n, heads=3, is_causal=is_causal).any(-1)
    torch.testing.assert_close(out, (~empty).double()[None, :, :, None].expand(out.shape), rtol=1e-12, atol=0.0)
    assert torch.equal(lse == -torch.inf, empty[None])


@MODERATE
@given(pattern=patterns, n=st.integers(2, 40), is_causal=st.booleans(), data=st.data())
def test_a_key_that_a_row_may_not_see_changes_no_bit_of_it(pattern, n, is_causal, data):
    query, key, value = qkv(batch=1, heads=3, n=n, dim=4)
    token = data.draw(st.integers(0, n - 1))
    blind = ~pattern.to_dense(n, heads=3, is_causal=is_causal)[:, :, token]
    made = ls.plan(ls.Problem.like(query, key, value, pattern, is_causal=is_causal), backend="reference")
    before = made(query, key, value)
    for number in (1e4, torch.nan, torch.inf):
        for place in (1, 2):
            edited = [query, key.clone(), value.clone()]
            edited[place][:, :, token] = number
            for one, other in zip(made(*edited), before, strict=True):
                assert torch.equal(one[:, blind], other[:, blind]), (number, place)


@pytest.mark.parametrize("backend", ["sdpa", "block_sparse_batched"])
def test_what_is_masked_reaches_nothing_in_the_backward_either(backend):
    pattern = ls.local_blocks(10, 0, 8)
    tensors = qkv(batch=1, heads=1, n=40)
    seen = pattern.to_dense(40)[0]
    grads = []
    for number in (None, torch.nan):
        query, key, value = (x.clone() for x in tensors)
        if number is not None:
            key[:, :, 20] = value[:, :, 20] = number
        leaves = [x.requires_grad_() for x in (query, key, value)]
        out = ls.attention(*leaves, pattern, backend=backend)
        rows = ~seen[:, 20]
        grads.append(torch.autograd.grad(out[:, :, rows].sum(), leaves))
    keys = ~seen[~rows].any(0)  # that no row with a NaN sees
    assert 0 < int(rows.sum()) < 40 and 0 < int(keys.sum()) < 40
    for kept, clean, dirty in zip((rows, keys, keys), *grads, strict=True):
        assert torch.equal(clean[:, :, kept], dirty[:, :, kept])


def test_gradcheck():
    tensors = qkv(batch=1, heads=4, kv_heads=2, n=19, dim=3, grad=True)
    for pattern in (ls.bigbird(block_size=4), ls.local_blocks(5, 2, 4), BUILT["per-head"]):
        assert torch.autograd.gradcheck(
            lambda q, k, v, pattern=pattern: ls.attention(
                q, k, v, pattern, backend="sdpa", enable_gqa=True, return_lse=True
            ),
            tensors,
        )


def test_rows_without_a_block_are_zero_and_have_no_gradient():
    csr = ls.BlockCSR(8, 40, 40, torch.tensor([0, 1, 1, 2, 2, 3]), torch.tensor([0, 3, 1]))
    tensors = qkv(n=40, grad=True)
    out, lse = ls.attention(*tensors, ls.BlockSparse(8, csr), backend="sdpa", return_lse=True)
    empty = torch.zeros(40, dtype=torch.bool)
    empty[8:16] = empty[24:32] = True
    assert bool((out[:, :, empty] == 0).all()) and bool((lse[:, :, empty] == -torch.inf).all())
    assert bool(lse[:, :, ~empty].isfinite().all())
    dquery, dkey, _ = torch.autograd.grad(out.sum() + lse[:, :, ~empty].sum(), tensors)
    assert bool((dquery[:, :, empty] == 0).all()) and bool((dkey[:, :, 16:24] == 0).all())
    assert bool((dquery[:, :, ~empty] != 0).any())


@pytest.mark.parametrize("backend", ["sdpa", "block_sparse_batched"])
@pytest.mark.parametrize(
    ("name", "query_heads", "kv_heads"),
    [(name, *heads) for name in ("random", "local") for heads in ((4, 2), (4, 1), (6, 2), (4, 4))]
    + [("per-head", 4, 2), ("per-head", 4, 1), ("per-head", 4, 4)],
)
def test_shared_key_heads(name, query_heads, kv_heads, backend):
    tensors = qkv(heads=query_heads, kv_heads=kv_heads, n=37)
    check(tensors, BUILT[name], backend, enable_gqa=True, is_causal=True)


@pytest.mark.parametrize("name", ["random", "local", "bigbird", "per-head"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_documents(name, is_causal):
    tensors = qkv(n=50)
    check(tensors, BUILT[name], "sdpa", is_causal=is_causal, cu_seqlens=(0, 17, 17, 18, 45))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "gapped"])
def test_any_strides(layout):
    tensors = qkv(n=40)
    shown = {
        "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": lambda x: torch.cat([x, x], 2)[:, :, 7:47].copy_(x),
        "gapped": lambda x: torch.stack([x, x], -1)[..., 0],
    }[layout]
    for pattern in (BUILT["bigbird"], BUILT["local-inner"], BUILT["per-head"]):
        check([shown(x) for x in tensors], pattern, "sdpa", is_causal=True)
        check(tensors, pattern, "sdpa", is_causal=True)


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("sdpa", torch.float32),
        ("sdpa", torch.bfloat16),
        ("sdpa", torch.float16),
        ("cpu_fused", torch.float16),
        ("block_sparse_batched", torch.bfloat16),
        ("torch_sparse", torch.float32),
        ("flex", torch.float32),
        ("flex", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("name", ["bigbird", "longformer", "random"])
def test_low_precision_within_the_rule(name, backend, dtype):
    """The conformance kit's: at most twice the error of naive torch of the same dtype, three times for gradients."""
    tensors = [x.requires_grad_() for x in qkv(n=96, dim=16, dtype=dtype)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    naive = [x.detach().clone().requires_grad_() for x in tensors]
    want, want_lse = answer(exact, BUILT[name], is_causal=True)
    counts = visible(BUILT[name], 4, 96, 96, is_causal=True)
    got, got_lse = ls.attention(*tensors, BUILT[name], is_causal=True, backend=backend, return_lse=True)
    right = Answer(tuple(exact), want, want_lse, tuple(naive), *dense(*naive, counts, 0.25))
    judge_forward(got, got_lse, right)
    dout = randn(*want.shape, seed=5, dtype=dtype)
    judge_gradients(torch.autograd.grad(got, tensors, dout), dout, right, 0.25)


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", ["bigbird", "local", "longformer", "per-head"])
def test_dropout_drops_the_same_pairs_on_every_path(name, kv_heads):
    """Against the weights written down, with the mask of `Dropout` for the whole matrix."""
    pattern, n = BUILT[name] | ls.local_blocks(0, 0, 4), 45  # no row is empty, which softmax does not take
    tensors = qkv(n=n, kv_heads=kv_heads, grad=True)
    given = {"is_causal": True, "dropout_p": 0.3, "enable_gqa": True}
    problem = ls.Problem.like(*tensors, pattern, **given)
    lines = torch.arange(8).view(2, 4)
    places = torch.arange(n).expand(2, 4, n)
    dropout = ls.Dropout(0.3, 11, lines, places, places)
    every = slice(None)
    factors = dropout.factors(every, every, every, torch.float64)
    hidden = ~pattern.to_dense(n, heads=4, is_causal=True)
    wanted = [x.detach().clone().requires_grad_() for x in tensors]
    key, value = (x.repeat_interleave(4 // kv_heads, 1) for x in wanted[1:])
    weights = (wanted[0] @ key.mT * 0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    want = (weights * factors) @ value
    dout = randn(*want.shape, seed=4)
    right = torch.autograd.grad(want, wanted, dout)
    for backend in ("reference", "sdpa"):
        out, _ = ls.plan(problem, backend)(*tensors, dropout_seed=11)
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
        got = torch.autograd.grad(out, tensors, dout)
        for one, other in zip(got, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_dropout_with_documents_and_offset():
    given = {"dropout_p": 0.5, "is_causal": True}
    window = ls.SlidingWindow(6, 0)
    for more in ({"cu_seqlens": (0, 13, 30)}, {"query_offset": 9}):
        tensors = qkv(n=30, kv_len=30 if "cu_seqlens" in more else 39)
        same = []
        for pattern in (window, ls.local_blocks(6, 0, 4)):
            problem = ls.Problem.like(*tensors, pattern, **given, **more)
            same.append(ls.plan(problem, "reference")(*tensors, dropout_seed=3))
        for one, other in zip(*same, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


# --- graphs and transforms --------------------------------------------------------------------------------------------


def test_compile_and_vmap():
    pattern = ls.local_blocks(6, 0, 4) | ls.global_blocks(1, 4)
    tensors = qkv(n=20, grad=True)

    def run(q, k, v):
        return ls.attention(q, k, v, pattern, is_causal=True, backend="sdpa")

    want = run(*tensors)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    got = compiled(*tensors)
    assert_same([got], [want])
    assert_same(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(want.sum(), tensors))
    many = [randn(3, *x.shape, seed=number) for number, x in enumerate(tensors)]
    mapped = torch.vmap(run)(*many)
    torch.testing.assert_close(mapped, torch.stack([run(*one) for one in zip(*many, strict=True)]), rtol=0, atol=1e-14)


def test_a_plan_made_in_inference_mode_trains_afterwards():
    pattern = ls.local_blocks(7, 0, 4) | ls.random_blocks(0.2, 4, seed=5)
    tensors = qkv(n=41)
    with torch.inference_mode():
        ls.attention(*tensors, pattern, backend="sdpa")
    check(tensors, pattern, "sdpa")


def test_no_default_device_gets_in_the_way():
    pattern = ls.local_blocks(7, 0, 4) | ls.random_blocks(0.2, 4, seed=6)
    tensors = qkv(n=43)
    with torch.device("meta"):
        out = ls.attention(*tensors, pattern, backend="sdpa")
    torch.testing.assert_close(out, oracle(*tensors, pattern), rtol=1e-12, atol=1e-12)


# --- what is run ------------------------------------------------------------------------------------------------------


def test_many_launches_give_what_one_gives(monkeypatch):
    """Rows, heads, batch entries and keys of one row are cut where a launch would be too large."""
    from longspan.lowering import schedule as block_schedule

    tensors = qkv(n=100, heads=4, kv_heads=2, dim=8)
    for pattern in (BUILT["bigbird"], BUILT["random"], BUILT["longformer"], BUILT["local-inner"]):
        for most, pairs in ((1, 1), (3000, 2**24), (2**24, 600), (20_000, 3000)):
            monkeypatch.setattr(block_schedule, "TEMPORARY", most)
            monkeypatch.setattr(block_schedule, "PAIRS", pairs)
            problem = ls.Problem.like(*tensors, pattern, enable_gqa=True)
            runner = ls.plan(problem, "sdpa")._runner
            found = runner.forward(*tensors, None)
            for one, other in zip(found, answer(tensors, pattern, enable_gqa=True), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
            monkeypatch.undo()
        check(tensors, pattern, "sdpa", enable_gqa=True)


def test_launches_are_bounded_in_bytes_and_pairs():
    from longspan.lowering.dense import lay_blocks
    from longspan.lowering.schedule import PAIRS, TEMPORARY, schedule

    for pattern in (ls.random_blocks(0.1), ls.local_blocks(1023), ls.global_blocks(2), ls.bigbird()):
        problem = ls.Problem(batch=4, heads=8, kv_heads=4, q_len=32768, head_dim=64, pattern=pattern, is_causal=True)
        jobs = schedule(problem, lay_blocks(problem))
        assert jobs
        for job in jobs:
            widest = max(one.keys for one in job.group.columns)
            for chunk in job.forward:
                lines = [part.stop - part.start for part in (chunk.batch, chunk.kv_heads, chunk.rows)]
                count = lines[0] * lines[1] * lines[2]
                gathered = [one.keys for one in job.group.columns if one.run is None]
                assert count * job.queries * widest <= PAIRS
                assert count * 2 * max(gathered, default=0) * 64 * 4 <= TEMPORARY


def test_rows_run_in_groups_not_one_by_one():
    """A window's rows are one batch, whose full blocks are read where they lie."""
    for n in (8192, 65536):
        made = ls.plan(ls.Problem(batch=1, heads=1, q_len=n, head_dim=8, pattern=ls.local_blocks(512)), "sdpa")
        groups = [job.group for job in made._runner._index[0]]
        assert len(groups) == 5  # four rows whose window is cut off by the start, and all others
        assert groups[-1].count == n // 128 - 4
        full = [one for one in groups[-1].columns if one.mask_ids is None]
        assert [one.run is not None for one in full] == [True]


def test_the_plan_says_who_runs_what():
    problem = ls.Problem(batch=1, heads=2, q_len=512, head_dim=16, pattern=ls.local_blocks(100, block_size=32))
    made = ls.plan(problem, "sdpa")
    assert isinstance(made.layout, BlockLayout)
    assert "under masks" in str(made.layout)
    assert made.layout.pairs == 2 * int(problem.pattern.to_dense(512).sum())
    assert made.layout.density == pytest.approx(problem.pattern.density(512))
    assert made.layout.nbytes < 20_000
    note = next(one for one in made.resolution.notes if "full blocks" in one)
    assert "sdpa runs" in note and "partial ones under their masks" in note


@pytest.mark.parametrize("backend", ["sdpa", "block_sparse_batched", "reference"])
def test_what_keeps_everything_runs_as_dense_attention(backend):
    tensors = qkv(n=40)
    whole, triangle = ls.random_blocks(1.0, 8), ls.BlockSparse(8, "all").causal()
    for pattern, is_causal, as_causal in ((whole, False, False), (whole, True, True), (triangle, False, True)):
        made = ls.plan(ls.Problem.like(*tensors, pattern, is_causal=is_causal), backend)
        dense = ls.plan(ls.Problem.like(*tensors, is_causal=as_causal), backend)
        assert made.layout == dense.layout
        assert_same(made(*tensors), dense(*tensors))
        assert any("dense attention" in note for note in made.resolution.notes)
    almost = ls.random_blocks(1.0, 8) & ~ls.local_blocks(0, 0, 8)
    assert isinstance(ls.plan(ls.Problem.like(*tensors, almost), backend).layout, BlockLayout)


def test_layouts_are_shared_kept_and_saved(tmp_path):
    pytest.importorskip("safetensors")
    store, tensors = PatternCache(), qkv(n=60, heads=4)
    mixed = [*BUILT.values(), ls.BlockSparse(8, ls.local_blocks(9, 0, 8).csr(60).layouts[0])]
    for pattern in mixed:
        problem = ls.Problem.like(*tensors, pattern)
        first, again = (ls.plan(problem, "sdpa", pattern_cache=store) for _ in range(2))
        assert first.layout is again.layout
        assert_same(first(*tensors), again(*tensors))
    layouts = [(LayoutKey(ls.Problem.like(*tensors, one), "sdpa", "longspan 1"), one) for one in mixed]
    made = [(key, ls.plan(key.problem, "sdpa").layout) for key, _ in layouts]
    # A layout that was given is no rule.
    assert cache_file.save(tmp_path / "layouts", made) == (len(mixed) - 1, (made[-1][0],))
    assert cache_file.load(tmp_path / "layouts") == made[:-1]


def plain_kernel(scale):
    return lambda q, k, v: blockwise.forward(q, k, v, is_causal=False, scale=scale)


class Minimal:
    """A dense kernel without causal, gqa, backward: ten lines, and every pattern."""

    @ls.hookimpl
    def longspan_capabilities(self):
        return ls.Capabilities(devices=("cpu",), dtypes=("float64",), patterns=("dense",))

    @ls.hookimpl
    def longspan_kernel(self, problem):
        assert not problem.is_causal and problem.pattern.kind == "dense"
        return plain_kernel(problem.scale)


def test_a_kernel_that_knows_no_causal_mask_runs_causal_layouts(register):
    register(Minimal(), "minimal")
    tensors = qkv(n=45, heads=4, kv_heads=2)
    for pattern in (BUILT["bigbird"].causal(), BUILT["local"].causal(), ls.BlockSparse(8, "causal")):
        check(tensors, pattern, "minimal", enable_gqa=True)


class Aliasing(Minimal):
    """With one key, the answer is the value: it returns its input. And its memory is kept for the next call."""

    arena = BufferArena(threshold=1)

    @ls.hookimpl
    def longspan_allocator(self):
        return self.arena

    @ls.hookimpl
    def longspan_kernel(self, problem):
        usual = plain_kernel(problem.scale)
        return lambda q, k, v: (v, (q * k).sum(-1) * problem.scale) if k.shape[2] == 1 == q.shape[2] else usual(q, k, v)


def test_a_kernel_may_return_its_input(register):
    register(Aliasing(), "aliasing")
    csr = ls.BlockCSR(1, 8, 8, torch.arange(9), torch.tensor([3, 1, 0, 2, 7, 4, 6, 5]))
    tensors = qkv(n=8)
    made = ls.plan(ls.Problem.like(*tensors, ls.BlockSparse(1, csr)), "aliasing")
    first = made(*tensors)[0]
    kept = first.clone()
    made(*[x + 1 for x in tensors])
    assert_same([first], [kept])


class Native(Minimal):
    """Takes block-sparse problems itself, forward alone, from the core's layout."""

    kinds: tuple[str, ...] = ("dense", "block_sparse")

    @ls.hookimpl
    def longspan_capabilities(self):
        return ls.Capabilities(devices=("cpu",), dtypes=("float64",), patterns=self.kinds)

    @ls.hookimpl
    def longspan_kernel(self, problem, layout):
        if problem.pattern.kind == "dense":
            return plain_kernel(problem.scale)
        assert isinstance(layout, BlockLayout)
        mask = torch.stack([layout.blocks[0][head].to_dense() for head in range(problem.heads)])
        return lambda q, k, v: blockwise.forward(q, k, v, is_causal=False, scale=problem.scale, mask=mask)


class OnlyNative(Native):
    kinds = ("block_sparse",)


@pytest.mark.parametrize("kind", [Native, OnlyNative])
def test_a_native_kernel_gets_the_blocks_and_the_core_its_backward(register, kind):
    register(kind(), "native")
    tensors = qkv(n=45)
    for pattern in (BUILT["bigbird"], BUILT["per-head"], ls.BlockSparse(8, "all")):
        check(tensors, pattern, "native")


@pytest.mark.parametrize("backend", ["flex", "torch_sparse", "block_sparse_batched"])
def test_backends_are_asked_about_the_launches_not_about_the_whole(backend):
    """Heads of 65,536 tokens are beyond them; launches of blocks are not."""
    problem = ls.Problem(batch=1, heads=2, q_len=65536, head_dim=16, pattern=ls.bigbird(block_size=64))
    assert ls.explain(problem, backend=backend)[backend].ok
    assert not ls.explain(problem.replace(pattern=ls.Dense()), backend=backend)[backend].ok
