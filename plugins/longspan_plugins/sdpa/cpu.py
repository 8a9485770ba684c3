"""torch's flash operator for CPUs, and what it gets wrong where there are NaN and inf: they reach hidden rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from longspan import blockwise

__all__ = ["backward", "forward"]

aten: Any = torch.ops.aten
_flash = aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
Gradients = tuple[Tensor, Tensor, Tensor]


def forward(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`; `mask` `(1, 1, q_len, kv_len)` of query's dtype, 0 or -inf."""
    if mask is not None:
        return _masked(query, key, value, scale, mask)
    out, lse = _flash(query, key, value, 0.0, is_causal, scale=scale)
    group = query.shape[1] // key.shape[1]
    if is_causal and not _finite(out):  # the operator multiplies masked weights, and 0 times NaN is NaN
        out, lse = _flash(query, key, torch.where(value.isfinite(), value, 0.0), 0.0, True, scale=scale)
        out = out + blockwise.taint(value).repeat_interleave(group, 1)
    if not lse.all() and not (_finite(query) and _finite(key)):  # it makes rows whose scores are all NaN zero
        bad = (~key.isfinite()).any(-1).repeat_interleave(group, 1)
        seen = bad.cummax(-1).values if is_causal else bad.any(-1, keepdim=True)
        zeroed = (lse == 0) & ((~query.isfinite()).any(-1) | seen)
        out, lse = out.masked_fill(zeroed.unsqueeze(-1), math.nan), lse.masked_fill(zeroed, math.nan)
    return out, lse


def backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> Gradients:
    """Gradients for the joint `(out, lse)`."""
    if mask is not None:
        return _masked_backward(dout, query, key, value, out, lse, scale, mask)
    result: Gradients = _flash_backward(dout, query, key, value, out, lse, 0.0, is_causal, scale=scale)
    if is_causal and not all(map(_finite, result)):
        return blockwise.backward(dout, query, key, value, out, lse, is_causal=True, scale=scale)
    return result


def _masked(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> tuple[Tensor, Tensor]:
    if _finite(query) and _finite(key) and _finite(value):
        out, lse = _flash(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
        return out, _emptied(lse, mask)
    bad_rows, bad_keys = _bad(query), _bad(key) | _bad(value)
    clean = (_without(query, bad_rows), _without(key, bad_keys), _without(value, bad_keys))
    out, lse = _flash(*clean, 0.0, False, attn_mask=mask, scale=scale)
    lse = _emptied(lse, mask)
    real, real_lse = blockwise.forward(query, key, value, is_causal=False, scale=scale, mask=mask == 0)
    touched = bad_rows | _sees(mask, bad_keys, query.shape[1])
    return torch.where(touched.unsqueeze(-1), real, out), torch.where(touched, real_lse, lse)


def _masked_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, mask: Tensor
) -> Gradients:
    lines = (dout, query, out)
    usable = lse.masked_fill(lse == -math.inf, math.inf)  # for weights of 0: -inf - -inf would be NaN
    if all(map(_finite, (*lines, key, value))) and not bool(lse.isnan().any()):
        found: Gradients = _flash_backward(
            dout, query, key, value, out, usable, 0.0, False, attn_mask=mask, scale=scale
        )
        return found
    # What is untouched by NaN and inf keeps its bits: it comes from the operator, without what is touched.
    bad_rows = _bad(dout) | _bad(query) | _bad(out) | lse.isnan()
    bad_keys = _bad(key) | _bad(value)
    rows = [_without(x, bad_rows) for x in lines]
    usable = usable.masked_fill(bad_rows, math.inf)
    keys = [_without(x, bad_keys) for x in (key, value)]
    found = _flash_backward(rows[0], rows[1], *keys, rows[2], usable, 0.0, False, attn_mask=mask, scale=scale)
    real = blockwise.backward(dout, query, key, value, out, lse, is_causal=False, scale=scale, mask=mask == 0)
    touched_rows = bad_rows | _sees(mask, bad_keys, query.shape[1])
    seen = _sees(mask.transpose(2, 3), bad_rows, query.shape[1])
    touched_keys = bad_keys | seen.view(len(key), key.shape[1], -1, key.shape[2]).any(2)
    touched = (touched_rows, touched_keys, touched_keys)
    dquery, dkey, dvalue = (torch.where(t.unsqueeze(-1), r, f) for t, r, f in zip(touched, real, found, strict=True))
    return dquery, dkey, dvalue


def _emptied(lse: Tensor, mask: Tensor) -> Tensor:
    """-inf for rows that see no key, for which the operator says 0."""
    if lse.all():
        return lse
    return lse.masked_fill((lse == 0) & (mask == -math.inf).all(-1), -math.inf)


def _sees(mask: Tensor, bad: Tensor, heads: int) -> Tensor:
    """`(batch, heads, rows)`: whether a row sees one of the bad keys, `(batch, heads or key heads, keys)`."""
    bad = bad.repeat_interleave(heads // bad.shape[1], 1).float()
    return ((mask == 0).float() @ bad.unsqueeze(-1)).squeeze(-1) > 0


def _bad(tensor: Tensor) -> Tensor:
    return (~tensor.isfinite()).any(-1)


def _without(tensor: Tensor, bad: Tensor) -> Tensor:
    return tensor.masked_fill(bad.unsqueeze(-1), 0.0)


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite: mostly by their sum alone, which reads the tensor once and writes nothing.

    Not in another dtype: torch would sum a copy. A sum that overflows only costs the second look.
    """
    return math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())
