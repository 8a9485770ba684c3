"""Peak memory of LongNet's five branches over 1,048,576 tokens, one head of 64, float32, causal.

Run: python tests/benchmarks/million.py
"""

from __future__ import annotations

from functools import partial

import torch

import longspan as ls
from longspan.tools.bench.sidebyside import report
from longspan.tools.meter import PeakMemory, timed

PATTERN = ls.Dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))


def main() -> None:
    torch.manual_seed(0)
    tokens = 2**20
    small = [torch.randn(1, 1, 65536, 64) for _ in range(3)]
    ls.attention(*small, PATTERN, is_causal=True, backend="sdpa")  # libraries loaded, threads started
    query, key, value = (torch.randn(1, 1, tokens, 64) for _ in range(3))
    with PeakMemory(torch.device("cpu")) as peak:
        call = partial(ls.attention, query, key, value, PATTERN, is_causal=True, backend="sdpa")
        out, ms = timed(call, torch.device("cpu"))
    beyond = peak.mib - out.nbytes / 2**20
    report(
        "million",
        {"tokens": tokens, "seconds": 1e-3 * ms, "mib_beyond_inputs_and_output": beyond, "limit_mib": 256},
    )


if __name__ == "__main__":
    main()
