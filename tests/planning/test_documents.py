"""A packed batch equals its documents computed one by one, bit for bit on the same backend, forward and backward."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import longspan as ls
from small import randn

BACKENDS = ("sdpa", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
PATTERNS = {
    "dense": ls.Dense(),
    "all": ls.Dilated((4, 16), (1, 3)),
    "block": ls.Dilated((7, 20), (2, 3), offset="block"),
    "grouped": ls.Dilated((4, 16), (1, 3), heads="grouped"),
    "window": ls.SlidingWindow(5, 2),
    "one side": ls.SlidingWindow(9, 0),
    "itself": ls.SlidingWindow(0, 0),
}
BOUNDS = (0, 1, 1, 8, 29, 61, 64, 93, 100)
N = 104  # four tokens in no document

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_pattern = pytest.mark.parametrize("name", PATTERNS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
either_causal = pytest.mark.parametrize("causal", [False, True])


def qkv(dtype, batch=2, heads=4, kv_heads=4, n=N, dim=16):
    shapes = (heads, kv_heads, kv_heads)
    return [randn(batch, h, n, dim, seed=i, dtype=dtype).requires_grad_() for i, h in enumerate(shapes)]


def run(tensors, dout, dlse, pattern, **given):
    """out, lse, gradients from out alone, gradients from out and lse."""
    out, lse = ls.attention(*tensors, pattern, return_lse=True, enable_gqa=True, **given)
    alone = torch.autograd.grad(out, tensors, dout, retain_graph=True)
    both = torch.autograd.grad((out, lse), tensors, (dout, dlse))
    return [out.detach(), lse.detach(), *alone, *both]


WHAT = ("out", "lse", "dquery", "dkey", "dvalue", "dquery with dlse", "dkey with dlse", "dvalue with dlse")


def check(tensors, pattern, bounds, one_by_one, **given):
    shape = tensors[0].shape
    dout = randn(*shape, seed=7, dtype=tensors[0].dtype)
    dlse = randn(*shape[:3], seed=8, dtype=torch.float64 if dout.dtype == torch.float64 else torch.float32)
    packed = run(tensors, dout, dlse, pattern, cu_seqlens=bounds, **given)
    assert packed[0].any() and packed[4].any(), "nothing to compare"
    for start, stop in pairwise(bounds):
        if start == stop:
            continue
        rows = (slice(None), slice(None), slice(start, stop))
        mine = [one_by_one(x.detach()[rows]).requires_grad_() for x in tensors]
        alone = run(mine, dout[rows], dlse[rows], pattern, **given)
        for got, want, what in zip(packed, alone, WHAT, strict=True):
            assert torch.equal(got[rows], want), f"{what} of the document from {start} to {stop}"
    outside = torch.ones(shape[2], dtype=torch.bool)
    outside[: bounds[-1]] = False
    out, lse, *grads = packed
    assert not out[:, :, outside].any() and (lse[:, :, outside] == -torch.inf).all()
    assert not any(x[:, :, outside].any() for x in grads)


@each_backend
@each_pattern
@either_causal
@each_dtype
@pytest.mark.parametrize("dim, kv_heads", [(16, 4), (16, 2), (64, 4)])
def test_a_packed_batch_is_its_documents(backend, name, causal, dtype, dim, kv_heads):
    """Each document as a tensor of its own, as a user who does not pack would have it."""
    tensors = qkv(dtype, dim=dim, kv_heads=kv_heads)
    check(tensors, PATTERNS[name], BOUNDS, torch.clone, is_causal=causal, backend=backend)


@each_backend
@each_pattern
@each_dtype
def test_so_it_is_in_views(backend, name, dtype):
    """Documents as slices of the packed tensors, and everything as a model has it: heads before tokens in name only."""
    tensors = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv(dtype)]
    check(tensors, PATTERNS[name], BOUNDS, lambda x: x, is_causal=True, backend=backend)


@each_backend
@pytest.mark.parametrize("name", ["dense", "all", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_so_are_longer_documents(backend, name, dtype):
    pattern = {"all": ls.Dilated((64, 256), (1, 3)), "window": ls.SlidingWindow(50, 20)}.get(name, PATTERNS[name])
    tensors = qkv(dtype, batch=1, n=1000, dim=64, kv_heads=2)
    check(tensors, pattern, (0, 333, 334, 590, 1000), torch.clone, is_causal=True, backend=backend)


@each_backend
@each_pattern
def test_how_the_others_are_cut_changes_nothing(backend, name):
    """One document's results do not depend on what is packed beside it, nor where."""
    first, middle, last = qkv(torch.float32, n=9), qkv(torch.float32, n=32), qkv(torch.float32, n=17)
    given = {"is_causal": True, "backend": backend, "return_lse": True}
    results = []
    for parts in ([first, middle, last], [middle, last], [last, first, middle], [middle]):
        packed = [torch.cat(x, 2).detach() for x in zip(*parts, strict=True)]
        bounds = [0]
        for part in parts:
            bounds.append(bounds[-1] + part[0].shape[2])
        place = next(i for i, part in enumerate(parts) if part is middle)
        rows = slice(bounds[place], bounds[place + 1])
        out, lse = ls.attention(*packed, PATTERNS[name], cu_seqlens=tuple(bounds), **given)
        results.append((out[:, :, rows], lse[:, :, rows]))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@each_backend
@each_pattern
@either_causal
def test_one_document_that_is_everything_is_no_documents(backend, name, causal):
    tensors = qkv(torch.float32, n=50)
    given = {"is_causal": causal, "backend": backend}
    dout = randn(2, 4, 50, 16, seed=7, dtype=torch.float32)
    whole = ls.attention(*tensors, PATTERNS[name], **given)
    for bounds in ((0, 50), (0, 0, 50, 50)):
        packed = ls.attention(*tensors, PATTERNS[name], cu_seqlens=bounds, **given)
        assert torch.equal(packed, whole)
        for one, other in zip(*(torch.autograd.grad(x, tensors, dout, True) for x in (packed, whole)), strict=True):
            assert torch.equal(one, other)


@each_backend
@each_pattern
def test_documents_do_not_see_each_other(backend, name):
    """Whatever stands in the others, NaN included, in the forward and in the gradients."""
    tensors = qkv(torch.float32)
    given = {"is_causal": True, "backend": backend, "cu_seqlens": BOUNDS}
    dout = randn(2, 4, N, 16, seed=7, dtype=torch.float32)
    out = ls.attention(*tensors, PATTERNS[name], **given)
    grads = torch.autograd.grad(out, tensors, dout)
    for start, stop in ((29, 61), (1, 8)):
        others = torch.ones(N, dtype=torch.bool)
        others[start:stop] = False
        for bad in (7.0, float("nan")):
            edited = [x.detach().clone() for x in tensors]
            for x in edited:
                x[:, :, others] = bad
            edited = [x.requires_grad_() for x in edited]
            new = ls.attention(*edited, PATTERNS[name], **given)
            assert torch.equal(new[:, :, ~others], out[:, :, ~others])
            for one, other in zip(torch.autograd.grad(new, edited, dout), grads, strict=True):
                assert torch.equal(one[:, :, ~others], other[:, :, ~others])


def test_the_bounds_may_come_in_any_form():
    tensors = qkv(torch.float32)
    forms = [
        BOUNDS,
        list(BOUNDS),
        *(torch.tensor(BOUNDS, dtype=dtype) for dtype in (torch.int32, torch.int64)),
        torch.tensor([[bound, 0] for bound in BOUNDS])[:, 0],
    ]
    results = [ls.attention(*tensors, PATTERNS["all"], is_causal=True, cu_seqlens=form) for form in forms]
    assert all(torch.equal(one, results[0]) for one in results[1:])
