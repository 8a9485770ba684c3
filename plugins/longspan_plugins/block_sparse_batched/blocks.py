"""Block-sparse attention in ten launches: gathered blocks, one batched product for all scores, one for all sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longspan.plugin import BlockLayout, Kernel, Problem, Workspace, nonfinite
from longspan_plugins.block_sparse_batched.batches import Batch, batches_of

__all__ = ["block_kernel", "gradients"]

Gradients = tuple[Tensor, Tensor, Tensor]
softmax: Any = torch.ops.aten._softmax.out


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
