"""What the machine can do: the rate of large matrix products by dtype, and of copies in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from longspan.tools.meter import timed

__all__ = ["bandwidth", "product_peak"]

SIDE = 1536
"""Rows, columns and depth of the products: large enough for the caches to be used as well as they can be."""


def product_peak(dtype: torch.dtype, device: torch.device, rounds: int = 7) -> float:
    """GFLOP/s of the fastest way that torch has to multiply two large matrices of this dtype.

    On a CPU both oneDNN's inner product and torch's own product are tried: which one is faster depends on the machine.
    """
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    best = 0.0
    for product in _products(a, b):
        best = max(best, 2e-9 * SIDE**3 / _fastest(product, device, rounds))
    return best


def bandwidth(device: torch.device, rounds: int = 7) -> float:
    """GB/s, read and written, of a copy that fits in no cache."""
    source = torch.zeros(2**26, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    return 2e-9 * source.nbytes / _fastest(lambda: target.copy_(source), device, rounds)


def _products(a: Tensor, b: Tensor) -> Iterator[Callable[[], Any]]:
    yield lambda: a @ b
    available: Any = torch.backends.mkldnn.is_available
    if a.device.type == "cpu" and available() and a.dtype in (torch.float32, torch.bfloat16):
        linear: Any = torch.ops.mkldnn._linear_pointwise
        yield lambda: linear(a, b, None, "none", [], "")


def _fastest(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Seconds of the fastest of some calls, after one that is not counted."""
    call()
    return 1e-3 * min(timed(call, device)[1] for _ in range(rounds))
