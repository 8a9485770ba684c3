"""The one true form of a layout: equal pairs have equal states, masks and numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.patterns.blocks.grid import Grid
from longspan.patterns.blocks.masks import FULL, Tiles

__all__ = ["clip", "renumber"]


def clip(grid: Grid, keys: Tensor, states: Tensor, tiles: Tiles) -> Tensor:
    """States in which no pair outside the sequence has a say: only blocks at ragged ends may change."""
    size, rows, columns = grid.block_size, grid.rows, grid.columns
    edges = torch.zeros_like(states)
    if not len(keys):
        return states
    if grid.query_offset % size:
        edges[: int(torch.searchsorted(keys, columns))] += 1
    if (grid.query_offset + grid.q_len) % size:
        edges[int(torch.searchsorted(keys, (rows - 1) * columns)) :] += 2
    if grid.kv_len % size:
        edges += 4 * (keys % columns == columns - 1)
    where = ((edges > 0) & (states > FULL)).nonzero().squeeze(1)
    if not len(where):
        return states
    states = states.clone()
    base = tiles.count + 1
    codes, inverse = torch.unique(edges[where] * base + states[where], return_inverse=True)
    found = []
    for part in torch.split(codes, tiles.chunk):
        masks = tiles.expand(part % base)
        for edge in range(1, 8):
            mine = part // base == edge
            if bool(mine.any()):
                inside = grid.inside(rows - 1 if edge & 2 else 0, columns - 1 if edge & 4 else 0)
                if not edge & 3:  # a middle row: all of its queries exist
                    inside = inside.any(0).expand(size, size)
                if not edge & 4:
                    inside = inside.any(1)[:, None].expand(size, size)
                kept = masks[mine] & inside
                kept[(kept == inside).all(2).all(1)] = True
                masks[mine] = kept
        found.append(tiles.add(masks))
    states[where] = torch.cat(found)[inverse]
    return states


def renumber(states: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Tiles and masks with the masks in order of first use."""
    where = (states > FULL).nonzero().squeeze(1)
    if not len(where):
        return states.to(torch.int32), tiles.masks[:0].clone()
    used = states[where]
    first = torch.full((tiles.count + 1,), len(states), dtype=torch.int64, device="cpu").scatter_reduce_(
        0, used, where, "amin"
    )
    order = torch.argsort(first, stable=True)[: int((first < len(states)).sum())]
    place = torch.zeros(tiles.count + 1, dtype=torch.int32, device="cpu")
    place[order] = torch.arange(1, len(order) + 1, dtype=torch.int32, device="cpu")
    return place[states], tiles.masks[order - 1]
