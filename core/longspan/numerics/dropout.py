"""Dropout keyed by position: whether a pair is dropped follows from the seed, the head, the query and the key alone.

A counter-based generator has no state, so the same seed drops the same pairs whatever the backend, the tiling, the
order of the work or the number of processes, and the backward draws the forward's mask again. Row keys and column keys
are 64-bit mixes (the finaliser of SplitMix64; Steele, Lea and Flood 2014) cut to 32 bits; a pair's number is a 32-bit
mix of the two (the two-round multiplicative hash "lowbias32").
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from longspan.errors import ArgumentError, is_integer

__all__ = ["Draw", "Dropout", "check_seed", "draw_seed", "signed"]


@frozen
class Draw:
    """What one call of a plan drops: the probability, the seed, and the position of the first query."""

    p: float
    seed: int
    query_offset: int = 0


@frozen(eq=False)
class Dropout:
    """The mask of one kernel launch, drawn piece by piece.

    `lines` `(batch, heads)` numbers the batch entry and head (entry * heads + head) of each row's line, `queries`
    `(batch, heads, q_len)` and `keys` `(batch, heads, kv_len)` are positions; all int64, on the kernel's device.
    """

    p: float
    seed: int
    lines: Tensor
    queries: Tensor
    keys: Tensor

    def factors(self, batch: slice, rows: slice, keys: slice, dtype: torch.dtype) -> Tensor:
        """What to multiply the softmax weights with: 0 for a dropped pair, 1/(1-p) for the others.

        Returns:
            `(batch, heads, rows, keys)` of these slices, in `dtype`.
        """
        seed = torch.full((), signed(self.seed), dtype=torch.int64, device=self.lines.device)
        start = _mix64(seed + _DOMAINS[0])  # a domain each, so that no seed, line or position stands for another
        line = _mix64(start + _mix64(self.lines[batch] + _DOMAINS[1]))
        row = _mix64(line.unsqueeze(-1) + _mix64(self.queries[batch, :, rows] + _DOMAINS[2])).to(torch.int32)
        column = _mix64(start + _mix64(self.keys[batch, :, keys] + _DOMAINS[3])).to(torch.int32)
        kept = _mix32(row.unsqueeze(-1) ^ column.unsqueeze(-2)) >= int(self.p * 2**32) - 2**31
        return kept.to(dtype).mul_(1.0 / (1.0 - self.p))

    def flipped(self) -> Dropout:
        """The same mask for rows and keys in reverse order."""
        return Dropout(self.p, self.seed, self.lines, self.queries.flip(-1), self.keys.flip(-1))


def check_seed(seed: object) -> None:
    """Refuse what is no integer."""
    if seed is not None and not is_integer(seed):
        raise ArgumentError("dropout_seed", repr(seed), "an integer or None", "e.g. dropout_seed=0")


def draw_seed() -> int:
    """A seed from torch's default CPU generator: `torch.manual_seed` makes it repeat, checkpointing restores it."""
    return int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu"))


def signed(number: int) -> int:
    """The 64-bit two's complement of a seed of any size."""
    return (number + 2**63) % 2**64 - 2**63


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _mix32(x: Tensor) -> Tensor:
    """In place; int32 arithmetic wraps, and masks make its right shifts logical."""
    x ^= x >> 16 & (1 << 16) - 1
    x *= 0x7FEB352D
    x ^= x >> 15 & (1 << 17) - 1
    x *= 0x846CA68B - 2**32
    x ^= x >> 16 & (1 << 16) - 1
    return x


_DOMAINS = tuple(
    signed(number) for number in (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xABC98388FB8FAC03, 0x8CB92BA72F3D8DD7)
)
"""Odd constants without structure, one for each kind of number that is mixed."""
