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

from longspan.execution.gather import Keys, Queries
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

__all__ = ["BlockRunner"]

Tensors = tuple[Tensor, Tensor, Tensor]


class BlockRunner(Runner):
    """Runs a block-sparse layout with the kernels of dense problems.

    Args:
        layout: the blocks.
        jobs: what to run.
        kernels: by `(q_len, kv_len)`.
        scale: factor on the scores.
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
        scale: float,
        memory: Workspace,
        made: Sequence[Kernel] = (),
        in_graph: Callable[..., Gradients] | None = None,
        name: str = "blocks",
    ) -> None:
        super().__init__(layout, made, in_graph)
        self._kernels, self._scale = kernels, scale
        self._memory, self._name = memory, name
        masks = {
            (number, which): csr.masks
            for number, heads in enumerate(layout.blocks)
            for which, csr in enumerate(heads.layouts)
        }
        self._index = tuple(jobs), masks

    def forward(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)`: out of query's shape and dtype, lse `(batch, heads, q_len)` float32 or float64."""
        query, key, value = (unit_stride(x.detach()) for x in (query, key, value))
        jobs, masks = self._memory.on_device(self._name, self._index, query.device)
        wide = wide_dtype(query.dtype)
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
        wide = wide_dtype(query.dtype)
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
        wide = wide_dtype(query.dtype)
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
