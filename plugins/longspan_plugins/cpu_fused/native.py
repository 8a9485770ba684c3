"""Running a program with the native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from longspan import Dropout, Kernel, Problem
from longspan_plugins.cpu_fused.binding import bits, run, strides
from longspan_plugins.cpu_fused.library import Library
from longspan_plugins.cpu_fused.program import TILE, Program
from longspan_plugins.cpu_fused.shares import Shares, share
from longspan_plugins.cpu_fused.table import Table

__all__ = ["OPERATOR", "kernel"]

OPERATOR = "longspan_plugins::cpu_fused"
Pair = tuple[Tensor, Tensor]
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
THREADS, PARTS = 5, 6
"""Places of these words in a job."""
PAYS = 2**21
"""Multiply-adds that are worth a thread of their own: starting one takes about as long."""


def kernel(problem: Problem, program: Program, library: Library) -> Kernel:
    """Forward and backward of one problem."""
    native = _Native(problem, program, library)
    return Kernel(native.forward, native.backward, (OPERATOR,), f"cpu_fused ({library.name})")


class _Native:
    def __init__(self, problem: Problem, program: Program, library: Library) -> None:
        assert library.handle is not None  # there is a program
        self._forward, self._backward = library.handle.longspan_forward, library.handle.longspan_backward
        self._lanes, self._program = library.lanes, program
        self._scale = bits(problem.scale)
        self._of_heads = {len(program.of_head): program.of_head}  # a lowered problem may come with other heads
        self._shared: dict[int, Shares] = {}
        self._pairs = program.keys * TILE // max(1, len(program.ranges))  # an upper bound for one head

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, dropout: Dropout | None = None
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty(query.shape, dtype=query.dtype)
        lse = torch.empty(query.shape[:3], dtype=torch.float32)
        if not self._program.covered:
            out.zero_()
            lse.fill_(-torch.inf)
        threads = self._threads(query, 2)
        words = self._job(query, key, value, out, lse, threads)
        with _traced():
            run(self._forward, [*words, *(0,) * 14, *_dropout_words(dropout)])
        return out, lse

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        dropout: Dropout | None = None,
        dlse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, kv_heads, keys, dim = key.shape
        padded = -(-dim // self._lanes) * self._lanes
        threads = self._threads(query, 5)
        shares = self._shares(min(-(-threads // max(1, batch * kv_heads)), max(1, len(self._program.tiles))))
        dquery = (torch.empty if self._program.covered else torch.zeros)(query.shape, dtype=query.dtype)

        def zeros(length: int) -> Pair:
            return torch.zeros(batch, kv_heads, length, padded), torch.zeros(batch, kv_heads, length, padded)

        sums = [zeros(keys)]
        home = max(range(shares.count), key=lambda number: shares.keys[number][1] - shares.keys[number][0])
        held = self._job(query, key, value, out, lse, threads)

        def words(tiles: Table, many: int, where: Table, threads: int) -> list[int]:
            """For `many` shares, which add up the gradients of keys and values at the addresses in `where`."""
            given = list(held)
            given[THREADS], given[PARTS] = threads, many
            addresses = dout.data_ptr(), 0 if dlse is None else dlse.data_ptr(), dquery.data_ptr()
            more = (*strides(dout), *strides(dlse), *strides(dquery))
            return [*given, *addresses, tiles.address, where.address, *more, *_dropout_words(dropout)]

        if shares.between is None:
            places = []
            for number, (low, high) in enumerate(shares.keys):
                if number != home:
                    sums.append(zeros(high - low))
                places.append((sums[0], 0) if number == home else (sums[-1], low))
            table = _places(places)
        else:
            table = _places([(sums[0], 0)] * shares.count)
        with _traced():
            run(self._backward, words(shares.tiles, shares.count, table, threads))
            if shares.between is not None:
                run(self._backward, words(shares.between, shares.count, table, 1))
        others = [keys for number, keys in enumerate(shares.keys) if number != home]
        for (low, high), part in zip(others, sums[1:], strict=False):  # there are none where all shares have one place
            for total, some in zip(sums[0], part, strict=True):
                total[:, :, low:high] += some
        dkey, dvalue = (total[..., :dim].to(key.dtype) for total in sums[0])
        return dquery, dkey, dvalue

    def _job(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, threads: int) -> list[int]:
        """The words up to the backward's."""
        program = self._program
        batch, heads, _, dim = query.shape
        of_head = self._of_heads.get(heads)
        if of_head is None:
            # setdefault: another thread's table, once it is in use, is not to be replaced, which would free it
            of_head = self._of_heads.setdefault(heads, Table.of(torch.zeros(heads, dtype=torch.int64)))
        masks = program.masks
        return [
            batch,
            heads,
            max(1, heads // max(1, key.shape[1])),  # without heads too the kernels divide by it
            dim,
            KINDS[query.dtype],
            threads,
            1,
            self._scale,
            program.tiles.address,
            program.segments.address,
            program.ranges.address,
            of_head.address,
            0 if masks is None else masks.address,
            0 if masks is None else masks.shape[1],
            0 if masks is None else masks.shape[2],
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            *strides(query),
            *strides(key),
            *strides(value),
            *strides(out),
            *strides(lse),
        ]

    def _shares(self, count: int) -> Shares:
        found = self._shared.get(count)
        if found is None:
            found = self._shared.setdefault(count, share(self._program, count))
        return found

    def _threads(self, query: Tensor, products: int) -> int:
        work = products * self._pairs * query.shape[0] * query.shape[1] * query.shape[3]
        return max(1, min(torch.get_num_threads(), work // PAYS))


def _dropout_words(dropout: Dropout | None) -> list[int]:
    if dropout is None:
        return [0] * 15
    return [
        dropout.lines.data_ptr(),
        dropout.queries.data_ptr(),
        dropout.keys.data_ptr(),
        *_broadcast(dropout.lines),
        *_broadcast(dropout.queries),
        *_broadcast(dropout.keys),
        (dropout.seed + 2**63) % 2**64 - 2**63,
        bits(1.0 / (1.0 - dropout.p)),
        int(dropout.p * 2**32) - 2**31,
        0,
    ]


def _broadcast(tensor: Tensor) -> list[int]:
    """Strides for dimensions of 1 that stand for any size: those of keys that several heads share."""
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def _places(sums: Sequence[tuple[Pair, int]]) -> Table:
    """`attention.h`'s `sums`, for pairs of `(batch, kv_heads, keys, padded)` that begin at these keys."""
    rows = []
    for both, first in sums:
        dkey, dvalue = both
        shift = dkey.element_size() * first * dkey.stride(2)
        rows.append([dkey.data_ptr() - shift, dvalue.data_ptr() - shift, dkey.stride(0), dkey.stride(1)])
    return Table.of(torch.tensor(rows, dtype=torch.int64))


class _Untraced:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_UNTRACED = _Untraced()


def _traced() -> Any:
    """A name for the profiler, where one is looking on: it sees no operator of torch's here."""
    return profiler.record_function(OPERATOR) if profiler._is_profiler_enabled else _UNTRACED
