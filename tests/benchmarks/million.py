"""Peak memory of LongNet's five branches over 1,048,576 tokens, one head of 64, float32, causal.

Run: python tests/benchmarks/million.py
"""

from __future__ import annotations

import time

import torch

import longspan as ls
from longspan.tools.bench.sidebyside import report

PATTERN = ls.Dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))


def resident(field: str) -> int:
    """Bytes, out of /proc/self/status."""
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(field))


def main() -> None:
    torch.manual_seed(0)
    tokens = 2**20
    small = [torch.randn(1, 1, 65536, 64) for _ in range(3)]
    ls.attention(*small, PATTERN, is_causal=True, backend="sdpa")  # libraries loaded, threads started
    query, key, value = (torch.randn(1, 1, tokens, 64) for _ in range(3))
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the high-water mark starts again from here
    before, start = resident("VmRSS"), time.perf_counter()
    out = ls.attention(query, key, value, PATTERN, is_causal=True, backend="sdpa")
    seconds = time.perf_counter() - start
    beyond = resident("VmHWM") - before - out.numel() * out.element_size()
    report(
        "million",
        {"tokens": tokens, "seconds": seconds, "mib_beyond_inputs_and_output": beyond / 2**20, "limit_mib": 256},
    )


if __name__ == "__main__":
    main()
