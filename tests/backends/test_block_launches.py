"""How many operators a block-sparse forward takes on batched products, counted by the profiler."""

from __future__ import annotations

import pytest
import torch
from test_builtin_backends import launches

import longspan as ls
from small import qkv

VIEWS = ("aten::unflatten", "aten::set_", "aten::unbind", "aten::item")
"""Further operators that launch nothing: the second puts a tensor on memory that is kept, the last reads a number."""

PATTERNS = {
    "random": (ls.random_blocks(0.25, 16), {}),
    "random-causal": (ls.random_blocks(0.25, 16) | ls.local_blocks(20, 0, 16), {"is_causal": True}),
    "strided": (ls.strided_blocks(4, 16), {}),
    "window": (ls.local_blocks(40, block_size=16), {}),
    "causal-window": (ls.local_blocks(40, 0, block_size=16), {"is_causal": True}),
    "heads": (ls.per_head([ls.local_blocks(40, block_size=16), ls.strided_blocks(4, 16)]), {}),
    "uneven": (ls.random_blocks(0.4, 16) & ~ls.random_blocks(0.2, 16, seed=1) | ls.local_blocks(3, 3, 16), {}),
}


def counted(pattern, n, **given):
    tensors = qkv(batch=1, heads=2, n=n, dim=16, dtype=torch.float32)
    made = ls.plan(ls.Problem.like(*tensors, pattern, **given), backend="block_sparse_batched")
    made(*tensors)
    return [one for one in launches(lambda: made(*tensors)) if one not in VIEWS]


@pytest.mark.parametrize("name", PATTERNS)
def test_at_most_ten_launches_however_many_blocks(name):
    pattern, more = PATTERNS[name]
    for n in (128, 512, 1024, 2048):
        found = counted(pattern, n, **more)
        assert {"aten::baddbmm", "aten::baddbmm_"} & set(found) and "aten::bmm" in found
        assert len(found) <= 10, (n, found)


def test_queries_without_keys_take_two_more():
    found = counted(ls.local_blocks(40, block_size=16) & ~ls.local_blocks(16, 0, 16), 512, is_causal=True)
    assert 10 < len(found) <= 12, found


def test_rows_of_very_unequal_numbers_of_blocks_are_few_batches():
    """Some rows that see everything would have all others padded to as many blocks."""
    found = [counted(ls.bigbird(block_size=16), n) for n in (1024, 2048)]
    for one in found:  # ten for each batch of rows, which reads its queries and writes both results, and both at first
        assert len(one) <= 2 + 3 * (10 + 3), one


def test_ragged_blocks_come_as_dense_launches():
    """Counted, not bounded by ten: a window's rows are full blocks in one call, partial ones in another, merged."""
    found = [counted(ls.local_blocks(40, block_size=16), n) for n in (500, 1012, 2036)]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 10
