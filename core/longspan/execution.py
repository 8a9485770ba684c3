"""Running a layout: each call's kernel over strided views, results stored or merged in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan import blockwise
from longspan.layout import Layout
from longspan.merge import merge_
from longspan.spec import Kernel
from longspan.views import Block, blocks

__all__ = ["TEMPORARY", "Step", "run_backward", "run_forward"]

TEMPORARY = 16 * 2**20
"""Bytes that one kernel launch's output may take, where the work can be cut that fine."""


class Step:
    """A kernel with what the core knows about the dense problem that it was made for."""

    __slots__ = ("backward", "forward", "gqa")

    def __init__(self, kernel: Kernel, *, gqa: bool, is_causal: bool, scale: float) -> None:
        self.forward = kernel.forward
        self.gqa = gqa
        self.backward = kernel.backward
        if self.backward is None:

            def backward(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                return blockwise.backward(*tensors, is_causal=is_causal, scale=scale)

            self.backward = backward


def run_forward(
    layout: Layout, steps: Sequence[Step], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `(out, lse)`: out of query's shape and dtype, lse `(batch, heads, q_len)` float32 or float64.

    Results that several calls share are merged in float32 or wider, whatever the dtype of the inputs.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out_dtype = wide if layout.merges else query.dtype
    if layout.covered:
        out = torch.empty(query.shape, dtype=out_dtype, device=query.device)
        lse = torch.empty(query.shape[:3], dtype=wide, device=query.device)
    else:
        out = torch.zeros(query.shape, dtype=out_dtype, device=query.device)
        lse = torch.full(query.shape[:3], -torch.inf, dtype=wide, device=query.device)
    query_strides = (query.stride(), out.stride(), (*lse.stride(), 1))
    key_strides = (key.stride(), value.stride())
    for call, step in zip(layout.calls, steps, strict=True):
        for block in blocks(call, query.shape[0], query.shape[3], step.gqa, _rows(query), query_strides, key_strides):
            part, part_lse = step.forward(block.query_side(query, 0), block.key_side(key, 3), block.key_side(value, 4))
            if call.first:
                block.query_side(out, 1).copy_(part)
                block.line_side(lse, 2).copy_(part_lse)
            else:
                merge_(block.query_side(out, 1), block.line_side(lse, 2), part, part_lse)
    return out.to(query.dtype), lse


def run_backward(
    layout: Layout,
    steps: Sequence[Step],
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `run_forward`: every call's backward gets the joint `out` and `lse`, and the results add up."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    dtype = wide if len(layout.calls) > 1 else query.dtype
    dquery, dkey, dvalue = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value))
    query_strides = (*(x.stride() for x in (query, dout, out, dquery)), (*lse.stride(), 1))
    key_strides = tuple(x.stride() for x in (key, value, dkey, dvalue))
    for call, step in zip(layout.calls, steps, strict=True):
        for block in blocks(call, query.shape[0], query.shape[3], step.gqa, _rows(query), query_strides, key_strides):
            assert step.backward is not None
            dq, dk, dv = step.backward(
                block.query_side(dout, 1),
                block.query_side(query, 0),
                block.key_side(key, 5),
                block.key_side(value, 6),
                block.query_side(out, 2),
                block.line_side(lse, 4),
            )
            block.query_side(dquery, 3).add_(dq)
            _add_keys(block, dkey, 7, dk)
            _add_keys(block, dvalue, 8, dv)
    return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype)


def _add_keys(block: Block, total: Tensor, slot: int, part: Tensor) -> None:
    if block.shared is not None:
        part = part.sum(block.shared, keepdim=True, dtype=total.dtype)
    block.key_side(total, slot, once=True).add_(part)


def _rows(query: Tensor) -> int:
    return max(1, TEMPORARY // (query.shape[3] * query.element_size()))
