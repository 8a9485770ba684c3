"""Whether blocks pay: the model, what is taken by it, and what explain says of it."""

from __future__ import annotations

import longspan as ls
from longspan.lowering.blocks import BlockLayout
from longspan.lowering.masked import MaskedLayout


def test_the_mask_is_taken_where_blocks_would_not_pay():
    def layout(pattern, dtype="float32", backend="sdpa", **more):
        shape = {"batch": 1, "heads": 8, "q_len": 8192, "head_dim": 64, **more}
        return ls.plan(ls.Problem(pattern=pattern, dtype=dtype, **shape), backend).layout

    sparse, dense = ls.random_blocks(0.1, 128), ls.random_blocks(0.95, 128)
    assert isinstance(layout(sparse), BlockLayout)
    assert isinstance(layout(dense), MaskedLayout)
    assert isinstance(layout(dense, backend="block_sparse_batched"), BlockLayout)
    half = ls.random_blocks(0.6, 128)
    assert isinstance(layout(half), BlockLayout)
    assert isinstance(layout(half, "bfloat16", requires_grad=True), MaskedLayout)  # short tiles cost its backward more


def test_explain_says_what_was_modelled():
    shape = {"batch": 1, "heads": 8, "q_len": 8192, "head_dim": 64}
    for density, words in (
        (0.95, "sdpa runs dense attention under a mask"),
        (0.1, "sdpa runs 3,072 full blocks of 128"),
    ):
        problem = ls.Problem(pattern=ls.random_blocks(density, 128), **shape)
        said = " ".join(ls.explain(problem, backend="sdpa").notes)
        assert words in said
        assert "of dense attention's time as blocks" in said
    device = ls.explain(ls.Problem(pattern=ls.random_blocks(0.95, 128), **shape), "sm_90", backend="sdpa")
    assert "modelled" not in " ".join(device.notes)
