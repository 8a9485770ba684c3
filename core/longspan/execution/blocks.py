"""Running a block-sparse layout: batched dense calls over full blocks, masked ones over partial blocks, merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longspan.execution.autograd import Runner
from longspan.execution.gather import Keys, Queries
from longspan.execution.strided import Step
from longspan.lowering.blocks import BlockLayout
from longspan.lowering.groups import Columns
from longspan.lowering.schedule import Chunk, Job
from longspan.memory.workspace import Scratch, Workspace
from longspan.numerics import blockwise
from longspan.numerics.dropout import Draw, Dropout
from longspan.numerics.merge import merge_
from longspan.numerics.tensors import unit_stride, wide_dtype
from longspan.spec.backend import Kernel

__all__ = ["BlockRunner", "run_block_backward", "run_block_forward"]

Steps = Mapping[tuple[int, int], Step]
Masks = Mapping[tuple[int, int], Tensor]


def run_block_forward(
    jobs: Sequence[Job],
    masks: Masks,
    steps: Steps,
    scale: float,
    draw: Draw | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: Workspace | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `(out, lse)`: out of query's shape and dtype, lse `(batch, heads, q_len)` float32 or float64.

    Args:
        jobs: what to run, with its index on the tensors' device.
        masks: for each job's source the masks that the numbers of its partial blocks mean, `(masks, size, size)`.
        steps: the kernels, by `(q_len, kv_len)`.
        scale: factor on the scores.
        draw: the dropout, if any.
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: the shape of `key`.
        memory: where temporaries come from.
    """
    query, key, value = (unit_stride(x.detach()) for x in (query, key, value))
    wide = wide_dtype(query.dtype)
    with Scratch(memory, query, _gathered(jobs, key)) as scratch:
        if _is_whole(jobs, query):
            chunk = jobs[0].forward[0]
            part, part_lse = _attend(jobs[0], chunk, masks, steps, scale, draw, (query, key, value), scratch)
            return _shaped(part, query.shape).to(query.dtype), _shaped(part_lse, query.shape[:3]).to(wide)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(query.shape[:3], dtype=wide, device=query.device)
        if not _covers(jobs, query):
            out.zero_()
            lse.fill_(-torch.inf)
        for job in jobs:
            for chunk in job.forward:
                found = _attend(job, chunk, masks, steps, scale, draw, (query, key, value), scratch)
                at = Queries(job, chunk)
                at.store(out, found[0])
                at.store(lse.unsqueeze(-1), found[1].unsqueeze(-1))
                del found
    return out, lse


def _attend(
    job: Job,
    chunk: Chunk,
    masks: Masks,
    steps: Steps,
    scale: float,
    draw: Draw | None,
    tensors: tuple[Tensor, Tensor, Tensor],
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """Attention of a launch's rows to all of their keys: `(lines, rows, queries, head_dim)` and without the last."""
    query, key, value = tensors
    wide = wide_dtype(query.dtype)
    q = Queries(job, chunk).read(query)
    joint: tuple[Tensor, Tensor] | None = None
    for columns in job.group.columns:
        at = Keys(job, chunk, columns)
        k, v = at.read(key, scratch, "k"), at.read(value, scratch, "v")
        given = {} if draw is None else {"dropout": _dropout(draw, job, chunk, at, query)}
        if columns.mask_ids is None:
            found = steps[job.queries, columns.keys].forward(q, k, v, **given)
        else:  # a query in float32 gets its result in float32
            mask = _mask(job, chunk, columns, masks)
            found = blockwise.forward(q.to(wide), k, v, is_causal=False, scale=scale, mask=mask, **given)
        if joint is None and len(job.group.columns) == 1:
            return found
        if joint is None:
            joint = found[0].to(wide, copy=True), found[1].to(wide, copy=True)
        else:
            merge_(*joint, *found)
        del found
    assert joint is not None  # a group has columns
    return joint


def run_block_backward(
    jobs: Sequence[Job],
    masks: Masks,
    steps: Steps,
    scale: float,
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
    """Gradients of `run_block_forward`: every call's backward gets the joint `out` and `lse`, and the results add up.

    The gradients of keys and values are summed in float32 (float64 for float64).
    """
    dout, query, key, value, out = (unit_stride(x.detach()) for x in (dout, query, key, value, out))
    wide = wide_dtype(query.dtype)
    lines = [None if x is None else x.detach().unsqueeze(-1) for x in (lse, dlse)]
    with Scratch(memory, query, _gathered(jobs, key) + 2 * key.numel() * wide.itemsize) as scratch:

        def total(name: str) -> Tensor:
            if wide is key.dtype:
                return torch.zeros(key.shape, dtype=wide, device=key.device)
            return scratch.once(name, tuple(key.shape), wide).zero_()

        dkey, dvalue = total("dkey"), total("dvalue")
        dquery = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if not _covers(jobs, query):
            dquery.zero_()

        def launch(job: Job, chunk: Chunk) -> None:
            """A function, so that nothing refers to the scratch memory when that is given back."""
            at = Queries(job, chunk)
            do, q, o = (at.read(x) for x in (dout, query, out))
            row_lse, row_dlse = (None if x is None else at.read(x).squeeze(-1) for x in lines)
            dq: Tensor | None = None
            for columns in job.group.columns:
                there = Keys(job, chunk, columns)
                given = {} if draw is None else {"dropout": _dropout(draw, job, chunk, there, query)}
                k, v = there.read(key, scratch, "k"), there.read(value, scratch, "v")
                if columns.mask_ids is None:
                    run: Any = steps[job.queries, columns.keys].backward
                else:
                    mask = _mask(job, chunk, columns, masks)
                    run = partial(blockwise.backward, is_causal=False, scale=scale, mask=mask)
                    q, k, v = q.to(wide), k.to(wide), v.to(wide)  # gradients come in their dtypes
                some, dk, dv = run(do, q, k, v, o, row_lse, dlse=row_dlse, **given)
                there.add(dkey, dk)
                there.add(dvalue, dv)
                dq = some if dq is None else dq.to(wide) + some
                del some, dk, dv
            assert dq is not None  # a group has columns
            at.store(dquery, dq)

        for job in jobs:
            for chunk in job.backward:
                launch(job, chunk)
        return dquery, dkey.to(key.dtype), dvalue.to(value.dtype)


def _mask(job: Job, chunk: Chunk, columns: Columns, masks: Masks) -> Tensor:
    """The mask of a launch's partial blocks: `(1, rows or 1, queries, keys)` bool."""
    assert columns.mask_ids is not None  # asked for only then
    group = job.group
    mask_ids = columns.mask_ids if len(columns.mask_ids) == 1 else columns.mask_ids[chunk.rows]
    mask = masks[job.source][mask_ids, group.low : group.low + group.height]  # (rows, blocks, height, size)
    mask = mask.transpose(1, 2).flatten(2)[..., : columns.keys].unsqueeze(0)
    return mask.repeat(1, 1, job.shared, 1) if job.folded and job.shared > 1 else mask


def _dropout(draw: Draw, job: Job, chunk: Chunk, keys: Keys, query: Tensor) -> Dropout:
    """The mask by position: numbers are those of the whole tensors, so that every path drops the same pairs."""
    numbers, positions = Queries(job, chunk).positions(query)
    seen = keys.positions(query.device).expand(*numbers.shape, -1)
    return Dropout(draw.p, draw.seed, numbers, positions + draw.query_offset, seen)


def _gathered(jobs: Sequence[Job], key: Tensor) -> int:
    """Bytes that a forward gathers in all, about."""
    found = 0
    for job in jobs:
        keys = sum(one.keys for one in job.group.columns if one.run is None)
        found += 2 * keys * job.group.count * job.kv_heads.count * key.shape[0] * key.shape[3] * key.element_size()
    return found


def _covers(jobs: Sequence[Job], query: Tensor) -> bool:
    """Whether the jobs write every row of every head."""
    return sum(job.heads.count * job.group.count * job.group.height for job in jobs) == query.shape[1] * query.shape[2]


def _is_whole(jobs: Sequence[Job], query: Tensor) -> bool:
    """Whether the first launch is all there is, and its result lies as the output does."""
    if len(jobs) != 1 or len(jobs[0].forward) != 1 or not _covers(jobs, query):
        return False
    job = jobs[0]
    return job.heads.count == job.kv_heads.count or not job.folded


def _shaped(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor.view(shape) if tensor.is_contiguous() else tensor.reshape(shape)


class BlockRunner(Runner):
    """Runs a block-sparse layout with the kernels of dense problems.

    Args:
        layout: of the pattern.
        jobs: what it was scheduled to.
        steps: the kernels, by `(q_len, kv_len)`.
        scale: factor on the scores.
        kernels: those that the backend made, for what they say of themselves.
        memory: where temporaries come from, and who keeps the index of the blocks and their masks on devices.
        name: of that index there.
    """

    quick = None

    def __init__(
        self,
        layout: BlockLayout,
        jobs: Sequence[Job],
        steps: Mapping[tuple[int, int], Step],
        scale: float,
        kernels: Iterable[Kernel] = (),
        *,
        memory: Workspace,
        name: str = "blocks",
    ) -> None:
        self.layout, self._steps, self._scale = layout, steps, scale
        self._memory, self._name = memory, name
        masks = {
            (number, which): csr.masks
            for number, heads in enumerate(layout.blocks)
            for which, csr in enumerate(heads.layouts)
        }
        self._index = tuple(jobs), masks
        self.operators = tuple(dict.fromkeys(name for kernel in kernels for name in kernel.operators))
        self.libraries = tuple(dict.fromkeys(kernel.library for kernel in kernels if kernel.library))
        self.own_backward = all(kernel.backward is not None for kernel in kernels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)`."""
        jobs, masks = self._memory.on_device(self._name, self._index, query.device)
        return run_block_forward(jobs, masks, self._steps, self._scale, draw, query, key, value, self._memory)

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        draw: Draw | None,
        dlse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(dquery, dkey, dvalue)`."""
        jobs, masks = self._memory.on_device(self._name, self._index, query.device)
        given = dout, query, key, value, out, lse, dlse
        return run_block_backward(jobs, masks, self._steps, self._scale, draw, *given, self._memory)
