"""The token masks of partial blocks, each kept once, and the arithmetic of block states that they make possible.

A block's *state* is an integer: -1 empty, 0 full, t > 0 partial with mask `t - 1`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor

from longspan.numerics.tensors import counting

__all__ = ["CHUNK", "EMPTY", "FULL", "MaskTable", "all_full", "content"]

EMPTY, FULL = -1, 0
CHUNK = 2**26
"""Bytes of masks that are computed at once."""

_DENSE_PAIRS = 2**20
_FEW = 32
"""Up to so many masks, hashing each alone is faster than looking for equal ones first."""


def all_full(*shape: int) -> Tensor:
    """The states of blocks that are all full, int64."""
    return torch.zeros(shape, dtype=torch.int64, device="cpu")


def content(tensor: Tensor) -> bytes:
    """The bytes of a contiguous CPU tensor, without NumPy, which torch may lack."""
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size()) if tensor.numel() else b""


class MaskTable:
    """A growing collection of distinct token masks of one block size."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._parts: list[Tensor] = [torch.empty(0, block_size, block_size, dtype=torch.bool, device="cpu")]
        self._found: dict[bytes, int] = {}
        self._weights: Tensor | None = None

    @property
    def count(self) -> int:
        """How many masks there are."""
        return len(self._found)

    @property
    def chunk(self) -> int:
        """How many masks may be computed at once."""
        return max(1, CHUNK // self.block_size**2)

    @property
    def masks(self) -> Tensor:
        """All of them, in order of their states: `(count, block_size, block_size)` bool."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    def add(self, masks: Tensor) -> Tensor:
        """The states that stand for `(n, block_size, block_size)` bool masks: `(n,)` int64."""
        states = torch.full((len(masks),), EMPTY, dtype=torch.int64, device="cpu")
        if not len(masks):
            return states
        flat = masks.reshape(len(masks), -1)
        some, every = flat.any(1), flat.all(1)
        states[every] = FULL
        mixed = (some & ~every).nonzero().squeeze(1)
        if len(mixed):
            states[mixed] = self._add_mixed(masks if len(mixed) == len(masks) else masks[mixed])
        return states

    def _add_mixed(self, masks: Tensor) -> Tensor:
        first, inverse = self._distinct(masks)
        states: list[int] = []
        new: list[int] = []
        for number in first:
            digest = blake2b(content(masks[number].contiguous()), digest_size=16).digest()
            if digest not in self._found:
                self._found[digest] = len(self._found) + 1
                new.append(number)
            states.append(self._found[digest])
        if new:
            self._parts.append(masks[new])
        of_distinct = torch.tensor(states, dtype=torch.int64, device="cpu")
        return of_distinct if inverse is None else of_distinct[inverse]

    def _distinct(self, masks: Tensor) -> tuple[list[int], Tensor | None]:
        """Numbers of masks among which every distinct one is, and for each mask the index of its equal there."""
        count = len(masks)
        if count <= _FEW:
            return list(range(count)), None
        flat = masks.reshape(count, -1)
        words = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).contiguous().view(torch.int64)
        if self._weights is None:
            odd = counting(1, 2 * words.shape[1], 2)
            self._weights = (odd * 0x9E3779B97F4A7) ^ (odd * odd * 0x2545F4914F6CDD)  # wraps: any mixture will do
        _, inverse = torch.unique((words * self._weights).sum(1), return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), count, dtype=torch.int64, device="cpu").scatter_reduce_(
            0, inverse, counting(count), "amin"
        )
        if not torch.equal(words[first][inverse], words):  # two masks share a sum: the digests tell them apart
            return list(range(count)), None
        return first.tolist(), inverse

    def meet(self, a: Tensor, b: Tensor) -> Tensor:
        """States of the pairs that both keep."""
        easy = torch.where((a == FULL) | (b == EMPTY), b, a)
        return self._combine(torch.logical_and, a, b, easy, (a > FULL) & (b > FULL) & (a != b))

    def without(self, a: Tensor, b: Tensor) -> Tensor:
        """States of the pairs that `a` keeps and `b` does not."""
        easy = torch.where((b == FULL) | (a == b), EMPTY, a)
        return self._combine(_and_not, a, b, easy, (a >= FULL) & (b > FULL) & (a != b))

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """States of the pairs that either keeps."""
        easy = torch.where((a == EMPTY) | (b == FULL), b, a)
        return self._combine(torch.logical_or, a, b, easy, (a > FULL) & (b > FULL) & (a != b))

    def _combine(
        self, operation: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, easy: Tensor, hard: Tensor
    ) -> Tensor:
        """`easy`, with the operation's result where `hard`: computed once for each distinct pair of states."""
        where = hard.nonzero().squeeze(1)
        if not len(where):
            return easy
        base = self.count + 1
        codes = a[where] * base + b[where]
        distinct, inverse = _unique(codes, base * base)
        results = []
        for part in torch.split(distinct, self.chunk):
            results.append(self.add(operation(self.expand(part // base), self.expand(part % base))))
        easy[where] = torch.cat(results)[inverse]
        return easy

    def expand(self, states: Tensor) -> Tensor:
        """The masks of `(n,)` states that are not empty: `(n, block_size, block_size)` bool."""
        masks = self.masks.new_ones(len(states), self.block_size, self.block_size)
        partial = states > FULL
        masks[partial] = self.masks[states[partial] - 1]
        return masks


def _and_not(a: Tensor, b: Tensor) -> Tensor:
    return a & ~b


def _unique(codes: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """The distinct codes, ascending, and the index of each code among them. All are below `bound`."""
    if bound > _DENSE_PAIRS:
        distinct, inverse = torch.unique(codes, return_inverse=True)
        return distinct, inverse
    seen = torch.zeros(bound, dtype=torch.bool, device="cpu")
    seen[codes] = True
    distinct = seen.nonzero().squeeze(1)
    index = torch.empty(bound, dtype=torch.int64, device="cpu")
    index[distinct] = counting(len(distinct))
    return distinct, index[codes]
