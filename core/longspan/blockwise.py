"""Dense attention in plain torch, a block of query rows at a time: any dtype, any device, any strides.

The core uses `backward` for kernels that bring none; `forward` and `backward` are public so that a plugin may fall back
on them. Arithmetic is float32 (float64 for float64 inputs); memory beyond the results is bounded by `BUDGET`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["BUDGET", "backward", "forward"]

BUDGET = 16 * 2**20
"""Bytes of scores held at once."""


def forward(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp.

    Args:
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`, `kv_heads` a divisor of `heads`.
        value: the shape of `key`.
        is_causal: query `i` sees keys up to `i` (counted from the first of each).
        scale: factor on the scores.

    Returns:
        `out` of query's shape and dtype; `lse` `(batch, heads, q_len)`, natural log, float32 or float64. A query
        without keys has out 0 and lse -inf.
    """
    wide = _wide(query)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=wide, device=query.device)
    for batch, rows, keys in _blocks(query, key, is_causal):
        q, k, v = _grouped(query, key, batch, rows), key[batch, :, keys].to(wide), value[batch, :, keys].to(wide)
        scores = _scores(q.to(wide), k, rows, is_causal, scale)
        block_lse = scores.logsumexp(-1)
        out[batch, :, rows] = (scores.sub_(block_lse.unsqueeze(-1)).exp_() @ v).view_as(out[batch, :, rows])
        lse[batch, :, rows] = block_lse.view_as(lse[batch, :, rows])
    return out, lse


def backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`, where `out` and `lse` may be those of a softmax over more keys than `key` holds.

    With P = exp(scores - lse), the joint weights, dV = P^T dO and dS = P * (dO V^T - rowsum(dO * O)): summed over
    disjoint key sets these are the gradients of the joint softmax, so no gradient with respect to a partial lse
    is needed.

    Args:
        dout: the shape of `query`.
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: the shape of `key`.
        out: the joint output, the shape of `query`.
        lse: the joint log-sum-exp, `(batch, heads, q_len)`, natural log; finite.
        is_causal: as in `forward`.
        scale: as in `forward`.

    Returns:
        `(dquery, dkey, dvalue)`, of the inputs' shapes and dtypes.
    """
    wide = _wide(query)
    dquery = torch.zeros_like(query, memory_format=torch.contiguous_format)
    dkey = torch.zeros(key.shape, dtype=wide, device=key.device)
    dvalue = torch.zeros_like(dkey)
    for batch, rows, keys in _blocks(query, key, is_causal):
        q, k, v = _grouped(query, key, batch, rows).to(wide), key[batch, :, keys].to(wide), value[batch, :, keys]
        do, o = (_grouped(x, key, batch, rows).to(wide) for x in (dout, out))
        row_lse = _grouped(lse.unsqueeze(-1), key, batch, rows).to(wide)
        weights = _scores(q, k, rows, is_causal, scale).sub_(row_lse).exp_()
        dvalue[batch, :, keys] += weights.transpose(-1, -2) @ do
        slope = do @ v.to(wide).transpose(-1, -2)
        slope = weights.mul_(slope.sub_((do * o).sum(-1, keepdim=True))).mul_(scale)
        dquery[batch, :, rows] = (slope @ k).view_as(dquery[batch, :, rows])
        dkey[batch, :, keys] += slope.transpose(-1, -2) @ q
    return dquery, dkey.to(key.dtype), dvalue.to(value.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _blocks(query: Tensor, key: Tensor, is_causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of batch entries, of query rows, and of the keys that these rows can see; empty for empty work."""
    batch, heads, q_len, _ = query.shape
    kv_len = key.shape[2]
    if not (batch and heads and q_len and kv_len):
        return
    line = heads * kv_len * (8 if query.dtype == torch.float64 else 4)  # bytes of scores for one row of one entry
    entries = max(1, min(batch, BUDGET // (line * min(q_len, 256))))
    rows = max(16, BUDGET // (line * entries))
    for b in range(0, batch, entries):
        for start in range(0, q_len, rows):
            stop = min(start + rows, q_len)
            yield slice(b, b + entries), slice(start, stop), slice(0, min(stop, kv_len) if is_causal else kv_len)


def _grouped(tensor: Tensor, key: Tensor, batch: slice, rows: slice) -> Tensor:
    """Rows of all query heads that share a key head, one after the other: `(batch, kv_heads, group * rows, ...)`."""
    part = tensor[batch, :, rows]
    return part.reshape(part.shape[0], key.shape[1], -1, part.shape[-1])


def _scores(q: Tensor, k: Tensor, rows: slice, is_causal: bool, scale: float) -> Tensor:
    scores = (q * scale) @ k.transpose(-1, -2)
    if is_causal:
        count = rows.stop - rows.start
        hidden = torch.ones(count, k.shape[2], dtype=torch.bool, device=k.device).triu_(rows.start + 1)
        scores.view(*scores.shape[:2], -1, count, k.shape[2]).masked_fill_(hidden, -torch.inf)
    return scores
