"""The block-sparse problem by which `TopKBlocks` is resolved, before anything is chosen."""

from __future__ import annotations

import torch

from longspan.patterns.blocks.csr import BlockCSR
from longspan.patterns.blocks.grid import on_cpu
from longspan.patterns.blocks.masks import FULL, Tiles
from longspan.patterns.blocks.sparse import BlockSparse
from longspan.patterns.topk.pattern import TopKBlocks, scorings
from longspan.spec.pattern import Dense
from longspan.spec.problem import Problem

__all__ = ["stand_in"]


@on_cpu
def stand_in(problem: Problem) -> Problem:
    """A block-sparse problem that costs as much, for resolving: its longest document, every row with adjacent blocks.

    Batch entries count as heads, since each has a layout of its own.
    """
    pattern = problem.pattern
    assert isinstance(pattern, TopKBlocks)
    found = scorings(problem)
    if not found:
        return problem.replace(pattern=Dense(), documents=None)
    scoring = max((one for _, one in found), key=lambda one: one.kv_len)
    grid, kept = scoring.grid, min(pattern.k, scoring.columns)
    near = torch.arange(kept, dtype=torch.int64, device="cpu")
    own = grid.row_numbers().clamp(max=grid.columns - 1)[:, None]
    tiles = Tiles(grid.block_size)
    if problem.is_causal:
        columns = (own - near.flip(0)).flatten()
    else:
        columns = ((own - kept // 2).clamp(min=0, max=grid.columns - kept) + near).flatten()
    keys = torch.arange(grid.rows, dtype=torch.int64, device="cpu").repeat_interleave(kept) * grid.columns + columns
    states = torch.full_like(keys, FULL)
    if problem.is_causal:
        diagonal = tiles.add(torch.ones(1, grid.block_size, grid.block_size, dtype=torch.bool, device="cpu").tril_())
        states = torch.where(keys // grid.columns + grid.first_row == columns, diagonal, states)
        keys, states = keys[columns >= 0], states[columns >= 0]
    csr = BlockCSR.of(grid, keys, states, tiles)
    return problem.replace(
        pattern=BlockSparse(pattern.block_size, csr),
        batch=1,
        heads=problem.batch * problem.heads,
        kv_heads=problem.batch * problem.kv_heads,
        q_len=scoring.q_len,
        kv_len=scoring.kv_len,
        is_causal=False,
        documents=None,
    )
