"""Attention on this CPU: a backend against torch's `scaled_dot_product_attention`, and against the machine's own peaks.

Every ratio is of interleaved rounds in one run. FLOPs are those of the products alone: 4 * pairs * head_dim forward,
10 * pairs * head_dim backward, half of the pairs under causality.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import longspan
from longspan import Dilated, Problem, SlidingWindow
from longspan.lowering.dense import lower
from longspan.tools.bench.apart import peak_bytes
from longspan.tools.bench.contract import OnStep, Step, perform, silent
from longspan.tools.bench.peaks import bandwidth, product_peak
from longspan.tools.bench.sidebyside import Rows, interleave

__all__ = ["HELP", "NAME", "add_arguments", "grouped_by_hand", "run"]

NAME = "kernels"
HELP = "Attention on this CPU against torch's own, and against the machine's peaks."

LONG = ((1, 8, 2048, 64), (1, 8, 4096, 128))
SHORT = ((128, 8, 128, 64), (32, 8, 256, 64))
FORWARD = {"float32": 1.7, "bfloat16": 2.4}
BACKWARD = {"float32": 1.5, "bfloat16": 1.2}
LONGNET = Dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
GROUPED = Dilated((2048, 4096), (1, 2), heads="grouped")


def add_arguments(parser: ArgumentParser) -> None:
    """Which backend, and how thoroughly."""
    parser.add_argument("--backend", default="cpu_fused", help="whose kernels (default: cpu_fused)")
    parser.add_argument("--quick", action="store_true", help="three rounds of the smaller shapes: a look, not a claim")


def run(args: Namespace, on_step: OnStep = silent) -> dict[str, Any]:
    """`rows` (work, figure, limit, holds, ...), and `rounds`, the seconds of every round."""
    quick = args.quick
    measured = _Measurements(args.backend, 3 if quick else 11)
    peaks: dict[str, float] = {}

    def measure_peaks() -> None:  # twice: a busy moment must not make the peak low and the shares of it high
        for dtype in FORWARD:
            peaks[dtype] = max(peaks.get(dtype, 0.0), product_peak(getattr(torch, dtype), torch.device("cpu")))

    steps: list[Step] = [("the machine's peaks", measure_peaks), ("bandwidth", measured.measure_bandwidth)]
    for dtype, shape in product(FORWARD, LONG[:1] if quick else LONG):
        words = _words(shape, dtype)
        steps.append((f"{words} forward", partial(measured.forward, shape, dtype, FORWARD[dtype], (False, True))))
        for is_causal in (False, True):
            work = partial(measured.backward, shape, dtype, is_causal, BACKWARD[dtype])
            steps.append((f"{words} {'causal ' if is_causal else ''}backward", work))
    for dtype, shape in product(FORWARD, SHORT[:1] if quick else SHORT):
        steps.append((f"{_words(shape, dtype)} forward", partial(measured.forward, shape, dtype, 1.3, (False,))))
    steps.append(("dilated, against ten lines of slicing", measured.by_hand))
    if not quick:
        steps += [("LongNet's branches on 131,072 tokens", measured.longnet), ("a sliding window", measured.window)]
    for dtype, gradients in product(FORWARD, (False, True)):
        words = f"{_words(LONG[-1], dtype)} peak memory{' with gradients' if gradients else ''}"
        steps.append((words, partial(measured.memory, LONG[-1], dtype, gradients)))
    steps.append(("the machine's peaks again", measure_peaks))
    complete = perform(steps, on_step)
    for row in measured.table.rows:
        if "gflops" in row and row.get("dtype"):
            row["share_of_peak"] = row["gflops"] / peaks[row["dtype"]]
    return {
        "backend": args.backend,
        "peaks_gflops": peaks,
        "bandwidth_gbs": measured.bandwidth,
        "rows": measured.table.rows,
        "rounds": measured.table.rounds,
        "complete": complete,
    }


def _tensors(shape: tuple[int, ...], dtype: str = "float32", gradients: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        torch.randn(shape, dtype=torch.float32, device="cpu").to(getattr(torch, dtype)).requires_grad_(gradients)
        for _ in range(3)
    )
    return query, key, value


def _words(shape: tuple[int, ...], dtype: str) -> str:
    return f"{shape} {dtype}"


class _Measurements:
    """The rows that were measured so far, and the bandwidth of which they take a share."""

    def __init__(self, backend: str, rounds: int) -> None:
        self.backend, self._rounds, self.bandwidth, self.table = backend, rounds, 0.0, Rows()

    def measure_bandwidth(self) -> None:
        self.bandwidth = bandwidth(torch.device("cpu"))

    def _compare(
        self, work: str, sides: dict[str, Callable[[], Any]], limit: float, flops: float, dtype: str, moved: float
    ) -> None:
        """The baseline's time over the backend's, round by round; the backend is the first side."""
        seconds = interleave(sides, rounds=self._rounds)
        self.table.keep_rounds(work, seconds)
        ours, other = seconds.values()
        self._add(work, ours, other, limit, flops, dtype, moved)

    def _add(
        self, work: str, ours: list[float], other: list[float], limit: float, flops: float, dtype: str, moved: float
    ) -> None:
        took = median(ours)
        share = 1e-9 * moved / took / self.bandwidth
        rate = 1e-9 * flops / took
        self.table.compare(work, other, ours, ">=", limit, dtype=dtype, gflops=rate, share_of_bandwidth=share)

    def forward(self, shape: tuple[int, ...], dtype: str, limit: float, causal: tuple[bool, ...]) -> None:
        """Against SDPA; full against causal in rounds of their own, as torch's threads spin on after its operators."""
        tensors = _tensors(shape, dtype)
        sides: dict[str, Callable[[], Any]] = {}
        for is_causal in causal:
            made = longspan.plan(Problem.like(*tensors, is_causal=is_causal), backend=self.backend)
            sides[f"{self.backend} {is_causal}"] = partial(made, *tensors)
            sides[f"SDPA {is_causal}"] = partial(F.scaled_dot_product_attention, *tensors, is_causal=is_causal)
        own = {name: side for name, side in sides.items() if name.startswith(self.backend)}
        with torch.inference_mode():
            seconds = interleave(sides, rounds=self._rounds)
            alone = interleave(own, rounds=3 * self._rounds) if len(causal) > 1 else {}
        self.table.keep_rounds(f"{_words(shape, dtype)} forward", seconds)
        for is_causal in causal:
            ours, other = seconds[f"{self.backend} {is_causal}"], seconds[f"SDPA {is_causal}"]
            work = f"{_words(shape, dtype)} {'causal ' if is_causal else ''}forward"
            flops = 4 * shape[3] * _pairs(shape, is_causal)
            self._add(work, ours, other, limit, flops, dtype, 4 * tensors[0].nbytes)
        if len(causal) > 1:
            work = f"{_words(shape, dtype)} causal / full"
            self.table.keep_rounds(work, alone)
            self.table.compare(work, alone[f"{self.backend} True"], alone[f"{self.backend} False"], "<=", 0.58)

    def backward(self, shape: tuple[int, ...], dtype: str, is_causal: bool, limit: float) -> None:
        tensors = _tensors(shape, dtype, True)
        mine = longspan.attention(*tensors, is_causal=is_causal, backend=self.backend)
        other = F.scaled_dot_product_attention(*tensors, is_causal=is_causal)
        dout = torch.randn_like(mine)

        def gradients(out: Tensor) -> Any:
            return torch.autograd.grad(out, tensors, dout, retain_graph=True)

        work = f"{_words(shape, dtype)} {'causal ' if is_causal else ''}backward"
        sides: dict[str, Callable[[], Any]] = {self.backend: lambda: gradients(mine), "SDPA": lambda: gradients(other)}
        self._compare(work, sides, limit, 10 * shape[3] * _pairs(shape, is_causal), dtype, 8 * dout.nbytes)

    def by_hand(self) -> None:
        shape = (1, 8, 8192, 64)
        tensors = _tensors(shape)
        made = longspan.plan(Problem.like(*tensors, pattern=GROUPED), backend=self.backend)
        pairs = 4 * (8192 // 2048) * 2048**2 + 4 * (8192 // 4096) * 2048**2
        with torch.inference_mode():
            torch.testing.assert_close(made(*tensors)[0], grouped_by_hand(*tensors), atol=1e-4, rtol=1e-4)
            self._compare(
                f"{GROUPED.spec} N=8192 float32 forward, against ten lines of slicing and SDPA",
                {self.backend: lambda: made(*tensors), "ten lines": lambda: grouped_by_hand(*tensors)},
                1.8,
                4 * 64 * pairs,
                "float32",
                4 * tensors[0].nbytes,
            )

    def longnet(self) -> None:
        """The share of its own dense rate that the backend keeps on five branches."""
        tensors, dense = _tensors((1, 8, 131072, 64)), _tensors((1, 8, 8192, 64))
        problem = Problem.like(*tensors, pattern=LONGNET, is_causal=True)
        long = longspan.plan(problem, backend=self.backend)
        short = longspan.plan(Problem.like(*dense, is_causal=True), backend=self.backend)
        with torch.inference_mode():
            seconds = interleave({"five branches": lambda: long(*tensors), "dense": lambda: short(*dense)}, rounds=3)
        work = f"{LONGNET.spec} N=131072 causal float32: share of the backend's dense rate"
        self.table.keep_rounds(work, seconds)
        pairs = {"five branches": lower(problem).pairs, "dense": _pairs((1, 8, 8192, 64), True)}
        rates = {side: 4e-9 * 64 * pairs[side] / median(seconds[side]) for side in seconds}
        self.table.add(work, rates["five branches"] / rates["dense"], ">=", 0.6, gflops=rates["five branches"])

    def window(self) -> None:
        """A sliding window against torch's SDPA given the same mask: what a user without longspan would write."""
        shape, reach = (1, 8, 4096, 64), 511
        tensors = _tensors(shape)
        made = longspan.plan(Problem.like(*tensors, pattern=SlidingWindow(reach, 0)), backend=self.backend)
        mask = torch.ones(4096, 4096, dtype=torch.bool, device="cpu").tril().triu(-reach)
        with torch.inference_mode():
            self._compare(
                f"window:{reach},0 {shape} float32 forward, against SDPA with that mask",
                {
                    self.backend: lambda: made(*tensors),
                    "SDPA with a mask": lambda: F.scaled_dot_product_attention(*tensors, mask),
                },
                1.0,
                4 * 64 * 8 * int(mask.sum()),
                "float32",
                4 * tensors[0].nbytes,
            )

    def memory(self, shape: tuple[int, ...], dtype: str, gradients: bool) -> None:
        """Bytes at the peak beyond inputs and output, each side in a process of its own."""
        mine = min(peak_bytes(self.backend, shape, dtype, gradients) for _ in range(3))
        other = min(peak_bytes("SDPA", shape, dtype, gradients) for _ in range(3))
        word = "forward and backward" if gradients else "forward"
        self.table.add(
            f"{_words(shape, dtype)} {word}: peak MiB beyond inputs and results, over SDPA's",
            (mine - other) / 2**20,
            "<=",
            32.0,
            mine_mib=mine / 2**20,
            sdpa_mib=other / 2**20,
        )


def grouped_by_hand(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
    """What a user would write for this one pattern, batch of one."""
    _, heads, length, dim = query.shape
    out = torch.zeros_like(query)
    half = heads // 2
    for group, (w, r, s) in enumerate(((2048, 1, 0), (4096, 2, 1))):
        mine = slice(group * half, (group + 1) * half)
        q, k, v = (x[0, mine].view(half, length // w, w, dim)[:, :, s::r] for x in (query, key, value))
        part = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        out[0, mine].view(half, length // w, w, dim)[:, :, s::r] = part
    return out


def _pairs(shape: tuple[int, ...], is_causal: bool) -> int:
    batch, heads, length, _ = shape
    return batch * heads * (length * (length + 1) // 2 if is_causal else length**2)
