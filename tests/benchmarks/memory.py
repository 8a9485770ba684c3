"""Peak memory of a training step, forward and backward, as the sequence doubles, each length in a process of its own.

LongNet's five branches, 8 heads of 64, bfloat16, causal, `backend="sdpa"`. Counted is what the process has at its peak
beyond what it had with the inputs and the gradient of the output in place. The issue's limit: twice the tokens take at
most twice the memory.

Run: python tests/benchmarks/memory.py
"""

from __future__ import annotations

import subprocess
import sys

import torch

import longspan as ls
from longspan.tools.bench.sidebyside import report
from longspan.tools.meter import PeakMemory, timed

PATTERN = ls.Dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
TOKENS = (8192, 16384, 32768, 65536)
HEADS, DIM = 8, 64


def step(tokens: int) -> tuple[int, float]:
    """Bytes beyond the inputs at the peak of one forward and backward, and its seconds."""

    def inputs(length: int) -> list[torch.Tensor]:
        made = [torch.randn(1, HEADS, length, DIM, dtype=torch.bfloat16) for _ in range(4)]
        return [x.requires_grad_(i < 3) for i, x in enumerate(made)]

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dout: torch.Tensor) -> None:
        out = ls.attention(query, key, value, PATTERN, is_causal=True, backend="sdpa")
        out.backward(dout)

    torch.manual_seed(0)
    run(*inputs(512))  # libraries loaded, threads started
    tensors = inputs(tokens)
    with PeakMemory(torch.device("cpu")) as peak:
        _, ms = timed(lambda: run(*tensors), torch.device("cpu"))
    return round(peak.mib * 2**20), 1e-3 * ms


def measure(tokens: int) -> tuple[int, float]:
    """`step` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, str(tokens)], capture_output=True, text=True, check=True)
    beyond, seconds = done.stdout.split()
    return int(beyond), float(seconds)


def main() -> None:
    if len(sys.argv) > 1:
        print(*step(int(sys.argv[1])))
        return
    found = {tokens: measure(tokens) for tokens in TOKENS}
    gradients = {tokens: 3 * HEADS * tokens * DIM * 2 for tokens in TOKENS}  # what must exist at the end, in bfloat16
    report(
        "memory",
        {
            "mib_beyond_inputs": {tokens: beyond / 2**20 for tokens, (beyond, _) in found.items()},
            "bytes_per_token_and_head": {tokens: beyond / tokens / HEADS for tokens, (beyond, _) in found.items()},
            "times_the_gradients": {tokens: found[tokens][0] / gradients[tokens] for tokens in TOKENS},
            "ratio_to_half_the_tokens": {
                tokens: found[tokens][0] / found[tokens // 2][0] for tokens in TOKENS if tokens // 2 in found
            },
            "limit_ratio": 2,
            "seconds": {tokens: seconds for tokens, (_, seconds) in found.items()},
        },
    )


if __name__ == "__main__":
    main()
