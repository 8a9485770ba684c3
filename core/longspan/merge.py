"""Exact joining of partial attention results by their log-sum-exp, in float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_"]


def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a softmax over some keys into one over others, in place.

    The result is the softmax over the multiset union of both key sets: weights are `exp(lse_i - logaddexp(lse_i))`.
    Two empty sides (lse -inf) stay empty: out 0, lse -inf, no NaN.

    Args:
        out: `(..., rows, head_dim)`, float32 or float64, written in place; any strides.
        lse: `(..., rows)`, of out's dtype, natural log, written in place.
        part: `(..., rows, head_dim)`, of any floating dtype.
        part_lse: `(..., rows)`, natural log.
    """
    part_lse = part_lse.to(lse.dtype)
    joint = torch.logaddexp(lse, part_lse)
    base = joint.masked_fill(joint == -torch.inf, 0.0)  # -inf - -inf would be NaN; exp(-inf - 0) is 0
    out.mul_(lse.sub(base).exp_().unsqueeze(-1))
    out.addcmul_(part.to(out.dtype), part_lse.sub(base).exp_().unsqueeze(-1))
    lse.copy_(joint)
