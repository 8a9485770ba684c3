"""Block-sparse patterns from and to FlexAttention's `BlockMask`, which is imported only when it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.errors import ArgumentError
from longspan.numerics.tensors import counting
from longspan.patterns.blocks.csr import BlockCSR, HeadBlocks
from longspan.patterns.blocks.grid import Grid, on_cpu
from longspan.patterns.blocks.masks import FULL, MaskTable, all_full
from longspan.patterns.blocks.sparse import BlockSparse

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["from_block_mask", "layout_from", "to_block_mask"]


@on_cpu
def from_block_mask(block_mask: BlockMask) -> BlockSparse:
    """The pattern that a `torch.nn.attention.flex_attention.BlockMask` holds, for its lengths alone.

    Partial blocks get their token masks by evaluating the mask's `mask_mod`. A mask with one head fits any number.

    Raises:
        ArgumentError: no BlockMask; one that differs between batch entries; block sizes of which neither divides the
            other; a block listed twice; a mask that keeps nothing.
    """
    from torch.nn.attention.flex_attention import BlockMask as Known

    given: object = block_mask
    if not isinstance(given, Known):
        want = "a torch.nn.attention.flex_attention.BlockMask"
        raise ArgumentError("block_mask", type(given).__name__, want, "make one with create_block_mask")
    if block_mask.kv_indices.dim() != 4:
        got = f"indices of shape {tuple(block_mask.kv_indices.shape)}"
        raise ArgumentError("block_mask", got, "(batch, heads, rows, columns)", "make it with create_block_mask")
    tall, wide = block_mask.BLOCK_SIZE
    size = min(tall, wide)
    if tall % size or wide % size:
        want = "block sizes of which one divides the other"
        raise ArgumentError("block_mask", f"BLOCK_SIZE=({tall}, {wide})", want, "make it with BLOCK_SIZE=128")
    batch, heads = block_mask.kv_indices.shape[:2]
    layouts = [[_head(block_mask, entry, head, size) for head in range(heads)] for entry in range(batch)]
    if any(of_entry != layouts[0] for of_entry in layouts):
        want = "the same mask for every batch entry"
        raise ArgumentError("block_mask", f"{batch} batch entries that differ", want, "make it with B=None")
    return BlockSparse(size, layouts[0] if heads > 1 else layouts[0][0])


layout_from = from_block_mask


@on_cpu
def to_block_mask(
    pattern: BlockSparse,
    q_len: int,
    kv_len: int | None = None,
    *,
    heads: int | None = None,
    is_causal: bool = False,
    query_offset: int = 0,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The `BlockMask` that keeps what the pattern keeps, bit for bit as `create_block_mask` makes it.

    As there, a block at a ragged end counts as partial. A BlockMask holds a dense grid of blocks.

    Args:
        pattern: any block-sparse pattern.
        q_len: queries.
        kv_len: keys; as many as queries unless given.
        heads: the mask's heads; None: 1, or as many as the pattern has.
        is_causal: only keys at the query's position or before it.
        query_offset: position of the first query; a multiple of the block size.
        device: where the mask lives.

    Raises:
        ArgumentError: a query_offset that is no multiple of the block size; what `BlockSparse.csr` refuses.
    """
    from torch.nn.attention.flex_attention import BlockMask

    size = pattern.block_size
    if query_offset % size:
        want = f"a multiple of the block size, {size}: a BlockMask's rows start at the first query"
        raise ArgumentError("query_offset", query_offset, want, "use a smaller block size")
    kv_len = q_len if kv_len is None else kv_len
    blocks = pattern.csr(
        q_len, kv_len, is_causal=is_causal, query_offset=query_offset, heads=heads or pattern.heads or 1
    )
    table, masks = _tables(blocks)
    of_head = torch.tensor(blocks.of_head, dtype=torch.int64, device="cpu")
    grid = blocks.layouts[0].grid
    whole = torch.ones(grid.rows, grid.columns, dtype=torch.bool, device="cpu")
    whole[q_len // size :] = False
    whole[:, kv_len // size :] = False
    full = ((table == 1) & whole)[of_head][None]
    counts, columns = _ordered((table > 0)[of_head][None] & ~full)
    full_counts, full_columns = _ordered(full)
    return BlockMask.from_kv_blocks(
        counts.to(device),
        columns.to(device),
        full_counts.to(device),
        full_columns.to(device),
        BLOCK_SIZE=size,
        mask_mod=_mask_mod(size, table.to(device), masks.to(device), of_head.to(device)),
        seq_lengths=(q_len, kv_len),
    )


def _tables(blocks: HeadBlocks) -> tuple[Tensor, Tensor]:
    """`(layouts, rows, columns)` numbers of masks, and the masks: 0 keeps nothing, 1 keeps all."""
    size = blocks.layouts[0].block_size
    table = torch.zeros(
        len(blocks.layouts), blocks.layouts[0].rows, blocks.layouts[0].columns, dtype=torch.int32, device="cpu"
    )
    masks = [
        torch.zeros(1, size, size, dtype=torch.bool, device="cpu"),
        torch.ones(1, size, size, dtype=torch.bool, device="cpu"),
    ]
    for number, layout in enumerate(blocks.layouts):
        shift = sum(len(part) for part in masks) - 1
        table[number].view(-1)[layout.keys()] = torch.where(layout.mask_ids == FULL, 1, layout.mask_ids + shift)
        masks.append(layout.masks)
    return table, torch.cat(masks)


def _ordered(there: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and its columns: those with a block first."""
    order = torch.argsort(there.to(torch.int32), dim=-1, descending=True, stable=True)
    return there.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _mask_mod(size: int, table: Tensor, masks: Tensor, of_head: Tensor) -> Callable[..., Tensor]:
    shared = len(of_head) == 1  # such a mask serves any number of heads

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        layout = of_head[0] if shared else of_head[h]
        return masks[table[layout, q_idx // size, kv_idx // size], q_idx % size, kv_idx % size]

    return mask_mod


def _head(mask: BlockMask, entry: int, head: int, size: int) -> BlockCSR:
    """The layout of one batch entry and head."""
    q_len, kv_len = mask.seq_lengths
    grid, table = Grid(size, q_len, kv_len), MaskTable(size)
    partial = _keys(mask, mask.kv_num_blocks[entry, head], mask.kv_indices[entry, head], grid)
    keys, states = [partial], [_evaluated(mask, entry, head, partial, grid, table)]
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        keys.append(_keys(mask, mask.full_kv_num_blocks[entry, head], mask.full_kv_indices[entry, head], grid))
        states.append(torch.zeros_like(keys[-1]))
    every, order = torch.cat(keys).sort()
    if bool((every.diff() == 0).any()):
        raise ArgumentError("block_mask", "a block that is listed twice", "every block at most once")
    return BlockCSR.of(grid, every, torch.cat(states)[order], table)


def _keys(mask: BlockMask, counts: Tensor, indices: Tensor, grid: Grid) -> Tensor:
    """The keys of the listed blocks, cut into squares, as far as they lie within the sequence."""
    counts, indices = counts.cpu().long(), indices.cpu().long()
    tall, wide = (side // grid.block_size for side in mask.BLOCK_SIZE)
    row, number = (counting(indices.shape[1]) < counts[:, None]).nonzero(as_tuple=True)
    column = indices[row, number]
    keys = []
    for down, along in product(range(tall), range(wide)):
        rows, columns = row * tall + down, column * wide + along
        there = (rows < grid.rows) & (columns >= 0) & (columns < grid.columns)
        keys.append((rows * grid.columns + columns)[there])
    return torch.cat(keys)


def _evaluated(mask: BlockMask, entry: int, head: int, keys: Tensor, grid: Grid, table: MaskTable) -> Tensor:
    """The states of partial blocks, by the mask's own function of positions."""
    device = mask.kv_indices.device
    size = grid.block_size
    step = torch.arange(size, device=device, dtype=torch.int64)
    b, h = torch.tensor(entry, device=device, dtype=torch.int64), torch.tensor(head, device=device, dtype=torch.int64)
    asked = torch.vmap(mask.mask_mod, in_dims=(None, None, 0, 0))
    states = [all_full(0)]
    for part in torch.split(keys.to(device), max(1, table.chunk // 16)):  # two int64 positions a pair
        if not len(part):
            break
        query = (part // grid.columns * size)[:, None, None] + step[:, None]
        key = (part % grid.columns * size)[:, None, None] + step[None, :]
        there = (query < grid.q_len) & (key < grid.kv_len)
        shape = there.shape
        inside = (query.clamp(max=grid.q_len - 1), key.clamp(max=grid.kv_len - 1))
        kept = asked(b, h, *(position.expand(shape).flatten() for position in inside))
        states.append(table.add((kept.view(shape) & there).cpu()))
    return torch.cat(states)
