"""Where a launch of a block-sparse layout reads and writes: views of whole rows and runs, gathered blocks otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.lowering.groups import Columns
from longspan.lowering.schedule import Chunk, Job
from longspan.memory.workspace import Scratch

__all__ = ["Keys", "Queries"]


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
