"""Tokens to query, key and value by fixed, seeded projections: no trained weights, but scores of a realistic spread."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["embed"]

WIDTH = 64
SPREAD = 2.0
"""Standard deviation of the scaled scores: softmax is then neither flat nor a single key, as in a trained model."""


def embed(
    tokens: Tensor, *, heads: int, head_dim: int, seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Embed bytes, add where they stand, and project to query, key and value.

    Everything is computed in float32 on the CPU, so that one seed poses one problem on every device.

    Args:
        tokens: `(n,)`, uint8.
        heads: attention heads.
        head_dim: width of each.
        seed: of the embedding and the projections.
        dtype: of the result.
        device: of the result.

    Returns:
        Query, key and value, each `(1, heads, n, head_dim)`: transposed views of `(1, n, heads, head_dim)`, which is
        what a model's projections give.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    hidden = normal(256, WIDTH)[tokens.long()] + _positions(len(tokens))
    hidden = torch.nn.functional.layer_norm(hidden, (WIDTH,))

    def project(scale: float) -> Tensor:
        weights = normal(WIDTH, heads * head_dim) * (scale / math.sqrt(WIDTH))
        rows = (hidden @ weights).to(device, dtype)
        return rows.view(1, len(tokens), heads, head_dim).transpose(1, 2)

    return project(SPREAD), project(1.0), project(1.0)


def _positions(count: int) -> Tensor:
    """The sinusoids of "Attention is all you need" (arXiv 1706.03762, section 3.5), `(count, WIDTH)`."""
    rates = torch.exp(torch.arange(0, WIDTH, 2, dtype=torch.float32, device="cpu") * (-math.log(10_000.0) / WIDTH))
    angles = torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * rates.double()
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1).float()
