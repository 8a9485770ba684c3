"""Running a program with the native kernels."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from longspan.plugin import ArgumentError, Dropout, Kernel, Problem
from longspan_plugins.cpu_fused.binding import AT, bits, job, places, put, run
from longspan_plugins.cpu_fused.gate import Passed, check_made, passed, passed_inputs
from longspan_plugins.cpu_fused.library import Library
from longspan_plugins.cpu_fused.program import TILE, Program, check_program
from longspan_plugins.cpu_fused.shares import Shares, share
from longspan_plugins.cpu_fused.table import Table, integers

__all__ = ["OPERATOR", "kernel"]

OPERATOR = "longspan_plugins::cpu_fused"
Pair = tuple[Tensor, Tensor]
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORWARD = places("query", "key", "value", "out", "lse")
BACKWARD, DLSE = places("dout", "dquery"), places("dlse")
POSITIONS = places("query_positions", "key_positions")
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
        check_program(program, problem)
        self._lanes, self._program, self._problem = library.lanes, program, problem
        self._dtype: torch.dtype = getattr(torch, problem.dtype)
        masks = program.masks
        self._job = job(
            dim=problem.head_dim,
            kind=KINDS[self._dtype],
            parts=1,
            scale=bits(problem.scale),
            tiles=program.tiles.address,
            segments=program.segments.address,
            programs=program.ranges.address,
            masks=0 if masks is None else masks.address,
            mask_keys=0 if masks is None else masks.shape[1],
            mask_words=0 if masks is None else masks.shape[2],
        )
        self._of_heads = {len(program.of_head): program.of_head}  # a lowered problem may come with other heads
        self._shared: dict[int, Shares] = {}
        self._pairs = program.keys * TILE // max(1, len(program.ranges))  # an upper bound for one head

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, dropout: Dropout | None = None
    ) -> tuple[Tensor, Tensor]:
        inputs = passed_inputs(self._problem, self._dtype, query, key, value)
        out = torch.empty_like(inputs[0][0], memory_format=torch.contiguous_format)
        shape = out.shape
        _, heads, rows, dim = shape
        lse = torch.empty(shape[:3], dtype=torch.float32, device="cpu")
        results = (
            (out, check_made(out, self._dtype), (heads * rows * dim, rows * dim, dim)),
            (lse, check_made(lse, torch.float32), (heads * rows, rows, 1)),
        )
        if not self._program.covered:
            out.zero_()
            lse.fill_(-torch.inf)
        words = self._words(inputs, results, shape, key.shape[1], self._threads(shape, 2))
        drawn = None if dropout is None else _put_dropout(words, dropout, shape, key.shape)
        with _traced():
            run(self._forward, words)
        del drawn  # which the kernels have read
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
        inputs = passed_inputs(self._problem, self._dtype, query, key, value)
        shape, (batch, kv_heads, keys, dim) = query.shape, key.shape
        results = passed("out", out, self._dtype, shape), passed("lse", lse, torch.float32, shape[:3])
        slope = passed("dout", dout, self._dtype, shape)
        more = None if dlse is None else passed("dlse", dlse, torch.float32, shape[:3])
        padded = -(-dim // self._lanes) * self._lanes
        dquery = torch.empty(shape, dtype=self._dtype, device="cpu")
        if not self._program.covered:
            dquery.zero_()
        target = dquery, check_made(dquery, self._dtype), dquery.stride()
        threads = self._threads(shape, 5)
        shares = self._shares(min(-(-threads // max(1, batch * kv_heads)), max(1, len(self._program.tiles))))

        def zeros(length: int) -> Pair:
            """What the kernels add up in: single precision, whatever the inputs' and torch's default dtype are."""
            wide = batch, kv_heads, length, padded
            dkey = torch.zeros(wide, dtype=torch.float32, device="cpu")
            return dkey, torch.zeros(wide, dtype=torch.float32, device="cpu")

        sums = [zeros(keys)]
        home = max(range(shares.count), key=lambda number: shares.keys[number][1] - shares.keys[number][0])
        words = self._words(inputs, results, shape, kv_heads, threads)
        drawn = None if dropout is None else _put_dropout(words, dropout, shape, key.shape)
        put(words, BACKWARD, (slope, target))
        if more is not None:
            put(words, DLSE, (more,))
        words[AT.run], words[AT.parts] = shares.apart(shape[1] // max(1, kv_heads)), shares.count
        if shares.between is None:
            ends = []
            for number, (low, high) in enumerate(shares.keys):
                if number != home:
                    sums.append(zeros(high - low))
                ends.append((sums[0], 0) if number == home else (sums[-1], low))
        else:
            ends = [(sums[0], 0)] * shares.count
        table = _sums(ends)
        words[AT.shares], words[AT.sums] = shares.tiles.address, table.address
        with _traced():
            run(self._backward, words)
            if shares.between is not None:
                words[AT.shares], words[AT.threads] = shares.between.address, 1
                run(self._backward, words)
        del drawn  # which the kernels have read
        others = [keys for number, keys in enumerate(shares.keys) if number != home]
        for (low, high), part in zip(others, sums[1:], strict=False):  # there are none where all shares have one place
            for total, some in zip(sums[0], part, strict=True):
                total[:, :, low:high] += some
        dkey, dvalue = (total[..., :dim].to(self._dtype) for total in sums[0])
        return dquery, dkey, dvalue

    def _words(
        self,
        inputs: Sequence[Passed],
        results: Sequence[Passed],
        shape: Sequence[int],
        kv_heads: int,
        threads: int,
    ) -> array[int]:
        """The job of a forward without dropout, and of a backward but for what is its own."""
        batch, heads, _, _ = shape
        of_head = self._of_heads.get(heads)
        if of_head is None:
            if len(self._program.ranges) != 1:
                raise ArgumentError("query", f"{heads} heads", f"{self._problem.heads}, as planned", "make a plan")
            # setdefault: another thread's table, once it is in use, is not to be replaced, which would free it
            of_head = self._of_heads.setdefault(heads, Table.of(torch.zeros(heads, dtype=torch.int64, device="cpu")))
        words = self._job[:]
        words[AT.batch], words[AT.heads], words[AT.threads] = batch, heads, threads
        words[AT.group] = max(1, heads // max(1, kv_heads))  # without heads too the kernels divide by it
        words[AT.program_of_head] = of_head.address
        put(words, FORWARD, (*inputs, *results))
        return words

    def _shares(self, count: int) -> Shares:
        shares = self._shared.get(count)
        if shares is None:
            shares = self._shared.setdefault(count, share(self._program, count))
        return shares

    def _threads(self, shape: Sequence[int], products: int) -> int:
        work = products * self._pairs * shape[0] * shape[1] * shape[3]
        return max(1, min(torch.get_num_threads(), work // PAYS))


def _put_dropout(words: array[int], dropout: Dropout, query: Sequence[int], key: Sequence[int]) -> list[Passed]:
    """Write down a dropout for tensors of these shapes; returns what has to be held while it is drawn."""
    drawn: list[Passed] = []
    for name, most in (("lines", query[:2]), ("queries", query[:3]), ("keys", key[:3])):
        tensor: Tensor = getattr(dropout, name)
        shape = tuple(size if size == 1 else many for size, many in zip(tensor.shape, most, strict=True))
        kept, address, strides = passed(f"dropout's {name}", tensor, torch.int64, shape)
        # A dimension of 1 stands for any size: that of keys that several heads share.
        drawn.append((kept, address, tuple(0 if size == 1 else at for size, at in zip(shape, strides, strict=True))))
    _, words[AT.lines], (words[AT.lines_at], words[AT.lines_at + 1]) = drawn[0]
    put(words, POSITIONS, drawn[1:])
    words[AT.seed] = (dropout.seed + 2**63) % 2**64 - 2**63
    words[AT.keep] = bits(1.0 / (1.0 - dropout.p))
    words[AT.threshold] = int(dropout.p * 2**32) - 2**31
    return drawn


def _sums(sums: Sequence[tuple[Pair, int]]) -> Table:
    """`attention.h`'s `sums`, for pairs of `(batch, kv_heads, keys, padded)` that begin at these keys."""
    rows = []
    for both, first in sums:
        dkey, _ = both
        shift = dkey.element_size() * first * dkey.stride(2)
        addresses = (check_made(tensor, torch.float32) - shift for tensor in both)
        rows.append([*addresses, dkey.stride(0), dkey.stride(1)])
    return Table.of(integers(rows))


class _Untraced:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_UNTRACED = _Untraced()


def _traced() -> Any:
    """A name for the profiler, where one is looking on: it sees no operator of torch's here."""
    return profiler.record_function(OPERATOR) if profiler._is_profiler_enabled else _UNTRACED
