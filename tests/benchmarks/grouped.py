"""Grouped dilated attention against ten lines of strided slicing plus SDPA written by hand: time and peak memory.

`Dilated((2048, 4096), (1, 2), heads="grouped")`, 8 heads of 64, N=8192, float32, `backend="sdpa"`.
Run: python tests/benchmarks/grouped.py
"""

from __future__ import annotations

import subprocess
import sys

import torch
import torch.nn.functional as F

import longspan as ls
from longspan.tools.bench.sidebyside import interleave, report, summary

PATTERN = ls.Dilated((2048, 4096), (1, 2), heads="grouped")


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """What a user would write for this one pattern, batch of one."""
    _, heads, length, dim = query.shape
    out = torch.zeros_like(query)
    half = heads // 2
    for group, (w, r, s) in enumerate(((2048, 1, 0), (4096, 2, 1))):
        mine = slice(group * half, (group + 1) * half)
        cut = [x[0, mine].view(half, length // w, w, dim)[:, :, s::r] for x in (query, key, value)]
        part = F.scaled_dot_product_attention(*cut, is_causal=is_causal)
        out[0, mine].view(half, length // w, w, dim)[:, :, s::r] = part
    return out


def peak(side: str) -> int:
    """Bytes of resident memory that one call adds at its peak, in a process of its own."""
    code = f"""
import resource, sys, torch
sys.path.insert(0, {__file__.rsplit("/", 1)[0]!r})
import grouped
import longspan as ls
x = [torch.randn(1, 8, 8192, 64) for _ in range(3)]
small = [t[:, :, :4096].contiguous() for t in x]
run = (lambda q, k, v: grouped.by_hand(q, k, v, True)) if {side!r} == "by hand" else (
    lambda q, k, v: ls.attention(q, k, v, grouped.PATTERN, is_causal=True, backend="sdpa"))
run(*small)
status = open("/proc/self/clear_refs", "w"); status.write("5"); status.close()
def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
before = kib("VmRSS")
out = run(*x)
print(1024 * (kib("VmHWM") - before) - out.numel() * out.element_size())
"""
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, 8, 8192, 64) for _ in range(3)]
    result = {}
    for is_causal in (False, True):
        sides = {
            "by hand": lambda c=is_causal: by_hand(*tensors, c),
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
