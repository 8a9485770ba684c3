"""NaN and inf reach the rows that see them, and change no bit of the others: for kernels that mask by adding -inf.

Such a kernel multiplies hidden values by weights of 0, and 0 times NaN is NaN; a score that is NaN or inf stays so, or
becomes NaN, under a mask of -inf. These run it without the rows and keys that are not finite, or so large that their
products need not be, and take what is touched by those from the core's arithmetic. Slow, and for such inputs only.

The bits of a product depend on how its operands lie in memory, so a tensor without such rows lies as the tensor did.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from longspan.numerics import blockwise
from longspan.numerics.tensors import wide_dtype

__all__ = ["add_taint", "backward", "forward", "is_finite", "without"]

Gradients = tuple[Tensor, Tensor, Tensor]
LINE = 64
"""Bytes of a cache line, at which torch's own memory begins."""


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
    bad = _bad(query, most), _bad(key, most), _bad(value, math.inf)  # each by itself: a view may repeat a row
    out, lse = run(without(query, bad[0]), without(key, bad[1]), without(value, bad[2]))
    real, real_lse = blockwise.forward(query, key, value, is_causal=False, scale=scale, mask=mask)
    bad_rows, bad_keys = bad[0].squeeze(-1), (bad[1] | bad[2]).squeeze(-1)
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
    bad = [_bad(x, most) for x in (dout, query, key, value, out)]  # each by itself: a view may repeat a row
    bad_rows, bad_keys = (bad[0] | bad[1] | bad[4]).squeeze(-1) | lse.isnan(), (bad[2] | bad[3]).squeeze(-1)
    clean_dout, q, k, v, o = (without(x, is_bad) for x, is_bad in zip((dout, query, key, value, out), bad, strict=True))
    usable = _as_it_lies(lse, lse.masked_fill(bad_rows | (lse == -math.inf), math.inf))
    gradients = run(clean_dout, q, k, v, o, usable)
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
    both = zip((rows, touched, touched), real, gradients, strict=True)
    dquery, dkey, dvalue = (torch.where(at.unsqueeze(-1), r, g.to(r.dtype)) for at, r, g in both)
    return dquery, dkey, dvalue


def is_finite(*tensors: Tensor) -> bool:
    """Whether all values are finite: mostly by their sums alone, which read each tensor once and write nothing.

    Not in another dtype: torch would sum a copy. A sum that overflows only costs the second look.
    """
    return all(math.isfinite(tensor.sum()) or bool(tensor.isfinite().all()) for tensor in tensors)


def without(tensor: Tensor, bad: Tensor) -> Tensor:
    """A copy in which the bad numbers are 0, and which lies in memory as the tensor does.

    Args:
        tensor: any strides.
        bad: bool, broadcastable to the tensor; found by its values alone: places that share memory are alike.
    """
    return _as_it_lies(tensor, tensor.masked_fill(bad, 0.0))


def add_taint(out: Tensor, value: Tensor) -> Tensor:
    """The causal `out` of finite values with the NaN and inf of `value` in the rows that may see them; other bits stay.

    Args:
        out: `(..., seq, head_dim)`.
        value: the shape of `out`, one to each of its heads.
    """
    taint = blockwise.taint(value)
    return torch.where(taint == 0.0, out, out + taint)


def _as_it_lies(tensor: Tensor, values: Tensor) -> Tensor:
    """`values` with the strides of `tensor` and as far from a cache line's start; repeated rows are repeated."""
    shape, strides = tensor.shape, tensor.stride()
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if tensor.numel() else 0
    lead = tensor.data_ptr() % LINE // tensor.element_size()
    memory = torch.empty(lead + span, dtype=tensor.dtype, device=tensor.device)
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)
    copy = memory.as_strided(shape, strides, lead)
    copy[once].copy_(values[once])
    return copy


def _most(query: Tensor, scale: float) -> float:
    """The largest number of which a scaled product of two rows is finite for certain."""
    bound = torch.finfo(wide_dtype(query.dtype)).max
    return 0.5 * math.sqrt(bound / (query.shape[3] * max(1.0, abs(scale))))


def _sees(mask: Tensor, bad: Tensor, heads: int) -> Tensor:
    """`(batch, heads, rows)`: whether a row sees one of the bad keys, `(batch, heads or key heads, keys)`."""
    every = bad.repeat_interleave(heads // bad.shape[1], 1).float()
    return (mask.float() @ every.unsqueeze(-1)).squeeze(-1) > 0


def _bad(tensor: Tensor, most: float) -> Tensor:
    """Rows that hold NaN, inf, or more than `most`: their shape with 1 for the last dimension."""
    narrow = most >= torch.finfo(tensor.dtype).max  # as a number of this dtype the bound would be inf
    fine = tensor.isfinite() if narrow else tensor.abs() <= most
    return (~fine).any(-1, keepdim=True)
