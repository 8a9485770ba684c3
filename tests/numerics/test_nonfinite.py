"""What a row may not see, be it inf in half precision, changes no bit of the row."""

from __future__ import annotations

import math

import pytest
import torch

import longspan as ls
from longspan import containment
from longspan.testing import cases_for, run_case
from longspan_plugins import sdpa
from longspan_plugins.sdpa import tiles

BAD = (math.inf, -math.inf, math.nan)
N, HIDDEN = 64, 40
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)


def tensors(dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, N, 16, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]


@each_dtype
@pytest.mark.parametrize("bad", BAD)
def test_a_bound_beyond_the_dtype_still_finds_inf(dtype, bad):
    rows = torch.ones(1, 1, 3, 2, dtype=dtype)
    rows[0, 0, 1, 0] = bad
    assert containment._bad(rows, 2.3e18).view(3).tolist() == [False, True, False]
    assert containment._bad(rows, math.inf).view(3).tolist() == [False, True, False]


@each_dtype
@pytest.mark.parametrize("backend", ["sdpa", "block_sparse_batched", "reference"])
@pytest.mark.parametrize("pattern", [ls.Dense(), ls.local_blocks(2, 0, block_size=8)], ids=["dense", "block_sparse"])
@pytest.mark.parametrize("bad", BAD)
def test_past_rows_and_their_gradients_stay_finite(dtype, backend, pattern, bad):
    q, k, v, dout = tensors(dtype)
    dout[:, :, HIDDEN:] = 0
    for which in (1, 2):
        edited = [q.clone(), k.clone(), v.clone()]
        edited[which][:, :, -1, 3] = bad
        for one in edited:
            one.requires_grad_()
        out, lse = ls.attention(*edited, pattern, is_causal=True, backend=backend, return_lse=True)
        (dquery,) = torch.autograd.grad(out, edited[:1], dout)
        for one in (out, lse, dquery):
            assert bool(one[:, :, :HIDDEN].isfinite().all())


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [512, 700])
def test_widened_tiles_keep_the_bits_of_the_past(monkeypatch, bad, n, dtype):
    """What serves dense float16 attention where there is no C compiler, and all half precision on GPUs without it."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 2**14)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, n, 32, generator=generator).to(dtype) for _ in range(3))
    kernel = sdpa.widened(ls.Problem.like(q, k, v, is_causal=True))
    out, lse = kernel.forward(q, k, v)
    for which in (1, 2):
        edited = [q, k.clone(), v.clone()]
        edited[which][:, 1, n - 90, 5] = bad
        new, new_lse = kernel.forward(*edited)
        assert torch.equal(new[:, :, : n - 90], out[:, :, : n - 90]) and torch.equal(new[:, 0], out[:, 0])
        assert torch.equal(new_lse[:, :, : n - 90], lse[:, :, : n - 90])
        assert which == 1 or not bool(new[:, 1, n - 90 :, 5].isfinite().any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_a_score_of_inf_makes_nan_not_zero(dtype, causal):
    q, k, v, _ = (one.abs() for one in tensors(dtype))
    k[0, 1, HIDDEN, 2] = math.inf
    out, lse = ls.attention(q, k, v, is_causal=causal, backend="sdpa", return_lse=True)
    first = HIDDEN if causal else 0
    assert bool(out[:, 1, first:].isnan().all()) and bool(lse[:, 1, first:].isnan().all())
    assert bool(out[:, 0].isfinite().all()) and bool(out[:, 1, :first].isfinite().all())


def test_a_copy_lies_as_the_tensor_does():
    base = torch.arange(2.0 * 5 * 3 * 7).view(2, 5, 3, 7)
    repeated = base[:1, :, :1].expand(4, 5, 3, 7)
    for tensor in (base, base.transpose(1, 2), base[:, 1:, :, 2:6], base[..., 1::2], repeated, base[:, :0]):
        bad = tensor == 9.0
        found = containment.without(tensor, bad)
        assert torch.equal(found, tensor.masked_fill(bad, 0.0)) and found.stride() == tensor.stride()
        assert not tensor.numel() or found.data_ptr() % 64 == tensor.data_ptr() % 64


class Multiplies:
    """A backend whose backward multiplies what it hides with weights of 0."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        self.devices = devices

    @ls.hookimpl
    def longspan_capabilities(self):
        return ls.Capabilities(
            devices=("cpu",),
            dtypes=("float32",),
            patterns=("dense",),
            causal=True,
            backward=True,
            contains_nonfinite=self.devices,
        )

    @ls.hookimpl
    def longspan_kernel(self, problem):
        given = {"is_causal": problem.is_causal, "scale": problem.scale}

        def backward(dout, query, key, value, out, lse):
            scores = query @ key.mT * problem.scale
            if problem.is_causal:
                scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
            weights = (scores - lse.unsqueeze(-1)).exp()
            slope = weights * (dout @ value.mT - (dout * out).sum(-1, keepdim=True)) * problem.scale
            return slope @ key, slope.mT @ query, weights.mT @ dout

        return ls.Kernel(lambda q, k, v: ls.blockwise.forward(q, k, v, **given), backward)


@pytest.mark.parametrize("devices", [(), ("cpu",), ("cuda",)])
def test_the_kit_tests_the_claim_where_it_is_made(devices):
    ls.register(Multiplies(devices), name="multiplies")
    try:
        cases = [case for case in cases_for("multiplies", quick=True) if case.check == "contain"]
        outcomes = [run_case("multiplies", case) for case in cases]
    finally:
        ls.unregister("multiplies")
    assert [one.status for one in outcomes] == ["failed"] * (devices == ("cpu",))
    for one in outcomes:
        assert one.claim.field == "contains_nonfinite" and "numbers of d" in one.reason
