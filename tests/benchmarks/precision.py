"""What rows of many keys and columns of many queries lose, over what naive torch of the same dtype loses.

`rows`: few queries on many keys, whose out, lse and dquery are long sums. `columns`: many queries on few keys, whose
dkey and dvalue are. The truth is float64; naive torch is matmul, softmax, matmul and its autograd, every step in the
dtype. A figure is the backend's error over naive torch's, as root mean squares and (in brackets) as largest ones; at
most 2 (out, lse) and 3 (gradients). `within`: what the conformance kit says, whose measure is absolute below 1 and
whose floor is what roundings of the lse alone come to (`longspan/testing/tolerance.py`).
Run: python tests/benchmarks/precision.py [--lengths 4096 65536 1048576] [--backends cpu_fused sdpa] [--json FILE]
"""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

import longspan as ls
from longspan.numerics.dropout import Dropout
from longspan.testing import tolerance
from longspan.testing.answers import dense
from longspan.testing.oracle import visible
from longspan.tools.bench.sidebyside import machine

BACKENDS = ("cpu_fused", "sdpa", "reference", "block_sparse_batched", "torch_sparse")
FEW = 8
"""Queries of `rows`, keys of `columns`."""
LIMITS = {"out": 2.0, "lse": 2.0, "dquery": 3.0, "dkey": 3.0, "dvalue": 3.0}
SEED = 20


@frozen
class Case:
    """One drawn problem: `values` are `normal`, `positive` (all tensors are) or `equal` (each tensor's are)."""

    shape: str
    length: int
    dtype: str = "float32"
    pattern: str = "dense"
    values: str = "normal"
    scale: float | None = None
    dim: int = 64
    heads: int = 1
    kv_heads: int = 1
    causal: bool = False
    dropout: float = 0.0

    @property
    def lengths(self) -> tuple[int, int]:
        """Queries and keys."""
        return (FEW, self.length) if self.shape == "rows" else (self.length, FEW)

    @property
    def name(self) -> str:
        """What differs from the plain case."""
        more = [f"{self.pattern}", self.values, f"dim {self.dim}"]
        more += [f"scale {self.scale:g}"] if self.scale is not None else []
        more += [f"{self.heads}:{self.kv_heads} heads"] if self.heads > 1 else []
        more += ["causal"] if self.causal else []
        more += [f"dropout {self.dropout:g}"] if self.dropout else []
        return ", ".join(more)

    def arguments(self) -> dict[str, Any]:
        """What both sides are told of who sees whom."""
        queries, keys = self.lengths
        return {"is_causal": self.causal, "query_offset": max(0, keys - queries)}

    def chosen(self) -> Any:
        """The pattern."""
        keys = self.lengths[1]
        size = 64 if keys > 64 else 4
        return {
            "dense": ls.Dense(),
            "window": ls.SlidingWindow(self.length - 100, 0),
            "dilated": ls.Dilated((2 * self.length, 4 * self.length), (1, 2)),
            "blocks": ls.global_blocks(tuple(range(0, -(-keys // size), 2)), block_size=size),
        }[self.pattern]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value and the output's gradient."""
        generator = torch.Generator().manual_seed(SEED)
        queries, keys = self.lengths
        shapes = [(1, self.heads, queries, self.dim), *[(1, self.kv_heads, keys, self.dim)] * 2]
        draw = torch.randn if self.values == "normal" else torch.rand
        dtype = getattr(torch, self.dtype)
        q, k, v, dout = (draw(shape, generator=generator).to(dtype) for shape in (*shapes, shapes[0]))
        if self.values == "equal":
            q, v, dout = q * 0, v * 0 + 0.7, dout * 0 + 0.7
        return q, k, v, dout


def attend(case: Case, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Out, lse, dquery, dkey and dvalue, written down in a dtype."""
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors[:3])
    queries, keys = case.lengths
    counts = visible(case.chosen(), case.heads, queries, keys, **case.arguments())
    scale = case.dim**-0.5 if case.scale is None else case.scale
    factors = None
    if case.dropout:
        every = slice(None)
        lines, rows = torch.arange(case.heads).view(1, -1), torch.arange(queries) + case.arguments()["query_offset"]
        places = (x.expand(1, case.heads, -1) for x in (rows, torch.arange(keys)))
        factors = Dropout(case.dropout, SEED, lines, *places).factors(every, every, every, torch.float64)
    out, lse = dense(q, k, v, counts, scale, factors)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3].to(dtype))]


def answered(case: Case, tensors: tuple[Tensor, ...], backend: str) -> list[Tensor]:
    """The same by a backend."""
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    more = {"dropout_p": case.dropout, "dropout_seed": SEED} if case.dropout else {}
    out, lse = ls.attention(
        *(q, k, v, case.chosen()),
        backend=backend,
        scale=case.scale,
        return_lse=True,
        enable_gqa=True,
        **case.arguments(),
        **more,
    )
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])]


def errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Root mean square and largest, relative to those of the truth."""
    seen = want.isfinite()
    off, want = (got.double() - want)[seen], want[seen]
    size = max(float(want.square().mean().sqrt()), 1e-30)  # all are 0 where nothing depends on an input
    return float(off.square().mean().sqrt()) / size, float(off.abs().max()) / size


def floors_of(case: Case, tensors: tuple[Tensor, ...], truth: list[Tensor]) -> dict[str, float]:
    """What the kit lets anyone lose."""
    q, k, _, dout = tensors
    scale = case.dim**-0.5 if case.scale is None else case.scale
    forward = tolerance.floor(q.dtype, truth[1])
    backward = tolerance.gradient_floor(q.dtype, truth[1], truth[0], dout, q, k, scale)
    return {name: forward if name in ("out", "lse") else backward for name in LIMITS}


def judged(case: Case, backends: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """A row for each backend that takes the case."""
    tensors = case.tensors()
    truth = attend(case, tensors, torch.float64)
    naive = attend(case, tensors, getattr(torch, case.dtype))
    base = [errors(*pair) for pair in zip(naive, truth, strict=True)]
    for backend in backends:
        try:
            found = answered(case, tensors, backend)
        except ls.BackendUnavailable:
            continue
        row: dict[str, Any] = {"backend": backend, "shape": case.shape, "length": case.length}
        row |= {"dtype": case.dtype, "case": case.name}
        floors = floors_of(case, tensors, truth)
        for name, got, want, plain, least in zip(LIMITS, found, truth, naive, base, strict=True):
            rms, most = errors(got, want)
            ratios = {"ratio": _over(rms, least[0]), "largest_ratio": _over(most, least[1])}
            allowed = tolerance.allowed(plain.dtype, tolerance.error(plain, want), LIMITS[name], floors[name])
            row[name] = {"error": rms, "naive": least[0], **ratios, "within": tolerance.error(got, want) <= allowed}
        row["within"] = all(row[name]["within"] for name in LIMITS)
        row["holds"] = all(row[name]["ratio"] <= limit for name, limit in LIMITS.items())
        yield row


def _over(mine: float, naive: float) -> float:
    return mine / naive if naive else (math.inf if mine else 1.0)


def cases(length: int, dtypes: tuple[str, ...], plain_only: bool) -> Iterator[Case]:
    """All of them at one length, or the dense ones alone."""
    for dtype in dtypes:
        for shape in ("rows", "columns"):
            plain = Case(shape, length, dtype, dim=16 if length > 2**18 else 64)
            yield plain
            yield evolve(plain, values="positive")
            if plain_only or length > 2**18:  # minutes each by then
                continue
            yield evolve(plain, scale=2.0)
            yield evolve(plain, scale=8.0)
            yield evolve(plain, values="equal")
            yield evolve(plain, values="positive", causal=True)
            for pattern in ("window", "dilated", "blocks"):
                yield evolve(plain, values="positive", pattern=pattern)
                yield evolve(plain, pattern=pattern)
            yield evolve(plain, values="positive", heads=4)
            yield evolve(plain, values="positive", dropout=0.2)
            yield evolve(plain, dropout=0.2)
            for dim in (16, 128, 256, 512, 1024):
                if dim * length <= 2**22:
                    yield evolve(plain, dim=dim)
                    yield evolve(plain, dim=dim, values="positive")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 4096, 65536])
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plain", action="store_true", help="dense attention alone")
    parser.add_argument("--all", action="store_true", help="print rows that hold too")
    args = parser.parse_args()
    rows = []
    print(ls.__file__)
    for length in args.lengths:
        for case in cases(length, tuple(args.dtypes), args.plain):
            for row in judged(case, tuple(args.backends)):
                rows.append(row)
                if args.all or not row["holds"]:
                    pairs = [(row[name]["ratio"], row[name]["largest_ratio"]) for name in LIMITS]
                    figures = "  ".join(f"{ratio:5.2f}({largest:5.2f})" for ratio, largest in pairs)
                    words = f"{row['backend']:14.14} {case.shape:7} {length:8} {case.dtype:8} {case.name:42}"
                    print(f"{words} {figures}{'' if row['holds'] else '  *'}{'' if row['within'] else '*'}", flush=True)
            if args.json:  # what there is: a million keys take minutes
                kept = {"benchmark": "precision", "machine": machine(), "rows": rows}
                args.json.write_text(json.dumps(kept, indent=1) + "\n")
    over, refused = (sum(not row[name] for row in rows) for name in ("holds", "within"))
    print(f"{len(rows)} judged, {over} over the limits (*), {refused} that the kit refuses (**)")


if __name__ == "__main__":
    main()
