"""The grid of blocks that a sequence is cut into: which block rows and columns there are, and how ragged the ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from attrs import frozen
from torch import Tensor

from longspan.errors import check_integer
from longspan.numerics.tensors import counting

__all__ = ["Grid", "check_block_size", "on_cpu"]

Given = ParamSpec("Given")
Made = TypeVar("Made")


def on_cpu(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Let a function make its tensors on the CPU, whatever torch's default device is: layouts live there."""

    @wraps(function)
    def inside(*arguments: Given.args, **keywords: Given.kwargs) -> Made:
        if torch.get_default_device().type == "cpu":
            return function(*arguments, **keywords)
        with torch.device("cpu"):  # every operator inside then goes by way of Python
            return function(*arguments, **keywords)

    return inside


LARGEST = 2**16
"""Tokens of a block, at most: the mask of one that is partial has as many, squared."""


def check_block_size(value: object) -> int:
    """`value` as a number of tokens that a block may have, or `ArgumentError`."""
    return check_integer("block_size", value, 1, LARGEST, "e.g. block_size=128")


@frozen
class Grid:
    """Queries at positions `query_offset` on, keys at positions 0 on, both cut at multiples of `block_size`.

    Block rows are numbered by position // block_size, so the first is `first_row`, and a `query_offset` that is no
    multiple of the block size makes it ragged. A block's key is `(row - first_row) * columns + column`.
    """

    block_size: int
    q_len: int
    kv_len: int
    query_offset: int = 0

    def __attrs_post_init__(self) -> None:
        check_block_size(self.block_size)
        for name in ("q_len", "kv_len", "query_offset"):
            check_integer(name, getattr(self, name))

    @property
    def first_row(self) -> int:
        """The number of the block row that holds the first query."""
        return self.query_offset // self.block_size

    @property
    def rows(self) -> int:
        """How many block rows there are."""
        if self.q_len == 0:
            return 0
        return (self.query_offset + self.q_len - 1) // self.block_size - self.first_row + 1

    @property
    def columns(self) -> int:
        """How many block columns there are."""
        return -(-self.kv_len // self.block_size)

    def scaled(self, block_size: int) -> Grid:
        """The same sequence in blocks of another size."""
        return Grid(block_size, self.q_len, self.kv_len, self.query_offset)

    def row_numbers(self) -> Tensor:
        """`(rows,)` int64: the absolute numbers of the block rows."""
        return counting(self.first_row, self.first_row + self.rows)

    def row_spans(self) -> tuple[Tensor, Tensor]:
        """For each block row, the first query in it and the end: two `(rows,)` int64, from 0 to block_size."""
        start = self.row_numbers() * self.block_size
        low = (self.query_offset - start).clamp_(min=0)
        return low, (self.query_offset + self.q_len - start).clamp_(max=self.block_size)

    def column_spans(self) -> Tensor:
        """For each block column, how many keys it holds: `(columns,)` int64."""
        return (self.kv_len - counting(self.columns) * self.block_size).clamp_(max=self.block_size)

    def inside(self, row: int, column: int) -> Tensor:
        """The token pairs of a block that exist: `(block_size, block_size)` bool. `row` counts from the first row."""
        step = counting(self.block_size)
        query = (self.first_row + row) * self.block_size + step
        there = (query >= self.query_offset) & (query < self.query_offset + self.q_len)
        return there[:, None] & (column * self.block_size + step < self.kv_len)[None, :]
