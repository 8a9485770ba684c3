"""Dense attention for comparison, on as many tokens as it manages in a few seconds."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longspan.demo.meter import measure, timed
from longspan.demo.reach import prefixes
from longspan.demo.report import Baseline

__all__ = ["measure_dense", "time_dense"]

PATIENCE_MS = 3_000.0


def measure_dense(query: Tensor, key: Tensor, value: Tensor) -> Baseline:
    """Time causal dense `scaled_dot_product_attention` on the longest prefix that is expected to take three seconds.

    The prefix doubles while the next, at quadratic cost, is expected to stay within the limit. The result is the time
    measured on the prefix reached; nothing is extrapolated.
    """
    length = query.shape[2]
    reached, ms = 0, 0.0
    for tokens in prefixes(length):
        if reached and ms * (tokens / reached) ** 2 > PATIENCE_MS:
            break
        reached, ms = tokens, _run(query, key, value, tokens)
    ms, runs = time_dense(query, key, value, reached)
    return Baseline(tokens=reached, whole=reached == length, ms=ms, runs=runs)


def time_dense(query: Tensor, key: Tensor, value: Tensor, tokens: int) -> tuple[float, int]:
    """The median milliseconds of causal dense attention on the first tokens, and the number of runs."""
    return measure(lambda: _dense(query, key, value, tokens), query.device)


def _run(query: Tensor, key: Tensor, value: Tensor, tokens: int) -> float:
    return timed(lambda: _dense(query, key, value, tokens), query.device)[1]


def _dense(query: Tensor, key: Tensor, value: Tensor, tokens: int) -> Tensor:
    return scaled_dot_product_attention(query[:, :, :tokens], key[:, :, :tokens], value[:, :, :tokens], is_causal=True)
