"""The inputs of a case: seeded, laid out in memory as the case asks, with NaN in every gap that no kernel may read."""

from __future__ import annotations

import math
from zlib import crc32

import torch
from attrs import frozen
from torch import Tensor

from longspan.testing.cases import Case

__all__ = ["Inputs", "make"]


@frozen(eq=False)
class Inputs:
    """Query, key, value and the gradient of the output, in the case's dtype, layout and device."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a plan takes."""
        return self.query, self.key, self.value


def make(case: Case, number: int = 0) -> Inputs:
    """The inputs of a case, the same on every machine and in every run; with a number, others of the same shapes."""
    p = case.problem
    queries, keys = (p.batch, p.heads, p.q_len, p.head_dim), (p.batch, p.kv_heads, p.kv_len, p.head_dim)
    seed = crc32(f"{p.replace(device='cpu', dtype='float64')}".encode()) + number
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
        for shape in (queries, keys, keys, queries)
    ]
    if case.logits == "spiked":
        drawn[:2] = _spiked(case, drawn[0], drawn[1])
    elif case.logits == "sunken":  # scores near -1e4 and below, where a mask of -1e4 hides nothing
        drawn[:2] = 100 * drawn[0].abs() + 10, -100 * drawn[1].abs() - 10
    elif case.logits == "uneven":
        drawn[:2] = _uneven(case, drawn[0], drawn[1])
    elif case.logits == "positive":
        drawn = [torch.special.ndtr(x) for x in drawn]  # even between 0 and 1
    dtype = getattr(torch, p.dtype)
    query, key, value, dout = (_laid_out(x.to(dtype).to(case.device), case.layout) for x in drawn)
    if case.layout == "pooled" and p.q_len:  # the gradient of a mean over the tokens
        dout = dout[:, :, :1].expand(queries)
    return Inputs(query, key, value, dout)


def _spiked(case: Case, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of 1e4 along the diagonal and 0 elsewhere: extreme, and yet well-conditioned."""
    height = math.sqrt(1e4 / case.problem.scale)
    query, key = torch.zeros_like(query), torch.zeros_like(key)
    for x in (query, key):
        index = torch.arange(min(x.shape[2], x.shape[3]), dtype=torch.int64, device="cpu")
        x[:, :, index, index] = height
    return query, key


def _uneven(case: Case, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Every third row's scores near 300, the next one's near 0, the next one's near -300."""
    height = math.sqrt(300 / abs(case.problem.scale))
    query[..., 0] = height * (1.0 - torch.arange(query.shape[2], dtype=query.dtype, device=query.device) % 3)
    key[..., 0] = height
    return query, key


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """A tensor of the same values (for `expanded`: of the first entry's), whose memory is laid out differently."""
    batch, heads, length, width = x.shape
    if layout == "transposed":  # (batch, seq, heads, head_dim) in memory
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":  # out of a longer, wider tensor with more heads
        around = x.new_full((batch, heads + 2, length + 5, width + 3), math.nan)
        view = around[:, 1:-1, 2 : length + 2, 3:]
    elif layout == "strided":  # the last dimension has gaps
        view = x.new_full((batch, heads, length, 2 * width), math.nan)[..., ::2]
    elif layout == "expanded":  # every batch entry is the same memory
        return x[:1].expand(batch, -1, -1, -1)
    else:
        return x
    view.copy_(x)
    return view
