"""Blocks that a caller hands in: checked, each refusal naming the tensor and what would do, and in canonical form.

Equal pairs then have equal states, masks and numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.errors import ArgumentError
from longspan.numerics.tensors import counting
from longspan.patterns.blocks.grid import Grid
from longspan.patterns.blocks.masks import FULL, MaskTable, all_full

__all__ = ["check_indices", "check_masks", "clip", "renumber"]


def _integers(name: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dim() != 1:
        got = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ArgumentError(name, got, "a torch.Tensor of one dimension", f"{name}=torch.tensor([...])")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ArgumentError(name, str(tensor.dtype), "integers", f"{name}.to(torch.int32)")
    return tensor.detach().to("cpu", torch.int64)


def check_indices(grid: Grid, indptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every block."""
    indptr, indices = _integers("indptr", indptr), _integers("indices", indices)
    if len(indptr) != grid.rows + 1:
        want = f"{grid.rows + 1} numbers, one more than the {grid.rows} block rows of {grid.q_len} queries"
        raise ArgumentError("indptr", f"{len(indptr)} numbers", want, "check block_size, q_len and query_offset")
    if int(indptr[0]) != 0 or int(indptr[-1]) != len(indices) or bool((indptr.diff() < 0).any()):
        got = f"{_brief(indptr)} for {len(indices)} indices"
        raise ArgumentError(
            "indptr",
            got,
            f"numbers that start at 0, never fall and end at {len(indices)}",
            "sum up the number of blocks of each row, e.g. torch.cumsum(counts, 0) with a 0 in front",
        )
    bad = (indices < 0) | (indices >= grid.columns)
    if bool(bad.any()):
        want = f"block columns from 0 to {grid.columns - 1}, for {grid.kv_len} keys in blocks of {grid.block_size}"
        raise ArgumentError("indices", f"{int(indices[bad][0])}", want, "drop it, or check block_size and kv_len")
    rows = torch.repeat_interleave(counting(grid.rows), indptr.diff())
    steps = (rows * grid.columns + indices).diff()
    if bool((steps <= 0).any()):
        where = int((steps <= 0).nonzero()[0])
        word = "twice" if int(steps[where]) == 0 else f"after {int(indices[where])}"
        got = f"column {int(indices[where + 1])} {word} in block row {int(rows[where])}"
        raise ArgumentError("indices", got, "distinct columns in ascending order in each row", "sort each row")
    return rows, indices


def check_masks(grid: Grid, mask_ids: object, masks: object, indices: Tensor) -> tuple[Tensor, MaskTable]:
    """The state of every block, and the masks."""
    size = grid.block_size
    masks = torch.empty(0, size, size, dtype=torch.bool, device="cpu") if masks is None else masks
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        got = str(masks.dtype) if isinstance(masks, Tensor) else type(masks).__name__
        raise ArgumentError("masks", got, "a bool tensor, True where a pair is kept", "masks.bool(), or scores > -inf")
    if masks.shape[1:] != (size, size) or masks.dim() != 3:
        raise ArgumentError("masks", f"shape {tuple(masks.shape)}", f"(T, {size}, {size})", "one mask a partial block")
    mask_ids = torch.zeros_like(indices) if mask_ids is None else _integers("mask_ids", mask_ids)
    if len(mask_ids) != len(indices):
        raise ArgumentError("mask_ids", f"{len(mask_ids)} numbers", f"one for each of the {len(indices)} indices")
    bad = (mask_ids < 0) | (mask_ids > len(masks))
    if bool(bad.any()):
        want = f"0 for a full block or 1 to {len(masks)} for one of the {len(masks)} masks"
        raise ArgumentError("mask_ids", f"{int(mask_ids[bad][0])}", want, "add the missing mask")
    table = MaskTable(size)
    states = [table.add(part) for part in torch.split(masks.detach().cpu(), table.chunk)]
    return torch.cat([all_full(1), *states])[mask_ids], table


def _brief(numbers: Tensor) -> str:
    shown = ", ".join(str(int(number)) for number in numbers[:6])
    return f"[{shown}, ... {int(numbers[-1])}]" if len(numbers) > 6 else f"[{shown}]"


def clip(grid: Grid, keys: Tensor, states: Tensor, table: MaskTable) -> Tensor:
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
    base = table.count + 1
    codes, inverse = torch.unique(edges[where] * base + states[where], return_inverse=True)
    clipped = []
    for part in torch.split(codes, table.chunk):
        masks = table.expand(part % base)
        for edge in range(1, 8):
            at_edge = part // base == edge
            if bool(at_edge.any()):
                inside = grid.inside(rows - 1 if edge & 2 else 0, columns - 1 if edge & 4 else 0)
                if not edge & 3:  # a middle row: all of its queries exist
                    inside = inside.any(0).expand(size, size)
                if not edge & 4:
                    inside = inside.any(1)[:, None].expand(size, size)
                kept = masks[at_edge] & inside
                kept[(kept == inside).all(2).all(1)] = True
                masks[at_edge] = kept
        clipped.append(table.add(masks))
    states[where] = torch.cat(clipped)[inverse]
    return states


def renumber(states: Tensor, table: MaskTable) -> tuple[Tensor, Tensor]:
    """Mask ids, and the masks in order of first use."""
    where = (states > FULL).nonzero().squeeze(1)
    if not len(where):
        return states.to(torch.int32), table.masks[:0].clone()
    used = states[where]
    first = torch.full((table.count + 1,), len(states), dtype=torch.int64, device="cpu").scatter_reduce_(
        0, used, where, "amin"
    )
    order = torch.argsort(first, stable=True)[: int((first < len(states)).sum())]
    number = torch.zeros(table.count + 1, dtype=torch.int32, device="cpu")
    number[order] = torch.arange(1, len(order) + 1, dtype=torch.int32, device="cpu")
    return number[states], table.masks[order - 1]
