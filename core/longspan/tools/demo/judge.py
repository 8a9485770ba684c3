"""Right or wrong: sampled rows of a result against the float64 oracle, by the conformance kit's tolerance."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.patterns.dilated import Dilated
from longspan.testing import oracle, tolerance, visible
from longspan.testing.answers import dense

__all__ = ["Judge", "sample_rows"]

ROWS = 64
COUNTS_BYTES = 64 * 2**20


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
        self.naive_error = tolerance.error(_naive(query, key, value, pattern, rows), self._want)
        least = tolerance.floor(query.dtype, lse)
        self.tolerance = tolerance.allowed(query.dtype, self.naive_error, tolerance.FORWARD, least)

    def error(self, out: Tensor) -> float:
        """The error of the sampled rows: the largest |got - want| / max(1, |want|); inf where it is NaN.

        `out` may be that of a prefix: under causal attention no row depends on those after it.
        """
        known = self.rows[self.rows < out.shape[2]]
        return tolerance.error(out[:, :, known.to(out.device)], self._want[:, :, : len(known)])  # rows are in order


def _naive(query: Tensor, key: Tensor, value: Tensor, pattern: Dilated, rows: Tensor) -> Tensor:
    """The rows as naive torch has them, some at a time: the counts of all would not fit."""
    heads, length, head_dim = query.shape[1:]
    parts = []
    for some in torch.split(rows, max(1, COUNTS_BYTES // (8 * heads * length))):
        counts = visible(pattern, heads, length, length, is_causal=True, rows=some, device=query.device)
        parts.append(dense(query[:, :, some.to(query.device)], key, value, counts, head_dim**-0.5)[0])
    return torch.cat(parts, 2)
