"""What a row may not see, be it inf in half precision, changes no bit of the row."""

from __future__ import annotations

import math

import pytest
import torch

import longspan as ls
from longspan import containment

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
    assert containment._bad(rows, 2.3e18).tolist() == [[[[False], [True], [False]]]]
    assert containment._bad(rows, math.inf).tolist() == [[[[False], [True], [False]]]]


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
