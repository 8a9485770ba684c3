"""NaN and inf reach the rows that see them, and change no bit of the others: for kernels that mask by adding -inf.

Such a kernel multiplies hidden values by weights of 0, and 0 times NaN is NaN; a score that is NaN or inf stays so, or
becomes NaN, under a mask of -inf. These run it without the rows and keys that are not finite, or so large that their
products need not be, and take what is touched by those from the core's arithmetic. Slow, and for such inputs only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from longspan import blockwise
from longspan.tensors import wide_dtype

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
    """`(out, lse)`, by `run(query, key, value)` where nothing that is bad is seen.

    Args:
        run: the kernel, under the mask.
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: the shape of `key`.
        scale: factor on the scores.
        mask: broadcastable to `(batch, heads, q_len, kv_len)`, True where a query sees a key.
    """
    most = _most(query, scale)
    bad_rows, bad_keys = _bad(query, most), _bad(key, most) | _bad(value, math.inf)
    out, lse = run(_without(query, bad_rows), _without(key, bad_keys), _without(value, bad_keys))
    real, real_lse = blockwise.forward(query, key, value, is_causal=False, scale=scale, mask=mask)
    touched = bad_rows | _sees(mask, bad_keys, query.shape[1])
    return torch.where(touched.unsqueeze(-1), real, out), torch.where(touched, real_lse.to(lse.dtype), lse)


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
    mask: Tensor | None,
) -> Gradients:
    """`(dquery, dkey, dvalue)`, by `run(dout, query, key, value, out, lse)` where nothing that is bad is seen.

    Args:
        run: the kernel's backward, under the mask; an lse of inf makes all weights of its row 0.
        dout: the gradient of `out`, of its shape.
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: the shape of `key`.
        out: the joint output.
        lse: the joint log-sum-exp, `(batch, heads, q_len)`.
        scale: factor on the scores.
        mask: broadcastable to `(batch, heads, q_len, kv_len)`, True where a query sees a key; None: query `i` sees the
            keys up to `i`.
    """
    most = _most(query, scale)
    bad_rows = _bad(dout, most) | _bad(query, most) | _bad(out, most) | lse.isnan()
    bad_keys = _bad(key, most) | _bad(value, most)
    lines = [_without(x, bad_rows) for x in (dout, query, out)]
    keys = [_without(x, bad_keys) for x in (key, value)]
    usable = lse.masked_fill(bad_rows | (lse == -math.inf), math.inf)
    found = run(lines[0], lines[1], keys[0], keys[1], lines[2], usable)
    given = {"is_causal": mask is None, "scale": scale}
    real = blockwise.backward(dout, query, key, value, out, lse, mask=mask, **given)  # type: ignore[arg-type]
    group = query.shape[1] // key.shape[1]
    if mask is None:
        rows = bad_rows | bad_keys.repeat_interleave(group, 1).cummax(-1).values
        seen = bad_rows.flip(-1).cummax(-1).values.flip(-1)
    else:
        rows = bad_rows | _sees(mask, bad_keys, query.shape[1])
        seen = _sees(mask.transpose(2, 3), bad_rows, query.shape[1])
    touched = bad_keys | seen.view(len(key), key.shape[1], group, key.shape[2]).any(2)
    both = zip((rows, touched, touched), real, found, strict=True)
    dquery, dkey, dvalue = (torch.where(one.unsqueeze(-1), r, f.to(r.dtype)) for one, r, f in both)
    return dquery, dkey, dvalue


def is_finite(*tensors: Tensor) -> bool:
    """Whether all values are finite: mostly by their sums alone, which read each tensor once and write nothing.

    Not in another dtype: torch would sum a copy. A sum that overflows only costs the second look.
    """
    return all(math.isfinite(one.sum()) or bool(one.isfinite().all()) for one in tensors)


def _most(query: Tensor, scale: float) -> float:
    """The largest number of which a scaled product of two rows is finite for certain."""
    bound = torch.finfo(wide_dtype(query.dtype)).max
    return 0.5 * math.sqrt(bound / (query.shape[3] * max(1.0, abs(scale))))


def _sees(mask: Tensor, bad: Tensor, heads: int) -> Tensor:
    """`(batch, heads, rows)`: whether a row sees one of the bad keys, `(batch, heads or key heads, keys)`."""
    every = bad.repeat_interleave(heads // bad.shape[1], 1).float()
    return (mask.float() @ every.unsqueeze(-1)).squeeze(-1) > 0


def _bad(tensor: Tensor, most: float) -> Tensor:
    """Rows that hold NaN, inf, or more than `most`."""
    narrow = most >= torch.finfo(tensor.dtype).max  # as a number of this dtype the bound would be inf
    fine = tensor.isfinite() if narrow else tensor.abs() <= most
    return (~fine).any(-1)


def _without(tensor: Tensor, bad: Tensor) -> Tensor:
    return tensor.masked_fill(bad.unsqueeze(-1), 0.0)
