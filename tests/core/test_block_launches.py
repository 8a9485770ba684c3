"""How many operators a block-sparse forward takes on batched products, counted by the profiler."""

from __future__ import annotations

import torch
from test_builtin_backends import launches

import longspan as ls
from small import qkv

VIEWS = ("aten::unflatten", "aten::set_")
"""Further operators that launch nothing: the second puts a tensor on memory that is kept."""


def counted(pattern, n, **given):
    tensors = qkv(batch=1, heads=2, n=n, dim=16, dtype=torch.float32)
    made = ls.plan(ls.Problem.like(*tensors, pattern, **given), backend="block_sparse_batched")
    made(*tensors)
    return [one for one in launches(lambda: made(*tensors)) if one not in VIEWS]


def test_full_blocks_in_equal_numbers_take_at_most_ten_launches_however_many():
    for pattern in (ls.random_blocks(0.25, 16), ls.strided_blocks(4, 16)):
        found = [counted(pattern, n) for n in (128, 512, 1024)]
        assert found[0] == found[1] == found[2]
        assert {"aten::baddbmm", "aten::bmm"} <= set(found[0])
        assert len(found[0]) <= 10, found[0]


def test_partial_blocks_take_the_core_s_launches_beside_and_a_merge():
    """Counted, not bounded by ten: a window's rows are full blocks in one call, partial ones in another, merged."""
    found = [counted(ls.local_blocks(40, block_size=16), n) for n in (512, 1024, 2048)]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 10
