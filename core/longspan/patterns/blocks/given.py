"""The rule that is a layout which somebody gave: it fits its own lengths alone."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from longspan.errors import ArgumentError
from longspan.patterns.blocks.csr import BlockCSR, remember_csr
from longspan.patterns.blocks.grid import Grid
from longspan.patterns.blocks.masks import EMPTY, Tiles
from longspan.patterns.blocks.rules import Rule
from longspan.patterns.blocks.sets import BlockSet, listed

__all__ = ["Layout"]


@frozen(slots=False, init=False)
class Layout(Rule):
    """Blocks that are given, for one length."""

    csr: BlockCSR
    name: str

    def __init__(self, csr: BlockCSR) -> None:
        csr = remember_csr(csr)
        self.__dict__.update(csr=csr, name=csr.digest, unit=csr.block_size)

    def text(self, block_size: int) -> str:
        """`csr:digest`, which `find_csr` gives back."""
        return f"csr:{self.name}"

    def allowed(self, query: Tensor, key: Tensor, head: int, kv_len: int) -> Tensor:
        """By looking up each pair's block, then its bit in the mask."""
        csr, size = self.csr, self.csr.block_size
        _check_lengths(csr, csr.q_len, kv_len, csr.query_offset)
        tile = torch.full((csr.rows * csr.columns,), EMPTY, device=key.device, dtype=torch.int64)
        tile[csr.keys().to(key.device)] = csr.tiles.long().to(key.device)
        row = query // size - csr.first_row
        there = (query >= csr.query_offset) & (query < csr.query_offset + csr.q_len) & (key >= 0) & (key < kv_len)
        column = key // size
        found = tile[(row * csr.columns + column).clamp(0, len(tile) - 1)]
        bits = torch.cat([csr.masks.new_ones(1, size, size), csr.masks]).to(key.device)
        return there & (found >= 0) & bits[found.clamp(min=0), query % size, key % size]

    def blocks(self, grid: Grid, tiles: Tiles) -> BlockSet:
        """As given."""
        csr = self.csr
        _check_lengths(csr, grid.q_len, grid.kv_len, grid.query_offset)
        states = [tiles.add(part) for part in torch.split(csr.masks, tiles.chunk)]
        return listed(csr.keys(), torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), *states])[csr.tiles])


def _check_lengths(csr: BlockCSR, q_len: int, kv_len: int, query_offset: int) -> None:
    if (csr.q_len, csr.kv_len, csr.query_offset) != (q_len, kv_len, query_offset):
        raise ArgumentError(
            "pattern",
            f"a layout of {csr.q_len} queries from {csr.query_offset} on and {csr.kv_len} keys for a problem of "
            f"{q_len} queries from {query_offset} on and {kv_len} keys",
            "a layout of the problem's lengths",
            "make it for these lengths, or use a rule such as local_blocks, which fits any (with packed documents, "
            "every document)",
        )
