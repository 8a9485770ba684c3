"""From a rule to its blocks, in time and memory that grow with what its parts list, never with the grid."""

from __future__ import annotations

from functools import reduce

import torch

from longspan.numerics.tensors import counting
from longspan.patterns.blocks.grid import Grid
from longspan.patterns.blocks.masks import MaskTable, all_full
from longspan.patterns.blocks.rules import And, Local, Not, Or, Rule
from longspan.patterns.blocks.sets import Band, BlockSet, complement, everything, intersect, listed

__all__ = ["evaluate"]


def evaluate(rule: Rule, grid: Grid, table: MaskTable) -> BlockSet:
    """The blocks that a rule without heads keeps on a grid, listed, in O(what is listed of its parts)."""
    if not grid.rows or not grid.columns:
        return BlockSet(
            torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(0, dtype=torch.int64, device="cpu")
        )
    kept = _evaluate(rule, False, grid, table)
    return everything(grid, complement(kept), table) if kept.absent else kept


def _evaluate(rule: Rule, flipped: bool, grid: Grid, table: MaskTable) -> BlockSet:
    """A rule's blocks, or with `flipped` those of its complement."""
    while isinstance(rule, Not):
        rule, flipped = rule.rule, not flipped
    if isinstance(rule, And):
        kept = _meet([(part, False) for part in rule.rules], grid, table)
    elif isinstance(rule, Or):  # a | b is ~(~a & ~b)
        kept = complement(_meet([(part, True) for part in rule.rules], grid, table))
    elif rule.unit is None or rule.unit == grid.block_size:
        kept = rule.blocks(grid, table)
    else:
        kept = _refined(rule, grid, table)
    return complement(kept) if flipped else kept


def _meet(parts: list[tuple[Rule, bool]], grid: Grid, table: MaskTable) -> BlockSet:
    """The blocks of all parts (flipped where so marked). Bands are not listed where something smaller is met."""
    within: Band | None = None
    outside: list[Band] = []
    sets: list[BlockSet] = []
    while parts:
        rule, flipped = parts.pop()
        if isinstance(rule, Not):
            parts.append((rule.rule, not flipped))
        elif isinstance(rule, Or if flipped else And):
            parts.extend((part, flipped) for part in rule.rules)
        elif isinstance(rule, Local) and not flipped:
            band = Band(rule.left, rule.right)
            within = band if within is None else within.meet(band)
        elif isinstance(rule, Local):
            outside.append(Band(rule.left, rule.right))
        else:
            sets.append(_evaluate(rule, flipped, grid, table))
    if within is not None and all(blocks.absent for blocks in sets):
        sets.append(within.blocks(grid, table))
        within = None
    if all(blocks.absent for blocks in sets):
        sets += [complement(band.blocks(grid, table)) for band in outside]
        outside = []
    sets.sort(key=lambda blocks: (blocks.absent, len(blocks.keys)))
    kept = reduce(lambda a, b: intersect(a, b, table), sets)
    if within is not None:
        kept = listed(kept.keys, table.meet(kept.states, within.at(grid, table, kept.keys)))
    for band in outside:
        kept = listed(kept.keys, table.without(kept.states, band.at(grid, table, kept.keys)))
    return kept


def _refined(rule: Rule, grid: Grid, table: MaskTable) -> BlockSet:
    """The blocks of a rule whose blocks are larger than the grid's, cut up."""
    assert rule.unit is not None
    size, times = grid.block_size, rule.unit // grid.block_size
    coarse, coarse_table = grid.scaled(rule.unit), MaskTable(rule.unit)
    large = rule.blocks(coarse, coarse_table)
    fine = [all_full(1, times, times)]
    for part in torch.split(coarse_table.masks, coarse_table.chunk):
        cut = part.view(-1, times, size, times, size).transpose(2, 3).reshape(-1, size, size)
        fine.append(table.add(cut).view(-1, times, times))
    step = counting(times)
    row = (large.keys // coarse.columns + coarse.first_row) * times - grid.first_row
    rows = row[:, None, None] + step[:, None]
    columns = (large.keys % coarse.columns * times)[:, None, None] + step[None, :]
    there = (rows >= 0) & (rows < grid.rows) & (columns < grid.columns)
    keys, order = (rows * grid.columns + columns)[there].sort()
    return listed(keys, torch.cat(fine)[large.states][there][order])
