"""Grouped dilated attention against ten lines of strided slicing plus SDPA written by hand: time and peak memory.

`Dilated((2048, 4096), (1, 2), heads="grouped")`, 8 heads of 64, N=8192, float32, `backend="sdpa"`.
Run: python tests/benchmarks/grouped.py
"""

from __future__ import annotations

import subprocess
import sys

import torch

import longspan as ls
from longspan.tools.bench.kernels import grouped_by_hand
from longspan.tools.bench.sidebyside import interleave, report, summary

PATTERN = ls.Dilated((2048, 4096), (1, 2), heads="grouped")


def peak(side: str) -> int:
    """Bytes of resident memory that one call adds at its peak, in a process of its own."""
    code = f"""
import sys, torch
sys.path.insert(0, {__file__.rsplit("/", 1)[0]!r})
import grouped
import longspan as ls
from longspan.tools.bench.kernels import grouped_by_hand
from longspan.tools.meter import PeakMemory
x = [torch.randn(1, 8, 8192, 64) for _ in range(3)]
small = [t[:, :, :4096].contiguous() for t in x]
run = (lambda q, k, v: grouped_by_hand(q, k, v, True)) if {side!r} == "by hand" else (
    lambda q, k, v: ls.attention(q, k, v, grouped.PATTERN, is_causal=True, backend="sdpa"))
run(*small)
with PeakMemory(torch.device("cpu")) as memory:
    out = run(*x)
print(round(memory.mib * 2**20) - out.nbytes)
"""
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, 8, 8192, 64) for _ in range(3)]
    result = {}
    for is_causal in (False, True):
        sides = {
            "by hand": lambda c=is_causal: grouped_by_hand(*tensors, c),
            "longspan": lambda c=is_causal: ls.attention(*tensors, PATTERN, is_causal=c, backend="sdpa"),
        }
        with torch.inference_mode():
            torch.testing.assert_close(sides["longspan"](), sides["by hand"]())
            seconds = interleave(sides, rounds=31)
        found = {name: summary(rounds) for name, rounds in seconds.items()}
        ratios = sorted(a / b for a, b in zip(seconds["longspan"], seconds["by hand"], strict=True))
        result["causal" if is_causal else "full"] = {
            "sides": found,
            "ratio_median": ratios[len(ratios) // 2],
            "ratio_of_medians": found["longspan"]["median_us"] / found["by hand"]["median_us"],
        }
    memory = {side: sorted(peak(side) for _ in range(5)) for side in ("by hand", "longspan")}
    report("grouped", {**result, "peak_bytes_beyond_inputs_and_output": memory, "limit_ratio": 1.05})


if __name__ == "__main__":
    main()
