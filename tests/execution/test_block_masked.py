"""Block-sparse patterns as dense attention under a mask: the same answers, taken where the model says that it pays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_block_execution import BUILT, check

import longspan as ls
from drawn import patterns
from longspan.lowering import cost, masked
from longspan.lowering.cost import Costs
from longspan.lowering.dense import lay_blocks
from longspan.lowering.masked import MaskedLayout, masked_layout, masked_pairs
from longspan.planning.attention import forget
from small import assert_same, qkv, randn


@pytest.fixture(autouse=True)
def as_masked(monkeypatch):
    """Under a mask whatever it costs, in slabs so small that there are several."""
    monkeypatch.setattr(
        cost, "model", lambda problem, layout, can: Costs(1.0, 0.0) if can.mask and layout.pairs else None
    )
    monkeypatch.setattr(masked, "ROWS", 24)
    monkeypatch.setattr(masked, "KEYS", 16)
    monkeypatch.setattr("longspan.execution.kernel.LEASED", 100)
    forget()
    yield
    forget()


def planned(tensors, pattern, **given):
    return ls.plan(ls.Problem.like(*tensors, pattern, **given), "sdpa")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", BUILT)
def test_every_builder(name, is_causal):
    tensors = qkv(batch=2, heads=4, n=45, dim=4)
    check(tensors, BUILT[name], "sdpa", is_causal=is_causal)
    assert isinstance(planned(tensors, BUILT[name], is_causal=is_causal).layout, MaskedLayout)


@settings(deadline=None, max_examples=60)
@given(pattern=patterns, n=st.integers(1, 60), is_causal=st.booleans())
def test_any_composition(pattern, n, is_causal):
    check(qkv(batch=1, heads=3, n=n, dim=3), pattern, "sdpa", is_causal=is_causal)


@pytest.mark.parametrize("name", ["bigbird", "gaps", "per-head", "tokens"])
def test_shared_keys_offsets_documents_and_dropout(name):
    pattern = BUILT[name]
    tensors = qkv(batch=2, heads=4, kv_heads=2, n=45, dim=4)
    check(tensors, pattern, "sdpa", enable_gqa=True, is_causal=True)
    check(tensors, pattern, "sdpa", enable_gqa=True, cu_seqlens=(0, 17, 17, 18, 45))
    few = [tensors[0][:, :, :19], *tensors[1:]]
    check(few, pattern, "sdpa", enable_gqa=True, is_causal=True, query_offset=21)
    torch.manual_seed(0)
    dropped = [ls.attention(*tensors, pattern, enable_gqa=True, dropout_p=0.3, backend="sdpa")]
    torch.manual_seed(0)
    wanted = [ls.attention(*tensors, pattern, enable_gqa=True, dropout_p=0.3, backend="reference")]
    torch.testing.assert_close(dropped, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_bad_reaches_those_that_see_it_and_leaves_the_others_bits(bad, which):
    pattern = BUILT["random"]
    tensors = qkv(batch=2, heads=4, kv_heads=2, n=45, dim=4, dtype=torch.float32)
    dout = randn(2, 4, 45, 4, dtype=torch.float32, seed=5)
    dirty = [x.clone() for x in tensors]
    dirty[which][0, 1, 20, 2] = bad
    sees = pattern.to_dense(45, heads=4)
    results = []
    for given_ in (tensors, dirty):
        leaves = [x.clone().requires_grad_() for x in given_]
        out, lse = ls.attention(*leaves, pattern, enable_gqa=True, backend="sdpa", return_lse=True)
        results.append((out, lse, *torch.autograd.grad(out, leaves, dout)))
    heads = [1] if which == 0 else [2, 3]
    rows = torch.zeros(2, 4, 45, dtype=torch.bool)
    keys = torch.zeros(2, 2, 45, dtype=torch.bool)
    for head in heads:
        rows[0, head] = torch.arange(45) == 20 if which == 0 else sees[head][:, 20]
        keys[0, head // 2] |= sees[head][rows[0, head]].any(0)
    if which:
        keys[0, 1, 20] = True
    for number, (one, other) in enumerate(zip(*results, strict=True)):
        touched = rows if number < 3 else keys
        assert torch.equal(one[~touched], other[~touched]), number
    assert not results[1][0][rows].isfinite().all()


def test_a_row_without_keys_is_zero_and_others_sum_to_one():
    pattern = BUILT["gaps"]
    query, key, _ = qkv(batch=1, heads=2, n=45, dim=4)
    out, lse = ls.attention(query, key, torch.ones_like(key), pattern, is_causal=True, backend="sdpa", return_lse=True)
    empty = ~pattern.to_dense(45, heads=2, is_causal=True).any(-1)
    assert empty.any() and torch.equal(empty[None], lse == -torch.inf)
    torch.testing.assert_close(out, (~empty[None, ..., None]).to(out).expand_as(out), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BUILT)
def test_slabs_count_what_they_compute(name):
    for given_ in ({}, {"is_causal": True}, {"documents": (0, 17, 45)}, {"query_offset": 13, "q_len": 20}):
        shape = {"batch": 1, "heads": 4, "q_len": 45, "kv_len": 45, "head_dim": 4, **given_}
        problem = ls.Problem(pattern=BUILT[name], **shape)
        layout = lay_blocks(problem)
        assert masked_layout(problem, layout).pairs == masked_pairs(layout)


def test_a_later_token_changes_no_earlier_bit():
    tensors = qkv(batch=1, heads=4, n=45, dim=4, dtype=torch.float32)
    before = ls.attention(*tensors, BUILT["random"], is_causal=True, backend="sdpa", return_lse=True)
    for token in (5, 23, 44):
        other = [x.clone() for x in tensors]
        for one in other:
            one[:, :, token:] = 9.0
        after = ls.attention(*other, BUILT["random"], is_causal=True, backend="sdpa", return_lse=True)
        assert_same([x[:, :, :token] for x in after], [x[:, :, :token] for x in before])


@pytest.mark.parametrize("backend", ["sdpa", "block_sparse_batched", "cpu_fused", "reference"])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("number", [3e38, -3e38, torch.nan])
def test_what_overflows_stays_with_those_that_see_it(number, which, backend):
    pattern = ls.local_blocks(9, 11, 8)
    tensors = qkv(batch=1, heads=1, n=48, dim=16, dtype=torch.float32)
    tensors[0][..., 0] = 10.0
    dirty = [x.clone() for x in tensors]
    dirty[which][0, 0, 47, 0] = number
    results = []
    for given_ in (tensors, dirty):
        leaves = [x.clone().requires_grad_() for x in given_]
        out, lse = ls.attention(*leaves, pattern, is_causal=True, backend=backend, return_lse=True)
        dout = torch.ones_like(out)
        results.append((out, lse, *torch.autograd.grad(out, leaves, dout)))
    for at, (one, other) in enumerate(zip(*results, strict=True)):
        rows = 47 if at < 3 else 38  # the last query sees the last ten keys
        assert torch.equal(one[:, :, :rows], other[:, :, :rows]), at


@pytest.mark.parametrize("dim", [1, 16, 33])
@pytest.mark.parametrize("backend", ["sdpa", "block_sparse_batched"])
def test_another_head_keeps_its_bits_in_packed_tensors_too(dim, backend):
    packed = randn(257, 3, 2, dim, dtype=torch.float32)
    dirty = packed.clone()
    dirty[256, 2, 0, 0] = torch.nan
    results = []
    for one in (packed, dirty):
        leaves = [x[None].requires_grad_() for x in one.permute(1, 2, 0, 3)]
        out = ls.attention(*leaves, ls.local_blocks(20, 20, 8), backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one[:, 1], other[:, 1])


@pytest.mark.parametrize("backend", ["sdpa", "block_sparse_batched", "reference"])
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_the_dense_causal_backward_keeps_bits_too(which, backend):
    tensors = [
        *qkv(batch=2, heads=2, n=32, dim=16, dtype=torch.float32),
        randn(2, 2, 32, 16, dtype=torch.float32, seed=4),
    ]
    dirty = [x.clone() for x in tensors]
    dirty[which][1, 1, 20, 3] = torch.nan
    grads = []
    for given_ in (tensors, dirty):
        leaves = [x.clone().requires_grad_() for x in given_[:3]]
        out = ls.attention(*leaves, is_causal=True, backend=backend)
        grads.append(torch.autograd.grad(out, leaves, given_[3]))
    for at, (one, other) in enumerate(zip(*grads, strict=True)):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1, 0], other[1, 0]), at
        if at == 0:
            assert torch.equal(one[1, 1, :20], other[1, 1, :20])
        elif which in (0, 3):
            assert torch.equal(one[1, 1, 21:], other[1, 1, 21:]), at


@pytest.mark.parametrize("backend", ["sdpa", "block_sparse_batched", "cpu_fused", "reference"])
def test_a_head_without_any_block(backend):
    near = ls.local_blocks(7, 7, 4)
    tensors = qkv(batch=2, heads=2, n=8, dim=4, dtype=torch.float32)
    out, lse = ls.attention(*tensors, ls.per_head([near, near & ~near]), backend=backend, return_lse=True)
    assert not out[:, 1].any() and bool((lse[:, 1] == -torch.inf).all()) and bool(out[:, 0].any())
