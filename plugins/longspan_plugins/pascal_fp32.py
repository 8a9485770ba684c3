"""Half precision stored, single precision computed: for devices where half arithmetic is many times slower.

On sm_60 to sm_62 float16 runs at a fraction of float32's rate (1/64 on sm_61) and bfloat16 not at all; most CPUs have
no float16 arithmetic either. Tiles of query, key and value are widened one at a time, so that no float32 copy of a
whole sequence ever exists; the arithmetic on each tile is float32. That half is slow here is a matter of the
resolution, not of a class: no subclass can lose it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from longspan.plugin import Capabilities, Kernel, Problem, Reason, hookimpl, merge_
from longspan_plugins import cpu_fused, sdpa

TILE_BYTES = 8 * 2**20
"""What one widened tile may take."""


@hookimpl
def longspan_capabilities() -> Capabilities:
    """Every pattern on half-precision tensors: as it is on a CPU, lowered elsewhere."""
    return Capabilities(
        devices=("cpu", "cuda==6.0", "cuda==6.1", "cuda==6.2"),
        dtypes=("float16", "bfloat16"),
        patterns=("dense", "window", "dilated", "block_sparse"),
        causal=True,
        gqa=True,
        documents=True,
        window=True,
        query_offset=True,
        backward=True,
        deterministic=True,
        contains_nonfinite=("cpu",),
        tier=40,
    )


@hookimpl
def longspan_unsupported(problem: Problem) -> Iterable[Reason]:
    """CPUs compute bfloat16 products well enough as they are."""
    if problem.device.type == "cpu" and problem.dtype == "bfloat16":
        yield Reason("dtype", "dtype", "bfloat16", "float16 on a CPU", "backend='cpu_fused'")


@hookimpl
def longspan_pattern(problem: Problem) -> Any:
    """On a CPU what the native kernels of `cpu_fused` run; None leaves it to be lowered."""
    return cpu_fused.longspan_pattern(problem) if problem.device.type == "cpu" else None


@hookimpl
def longspan_kernel(problem: Problem, layout: Any) -> Kernel | None:
    """Widened a tile at a time: by the native kernels of `cpu_fused` where they serve, else over sdpa's in float32."""
    if native := cpu_fused.program_kernel(problem, layout):
        return native
    shifted = problem.is_causal and (problem.query_offset or problem.q_len != problem.kv_len)
    if problem.pattern.kind != "dense" or problem.documents is not None or shifted:
        return None  # to be lowered
    return tiled(problem)


def tiled(problem: Problem) -> Kernel:
    """Tiles over sdpa's float32 kernels, square ones (causal on the diagonal) or rectangles."""
    wide = problem.replace(dtype="float32")
    square = sdpa.longspan_kernel(wide)
    return _Tiled(square, sdpa.longspan_kernel(wide.replace(is_causal=False)), problem.is_causal).kernel


class _Tiled:
    """Forward and backward over tiles; tiles on the diagonal are causal where the problem is."""

    def __init__(self, diagonal: Kernel, other: Kernel, is_causal: bool) -> None:
        self.diagonal, self.other, self.is_causal = diagonal, other, is_causal

    @property
    def kernel(self) -> Kernel:
        """With what the float32 kernels on the tiles claim."""
        return Kernel(self.forward, self.backward, self.diagonal.operators, self.diagonal.library)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        for entries, rows in _tiles(query):
            q = query[entries, :, rows].float()
            joint: tuple[Tensor, Tensor] | None = None
            for keys in self._keys(query, key, rows):
                kernel = self.diagonal if self.is_causal and keys == rows else self.other
                part = kernel.forward(q, key[entries, :, keys].float(), value[entries, :, keys].float())
                if joint is None:
                    joint = part
                else:
                    merge_(*joint, *part)
            assert joint is not None  # a dense problem has keys
            out[entries, :, rows], lse[entries, :, rows] = joint
        return out, lse

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dquery, dkey, dvalue = (torch.empty_like(x) for x in (query, key, value))
        for entries, _ in _tiles(query, rows=False):
            dk, dv = (torch.zeros(x[entries].shape, device=x.device, dtype=torch.float32) for x in (key, value))
            for _, rows in _tiles(query[entries]):
                do, q, o = (x[entries, :, rows].float() for x in (dout, query, out))
                dq = torch.zeros_like(q)
                for keys in self._keys(query, key, rows):
                    kernel = self.diagonal if self.is_causal and keys == rows else self.other
                    assert kernel.backward is not None  # sdpa's have one
                    k, v = key[entries, :, keys].float(), value[entries, :, keys].float()
                    parts = kernel.backward(do, q, k, v, o, lse[entries, :, rows])
                    for total, part in zip((dq, dk[:, :, keys], dv[:, :, keys]), parts, strict=True):
                        total += part
                dquery[entries, :, rows] = dq
            dkey[entries], dvalue[entries] = dk, dv
        return dquery, dkey, dvalue

    def _keys(self, query: Tensor, key: Tensor, rows: slice) -> Iterator[slice]:
        """Tiles of keys for these rows; on the diagonal they are the rows' own."""
        step = _row_step(query)
        for start in range(0, rows.stop if self.is_causal else key.shape[2], step):
            yield slice(start, min(start + step, key.shape[2]))


def _row_step(query: Tensor) -> int:
    return max(256, TILE_BYTES // (4 * query.shape[1] * query.shape[3]))


def _tiles(query: Tensor, rows: bool = True) -> Iterator[tuple[slice, slice]]:
    """Batch entries and query rows, together `TILE_BYTES` of float32; without `rows`, all rows of each entry."""
    batch, heads, length, width = query.shape
    step = _row_step(query)
    entries = max(1, TILE_BYTES // (4 * heads * min(step, length) * width))
    for b in range(0, batch, entries):
        for start in range(0, length, step) if rows else (0,):
            yield slice(b, min(b + entries, batch)), slice(start, min(start + step, length))
