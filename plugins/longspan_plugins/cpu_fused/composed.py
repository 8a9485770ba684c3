"""Without native kernels: tiles of rows over oneDNN's products, for what they serve better than torch's own operator.

oneDNN's inner product reaches twice the rate of torch's default float32 product on many processors. Everything else is
`sdpa`'s, or `pascal_fp32`'s in float16.
"""

from __future__ import annotations

from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from longspan.plugin import Kernel, Problem, nonfinite
from longspan_plugins import pascal_fp32, sdpa

__all__ = ["kernel"]

ROWS = 512
"""Query rows of a tile: fewer starve the products, more leave the caches."""


def kernel(problem: Problem) -> Kernel | None:
    """The kernel of a dense problem; None for any other, which is then lowered."""
    shifted = problem.is_causal and (problem.query_offset or problem.q_len != problem.kv_len)
    if problem.pattern.kind != "dense" or problem.documents is not None or shifted:
        return None
    if problem.dtype == "float16" and not problem.dropout_p:
        return pascal_fp32.tiled(problem)
    usual: Kernel = sdpa.longspan_kernel(problem)
    pays = problem.dtype == "float32" and problem.q_len >= ROWS and problem.kv_len >= ROWS and problem.scale > 0
    if problem.dropout_p or not (pays and _has_products()):
        return usual
    tiles = _Tiles(problem)
    return evolve(usual, forward=tiles.forward, operators=("mkldnn::_linear_pointwise",))


def _has_products() -> bool:
    available: Any = torch.backends.mkldnn.is_available
    return available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _Tiles:
    def __init__(self, problem: Problem) -> None:
        self._is_causal, self._scale = problem.is_causal, problem.scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if not self._is_causal or nonfinite.is_finite(value):
            return self._attend(query, key, value)
        # A masked weight of 0 times NaN is NaN: attend to the finite values, in the same memory layout.
        out, lse = self._attend(query, key, nonfinite.without(value, ~value.isfinite()))
        group = query.shape[1] // key.shape[1]
        return nonfinite.add_taint(out, value.repeat_interleave(group, 1)), lse

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        product: Any = torch.ops.mkldnn._linear_pointwise  # x @ w.T
        out = torch.empty(query.shape, dtype=query.dtype, device="cpu")
        lse = torch.empty(query.shape[:3], dtype=query.dtype, device="cpu")
        group = query.shape[1] // key.shape[1]
        for entry in range(query.shape[0]):
            for head in range(query.shape[1]):
                k, v = key[entry, head // group].contiguous(), value[entry, head // group].t().contiguous()
                for start in range(0, query.shape[2], ROWS):
                    rows = slice(start, min(start + ROWS, query.shape[2]))
                    seen = rows.stop if self._is_causal else k.shape[0]
                    scores = product(query[entry, head, rows] * self._scale, k[:seen], None, "none", [], "")
                    if self._is_causal:
                        edge = scores[:, start:]
                        edge.masked_fill_(torch.ones_like(edge, dtype=torch.bool).triu_(1), -torch.inf)
                    top = scores.amax(-1, keepdim=True)
                    weights = scores.sub_(top).exp_()
                    total = weights.sum(-1, keepdim=True)
                    part = product(weights, v[:, :seen].contiguous(), None, "none", [], "")
                    out[entry, head, rows] = part.div_(total)
                    lse[entry, head, rows] = (top + total.log()).squeeze(-1)
        return out, lse
