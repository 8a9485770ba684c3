"""Dense attention for comparison: measured as far as a few seconds go, and how it grows from there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longspan.tools.demo.prefix import prefixes
from longspan.tools.demo.report import Baseline, Timing
from longspan.tools.meter import measure

__all__ = ["extrapolate", "measure_dense"]

PATIENCE_MS = 3_000.0
START = 512
POINTS = 3
"""Lengths that are measured at least, where the whole is not: fewer show no growth."""


def measure_dense(query: Tensor, key: Tensor, value: Tensor) -> Baseline:
    """Time causal dense `scaled_dot_product_attention` on the whole, or on the prefixes that take three seconds.

    The prefix doubles while the next, at quadratic cost, is expected to stay within the limit. Beyond the longest the
    time is extrapolated from the last three, and the result says so.
    """
    length = query.shape[2]
    timings: list[Timing] = []
    for tokens in prefixes(length, START):
        if len(timings) >= POINTS and timings[-1].ms * (tokens / timings[-1].tokens) ** 2 > PATIENCE_MS:
            break
        ms, runs = measure(lambda tokens=tokens: _dense(query, key, value, tokens), query.device)  # type: ignore[misc]
        timings.append(Timing(tokens=tokens, ms=ms, runs=runs))
    whole = timings[-1].ms if timings[-1].tokens == length else extrapolate(timings[-POINTS:], length)
    return Baseline(tokens=length, ms=whole, measured=tuple(timings))


def extrapolate(measured: Sequence[Timing], tokens: int) -> float:
    """Milliseconds for more tokens: `a n^2 + b n` through what was measured, in least squares of the relative error.

    Neither part may be negative: time that grows faster than the square of the length is taken to grow as its square
    from the longest on, which makes dense attention rather too fast.
    """
    # Each point is weighed by 1 / ms: minimise the sum of (a u + b v - 1)^2 with u = n^2 / ms and v = n / ms.
    points = [(timing.tokens**2 / timing.ms, timing.tokens / timing.ms) for timing in measured]
    uu, vv, uv = sum(u * u for u, _ in points), sum(v * v for _, v in points), sum(u * v for u, v in points)
    su, sv = sum(u for u, _ in points), sum(v for _, v in points)
    determinant = uu * vv - uv * uv
    if len(points) > 1 and determinant > 0:
        a, b = (su * vv - sv * uv) / determinant, (sv * uu - su * uv) / determinant
        if a > 0 and b >= 0:
            return a * tokens**2 + b * tokens
    longest = measured[-1]
    return longest.ms * (tokens / longest.tokens) ** 2


def _dense(query: Tensor, key: Tensor, value: Tensor, tokens: int) -> Tensor:
    return scaled_dot_product_attention(query[:, :, :tokens], key[:, :, :tokens], value[:, :, :tokens], is_causal=True)
