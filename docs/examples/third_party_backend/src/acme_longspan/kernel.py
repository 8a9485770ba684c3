"""The kernel: replace the arithmetic by your launches, and keep the shapes, the dtypes and what the comments promise.

Tensors are `(batch, heads, seq, head_dim)`. The last dimension has no gaps; the other strides may be any, 0 included,
so call `.contiguous()` if your kernel needs it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.plugin import Kernel, blockwise


def make_kernel(*, is_causal: bool, scale: float) -> Kernel:
    """Forward and backward for one problem. `batch` and `heads` may differ from call to call, all else stays.

    Args:
        is_causal: query `i` sees keys up to `i`. Asked for only where there are as many queries as keys.
        scale: factor on the scores; any number, negative ones too.
    """

    def hide(scores: Tensor, fill: float) -> Tensor:
        """Fill what a causal row may not see."""
        if not is_causal:
            return scores
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(hidden, fill)

    def visible(tensor: Tensor) -> Tensor:
        """Keys or values that hidden weights may be multiplied with: 0 times NaN would be NaN."""
        return tensor.where(tensor.isfinite(), 0.0) if is_causal else tensor

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # float32 inside, whatever the inputs are: lse has to be float32 anyway (float64 for float64 inputs).
        q, k, v = (_wide(x) for x in (query, key, value))
        scores = hide(scale * q @ k.mT, -torch.inf)
        lse = scores.logsumexp(-1)  # natural logarithm; kernels that use base 2 multiply by ln 2
        out = (scores - lse[..., None]).exp() @ visible(v)
        if is_causal:
            out = out + blockwise.taint(v)  # a NaN reaches the rows that see it, and no others
        return out.to(query.dtype), lse

    def backward(
        dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # `out` and `lse` are those of the whole softmax, of which `key` may be only a part. So do not compute them
        # again: with the joint lse these weights are the joint ones, and the gradients of all parts add up.
        q, k, v, do, o = (_wide(x) for x in (query, key, value, dout, out))
        weights = hide(scale * q @ k.mT, -torch.inf).sub_(lse[..., None]).exp_()
        dvalue = weights.mT @ do
        held = (do * o).sum(-1, keepdim=True)  # FlashAttention's D, from the joint out
        dscores = hide(weights * (do @ v.mT - held), 0.0) * scale
        dquery, dkey = dscores @ visible(k), dscores.mT @ q
        return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype)

    return Kernel(forward, backward)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
