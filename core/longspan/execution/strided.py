"""Running a layout's dense calls: each one's kernel over strided views, results stored or merged in place.

No row is ever copied to be read. A call spans six dimensions: batch, key heads, query heads that share one, segments,
rows, head_dim. Kernels take four, so adjacent dimensions are folded where the strides of every tensor allow it, and
what remains is looped over, smallest first. Long dimensions are cut so that a kernel's result, a temporary, stays
within a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from longspan.execution.kernel import CheckedKernel
from longspan.execution.runner import Gradients, Runner, Saved
from longspan.lowering.layout import Call, Layout
from longspan.memory.workspace import Scratch, Workspace
from longspan.numerics.dropout import Draw, Dropout
from longspan.numerics.merge import merge_
from longspan.numerics.tensors import unit_stride, wide_dtype
from longspan.spec.backend import Kernel
from longspan.spec.problem import Problem

__all__ = ["TEMPORARY", "Launch", "LoweredRunner", "launches"]

TEMPORARY = 16 * 2**20
"""Bytes that one kernel launch's output may take, where the work can be cut that fine."""

KEPT, KEPT_STRIDES = 512, 8
"""How many launches a runner keeps, and for how many combinations of strides."""

Strides = tuple[int, ...]


@frozen(slots=True)
class Launch:
    """One kernel launch: shape, stride and storage offset of the query side, the key side and the LSE's rows.

    `shared` is the dimension (0 or 1) along which several query heads read one key head (key stride 0), or None: a
    gradient with respect to keys is to be summed over it.
    """

    query_shape: tuple[int, int, int, int]
    key_shape: tuple[int, int, int, int]
    outer: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    shared: int | None

    def query_side(self, tensor: Tensor, slot: int) -> Tensor:
        """The view of a query-like tensor (query, out, their gradients) whose strides were given at `slot`."""
        stride = (*self.outer[slot], self.rows[slot], tensor.stride(3))
        return tensor.as_strided(self.query_shape, stride, tensor.storage_offset() + self.starts[slot])

    def key_side(self, tensor: Tensor, slot: int, once: bool = False) -> Tensor:
        """The view of a key-like tensor; with `once`, the shared dimension is 1 instead of repeated."""
        shape = list(self.key_shape)
        if once and self.shared is not None:
            shape[self.shared] = 1
        stride = (*self.outer[slot], self.rows[slot], tensor.stride(3))
        return tensor.as_strided(shape, stride, tensor.storage_offset() + self.starts[slot])

    def line_side(self, tensor: Tensor, slot: int) -> Tensor:
        """The view of an LSE-like tensor `(batch, heads, seq)`."""
        stride = (*self.outer[slot], self.rows[slot])
        return tensor.as_strided(self.query_shape[:3], stride, tensor.storage_offset() + self.starts[slot])

    def coordinates(self, slot: int, device: torch.device, of_keys: bool = False) -> Tensor:
        """The value at each place of a tensor that would hold its own storage offsets: `(size, size, rows)`, int64."""
        sizes = (self.key_shape if of_keys else self.query_shape)[:3]
        found = torch.full((1, 1, 1), self.starts[slot], dtype=torch.int64, device=device)
        for place, step in enumerate((*self.outer[slot], self.rows[slot])):
            line = torch.arange(sizes[place], device=device, dtype=torch.int64) * step
            found = found + line.view([-1 if place == other else 1 for other in range(3)])
        return found


def launches(
    call: Call, batch: int, width: int, gqa: bool, budget: int, queries: tuple[Strides, ...], keys: tuple[Strides, ...]
) -> tuple[Launch, ...]:
    """The launches of one call.

    Args:
        call: the dense call.
        batch: batch entries.
        width: head_dim.
        gqa: the kernel takes fewer key heads than query heads.
        budget: most rows (times heads and batch) of a launch where it can be cut.
        queries: the strides of each query-like tensor (query, out, lse, ...): their slots are 0, 1, ...
        keys: the strides of each key-like tensor: their slots follow.
    """
    ratio = call.heads.count // call.kv_heads.count
    starts = [call.queries.start * s[2] + call.heads.start * s[1] for s in queries]
    starts += [call.keys.start * s[2] + call.kv_heads.start * s[1] for s in keys]
    rows = [call.queries.stride * s[2] for s in queries] + [call.keys.stride * s[2] for s in keys]

    def dimension(size: int, of_query: list[int], of_key: list[int]) -> tuple[int, tuple[int, ...]]:
        return size, (*of_query, *of_key)

    step = call.heads.step
    entries = dimension(batch, [s[0] for s in queries], [s[0] for s in keys])
    segments = dimension(
        call.queries.count,
        [call.queries.period * s[2] for s in queries],
        [call.keys.period * s[2] for s in keys],
    )
    shared = dimension(ratio, [step * s[1] for s in queries], [0] * len(keys))
    own = dimension(
        call.kv_heads.count, [ratio * step * s[1] for s in queries], [call.kv_heads.step * s[1] for s in keys]
    )
    fused = gqa and ratio > 1
    outer = _fold([entries, segments] if fused else [entries, own, shared, segments])
    room = 1 if fused else 2
    outer.sort(key=lambda one: one[0])
    looped, kept = outer[: max(0, len(outer) - room)], outer[max(0, len(outer) - room) :]
    kept = [(1, (0,) * len(rows))] * (room - len(kept)) + kept
    per_entry = call.queries.length * (call.heads.count if fused else kept[0][0])
    cut = max(1, budget // max(1, per_entry))  # of the longest dimension
    found = []
    for where in product(*(range(size) for size, _ in looped)):
        base = [
            start + sum(i * strides[slot] for i, (_, strides) in zip(where, looped, strict=True))
            for slot, start in enumerate(starts)
        ]
        for at in range(0, kept[-1][0], cut):
            count = min(cut, kept[-1][0] - at)
            here = tuple(start + at * stride for start, stride in zip(base, kept[-1][1], strict=True))
            if fused:
                head_strides = [step * s[1] for s in queries] + [call.kv_heads.step * s[1] for s in keys]
                pairs = tuple(zip(kept[-1][1], head_strides, strict=True))
                sizes, key_sizes = (count, call.heads.count), (count, call.kv_heads.count)
            else:
                pairs = tuple(zip(kept[0][1], kept[1][1], strict=True))
                sizes = key_sizes = (kept[0][0], count)
            repeated = _shared(key_sizes, pairs[len(queries) :])
            shapes = (*sizes, call.queries.length, width), (*key_sizes, call.keys.length, width)
            found.append(Launch(*shapes, pairs, tuple(rows), here, repeated))
    return tuple(found)


def _shared(sizes: tuple[int, int], pairs: tuple[tuple[int, ...], ...]) -> int | None:
    """The dimension along which every key-like tensor repeats itself."""
    for place in (0, 1):
        if sizes[place] > 1 and all(pair[place] == 0 for pair in pairs):
            return place
    return None


def _fold(dimensions: list[tuple[int, Strides]]) -> list[tuple[int, Strides]]:
    """Drop dimensions of one, and join pairs that are one longer dimension in every tensor."""
    left = [one for one in dimensions if one[0] != 1]
    joined = True
    while joined and len(left) > 1:
        joined = False
        for a, b in _pairs(left):
            if all(x == b[0] * y for x, y in zip(a[1], b[1], strict=True)):
                left.remove(a)
                left.remove(b)
                left.append((a[0] * b[0], b[1]))
                joined = True
                break
    return left


def _pairs(items: list[tuple[int, Strides]]) -> Iterator[tuple[tuple[int, Strides], tuple[int, Strides]]]:
    for i, a in enumerate(items):
        for j, b in enumerate(items):
            if i != j:
                yield a, b


class LoweredRunner(Runner):
    """Runs a layout call by call.

    Args:
        problem: what they compute.
        layout: the calls.
        kernels: one for each call.
        memory: where temporaries come from. Results never do.
        made: the distinct kernels.
        in_graph: as of `Runner`.
    """

    def __init__(
        self,
        problem: Problem,
        layout: Layout,
        kernels: Sequence[CheckedKernel],
        memory: Workspace,
        made: Sequence[Kernel] = (),
        in_graph: Callable[..., Gradients] | None = None,
    ) -> None:
        super().__init__(layout, made, in_graph)
        self._calls = tuple(zip(layout.calls, kernels, strict=True))
        self._wide = wide_dtype(getattr(torch, problem.dtype))
        self._merges, self._covered = layout.merges, layout.covered
        self._memory = memory
        self._kept: dict[tuple[object, ...], list[tuple[Call, CheckedKernel, Launch]]] = {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)`: out of query's shape and dtype, lse `(batch, heads, q_len)` float32 or float64.

        Results that several calls share are merged in float32 or wider, whatever the dtype of the inputs.
        """
        if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
            query, key, value = map(unit_stride, (query, key, value))
        wide = self._wide
        out_dtype = wide if self._merges else query.dtype
        with Scratch(self._memory, query, query.numel() * wide.itemsize) as scratch:
            if out_dtype is query.dtype:
                out = torch.empty(query.shape, dtype=out_dtype, device=query.device)
            else:
                out = scratch.once("out", query.shape, out_dtype)
            lse = torch.empty(query.shape[:3], dtype=wide, device=query.device)
            if not self._covered:
                out.zero_()
                lse.fill_(-torch.inf)
            query_strides = (query.stride(), out.stride(), (*lse.stride(), 1))
            key_strides = (key.stride(), value.stride())
            k = _first_key(query_strides, draw)

            def run(call: Call, kernel: CheckedKernel, launch: Launch, given: dict[str, Any]) -> None:
                """A function, so that nothing refers to the scratch memory when that is given back.

                Nor to a launch's results: two at once are twice the memory, and the heap trims what is freed.
                """
                q, keys, values = launch.query_side(query, 0), launch.key_side(key, k), launch.key_side(value, k + 1)
                if call.flipped:
                    q, keys, values = scratch.flip("q", q), scratch.flip("k", keys), scratch.flip("v", values)
                part, part_lse = kernel.forward(q, keys, values, **given)
                if call.flipped:
                    part, part_lse = scratch.flip("part", part), part_lse.flip(2)
                if call.first:
                    launch.query_side(out, 1).copy_(part)
                    launch.line_side(lse, 2).copy_(part_lse)
                else:
                    part = scratch.widen("wide", part, wide)
                    merge_(launch.query_side(out, 1), launch.line_side(lse, 2), part, part_lse)

            for one in self._launches(draw, query, query_strides, key_strides):
                run(*one)
            return out.to(query.dtype), lse

    def backward(self, saved: Saved, dout: Tensor, dlse: Tensor | None, draw: Draw | None) -> Gradients:
        """Gradients: every call's backward gets the joint `out` and `lse`, and the results add up."""
        query, key, value, out = map(unit_stride, saved[:4])
        dout, lse = unit_stride(dout), saved.lse
        sums = len(self._calls) > 1 or query.shape[1] != key.shape[1]
        dtype = self._wide if sums else query.dtype
        with Scratch(self._memory, query, query.numel() * dtype.itemsize) as scratch:

            def total(name: str, like: Tensor) -> Tensor:
                if dtype is like.dtype:
                    return torch.zeros(like.shape, dtype=dtype, device=like.device)
                return scratch.once(name, like.shape, dtype).zero_()

            dquery, dkey, dvalue = total("dquery", query), total("dkey", key), total("dvalue", value)
            lines = [(*x.stride(), 1) for x in (lse, dlse) if x is not None]
            query_strides = (*(x.stride() for x in (query, dout, out, dquery)), *lines)
            key_strides = tuple(x.stride() for x in (key, value, dkey, dvalue))
            k = _first_key(query_strides, draw)
            for call, kernel, launch, given in self._launches(draw, query, query_strides, key_strides):
                turn = scratch.flip if call.flipped else _as_is
                dq, dk, dv = kernel.backward(
                    turn("dout", launch.query_side(dout, 1)),
                    turn("q", launch.query_side(query, 0)),
                    turn("k", launch.key_side(key, k)),
                    turn("v", launch.key_side(value, k + 1)),
                    turn("out", launch.query_side(out, 2)),
                    turn("lse", launch.line_side(lse, 4)),
                    dlse=None if dlse is None else turn("dlse", launch.line_side(dlse, 5)),
                    **given,
                )
                launch.query_side(dquery, 3).add_(turn("dq", dq))
                _add_keys(launch, dkey, k + 2, turn("dk", dk))
                _add_keys(launch, dvalue, k + 3, turn("dv", dv))
                del dq, dk, dv
            dquery = dquery.to(query.dtype)  # one by one: each wide sum is freed before the next result is made
            dkey = dkey.to(key.dtype)
            dvalue = dvalue.to(value.dtype)
            return dquery, dkey, dvalue

    def _launches(
        self, draw: Draw | None, query: Tensor, queries: tuple[Strides, ...], keys: tuple[Strides, ...]
    ) -> Iterator[tuple[Call, CheckedKernel, Launch, dict[str, Any]]]:
        batch, heads, _, width = query.shape
        budget = max(1, TEMPORARY // (width * query.element_size()))
        lines, query_positions = len(queries), len(queries) + 1
        key_positions = _first_key(queries, draw) + len(keys)
        if draw is not None:  # coordinates are strided too: they fold and split with the tensors
            queries = (*queries, (heads, 1, 0, 0), (0, 0, 1, 0))
            keys = (*keys, (0, 0, 1, 0))
        how = batch, width, budget, queries, keys
        made = self._kept.get(how)
        if made is None:
            made = [
                (call, kernel, launch)
                for call, kernel in self._calls
                for launch in launches(call, batch, width, kernel.gqa, budget, queries, keys)
            ]
            if len(made) <= KEPT:
                if len(self._kept) >= KEPT_STRIDES:
                    self._kept.clear()
                self._kept[how] = made
        for call, kernel, launch in made:
            if draw is None:
                yield call, kernel, launch, {}
                continue
            positions = launch.coordinates(key_positions, query.device, of_keys=True)
            dropout = Dropout(
                draw.p,
                draw.seed,
                launch.coordinates(lines, query.device)[..., 0],
                launch.coordinates(query_positions, query.device) + draw.query_offset,
                positions if launch.key_shape[1] == launch.query_shape[1] else positions[:, :1],  # shared heads: alike
            )
            yield call, kernel, launch, {"dropout": dropout.flipped() if call.flipped else dropout}


def _first_key(queries: tuple[Strides, ...], draw: Draw | None) -> int:
    """The slot of the first key-like tensor: behind the query-like ones and, with dropout, their two coordinates."""
    return len(queries) + (0 if draw is None else 2)


def _as_is(name: str, tensor: Tensor) -> Tensor:
    return tensor


def _add_keys(launch: Launch, total: Tensor, slot: int, part: Tensor) -> None:
    if launch.shared is not None:
        part = part.sum(launch.shared, keepdim=True, dtype=total.dtype)
    launch.key_side(total, slot, once=True).add_(part)
