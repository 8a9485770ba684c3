"""Exact joining of partial attention results by their log-sum-exp, in float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_"]


def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a softmax over some keys into one over others, in place.

    The result is the softmax over the multiset union of both key sets, with weights in proportion to `exp(lse_i)`. They
    are taken relative to the larger side and divided by their own sum, so that they add up to 1 however large the lse.
    Two empty sides (lse -inf) stay empty: out 0, lse -inf, no NaN.

    Args:
        out: `(..., rows, head_dim)`, float32 or float64, written in place; any strides.
        lse: `(..., rows)`, of out's dtype, natural log, written in place.
        part: `(..., rows, head_dim)`, of any floating dtype.
        part_lse: `(..., rows)`, natural log.
    """
    part_lse = part_lse.to(lse.dtype)
    larger = torch.maximum(lse, part_lse)
    larger.masked_fill_(larger == -torch.inf, 0.0)  # -inf - -inf would be NaN; exp(-inf - 0) is 0
    mine, other = lse.sub(larger).exp_(), part_lse.sub(larger).exp_()
    total = mine + other
    lse.copy_(larger.add_(total.log()))
    total.masked_fill_(total == 0.0, 1.0)
    out.mul_(mine.div_(total).unsqueeze(-1))
    out.addcmul_(part.to(out.dtype), other.div_(total).unsqueeze(-1))
