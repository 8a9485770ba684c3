"""float16 on a CPU, where half precision is slow: auto against torch's operator fed float16, and naive float16.

8 heads of 64; auto against `scaled_dot_product_attention` at N=4096, against `softmax(q @ k.T) @ v` in float16 at
N=512; errors against the float64 oracle.
Run: python tests/benchmarks/half.py
"""

from __future__ import annotations

import torch

import longspan as ls
from longspan.testing import oracle
from longspan.tools.bench.sidebyside import interleave, report, summary


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Three lines in the inputs' own precision."""
    return torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, -1) @ value


def main() -> None:
    torch.manual_seed(0)
    result = {}
    for length, name, other in (
        (4096, "torch's operator fed float16", torch.nn.functional.scaled_dot_product_attention),
        (512, "naive float16", naive),
    ):
        tensors = [torch.randn(1, 8, length, 64).half() for _ in range(3)]
        sides = {"auto": lambda t=tensors: ls.attention(*t), name: lambda t=tensors, o=other: o(*t)}
        with torch.inference_mode():
            seconds = interleave(sides, rounds=15)
            rows = torch.arange(0, length, max(1, length // 64))
            exact = oracle(*tensors, rows=rows)
            errors = {side: float((run()[:, :, rows] - exact).abs().max()) for side, run in sides.items()}
        found = {side: summary(rounds) for side, rounds in seconds.items()}
        result[f"N={length}"] = {
            "sides": found,
            "auto_is_faster_by": found[name]["median_us"] / found["auto"]["median_us"],
            "largest_error": errors,
        }
    chosen = ls.explain(ls.Problem(batch=1, heads=8, q_len=4096, head_dim=64, dtype="float16")).chosen
    report("half", {"auto_took": chosen, **result, "limits": {"N=4096": 1.5, "N=512": 20}})


if __name__ == "__main__":
    main()
