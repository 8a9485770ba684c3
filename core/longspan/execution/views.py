"""The strided views that a call of a layout reads and writes: no row is ever copied to be read.

A call spans six dimensions: batch, key heads, query heads that share one, strips, rows, head_dim. Kernels take four, so
adjacent dimensions are folded where the strides of every tensor allow it, and what remains is looped over, smallest
first. Long dimensions are cut so that a kernel's result, a temporary, stays within a budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

import torch
from attrs import frozen
from torch import Tensor

from longspan.lowering.layout import Call

__all__ = ["Block", "blocks"]

Strides = tuple[int, ...]


@frozen(slots=True)
class Block:
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


@lru_cache(maxsize=512)
def blocks(
    call: Call, batch: int, width: int, gqa: bool, budget: int, queries: tuple[Strides, ...], keys: tuple[Strides, ...]
) -> tuple[Block, ...]:
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
    strips = dimension(
        call.queries.count,
        [call.queries.period * s[2] for s in queries],
        [call.keys.period * s[2] for s in keys],
    )
    shared = dimension(ratio, [step * s[1] for s in queries], [0] * len(keys))
    own = dimension(
        call.kv_heads.count, [ratio * step * s[1] for s in queries], [call.kv_heads.step * s[1] for s in keys]
    )
    fused = gqa and ratio > 1
    outer = _fold([entries, strips] if fused else [entries, own, shared, strips])
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
            found.append(Block(*shapes, pairs, tuple(rows), here, repeated))
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
