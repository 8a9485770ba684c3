"""Dense attention by tiles, for operators that are slow or lossy on whole sequences: they are joined in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from attrs import frozen
from torch import Tensor

from longspan.plugin import merge_

__all__ = ["Tiling", "backward", "forward"]

Gradients = tuple[Tensor, Tensor, Tensor]
TILE_BYTES = 8 * 2**20
"""What the rows of one widened tensor may take in a tile."""


@frozen
class Tiling:
    """How many batch entries, query rows and keys an operator takes at once."""

    entries: int
    rows: int
    keys: int

    @classmethod
    def of(cls, query: Tensor) -> Tiling:
        """Tiles of `TILE_BYTES` in float32, for as many keys as query rows."""
        _, heads, length, dim = query.shape
        row = 4 * max(1, heads * dim)
        rows = max(256, TILE_BYTES // row)
        return cls(max(1, TILE_BYTES // (row * max(1, min(rows, length)))), rows, rows)


def forward(
    run: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of half-precision tensors by a float32 operator: no float32 copy of a whole sequence ever exists.

    `run` makes `(out, lse)` of `(query, key, value, is_causal=, scale=, mask=)`. There is at least one key; `mask` is
    `(1, 1, q_len, kv_len)`, 0 where a query sees a key, else -inf.
    """
    tiles = Tiling.of(query)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    for entries in _runs(len(query), tiles.entries):
        for rows in _runs(query.shape[2], tiles.rows):
            q = query[entries, :, rows].float()
            joint: tuple[Tensor, Tensor] | None = None
            for keys, on_diagonal in _seen(rows, key.shape[2], tiles.keys, is_causal):
                k, v = (x[entries, :, keys].float() for x in (key, value))
                bias = None if mask is None else mask[:, :, rows, keys].float()
                part = run(q, k, v, is_causal=on_diagonal, scale=scale, mask=bias)
                if joint is None:
                    joint = part
                else:
                    merge_(*joint, *part)
            assert joint is not None  # there are keys
            out[entries, :, rows], lse[entries, :, rows] = joint
    return out, lse.masked_fill_(lse == torch.inf, torch.nan)  # a score of inf, where one tile was all there was


def backward(
    run: Callable[..., Gradients],
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
    tiles: Tiling | None = None,
    dtype: torch.dtype = torch.float32,
) -> Gradients:
    """`(dquery, dkey, dvalue)` for the joint out and lse, by an operator's backward; arguments are as in `forward`.

    `run` takes `(dout, query, key, value, out, lse, is_causal=, scale=, mask=)` in `dtype`, as much as `tiles` says:
    `Tiling.of(query)` unless given.
    """
    tiles = tiles or Tiling.of(query)
    dquery, dkey, dvalue = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    for entries in _runs(len(query), tiles.entries):
        dk, dv = (torch.zeros(x[entries].shape, dtype=torch.float32, device=x.device) for x in (key, value))
        for rows in _runs(query.shape[2], tiles.rows):
            do, q, o = (x[entries, :, rows].to(dtype) for x in (dout, query, out))
            dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
            for keys, on_diagonal in _seen(rows, key.shape[2], tiles.keys, is_causal):
                k, v = (x[entries, :, keys].to(dtype) for x in (key, value))
                bias = None if mask is None else mask[:, :, rows, keys].to(dtype)
                line = lse[entries, :, rows]
                parts = run(do, q, k, v, o, line, is_causal=on_diagonal, scale=scale, mask=bias)
                for total, part in zip((dq, dk[:, :, keys], dv[:, :, keys]), parts, strict=True):
                    total += part
            dquery[entries, :, rows] = dq
        dkey[entries], dvalue[entries] = dk, dv
    return dquery, dkey, dvalue


def _runs(length: int, most: int) -> Iterator[slice]:
    for start in range(0, length, most):
        yield slice(start, min(start + most, length))


def _seen(rows: slice, kv_len: int, most: int, is_causal: bool) -> Iterator[tuple[slice, bool]]:
    """The keys that these rows see, `most` at a time, and whether they are those of the causal diagonal, which is last.

    All rows see all keys before it.
    """
    before = min(rows.start, kv_len) if is_causal else kv_len
    for keys in _runs(before, most):
        yield keys, False
    if is_causal and before < kv_len:
        yield slice(before, min(rows.stop, kv_len)), True
