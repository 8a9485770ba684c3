"""Block-sparse attention in ten launches: gathered blocks, one batched product for all scores, one for all sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from longspan.plugin import BlockCSR, BlockLayout, Kernel, Problem, Workspace, nonfinite

__all__ = ["block_kernel", "gradients"]

Gradients = tuple[Tensor, Tensor, Tensor]
softmax: Any = torch.ops.aten._softmax.out
FULL, ABSENT = 0, 1
"""Rows of blocks in a table of masks: those that hide nothing, and those that hide everything."""
WASTE = 2.5
"""Blocks that are computed over blocks that are kept, in one batch. Beyond it rows are put into several."""


def block_kernel(problem: Problem, layout: BlockLayout, buffers: Workspace, most: int) -> Kernel | None:
    """The kernel of a block-sparse problem; None where its blocks are ragged, or more than `most` pairs at once."""
    wide = torch.float64 if problem.dtype == "float64" else torch.float32
    batches = batches_of(layout, problem.batch, wide)
    if batches is None or sum(batch.pairs for batch in batches) > most:
        return None
    scale = problem.scale

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.to(wide).flatten(0, 2) for x in (query, key, value))
        placed = buffers.on_device("batches", batches, query.device)
        if len(placed) == 1 and placed[0].rows is None:
            out, lse = _attend(placed[0], q, k, v, scale)
        else:
            out, lse = torch.zeros_like(q), q.new_full((len(q),), -math.inf)
            for batch in placed:
                part, part_lse = _attend(batch, q, k, v, scale)
                assert batch.rows is not None  # several batches share the rows
                _lines(out, batch.size).index_copy_(0, batch.rows, part)
                lse.view(-1, batch.size).index_copy_(0, batch.rows, part_lse)
        return out.view(query.shape).to(query.dtype), lse.view(query.shape[:3])

    def backward(
        dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = [x.to(wide).flatten(0, 2) for x in (dout, query, out)]
        k, v = (x.to(wide).flatten(0, 2) for x in (key, value))
        dquery, dkey, dvalue = torch.zeros_like(rows[1]), torch.zeros_like(k), torch.zeros_like(v)
        for batch in buffers.on_device("batches", batches, query.device):
            dq, dk, dv = _gradients(batch, rows[0], rows[1], rows[2], k, v, lse.to(wide).flatten(), scale)
            if batch.rows is None:
                dquery = dq
            else:
                _lines(dquery, batch.size).index_copy_(0, batch.rows, dq)
            for total, part in ((dkey, dk), (dvalue, dv)):
                _lines(total, batch.size).index_add_(0, batch.blocks, part.reshape(-1, batch.size, part.shape[-1]))
        both = ((dquery, query), (dkey, key), (dvalue, value))
        dquery, dkey, dvalue = (grad.view(like.shape).to(like.dtype) for grad, like in both)
        return dquery, dkey, dvalue

    return Kernel(forward, backward, ("aten::baddbmm", "aten::bmm"))


def _attend(batch: Batch, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`(lines, size, head_dim)` and `(lines, size)` of tensors `(tokens, head_dim)`."""
    q, k, v = _rows(batch, query), _keys(batch, key), _keys(batch, value)
    out, lse = _products(batch, q, k, v, scale)
    if batch.masks is not None and not (math.isfinite(out.sum()) or nonfinite.is_finite(out)):
        run = _on_one_head(partial(_products, batch, scale=scale))
        mask = _bias(batch).unsqueeze(1) == 0
        both = nonfinite.forward(run, q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scale=scale, mask=mask)
        out, lse = (x.squeeze(1) for x in both)
    if batch.empty is not None:
        out.masked_fill_(batch.empty.unsqueeze(-1), 0.0)
        lse.masked_fill_(batch.empty, -math.inf)
    return out, lse


def _products(batch: Batch, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    both = q.new_empty(2, batch.lines, batch.size, batch.most * batch.size)  # scores, and their softmax
    scores, weights = both.unbind()
    _scores(batch, q, k, scale, scores)
    softmax(scores, -1, False, out=weights)
    largest = both.amax(-1)
    lse = largest[0] - largest[1].log_()
    return torch.bmm(weights, v), lse


def _gradients(
    batch: Batch, dout: Tensor, query: Tensor, out: Tensor, key: Tensor, value: Tensor, lse: Tensor, scale: float
) -> Gradients:
    do, q, o = (_rows(batch, x) for x in (dout, query, out))
    k, v = _keys(batch, key), _keys(batch, value)
    line = _rows(batch, lse.unsqueeze(-1)).squeeze(-1)

    def run(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, line: Tensor) -> Gradients:
        weights = _scores(batch, q, k, scale, q.new_empty(batch.lines, batch.size, batch.most * batch.size))
        weights.sub_(line.unsqueeze(-1)).exp_()
        return gradients(weights, do, q, k, v, o, scale)

    usable = line.masked_fill(line == -math.inf, math.inf)  # for weights of 0: -inf - -inf would be NaN
    grads = run(do, q, k, v, o, usable)
    if batch.masks is None or nonfinite.is_finite(*grads):
        return grads
    mask = _bias(batch) == 0
    if batch.empty is not None:
        mask &= ~batch.empty.unsqueeze(-1)
    saved = (x.unsqueeze(1) for x in (do, q, k, v, o, line))
    dq, dk, dv = nonfinite.backward(_on_one_head(run), *saved, scale=scale, mask=mask.unsqueeze(1))
    return dq.squeeze(1), dk.squeeze(1), dv.squeeze(1)


def gradients(weights: Tensor, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float) -> Gradients:
    """Those of query, key and value `(lines, rows, head_dim)`, by the joint softmax's weights `(lines, rows, keys)`."""
    dscores = torch.bmm(do, v.mT).sub_((do * o).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
    return torch.bmm(dscores, k), torch.bmm(dscores.mT, q), torch.bmm(weights.mT, do)


def _on_one_head(run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """The same for tensors of one head and many batch entries, `(lines, 1, ...)`: what the core's arithmetic takes."""
    return lambda *tensors: tuple(x.unsqueeze(1) for x in run(*(x.squeeze(1) for x in tensors)))


def _scores(batch: Batch, q: Tensor, k: Tensor, scale: float, out: Tensor) -> Tensor:
    if batch.masks is None:
        torch.baddbmm(q.new_empty(1), q, k.mT, beta=0.0, alpha=scale, out=out)
        return out
    torch.index_select(batch.table, 0, batch.masks, out=out.view(-1, batch.size))
    return out.baddbmm_(q, k.mT, alpha=scale)


def _bias(batch: Batch) -> Tensor:
    assert batch.masks is not None  # asked for only then
    return batch.table.index_select(0, batch.masks).view(batch.lines, batch.size, -1)


def _rows(batch: Batch, tensor: Tensor) -> Tensor:
    lines = _lines(tensor, batch.size)
    return lines if batch.rows is None else lines.index_select(0, batch.rows)


def _keys(batch: Batch, tensor: Tensor) -> Tensor:
    return _lines(tensor, batch.size).index_select(0, batch.blocks).view(batch.lines, -1, tensor.shape[1])


def _lines(tensor: Tensor, size: int) -> Tensor:
    return tensor.view(-1, size, tensor.shape[1])


# ------------------------------------------- block rows as a batch: padded to as many blocks as the longest has


@frozen(eq=False)
class Batch:
    """Block rows that run at once.

    `rows` `(lines,)` are their numbers among all block rows of all heads and batch entries, None for all of them in
    order. `blocks` `(lines * most,)` are the block columns of each, numbered in the same way. `masks` `(lines * size *
    most,)` are rows of `table` `(*, size)`, which is 0 where a query sees a key and else -inf; None where nothing is
    hidden. `empty` `(lines, size)` are queries that see no key; they are shown some, and their results are thrown away.
    """

    size: int
    lines: int
    most: int
    rows: Tensor | None
    blocks: Tensor
    masks: Tensor | None
    table: Tensor
    empty: Tensor | None

    @property
    def pairs(self) -> int:
        """Query-key pairs that are computed, the padding's among them."""
        return self.lines * self.most * self.size**2


def batches_of(layout: BlockLayout, batch: int, dtype: torch.dtype) -> tuple[Batch, ...] | None:
    """The batches of a layout; None where block rows or columns are ragged.

    Args:
        layout: of one document.
        batch: how many batch entries there are.
        dtype: of the masks.
    """
    if len(layout.blocks) != 1:
        return None
    heads = layout.blocks[0]
    csr, size = heads.layouts[0], heads.layouts[0].block_size
    if csr.q_len % size or csr.kv_len % size or csr.query_offset % size or not layout.pairs:
        return None
    with torch.inference_mode(False), torch.device("cpu"):
        table, first = _table(heads.layouts, dtype)
        counts = torch.cat([heads[head].indptr.diff() for head in range(len(heads.of_head))])
        made = []
        for rows in _classes(counts):
            padded = [
                _padded(heads[head], first[heads.of_head[head]], head, rows[rows // csr.rows == head] % csr.rows, most)
                for most in (int(counts[rows].max()),)
                for head in range(len(heads.of_head))
            ]
            blocks, states = (torch.cat(parts) for parts in zip(*padded, strict=True))
            made.append(_batch(rows, counts, blocks, states, table, size, batch, csr.columns * len(heads.of_head)))
    return tuple(made)


def _classes(counts: Tensor) -> Sequence[Tensor]:
    """Block rows, by how many blocks they have: all of them, or those within a factor of two of each other."""
    every = torch.arange(len(counts), dtype=torch.int64, device="cpu")
    if int(counts.max()) * len(counts) <= WASTE * int(counts.sum()):
        return [every]
    kinds = torch.where(counts > 0, counts.clamp(min=1).log2().floor().long(), -1)
    return [every[kinds == kind] for kind in torch.unique(kinds).tolist() if kind >= 0]


def _table(layouts: Sequence[BlockCSR], dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """`(masks, size, size)` of all layouts, and where those of each begin."""
    size = layouts[0].block_size
    fixed = torch.zeros(2, size, size, dtype=dtype, device="cpu")
    fixed[ABSENT] = -torch.inf
    first = [2]
    for csr in layouts:
        first.append(first[-1] + len(csr.masks))
    hidden = [
        torch.zeros(csr.masks.shape, dtype=dtype, device="cpu").masked_fill_(~csr.masks, -torch.inf) for csr in layouts
    ]
    return torch.cat([fixed, *hidden]), first


def _padded(csr: BlockCSR, first: int, head: int, rows: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Block columns `(rows, most)`, numbered over all heads, and their masks in the table."""
    if not csr.nnz:
        nothing = torch.zeros(len(rows), most, dtype=torch.int64, device="cpu")
        return nothing + head * csr.columns, nothing + ABSENT
    place = csr.indptr[rows][:, None] + torch.arange(most, dtype=torch.int64, device="cpu")
    there = place < csr.indptr[rows + 1][:, None]
    place = torch.where(there, place, 0)
    states = csr.mask_ids.long()[place]
    states = torch.where(there, torch.where(states > 0, states - 1 + first, FULL), ABSENT)
    return torch.where(there, csr.indices.long()[place], 0) + head * csr.columns, states


def _batch(
    rows: Tensor, counts: Tensor, blocks: Tensor, states: Tensor, table: Tensor, size: int, batch: int, columns: int
) -> Batch:
    lines, most = blocks.shape
    within = torch.arange(size, dtype=torch.int64, device="cpu")
    masks = states[:, None, :] * size + within[:, None]  # (lines, size, most)
    flat = table.view(-1, size)
    blind = (flat == -torch.inf).all(-1)[masks].all(-1)  # (lines, size)
    masks[..., 0].masked_fill_(blind, FULL)
    numbers = torch.arange(batch, dtype=torch.int64, device="cpu")[:, None]
    return Batch(
        size,
        batch * lines,
        most,
        None if lines == len(counts) else (rows + numbers * len(counts)).flatten(),
        (blocks.flatten() + numbers * columns).flatten(),
        masks.flatten().repeat(batch) if bool((states != FULL).any()) else None,
        flat,
        blind.repeat(batch, 1) if bool(blind.any()) else None,
    )
