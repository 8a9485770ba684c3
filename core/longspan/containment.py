"""NaN and inf reach the rows that see them, and change no bit of the others: for kernels that add masks to scores.

Such a kernel multiplies hidden values by weights of 0, and 0 times NaN is NaN; a NaN score stays one under a mask of
-inf. These run it without what is not finite, and take the rows and keys that are touched from the core's arithmetic.
Slow, and for such inputs only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from longspan import blockwise

__all__ = ["backward", "forward", "is_finite"]

Gradients = tuple[Tensor, Tensor, Tensor]


def forward(
    run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`, by `run(query, key, value)` where nothing that is not finite is seen.

    Args:
        run: the kernel, under the mask.
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: the shape of `key`.
        scale: factor on the scores.
        mask: broadcastable to `(batch, heads, q_len, kv_len)`, True where a query sees a key.
    """
    bad_rows, bad_keys = _bad(query), _bad(key) | _bad(value)
    out, lse = run(_without(query, bad_rows), _without(key, bad_keys), _without(value, bad_keys))
    real, real_lse = blockwise.forward(query, key, value, is_causal=False, scale=scale, mask=mask)
    touched = bad_rows | _sees(mask, bad_keys, query.shape[1])
    return torch.where(touched.unsqueeze(-1), real, out), torch.where(touched, real_lse, lse)


def backward(
    run: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Gradients],
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    mask: Tensor,
) -> Gradients:
    """`(dquery, dkey, dvalue)`, by `run(dout, query, key, value, out, lse)` where nothing that is not finite is seen.

    Args:
        run: the kernel's backward, under the mask; an lse of inf makes all weights of its row 0.
        dout: the gradient of `out`, of its shape.
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: the shape of `key`.
        out: the joint output.
        lse: the joint log-sum-exp, `(batch, heads, q_len)`.
        scale: factor on the scores.
        mask: broadcastable to `(batch, heads, q_len, kv_len)`, True where a query sees a key.
    """
    bad_rows = _bad(dout) | _bad(query) | _bad(out) | lse.isnan()
    bad_keys = _bad(key) | _bad(value)
    lines = [_without(x, bad_rows) for x in (dout, query, out)]
    keys = [_without(x, bad_keys) for x in (key, value)]
    found = run(
        lines[0], lines[1], keys[0], keys[1], lines[2], lse.masked_fill(bad_rows | (lse == -math.inf), math.inf)
    )
    real = blockwise.backward(dout, query, key, value, out, lse, is_causal=False, scale=scale, mask=mask)
    rows = bad_rows | _sees(mask, bad_keys, query.shape[1])
    seen = _sees(mask.transpose(2, 3), bad_rows, query.shape[1])
    touched = bad_keys | seen.view(len(key), key.shape[1], -1, key.shape[2]).any(2)
    both = zip((rows, touched, touched), real, found, strict=True)
    dquery, dkey, dvalue = (torch.where(one.unsqueeze(-1), r, f.to(r.dtype)) for one, r, f in both)
    return dquery, dkey, dvalue


def is_finite(*tensors: Tensor) -> bool:
    """Whether all values are finite: mostly by their sums alone, which read each tensor once and write nothing.

    Not in another dtype: torch would sum a copy. A sum that overflows only costs the second look.
    """
    return all(math.isfinite(one.sum()) or bool(one.isfinite().all()) for one in tensors)


def _sees(mask: Tensor, bad: Tensor, heads: int) -> Tensor:
    """`(batch, heads, rows)`: whether a row sees one of the bad keys, `(batch, heads or key heads, keys)`."""
    every = bad.repeat_interleave(heads // bad.shape[1], 1).float()
    return (mask.float() @ every.unsqueeze(-1)).squeeze(-1) > 0


def _bad(tensor: Tensor) -> Tensor:
    return (~tensor.isfinite()).any(-1)


def _without(tensor: Tensor, bad: Tensor) -> Tensor:
    return tensor.masked_fill(bad.unsqueeze(-1), 0.0)
