"""Ways to compute dense attention on a CPU, side by side: what `cpu_fused` was chosen from.

torch's own operator (`cpu_fused` without a compiler), oneDNN products over 512-row tiles, FlexAttention
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

ROWS = 512


def composed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Tiles of rows over oneDNN's inner product, x @ w.T, one head after the other."""
    product = torch.ops.mkldnn._linear_pointwise
    out = torch.empty_like(query)
    for entry, head in torch.cartesian_prod(*map(torch.arange, query.shape[:2])).tolist():
        k, v = key[entry, head].contiguous(), value[entry, head].t().contiguous()
        for rows, into in zip(query[entry, head].split(ROWS), out[entry, head].split(ROWS), strict=True):
            weights = product(rows * query.shape[3] ** -0.5, k, None, "none", [], "").softmax(-1)
            into.copy_(product(weights, v, None, "none", [], ""))
    return out


def main() -> None:
    torch.manual_seed(0)
    flex = torch.compile(flex_attention)
    result = {}
    for shape in ((1, 8, 2048, 64), (1, 8, 4096, 128)):
        query, key, value = (torch.randn(shape) for _ in range(3))
        problem = ls.Problem.like(query, key, value)
        native = ls.plan(problem, backend="cpu_fused")
        sides = {
            "torch's operator (SDPA)": lambda q=query, k=key, v=value: F.scaled_dot_product_attention(q, k, v),
            "composed of oneDNN products": lambda q=query, k=key, v=value: composed(q, k, v),
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
