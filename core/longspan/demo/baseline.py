"""Dense attention for comparison, on as many tokens as it manages in a few seconds."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longspan.demo.meter import measure, timed
from longspan.demo.report import Baseline

__all__ = ["measure_dense"]

PATIENCE_MS = 3_000.0
START = 2048


def measure_dense(query: Tensor, key: Tensor, value: Tensor) -> Baseline:
    """Time causal dense `scaled_dot_product_attention` on the longest prefix that is expected to take three seconds.

    The prefix doubles while the next, at quadratic cost, is expected to stay within the limit. The result is the time
    measured on the prefix reached; nothing is extrapolated.
    """
    length = query.shape[2]
    prefix = min(START, length)

    def dense() -> Tensor:
        return scaled_dot_product_attention(
            query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], is_causal=True
        )

    dense()  # what is done once only is not counted
    ms = timed(dense, query.device)[1]
    while prefix < length and ms * (min(2 * prefix, length) / prefix) ** 2 <= PATIENCE_MS:
        prefix = min(2 * prefix, length)
        ms = timed(dense, query.device)[1]
    ms, runs = measure(dense, query.device, ms)
    return Baseline(tokens=prefix, whole=prefix == length, ms=ms, runs=runs)
