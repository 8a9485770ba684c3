"""Right or wrong: sampled rows of a result against the float64 oracle, and how far off they may be."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.numerics.tensors import wide_dtype
from longspan.patterns.dilated import Dilated
from longspan.testing import oracle, visible

__all__ = ["Judge", "sample_rows"]

ROWS = 64
NAIVE = 2.0
"""A backend may lose this many times what naive torch of the same dtype loses."""
ROUNDING = 2.0
"""And this many roundings of the log-sum-exp, by which partial results are joined and which naive torch never takes."""
COUNTS_BYTES = 256 * 2**20


def sample_rows(length: int, pattern: Dilated, seed: int) -> Tensor:
    """Query indices worth a look: the first and the last, both sides of segment borders, and seeded random ones."""
    borders = [1, *pattern.segment_lengths, *(length // w * w for w in pattern.segment_lengths)]
    wanted = {0, length - 1, *(row for border in borders for row in (border - 1, border))}
    chosen = {row for row in wanted if 0 <= row < length}
    generator = torch.Generator().manual_seed(seed)
    for row in torch.randperm(length, generator=generator, dtype=torch.int64, device="cpu")[:ROWS].tolist():
        if len(chosen) >= ROWS:
            break
        chosen.add(row)
    return torch.tensor(sorted(chosen), dtype=torch.int64, device="cpu")


class Judge:
    """Knows the right answer for some rows of causal attention, and what naive torch of the same dtype loses there.

    `rows` are the query indices; `naive_error` is naive torch's error there; `tolerance` the largest error that passes.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, pattern: Dilated, rows: Tensor) -> None:
        self.rows = rows
        self._want, lse = oracle(  # on the CPU: not every device has float64
            query.cpu(), key.cpu(), value.cpu(), pattern, is_causal=True, rows=rows, return_lse=True
        )
        self.naive_error = self._error_of(_naive(query, key, value, pattern, rows))
        # Few keys in sight: naive torch may be right by luck, but to round the result once is always allowed.
        own = max(NAIVE * self.naive_error, torch.finfo(query.dtype).eps)
        self.tolerance = own + ROUNDING * torch.finfo(wide_dtype(query.dtype)).eps * max(1.0, float(lse.abs().max()))

    def error(self, out: Tensor) -> float:
        """The largest relative error of any sampled row in any head: |got - want| / |want|, 2-norms. NaN stays NaN.

        `out` may be that of a prefix: under causal attention no row depends on those after it.
        """
        known = self.rows[self.rows < out.shape[2]]
        return self._error_of(out[:, :, known.to(out.device)])

    def _error_of(self, got: Tensor) -> float:
        want = self._want[:, :, : got.shape[2]]  # rows are in order
        off = (got.cpu().double() - want).norm(dim=-1)
        size = want.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
        return float((off / size).max())


def _naive(query: Tensor, key: Tensor, value: Tensor, pattern: Dilated, rows: Tensor) -> Tensor:
    """The rows as anyone would write them down, every step in the inputs' dtype."""
    heads, length, head_dim = query.shape[1:]
    parts = []
    for some in torch.split(rows, max(1, COUNTS_BYTES // (8 * heads * length))):
        counts = visible(pattern, heads, length, length, is_causal=True, rows=some, device=query.device)
        scores = query[:, :, some.to(query.device)] @ key.transpose(-1, -2) / head_dim**0.5
        # A key that two branches show weighs twice: a factor on its softmax term, so a summand on its score.
        scores += counts.to(wide_dtype(query.dtype)).log().to(query.dtype)
        parts.append(scores.softmax(-1) @ value)
    return torch.cat(parts, 2)
