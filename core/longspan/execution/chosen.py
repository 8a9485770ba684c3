"""Running blocks that were chosen from content: every block of queries of every head has a list of its own.

Rows with equally many blocks run as one batch over all heads, and read their blocks by index. What a batch is made of
follows from lengths alone, except where a ragged last block may be chosen: there each head runs by itself, as what one
head holds must not decide how another is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import gcd
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from longspan.execution.kernel import CheckedKernel
from longspan.execution.runner import Gradients, Runner, Saved
from longspan.lowering.schedule import PAIRS, TEMPORARY
from longspan.memory.workspace import Scratch, Workspace
from longspan.numerics import blockwise
from longspan.numerics.dropout import Draw, Dropout
from longspan.numerics.merge import merge_
from longspan.numerics.tensors import wide_dtype
from longspan.patterns.topk.choice import Part, best
from longspan.patterns.topk.scoring import BlockScoring
from longspan.spec.pattern import Dense
from longspan.spec.problem import Problem

__all__ = ["ChosenBlocks", "ChosenRunner"]

Columns = tuple[Tensor, int, Tensor | None]
"""Some blocks of a batch's rows, `(rows, n)`, how many keys of the ragged last one follow, and the mask if any."""


class ChosenBlocks:
    """What runs the blocks that are chosen in one document, with a kernel for every shape of dense problem.

    Args:
        problem: the block-sparse problem that stands in for the document's: batch entries are heads.
        make: a kernel for a dense problem, asked once for each shape.
        memory: where temporaries come from.
    """

    def __init__(self, problem: Problem, make: Callable[[Problem], CheckedKernel], memory: Workspace) -> None:
        self.problem, self.memory, self._make = problem, memory, make
        self._rows: dict[torch.device, _Rows] = {}
        self._kernels: dict[tuple[int, int], CheckedKernel] = {}

    def prepare(self, scoring: BlockScoring, k: int) -> None:
        """Make the kernels for every choice of `k` blocks: it takes the ragged last one, or leaves it out."""
        columns = torch.arange(scoring.columns, dtype=torch.float32, device="cpu")
        for scores in (columns, -columns):
            chosen = best(scores.repeat(1, 1, scoring.rows, 1), scoring, min(k, scoring.columns))
            for batch in self(Part(0, scoring, scores, chosen), chosen).batches:
                for blocks, tail, mask in batch.columns:
                    if mask is None:
                        self.kernel(batch.height, blocks.shape[1] * scoring.block_size + tail)

    def kernel(self, q_len: int, kv_len: int) -> CheckedKernel:
        """The kernel for such a dense problem."""
        found = self._kernels.get((q_len, kv_len))
        if found is None:
            dense = self.problem.replace(pattern=Dense(), q_len=q_len, kv_len=kv_len, query_offset=0)
            found = self._kernels[q_len, kv_len] = self._make(dense.replace(kv_heads=dense.heads))
        return found

    def __call__(self, part: Part, chosen: Tensor) -> ChosenRunner:
        """What runs these blocks, `(batch, heads, query blocks, key blocks)` bool."""
        rows = self._rows.get(chosen.device)
        if rows is None:
            with torch.inference_mode(False):  # they outlive the mode that a call happens to be made in
                rows = self._rows[chosen.device] = _Rows(part.scoring, chosen.device)
        return ChosenRunner(self, rows, chosen)


class _Rows:
    """What is known of block rows before anything is chosen, on one device.

    `starts` and `own` are the first query of each row, and the block that causality cuts: for the rows `cut`. Rows of
    one kind have the same part of a block's queries, from the first to the last, and are cut to as many keys.
    """

    def __init__(self, scoring: BlockScoring, device: torch.device) -> None:
        grid, self.size = scoring.grid, scoring.block_size
        self.whole, self.tail = divmod(scoring.kv_len, self.size)
        (low, high), own = grid.row_spans(), grid.row_numbers()
        width = (scoring.kv_len - own * self.size).clamp_(min=0, max=self.size)
        cut = (low < width - 1) & scoring.is_causal
        kinds, kind = torch.unique(torch.stack([low, high, cut * width], 1), dim=0, return_inverse=True)
        self.kinds: list[list[int]] = kinds.tolist()
        self.starts = (own * self.size - scoring.query_offset).clamp_(min=0).to(device)
        self.kind, self.own, self.cut = kind.to(device), own.to(device), cut.nonzero().squeeze(1).to(device)
        self.is_by_head = self.tail > 0 and not (scoring.is_causal and grid.first_row + grid.rows <= grid.columns)
        self.triangle = torch.ones(self.size, self.size, dtype=torch.bool, device=device).tril_()


@frozen(eq=False)
class _Batch:
    """Rows that run at once: the number of each one's head, all batch entries' on end, and its first query."""

    head: Tensor
    start: Tensor
    height: int
    columns: tuple[Columns, ...]


class ChosenRunner(Runner):
    """Attention over the blocks of one choice."""

    def __init__(self, of: ChosenBlocks, rows: _Rows, chosen: Tensor) -> None:
        super().__init__("chosen blocks")
        problem, self._rows, self._kernel, self._memory = of.problem, rows, of.kernel, of.memory
        self._shared, self._scale = problem.heads // problem.kv_heads, problem.scale
        self._wide = wide_dtype(getattr(torch, problem.dtype))
        self._token = 2 * problem.head_dim * self._wide.itemsize  # a key and its value
        self.batches = tuple(self._batched(chosen.flatten(0, 1)))

    def _batched(self, chosen: Tensor) -> Iterator[_Batch]:
        """The batches of `(heads, query blocks, key blocks)`, each of bounded size."""
        rows, size, device = self._rows, self._rows.size, chosen.device
        cut = torch.zeros(chosen.shape[:2], dtype=torch.bool, device=device)
        if len(rows.cut):
            own, chosen = rows.own[rows.cut], chosen.clone()
            cut[:, rows.cut] = chosen[:, rows.cut, own]
            chosen[:, rows.cut, own] = False
        full, tail = chosen[..., : rows.whole], chosen[..., rows.whole :].any(-1)
        counts, many = full.sum(-1), rows.whole + 1
        code = ((rows.kind * many + counts) * 2 + tail) * 2 + cut
        if rows.is_by_head:
            apart = torch.arange(len(chosen), device=device, dtype=torch.int64) * (4 * many * len(rows.kinds))
            code += apart[:, None]
        there = (counts > 0) | tail | cut
        codes, kind = torch.unique(code[there], return_inverse=True)
        lines = there.flatten().nonzero().squeeze(1)[kind.argsort(stable=True)]
        blocks, counts = full.flatten(0, 1).nonzero()[:, 1], counts.flatten()
        first, steps = counts.cumsum(0) - counts, torch.arange(many, device=device, dtype=torch.int64)
        most = max(1, min(TEMPORARY // (size * self._token), PAIRS // size**2))
        for number, mine in zip(codes.tolist(), torch.split(lines, torch.bincount(kind).tolist()), strict=True):
            count, (low, high, width) = number // 4 % many, rows.kinds[number // 4 // many % len(rows.kinds)]
            keys, height = min(count, most) * size + rows.tail + width, high - low
            at_once = max(1, min(TEMPORARY // (2 * (height + keys) * self._token), PAIRS // (height * keys)))
            for some in torch.split(mine, at_once):
                head, row = some // chosen.shape[1], some % chosen.shape[1]
                index = blocks[first[some][:, None] + steps[:count]]
                columns: list[Columns] = [(part, 0, None) for part in torch.split(index, most, dim=1) if count]
                if number // 2 % 2:
                    columns.append((columns.pop()[0] if count else index, rows.tail, None))
                if number % 2:
                    mask, mine_alone = rows.triangle[low:high, :width][None, None], rows.own[row][:, None]
                    columns.append((mine_alone, 0, mask) if width == size else (mine_alone[:, :0], width, mask))
                yield _Batch(head, rows.starts[row], height, tuple(columns))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)` of tensors whose batch entries are heads: `(1, heads, q_len, head_dim)`."""
        query, key, value = query.detach(), key.detach(), value.detach()
        with Scratch(self._memory, query, self._gathered(key)) as scratch:
            first = self.batches[0] if len(self.batches) == 1 else None
            if first is not None and len(first.head) * first.height == query.shape[1] * query.shape[2]:
                part, part_lse = self._attend(first, query, key, value, draw, scratch)  # all rows, in order
                return part.reshape(query.shape).to(query.dtype), part_lse.reshape(query.shape[:3]).to(self._wide)
            out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
            lse = torch.full(query.shape[:3], -torch.inf, dtype=self._wide, device=query.device)
            for batch in self.batches:
                part, part_lse = self._attend(batch, query, key, value, draw, scratch)
                _store(out, batch, part)
                _store(lse.unsqueeze(-1), batch, part_lse)
        return out, lse

    def _attend(
        self, batch: _Batch, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None, scratch: Scratch
    ) -> tuple[Tensor, Tensor]:
        """`(1, rows, height, head_dim)`, and its lse."""
        q = _read(query, batch)
        joint: tuple[Tensor, Tensor] | None = None
        for columns in batch.columns:
            k, v = self._keys(key, batch, columns, scratch, "k"), self._keys(value, batch, columns, scratch, "v")
            given, mask = self._given(batch, columns, draw), columns[2]
            if mask is None:
                part = self._kernel(batch.height, k.shape[2]).forward(q, k, v, **given)
            else:  # a query in float32 gets its result in float32
                part = blockwise.forward(q.to(self._wide), k, v, is_causal=False, scale=self._scale, mask=mask, **given)
            if len(batch.columns) == 1:
                return part
            if joint is None:
                joint = part[0].to(self._wide, copy=True), part[1].to(self._wide, copy=True)
            else:
                merge_(*joint, *part)
        assert joint is not None  # a batch has columns
        return joint

    def backward(self, saved: Saved, dout: Tensor, dlse: Tensor | None, draw: Draw | None) -> Gradients:
        """The gradients; those of keys and values are summed in float32 (float64 for float64)."""
        query, key, value, out, lse = (x.detach() for x in saved)
        padded = key.shape[1], (self._rows.whole + (self._rows.tail > 0)) * self._rows.size, key.shape[3]
        dkey, dvalue = (torch.zeros(padded, dtype=self._wide, device=key.device) for _ in range(2))
        dquery = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
        with Scratch(self._memory, query, self._gathered(key)) as scratch:
            for batch in self.batches:
                do, q, o, row_lse = (_read(x, batch) for x in (dout, query, out, lse.unsqueeze(-1)))
                row_dlse = None if dlse is None else _read(dlse.unsqueeze(-1), batch)[..., 0]
                dq: Tensor | None = None
                for columns in batch.columns:
                    k, v = (self._keys(x, batch, columns, scratch, name) for x, name in ((key, "k"), (value, "v")))
                    if columns[2] is None:
                        run: Any = self._kernel(batch.height, k.shape[2]).backward
                    else:
                        run = partial(blockwise.backward, is_causal=False, scale=self._scale, mask=columns[2])
                        q, k, v = q.to(self._wide), k.to(self._wide), v.to(self._wide)  # gradients come in their dtypes
                    given = self._given(batch, columns, draw)
                    some, dk, dv = run(do, q, k, v, o, row_lse[..., 0], dlse=row_dlse, **given)
                    del k, v
                    self._add(dkey, batch, columns, dk)
                    self._add(dvalue, batch, columns, dv)
                    dq = some if dq is None else dq.to(self._wide) + some
                assert dq is not None  # a batch has columns
                _store(dquery, batch, dq)
        dkey, dvalue = (total[None, :, : key.shape[2]].to(key.dtype).contiguous() for total in (dkey, dvalue))
        return dquery, dkey, dvalue

    def _gathered(self, key: Tensor) -> int:
        """Bytes of keys and values that a forward gathers in all, but for the last block's."""
        count = sum(blocks.numel() for batch in self.batches for blocks, _, _ in batch.columns)
        return 2 * count * self._rows.size * key.shape[3] * key.element_size()

    def _keys(self, tensor: Tensor, batch: _Batch, columns: Columns, scratch: Scratch, name: str) -> Tensor:
        """`(1, rows, keys, head_dim)`: blocks are elements of one view, in steps that heads and tokens share."""
        (blocks, tail, _), size, tokens = columns, self._rows.size, tensor.stride(2)
        head, found = batch.head // self._shared, []
        if blocks.shape[1]:
            view, step = _steps(tensor, size, size * tokens, self._rows.whole)
            index = (head * (tensor.stride(1) // step))[:, None] + blocks * (size * tokens // step)
            memory = scratch.again(name, (index.numel(), size, tensor.shape[3]), tensor.dtype)
            taken = torch.index_select(view, 0, index.flatten(), out=memory)
            found.append(taken.view(1, len(head), -1, tensor.shape[3]))
        if tail:
            found.append(tensor[0, :, self._rows.whole * size :].index_select(0, head).unsqueeze(0))
        return torch.cat(found, dim=2) if len(found) > 1 else found[0]

    def _add(self, total: Tensor, batch: _Batch, columns: Columns, part: Tensor) -> None:
        """Add gradients `(1, rows, keys, head_dim)` to `(kv_heads, whole blocks of keys, head_dim)`."""
        (blocks, tail, _), size, head = columns, self._rows.size, batch.head // self._shared
        part, count = part[0].to(total.dtype), blocks.shape[1] * size
        if count:
            index = (head[:, None] * (total.shape[1] // size) + blocks).flatten()
            total.view(-1, size, total.shape[2]).index_add_(0, index, part[:, :count].reshape(len(index), size, -1))
        if tail:
            start = self._rows.whole * size
            total[:, start : start + tail].index_add_(0, head, part[:, count:])

    def _given(self, batch: _Batch, columns: Columns, draw: Draw | None) -> dict[str, Any]:
        """The dropout by position: numbers are those of the whole tensors, so that every path drops the same pairs."""
        if draw is None:
            return {}
        (blocks, tail, _), size = columns, self._rows.size
        within = torch.arange(max(size, batch.height), device=blocks.device, dtype=torch.int64)
        keys = (blocks[..., None] * size + within[:size]).flatten(1)
        last = (self._rows.whole * size + within[:tail]).expand(len(keys), -1)
        queries = batch.start[:, None] + within[: batch.height] + draw.query_offset
        numbers = batch.head[None], queries[None], torch.cat([keys, last], dim=1)[None]
        return {"dropout": Dropout(draw.p, draw.seed, *numbers)}


def _steps(tensor: Tensor, length: int, between: int, count: int) -> tuple[Tensor, int]:
    """`(any, length, width)`: the runs of tokens that begin at multiples of a step which heads and runs share."""
    _, heads, tokens, last = tensor.stride()
    step = max(1, gcd(heads, between))
    most = ((tensor.shape[1] - 1) * heads + (count - 1) * between) // step + 1
    return tensor.as_strided((most, length, tensor.shape[3]), (step, tokens, last)), step


def _read(tensor: Tensor, batch: _Batch) -> Tensor:
    """The rows of a batch, `(1, rows, height, width)`, out of `(1, heads, q_len, width)`."""
    view, step = _steps(tensor, batch.height, tensor.stride(2), tensor.shape[2] - batch.height + 1)
    index = batch.head * (tensor.stride(1) // step) + batch.start * (tensor.stride(2) // step)
    return view.index_select(0, index).unsqueeze(0)


def _store(tensor: Tensor, batch: _Batch, part: Tensor) -> None:
    """Write the rows of a batch to where they belong in a contiguous tensor."""
    first = (batch.head * tensor.shape[2] + batch.start)[:, None]
    index = (first + torch.arange(batch.height, device=first.device, dtype=torch.int64)).flatten()
    lines = tensor.view(-1, tensor.shape[3])
    lines.index_copy_(0, index, part.reshape(-1, tensor.shape[3]).to(tensor.dtype))
