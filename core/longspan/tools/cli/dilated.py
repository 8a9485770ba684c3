"""How much of each cell of the attention matrix a dilated pattern keeps, counted from what its branches see."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.patterns.dilated import Dilated

__all__ = ["Branch", "dilated_heads", "dilated_shares"]

Branch = tuple[int, int, int]
"""Segment length, dilation rate and offset: positions `p` with `p mod length mod rate == offset` see one another."""


def dilated_heads(pattern: Dilated, heads: int) -> dict[tuple[int, ...], tuple[Branch, ...]]:
    """Heads that run the same branches, and these branches; the first head's come first.

    Raises:
        ArgumentError: too few heads for the pattern.
    """
    pattern.check(heads)
    pairs = list(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True))
    alike: dict[tuple[Branch, ...], list[int]] = {}
    for head in range(heads):
        if pattern.heads == "grouped":
            group = _group(head, heads, len(pairs))
            length, rate = pairs[group]
            own: tuple[Branch, ...] = ((length, rate, group % rate),)
        elif pattern.offset == "modulo":
            own = tuple((length, rate, head % rate) for length, rate in pairs)
        else:
            own = tuple((length, rate, head // -(-heads // rate)) for length, rate in pairs)
        alike.setdefault(own, []).append(head)
    return {tuple(numbers): own for own, numbers in alike.items()}


def _group(head: int, heads: int, groups: int) -> int:
    """Groups follow each other; those before the remainder's end have one head more."""
    size, more = divmod(heads, groups)
    return head // (size + 1) if head < more * (size + 1) else (head - more) // size


def dilated_shares(branches: tuple[Branch, ...], tokens: int, cell: int, is_causal: bool) -> Tensor:
    """`(cells, cells)`, float32: the share of each cell's pairs that some branch keeps; cells of `cell` tokens a side.

    Queries of a cell that stand alike in every branch see the same keys, so that each kind is looked at once.
    """
    position = torch.arange(tokens, dtype=torch.int64, device="cpu")
    segments = torch.stack([position // length for length, _, _ in branches])
    chosen = torch.stack([position % length % rate == offset for length, rate, offset in branches])
    kind = torch.where(chosen, segments, -1)  # (branches, tokens): the segment that a position takes part in, if any
    count = -(-tokens // cell)
    sizes = torch.full((count,), cell, dtype=torch.float32, device="cpu")
    sizes[-1] = tokens - cell * (count - 1)
    shares = torch.zeros(count, count, dtype=torch.float32, device="cpu")
    for row in range(count):
        mine = kind[:, row * cell : (row + 1) * cell]
        kinds, members = torch.unique(mine, dim=1, return_counts=True)
        keys = kind[:, : (row + 1) * cell] if is_causal else kind
        seen = torch.zeros(count * cell, dtype=torch.float32, device="cpu")
        seen[: keys.shape[1]] = members.float() @ _alike(kinds, keys).float()
        kept = seen.view(count, cell).sum(1)
        if is_causal:
            kept[row] = _alike(mine, mine).tril().sum()
        shares[row] = kept / (sizes[row] * sizes)
    return shares


def _alike(queries: Tensor, keys: Tensor) -> Tensor:
    """`(queries, keys)`: whether some branch has both in one segment; a key that two branches show counts once."""
    together = torch.zeros(queries.shape[1], keys.shape[1], dtype=torch.bool, device="cpu")
    for asking, shown in zip(queries, keys, strict=True):
        together |= (asking[:, None] == shown[None, :]) & (asking >= 0)[:, None]
    return together
