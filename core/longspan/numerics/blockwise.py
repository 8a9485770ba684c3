"""Dense attention in plain torch, a tile of query rows at a time: any dtype, any device, any strides.

The core uses `backward` for kernels that bring none; `forward` and `backward` are public so that a plugin may fall back
on them. Arithmetic is float32 (float64 for float64 inputs); memory beyond the results is bounded by `BUDGET`. NaN and
inf reach only the rows that may see them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attrs import frozen
from torch import Tensor

from longspan.numerics.dropout import Dropout
from longspan.numerics.tensors import wide_dtype

__all__ = ["BUDGET", "backward", "forward", "taint"]

BUDGET = 16 * 2**20
"""Bytes of scores held at once."""
ROWS = 4096
"""Most query rows, of all heads that share a key head, in one product: sums over rows are made in two levels."""


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    scale: float,
    dropout: Dropout | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp.

    Args:
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`, `kv_heads` a divisor of `heads`.
        value: the shape of `key`.
        is_causal: query `i` sees keys up to `i` (counted from the first of each).
        scale: factor on the scores.
        dropout: the mask on the weights, if any; the log-sum-exp is that of the weights before it.
        mask: True where a query sees a key (and `is_causal` allows it), bool, broadcastable to
            `(batch, heads, q_len, kv_len)`.

    Returns:
        `out` of query's shape and dtype; `lse` `(batch, heads, q_len)`, natural log, float32 or float64. A query
        without keys has out 0 and lse -inf.
    """
    mask, is_causal = _mask_alone(mask, query, key, is_causal)
    wide = wide_dtype(query.dtype)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=wide, device=query.device)
    for tile in _tiles(query, key, is_causal):
        at = tile.batch, slice(None), tile.rows
        scores = tile.scores(tile.grouped(query).to(wide), key, scale, wide)
        seen = tile.seen(mask)
        if seen is not None:
            scores.masked_fill_(~seen, -torch.inf)
        largest = scores.amax(-1, keepdim=True)
        if seen is not None:
            largest.masked_fill_(largest == -torch.inf, 0.0)  # a row that sees nothing: -inf - -inf would be NaN
        weights = scores.sub_(largest).exp_()  # relative to the largest, which loses less than relative to the lse
        total = weights.sum(-1, keepdim=True)
        tile_lse = (largest + total.log()).squeeze(-1)
        if dropout is not None:
            weights *= tile.factors(dropout, weights)
        if seen is not None:
            total.masked_fill_(total == 0.0, 1.0)
        plain = tile.before(value).to(wide)
        bad = None
        if seen is not None and not bool(plain.isfinite().all()):  # a masked weight of 0 times NaN is NaN
            bad, plain = plain, torch.where(plain.isfinite(), plain, 0.0)
        part = weights[..., : plain.shape[2]] @ plain
        if is_causal:
            edge = tile.edge(value).to(wide)
            part += weights[..., plain.shape[2] :] @ torch.where(edge.isfinite(), edge, 0.0)
            part /= total
            tile.add(part, taint(edge))
        else:
            part /= total
            if bad is not None and seen is not None:
                _add_seen(part, seen, bad)
        out[at] = part.view_as(out[at])
        lse[at] = tile_lse.view_as(lse[at])
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
    dropout: Dropout | None = None,
    dlse: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`, where `out` and `lse` may be those of a softmax over more keys than `key` holds.

    With P = exp(scores - lse), the joint weights, dV = P^T dO and dS = P * (dO V^T - rowsum(dO * O) + dlse): summed
    over disjoint key sets these are the gradients of the joint softmax, so no gradient with respect to a partial
    lse is needed.

    Args:
        dout: the shape of `query`.
        query: `(batch, heads, q_len, head_dim)`.
        key: `(batch, kv_heads, kv_len, head_dim)`.
        value: the shape of `key`.
        out: the joint output, the shape of `query`.
        lse: the joint log-sum-exp, `(batch, heads, q_len)`, natural log; finite, but where the mask leaves a row
            nothing to see.
        is_causal: as in `forward`.
        scale: as in `forward`.
        dropout: the forward's mask, if any.
        dlse: the gradient with respect to the joint log-sum-exp, if any, the shape of `lse`.
        mask: as in `forward`.

    Returns:
        `(dquery, dkey, dvalue)`, of the inputs' shapes and dtypes.
    """
    mask, is_causal = _mask_alone(mask, query, key, is_causal)
    wide = wide_dtype(query.dtype)
    dquery = torch.zeros_like(query, memory_format=torch.contiguous_format)
    dkey = torch.zeros(key.shape, dtype=wide, device=key.device)
    dvalue = torch.zeros_like(dkey)
    for tile in _tiles(query, key, is_causal):
        q, do, o = (tile.grouped(x).to(wide) for x in (query, dout, out))
        weights = tile.scores(q, key, scale, wide).sub_(tile.grouped(lse.unsqueeze(-1)).to(wide)).exp_()
        seen = tile.seen(mask)
        dscores = do @ tile.keys_of(value).to(wide).transpose(-1, -2)
        dropped = weights
        if dropout is not None:
            factors = tile.factors(dropout, weights)
            dropped = weights * factors
            dscores *= factors
        delta = (do * o).sum(-1, keepdim=True)
        if dlse is not None:
            delta -= tile.grouped(dlse.unsqueeze(-1)).to(wide)
        dscores = dscores.sub_(delta).mul_(weights).mul_(scale)
        keys = tile.keys_of(key).to(wide)
        if is_causal or seen is not None:  # 0 * NaN is NaN: what a row may not see must not reach it, nor it that
            for hidden in (dscores, weights) if dropped is weights else (dscores, weights, dropped):
                tile.hide(hidden, 0.0) if seen is None else hidden.masked_fill_(~seen, 0.0)
            keys, q = (torch.where(x.isfinite(), x, 0.0) for x in (keys, q))
        at = tile.batch, slice(None), tile.rows
        dvalue[tile.batch, :, tile.keys] += _products(dropped, do, is_causal or seen is not None)
        dquery[at] = (dscores @ keys).view_as(dquery[at])
        dkey[tile.batch, :, tile.keys] += dscores.transpose(-1, -2) @ q
    return dquery, dkey.to(key.dtype), dvalue.to(value.dtype)


def taint(value: Tensor) -> Tensor:
    """What NaN and inf among the values add to each causal row: row `i` gets those of rows up to `i`, others 0.

    A masked weight of 0 times NaN is NaN, so a kernel that multiplies masked weights lets one bad value reach rows
    before it. Run it on the finite values instead, and add this.

    Args:
        value: `(..., seq, head_dim)`.
    """
    return torch.where(value.isfinite(), 0.0, value).cumsum(-2)


def _mask_alone(mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool) -> tuple[Tensor | None, bool]:
    """The mask at its full shape (a view), with the causal triangle in it."""
    if mask is None:
        return None, is_causal
    if is_causal:
        mask = mask & torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=mask.device).tril_()
    return mask.expand(*query.shape[:3], key.shape[2]), False


def _add_seen(part: Tensor, seen: Tensor, value: Tensor) -> None:
    """Add to each row the NaN and inf among the values that it sees, in place."""
    kept = seen.to(value.dtype)
    for bad, where in ((torch.inf, value == torch.inf), (-torch.inf, value == -torch.inf), (torch.nan, value.isnan())):
        part.add_(torch.where(kept @ where.to(value.dtype) > 0, bad, 0.0))


def _products(weights: Tensor, do: Tensor, has_hidden: bool) -> Tensor:
    """`weights^T @ do`, where a NaN or inf in `do` reaches only the keys that have a weight in its row."""
    finite = do.isfinite()
    if not has_hidden or bool(finite.all()):
        return weights.transpose(-1, -2) @ do
    products = weights.transpose(-1, -2) @ torch.where(finite, do, 0.0)
    seen = (weights != 0).to(do.dtype).transpose(-1, -2) @ (~finite).to(do.dtype)
    return products.masked_fill_(seen > 0, torch.nan)


@frozen
class _Tile:
    """Some query rows of some batch entries, with the keys that they can see."""

    batch: slice
    rows: slice
    keys: slice
    is_causal: bool
    kv_heads: int

    def grouped(self, tensor: Tensor) -> Tensor:
        """Rows of all query heads that share a key head, in turn: `(batch, kv_heads, group * rows, ...)`."""
        part = tensor[self.batch, :, self.rows]
        return part.reshape(part.shape[0], self.kv_heads, -1, part.shape[-1])

    def keys_of(self, tensor: Tensor) -> Tensor:
        """Without gaps: the bits of a product depend on its strides, and a packed document's are those of one alone."""
        return tensor[self.batch, :, self.keys].contiguous()

    def before(self, tensor: Tensor) -> Tensor:
        """The keys that every row sees."""
        stop = min(self.rows.start, self.keys.stop) if self.is_causal else self.keys.stop
        return tensor[self.batch, :, :stop]

    def edge(self, tensor: Tensor) -> Tensor:
        """The keys of the causal triangle: key `rows.start + i` is the last that row `i` sees."""
        return tensor[self.batch, :, self.rows.start : self.keys.stop]

    def add(self, grouped: Tensor, lines: Tensor) -> None:
        """Add line `i`, or the last one where there are fewer, to row `i` of every query head, in place."""
        count = self.rows.stop - self.rows.start
        if lines.shape[2]:
            where = torch.arange(count, device=lines.device, dtype=torch.int64).clamp_(max=lines.shape[2] - 1)
            grouped.view(*grouped.shape[:2], -1, count, grouped.shape[-1]).add_(lines[:, :, where].unsqueeze(2))

    def scores(self, q: Tensor, key: Tensor, scale: float, wide: torch.dtype) -> Tensor:
        scores = (q * scale) @ self.keys_of(key).to(wide).transpose(-1, -2)
        return self.hide(scores, -torch.inf) if self.is_causal else scores

    def seen(self, mask: Tensor | None) -> Tensor | None:
        """The mask of these rows and keys, grouped as `grouped` does."""
        if mask is None:
            return None
        part = mask[self.batch, :, self.rows, self.keys]
        return part.reshape(part.shape[0], self.kv_heads, -1, part.shape[-1])

    def hide(self, scores: Tensor, fill: float) -> Tensor:
        """Fill what causal rows may not see, in place."""
        count, seen = self.rows.stop - self.rows.start, scores.shape[-1]
        hidden = torch.ones(count, seen, dtype=torch.bool, device=scores.device).triu_(self.rows.start + 1)
        scores.view(*scores.shape[:2], -1, count, seen).masked_fill_(hidden, fill)
        return scores

    def factors(self, dropout: Dropout, weights: Tensor) -> Tensor:
        return dropout.factors(self.batch, self.rows, self.keys, weights.dtype).reshape(weights.shape)


def _tiles(query: Tensor, key: Tensor, is_causal: bool) -> Iterator[_Tile]:
    batch, heads, q_len, _ = query.shape
    kv_heads, kv_len = key.shape[1:3]
    if not (batch and heads and q_len and kv_len):
        return
    line = heads * kv_len * (8 if query.dtype == torch.float64 else 4)  # bytes of scores for one row of one entry
    entries = max(1, min(batch, BUDGET // (line * min(q_len, 256))))
    rows = max(16, min(BUDGET // (line * entries), ROWS * kv_heads // heads))
    for b in range(0, batch, entries):
        for start in range(0, q_len, rows):
            stop = min(start + rows, q_len)
            keys = slice(0, min(stop, kv_len) if is_causal else kv_len)
            yield _Tile(slice(b, b + entries), slice(start, stop), keys, is_causal, kv_heads)
