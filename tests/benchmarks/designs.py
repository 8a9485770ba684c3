"""Ways to compute dense attention on a CPU, side by side: what `cpu_fused` was chosen from.

torch's own operator, oneDNN products over 512-row tiles (`cpu_fused` without a compiler), FlexAttention
compiled by inductor, and the native kernels; float32 forward, (1, 8, 2048, 64) and (1, 8, 4096, 128).
Run: python tests/benchmarks/designs.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import longspan as ls
from longspan.tools.bench.peaks import product_peak
from longspan.tools.bench.sidebyside import interleave, report, summary
from longspan_plugins.cpu_fused import composed


def main() -> None:
    torch.manual_seed(0)
    flex = torch.compile(flex_attention)
    result = {}
    for shape in ((1, 8, 2048, 64), (1, 8, 4096, 128)):
        query, key, value = (torch.randn(shape) for _ in range(3))
        problem = ls.Problem.like(query, key, value)
        native, tiles = ls.plan(problem, backend="cpu_fused"), composed.kernel(problem).forward
        sides = {
            "torch's operator (SDPA)": lambda q=query, k=key, v=value: F.scaled_dot_product_attention(q, k, v),
            "composed of oneDNN products": lambda q=query, k=key, v=value, f=tiles: f(q, k, v),
            "FlexAttention compiled": lambda q=query, k=key, v=value: flex(q, k, v),
            "native": lambda q=query, k=key, v=value, f=native: f(q, k, v),
        }
        with torch.inference_mode():
            seconds = interleave(sides, rounds=11)
        flops = 4e-9 * shape[1] * shape[2] ** 2 * shape[3]
        result[str(shape)] = {
            side: {**summary(rounds), "gflops": flops / (1e-6 * summary(rounds)["median_us"])}
            for side, rounds in seconds.items()
        }
    report("designs", {"float32_product_peak_gflops": product_peak(torch.float32, torch.device("cpu")), **result})


if __name__ == "__main__":
    main()
