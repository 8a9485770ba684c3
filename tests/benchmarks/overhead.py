"""What `plan(...)` and `attention(...)` add to calling the kernel directly, at a tiny shape.

Run: python tests/benchmarks/overhead.py
"""

from __future__ import annotations

import torch

import longspan as ls
from longspan.tools.bench.sidebyside import interleave, report, summary
from longspan_plugins import sdpa


def main() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 8, 8) for _ in range(3))
    problem = ls.Problem.like(query, key, value)
    kernel = sdpa.longspan_kernel(problem).forward
    plan = ls.plan(problem, backend="sdpa")
    sides = {
        "kernel": lambda: kernel(query, key, value),
        "plan": lambda: plan(query, key, value),
        "attention": lambda: ls.attention(query, key, value, backend="sdpa"),
        "attention, auto, causal": lambda: ls.attention(query, key, value, is_causal=True),
        "torch SDPA": lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value),
    }
    with torch.inference_mode():
        seconds = interleave(sides, rounds=200, calls=500, warm=500)
    found = {name: summary(rounds) for name, rounds in seconds.items()}
    base = found["kernel"]["median_us"]
    added = {name: round(one["median_us"] - base, 3) for name, one in found.items()}
    report("overhead", {"sides": found, "added_us": added, "limits_us": {"plan": 2, "attention": 10}})


if __name__ == "__main__":
    main()
