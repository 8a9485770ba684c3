"""Running a block-sparse layout: batched dense calls over full blocks, masked ones over partial blocks, merged.

What is merged is merged in float32 (float64 for float64) for the rows of a launch alone, so that no wide copy of the
output is needed. Loops run over groups of rows and over launches of bounded size, never over block rows.

These are hundreds of short parallel regions a call. On a CPU whose cores are taken by others, OpenMP's threads spin at
the end of each for one that is not running: 4,096 tokens took 1.4 to 1.7 s on two busy cores, and 0.3 to 0.5 s with
`OMP_WAIT_POLICY=PASSIVE` (or `OMP_NUM_THREADS=1`) in the environment of the process, which is the way out there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longspan.execution.kernel import CheckedKernel
from longspan.execution.runner import Gradients, Runner, Saved
from longspan.lowering.blocks import BlockLayout
from longspan.lowering.groups import Columns
from longspan.lowering.schedule import Chunk, Job
from longspan.memory.workspace import Scratch, Workspace
from longspan.numerics import blockwise
from longspan.numerics.dropout import Draw, Dropout
from longspan.numerics.merge import merge_
from longspan.numerics.tensors import unit_stride, wide_dtype
from longspan.spec.backend import Kernel
from longspan.spec.problem import Problem

__all__ = ["BlockRunner"]

Tensors = tuple[Tensor, Tensor, Tensor]


class BlockRunner(Runner):
    """Runs a block-sparse layout with the kernels of dense problems.

    Args:
        layout: the blocks.
        jobs: what to run.
        kernels: by `(q_len, kv_len)`.
        problem: what they compute.
        memory: where temporaries come from, and who keeps the index of the blocks and their masks on devices.
        made: the distinct kernels.
        in_graph: as of `Runner`.
        name: of that index there.
    """

    def __init__(
        self,
        layout: BlockLayout,
        jobs: Sequence[Job],
        kernels: Mapping[tuple[int, int], CheckedKernel],
        problem: Problem,
        memory: Workspace,
        made: Sequence[Kernel] = (),
        in_graph: Callable[..., Gradients] | None = None,
        name: str = "blocks",
    ) -> None:
        super().__init__(layout, made, in_graph)
        self._kernels, self._scale = kernels, problem.scale
        self._wide = wide_dtype(getattr(torch, problem.dtype))
        self._memory, self._name = memory, name
        masks = {
            (number, which): csr.masks
            for number, heads in enumerate(layout.blocks)
            for which, csr in enumerate(heads.layouts)
        }
        self._index = tuple(jobs), masks

    def forward(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)`: out of query's shape and dtype, lse `(batch, heads, q_len)` float32 or float64."""
        query, key, value = query.detach(), key.detach(), value.detach()
        if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
            query, key, value = map(unit_stride, (query, key, value))
        jobs, masks = self._memory.on_device(self._name, self._index, query.device)
        wide = self._wide
        with Scratch(self._memory, query, _gathered(jobs, key)) as scratch:
            attend = partial(self._attend, masks, draw, (query, key, value), scratch)
            if _is_whole(jobs, query):
                part, part_lse = attend(jobs[0], jobs[0].forward[0])
                return _shaped(part, query.shape).to(query.dtype), _shaped(part_lse, query.shape[:3]).to(wide)
            out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
            lse = torch.empty(query.shape[:3], dtype=wide, device=query.device)
            if not _covers(jobs, query):
                out.zero_()
                lse.fill_(-torch.inf)
            for job in jobs:
                for chunk in job.forward:
                    found = attend(job, chunk)
                    at = Queries(job, chunk)
                    at.store(out, found[0])
                    at.store(lse.unsqueeze(-1), found[1].unsqueeze(-1))
                    del found
        return out, lse

    def _attend(
        self,
        masks: Mapping[tuple[int, int], Tensor],
        draw: Draw | None,
        tensors: Tensors,
        scratch: Scratch,
        job: Job,
        chunk: Chunk,
    ) -> tuple[Tensor, Tensor]:
        """Attention of a launch's rows to all of their keys: `(lines, rows, queries, head_dim)`, and its lse."""
        query, key, value = tensors
        wide = self._wide
        q = Queries(job, chunk).read(query)
        joint: tuple[Tensor, Tensor] | None = None
        for columns in job.group.columns:
            at = Keys(job, chunk, columns)
            k, v = at.read(key, scratch, "k"), at.read(value, scratch, "v")
            given = {} if draw is None else {"dropout": _dropout(draw, job, chunk, at, query)}
            if columns.mask_ids is None:
                found = self._kernels[job.queries, columns.keys].forward(q, k, v, **given)
            else:  # a query in float32 gets its result in float32
                mask = _mask(job, chunk, columns, masks)
                found = blockwise.forward(q.to(wide), k, v, is_causal=False, scale=self._scale, mask=mask, **given)
            if joint is None and len(job.group.columns) == 1:
                return found
            if joint is None:
                joint = found[0].to(wide, copy=True), found[1].to(wide, copy=True)
            else:
                merge_(*joint, *found)
            del found
        assert joint is not None  # a group has columns
        return joint

    def backward(self, saved: Saved, dout: Tensor, dlse: Tensor | None, draw: Draw | None) -> Gradients:
        """Gradients: every call's backward gets the joint `out` and `lse`, and the results add up.

        The gradients of keys and values are summed in float32 (float64 for float64).
        """
        query, key, value, out = (unit_stride(x.detach()) for x in saved[:4])
        dout = unit_stride(dout.detach())
        jobs, masks = self._memory.on_device(self._name, self._index, query.device)
        wide = self._wide
        lines = [None if x is None else x.detach().unsqueeze(-1) for x in (saved.lse, dlse)]
        with Scratch(self._memory, query, _gathered(jobs, key) + 2 * key.numel() * wide.itemsize) as scratch:

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
                        run: Any = self._kernels[job.queries, columns.keys].backward
                    else:
                        mask = _mask(job, chunk, columns, masks)
                        run = partial(blockwise.backward, is_causal=False, scale=self._scale, mask=mask)
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


def _mask(job: Job, chunk: Chunk, columns: Columns, masks: Mapping[tuple[int, int], Tensor]) -> Tensor:
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


# ------------------------------------------------------------------------------------ where a launch reads and writes


class Queries:
    """The query rows of a launch, as `(lines, rows, queries, head_dim)`: a line is a head of one batch entry.

    Query heads that share a key head come as further queries of one line where the job is folded.
    """

    def __init__(self, job: Job, chunk: Chunk) -> None:
        self._job, self._chunk = job, chunk
        self._entries = chunk.batch.stop - chunk.batch.start
        self._kv_heads = chunk.kv_heads.stop - chunk.kv_heads.start
        self._rows = chunk.rows.stop - chunk.rows.start
        self._folds = job.folded and job.shared > 1

    def read(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor `(batch, heads, q_len, width)`: a view where there is one."""
        group = self._job.group
        rows = self._grid(tensor)
        if group.rows is not None:
            rows = rows.index_select(2, group.rows[self._chunk.rows])
        if self._folds:
            return self._split_heads(rows).flatten(3, 4).flatten(0, 1)
        return rows.flatten(0, 1)

    def store(self, tensor: Tensor, part: Tensor) -> None:
        """Write rows `(lines, rows, queries, width)` into a tensor `(batch, heads, q_len, width)`."""
        group = self._job.group
        grid = self._grid(tensor)
        part = torch.unflatten(part, 0, (self._entries, -1))
        if self._folds:
            part = torch.unflatten(part, 3, (self._job.shared, -1))
            if group.rows is None:
                self._split_heads(grid).copy_(part)
                return
            part = part.transpose(2, 3).flatten(1, 2)
        if group.rows is None:
            grid.copy_(part)
        else:
            grid.index_copy_(2, group.rows[self._chunk.rows], part.to(tensor.dtype))

    def positions(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The number of each line, `(lines, rows)`, and each query's index, `(lines, rows, queries)`; int64."""
        heads = torch.arange(query.shape[1], device=query.device, dtype=torch.int64)
        numbers = torch.arange(query.shape[0], device=query.device, dtype=torch.int64)[:, None] * query.shape[1] + heads
        index = torch.arange(query.shape[2], device=query.device, dtype=torch.int64)
        numbers = numbers[:, :, None, None].expand((*query.shape[:3], 1))
        index = index[:, None].expand((*query.shape[:3], 1))
        return self.read(numbers)[:, :, 0, 0], self.read(index).squeeze(-1)

    def _split_heads(self, grid: Tensor) -> Tensor:
        """Query heads by the key head that they share: `(entries, kv_heads, rows, sharing heads, height, width)`."""
        return torch.unflatten(grid, 1, (self._kv_heads, -1)).transpose(2, 3)

    def _grid(self, tensor: Tensor) -> Tensor:
        """`(entries, heads, rows, height, width)`, a view; of all block rows up to the last, if not regular."""
        job, chunk, group = self._job, self._chunk, self._job.group
        batch, heads, tokens, width = tensor.stride()
        first = job.heads.start + chunk.kv_heads.start * job.shared * job.heads.step
        row, rows = chunk.rows.start, self._rows
        if group.rows is not None:
            row, rows = 0, group.reach
        start = chunk.batch.start * batch + first * heads + (group.start + row * group.step) * tokens
        sizes = (self._entries, self._kv_heads * job.shared, rows, group.height, tensor.shape[3])
        strides = (batch, job.heads.step * heads, group.step * tokens, tokens, width)
        return tensor.as_strided(sizes, strides, tensor.storage_offset() + start)


class Keys:
    """The keys of a launch, as `(lines, rows, keys, head_dim)`."""

    def __init__(self, job: Job, chunk: Chunk, columns: Columns) -> None:
        self._job, self._chunk, self._columns = job, chunk, columns
        self._entries = chunk.batch.stop - chunk.batch.start
        self._kv_heads = chunk.kv_heads.stop - chunk.kv_heads.start
        self._rows = chunk.rows.stop - chunk.rows.start
        self._repeats = 1 if job.folded else job.shared

    def read(self, tensor: Tensor, scratch: Scratch, name: str) -> Tensor:
        """The keys of a tensor `(batch, kv_heads, kv_len, width)`; gathered into memory that the next launch reuses."""
        columns, width = self._columns, tensor.shape[3]
        if columns.run is not None:
            keys = self._run(tensor, columns.run)
        else:
            count, size = columns.blocks.shape[1], columns.size
            index = columns.blocks[self._chunk.rows].flatten()
            shape = (self._entries, self._kv_heads, len(index), size, width)
            keys = torch.index_select(
                self._blocks(tensor), 2, index, out=scratch.again(name, shape, tensor.dtype)
            ).view(self._entries, self._kv_heads, self._rows, count * size, width)
            if columns.tail:
                tail = self._tail(tensor).unsqueeze(2).expand(-1, -1, self._rows, -1, -1)
                keys = torch.cat([keys, tail], dim=3)
        if self._repeats > 1:
            keys = keys.unsqueeze(2).expand(-1, -1, self._repeats, -1, -1, -1).flatten(1, 2)
        return keys.flatten(0, 1)

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add gradients `(lines, rows, keys, width)` to a tensor `(batch, kv_heads, kv_len, width)`."""
        columns = self._columns
        part = torch.unflatten(part, 0, (self._entries, self._kv_heads, self._repeats))
        part = part.sum(2, dtype=total.dtype) if self._repeats > 1 else part.squeeze(2).to(total.dtype)
        count = columns.blocks.shape[1]
        if columns.run is not None and (self._rows == 1 or columns.run[1] == 0):
            self._run(total, (self._first(columns.run), 0), rows=1).add_(part.sum(2, keepdim=True))
            return
        whole = torch.unflatten(part[:, :, :, : count * columns.size], 3, (count, columns.size)).flatten(2, 3)
        self._blocks(total).index_add_(2, columns.blocks[self._chunk.rows].flatten(), whole)
        if columns.tail:
            self._tail(total).add_(part[:, :, :, count * columns.size :].sum(2))

    def positions(self, device: torch.device) -> Tensor:
        """Each key's index in the key tensor, `(rows, keys)` int64."""
        columns, size = self._columns, self._columns.size
        whole = columns.blocks[self._chunk.rows].unsqueeze(-1) * size + torch.arange(
            size, device=device, dtype=torch.int64
        )
        last = self._job.group.key_blocks * size + torch.arange(columns.tail, device=device, dtype=torch.int64)
        index = torch.cat([whole.flatten(1), last.expand(self._rows, -1)], dim=1)
        return index + self._job.group.key_start

    def _first(self, run: tuple[int, int]) -> int:
        return run[0] + int(self._chunk.rows.start) * run[1]

    def _run(self, tensor: Tensor, run: tuple[int, int], rows: int | None = None) -> Tensor:
        """`(entries, kv_heads, rows, keys, width)`: rows overlap, and nothing is copied."""
        size, tokens = self._columns.size, tensor.stride(2)
        start = run[0] * size if rows is not None else self._first(run) * size
        rows = self._rows if rows is None else rows
        return self._view(tensor, start, (rows, self._columns.keys), (run[1] * size * tokens, tokens))

    def _blocks(self, tensor: Tensor) -> Tensor:
        """`(entries, kv_heads, blocks, size, width)`: all whole blocks."""
        size, tokens = self._columns.size, tensor.stride(2)
        return self._view(tensor, 0, (self._job.group.key_blocks, size), (size * tokens, tokens))

    def _tail(self, tensor: Tensor) -> Tensor:
        """`(entries, kv_heads, tail, width)`: the ragged last block."""
        start = self._job.group.key_blocks * self._columns.size
        return self._view(tensor, start, (self._columns.tail,), (tensor.stride(2),))

    def _view(self, tensor: Tensor, start: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """A view from this key of the document on, over the launch's batch entries and key heads."""
        chunk, heads = self._chunk, self._job.kv_heads
        step = heads.step * tensor.stride(1)
        first = chunk.batch.start * tensor.stride(0) + heads.start * tensor.stride(1) + chunk.kv_heads.start * step
        offset = tensor.storage_offset() + first + (self._job.group.key_start + start) * tensor.stride(2)
        sizes = (self._entries, self._kv_heads, *sizes, tensor.shape[3])
        return tensor.as_strided(sizes, (tensor.stride(0), step, *strides, tensor.stride(3)), offset)
