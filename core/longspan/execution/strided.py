"""Running a layout: each call's kernel over strided views, results stored or merged in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.execution.contract import check_gradients, check_result, note_kernel
from longspan.execution.views import Block, blocks
from longspan.lowering.layout import Call, Layout
from longspan.memory.workspace import Scratch, Workspace
from longspan.numerics import blockwise
from longspan.numerics.dropout import Draw, Dropout
from longspan.numerics.merge import merge_
from longspan.numerics.tensors import unit_stride, wide_dtype
from longspan.spec.backend import Kernel

__all__ = ["TEMPORARY", "Step", "run_backward", "run_forward"]

TEMPORARY = 16 * 2**20
"""Bytes that one kernel launch's output may take, where the work can be cut that fine."""


class Step:
    """A kernel with what the core knows about the dense problem that it was made for."""

    __slots__ = ("_backward", "_backward_checked", "_checked", "_forward", "backend", "gqa", "is_causal", "scale")

    def __init__(self, kernel: Kernel, backend: str, *, gqa: bool, is_causal: bool, scale: float) -> None:
        self._forward, self.backend, self._checked = kernel.forward, backend, False
        self._backward_checked = False
        self._backward = kernel.backward
        self.gqa, self.is_causal, self.scale = gqa, is_causal, scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        """The kernel's forward; what it returns is checked the first time."""
        try:
            result = self._forward(query, key, value, **given)
        except Exception as error:
            note_kernel(error, self.backend)
            raise
        if not self._checked:
            check_result(self.backend, result, query)
            self._checked = True
        return result

    def backward(self, *tensors: Tensor, dlse: Tensor | None, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The kernel's backward; the core's where there is none, or where the lse has a gradient of its own."""
        if self._backward is not None and dlse is None:
            try:
                result = self._backward(*tensors, **given)
            except Exception as error:
                note_kernel(error, self.backend)
                raise
            if not self._backward_checked:
                check_gradients(self.backend, result, tensors[1:4])
                self._backward_checked = True
            return result
        return blockwise.backward(*tensors, is_causal=self.is_causal, scale=self.scale, dlse=dlse, **given)


def run_forward(
    layout: Layout,
    steps: Sequence[Step],
    draw: Draw | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: Workspace | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `(out, lse)`: out of query's shape and dtype, lse `(batch, heads, q_len)` float32 or float64.

    Results that several calls share are merged in float32 or wider, whatever the dtype of the inputs. Temporaries come
    from `memory`, results never do.
    """
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    wide = wide_dtype(query.dtype)
    out_dtype = wide if layout.merges else query.dtype
    with Scratch(memory, query, query.numel() * wide.itemsize) as scratch:
        if out_dtype is query.dtype:
            out = torch.empty(query.shape, dtype=out_dtype, device=query.device)
        else:
            out = scratch.once("out", query.shape, out_dtype)
        lse = torch.empty(query.shape[:3], dtype=wide, device=query.device)
        if not layout.covered:
            out.zero_()
            lse.fill_(-torch.inf)
        query_strides = (query.stride(), out.stride(), (*lse.stride(), 1))
        key_strides = (key.stride(), value.stride())
        k = _first_key(query_strides, draw)

        def launch(call: Call, step: Step, block: Block, given: dict[str, Any]) -> None:
            """A function, so that nothing refers to the scratch memory when that is given back.

            Nor to a launch's results: two at once are twice the memory, and the heap trims what is freed.
            """
            q, keys, values = block.query_side(query, 0), block.key_side(key, k), block.key_side(value, k + 1)
            if call.flipped:
                q, keys, values = scratch.flip("q", q), scratch.flip("k", keys), scratch.flip("v", values)
            part, part_lse = step.forward(q, keys, values, **given)
            if call.flipped:
                part, part_lse = scratch.flip("part", part), part_lse.flip(2)
            if call.first:
                block.query_side(out, 1).copy_(part)
                block.line_side(lse, 2).copy_(part_lse)
            else:
                part = scratch.widen("wide", part, wide)
                merge_(block.query_side(out, 1), block.line_side(lse, 2), part, part_lse)

        for one in _launches(layout, steps, draw, query, query_strides, key_strides):
            launch(*one)
        return out.to(query.dtype), lse


def run_backward(
    layout: Layout,
    steps: Sequence[Step],
    draw: Draw | None,
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None = None,
    memory: Workspace | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `run_forward`: every call's backward gets the joint `out` and `lse`, and the results add up."""
    dout, query, key, value, out = (unit_stride(x) for x in (dout, query, key, value, out))
    sums = len(layout.calls) > 1 or query.shape[1] != key.shape[1]
    dtype = wide_dtype(query.dtype) if sums else query.dtype
    with Scratch(memory, query, query.numel() * dtype.itemsize) as scratch:

        def total(name: str, like: Tensor) -> Tensor:
            if dtype is like.dtype:
                return torch.zeros(like.shape, dtype=dtype, device=like.device)
            return scratch.once(name, like.shape, dtype).zero_()

        dquery, dkey, dvalue = total("dquery", query), total("dkey", key), total("dvalue", value)
        lines = [(*x.stride(), 1) for x in (lse, dlse) if x is not None]
        query_strides = (*(x.stride() for x in (query, dout, out, dquery)), *lines)
        key_strides = tuple(x.stride() for x in (key, value, dkey, dvalue))
        k = _first_key(query_strides, draw)
        for call, step, block, given in _launches(layout, steps, draw, query, query_strides, key_strides):
            turn = scratch.flip if call.flipped else _as_is
            dq, dk, dv = step.backward(
                turn("dout", block.query_side(dout, 1)),
                turn("q", block.query_side(query, 0)),
                turn("k", block.key_side(key, k)),
                turn("v", block.key_side(value, k + 1)),
                turn("out", block.query_side(out, 2)),
                turn("lse", block.line_side(lse, 4)),
                dlse=None if dlse is None else turn("dlse", block.line_side(dlse, 5)),
                **given,
            )
            block.query_side(dquery, 3).add_(turn("dq", dq))
            _add_keys(block, dkey, k + 2, turn("dk", dk))
            _add_keys(block, dvalue, k + 3, turn("dv", dv))
            del dq, dk, dv
        dquery = dquery.to(query.dtype)  # one after the other: each wide sum is freed before the next result is made
        dkey = dkey.to(key.dtype)
        dvalue = dvalue.to(value.dtype)
        return dquery, dkey, dvalue


def _launches(
    layout: Layout,
    steps: Sequence[Step],
    draw: Draw | None,
    query: Tensor,
    queries: tuple[tuple[int, ...], ...],
    keys: tuple[tuple[int, ...], ...],
) -> Iterator[tuple[Call, Step, Block, dict[str, Any]]]:
    batch, heads, _, width = query.shape
    budget = max(1, TEMPORARY // (width * query.element_size()))
    lines, query_positions = len(queries), len(queries) + 1
    key_positions = _first_key(queries, draw) + len(keys)
    if draw is not None:  # coordinates are strided too: they fold and split with the tensors
        queries = (*queries, (heads, 1, 0, 0), (0, 0, 1, 0))
        keys = (*keys, (0, 0, 1, 0))
    for call, step in zip(layout.calls, steps, strict=True):
        for block in blocks(call, batch, width, step.gqa, budget, queries, keys):
            if draw is None:
                yield call, step, block, {}
                continue
            positions = block.coordinates(key_positions, query.device, of_keys=True)
            dropout = Dropout(
                draw.p,
                draw.seed,
                block.coordinates(lines, query.device)[..., 0],
                block.coordinates(query_positions, query.device) + draw.query_offset,
                positions if block.key_shape[1] == block.query_shape[1] else positions[:, :1],  # shared heads: the same
            )
            yield call, step, block, {"dropout": dropout.flipped() if call.flipped else dropout}


def _first_key(queries: tuple[tuple[int, ...], ...], draw: Draw | None) -> int:
    """The slot of the first key-like tensor: behind the query-like ones and, with dropout, their two coordinates."""
    return len(queries) + (0 if draw is None else 2)


def _as_is(name: str, tensor: Tensor) -> Tensor:
    return tensor


def _add_keys(block: Block, total: Tensor, slot: int, part: Tensor) -> None:
    if block.shared is not None:
        part = part.sum(block.shared, keepdim=True, dtype=total.dtype)
    block.key_side(total, slot, once=True).add_(part)
