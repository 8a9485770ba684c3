"""Which blocks of an attention matrix are kept, by rows (CSR), with the token masks of the partial ones."""

from __future__ import annotations

from functools import cached_property
from hashlib import blake2b
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from attrs import frozen
from torch import Tensor

from longspan.errors import ArgumentError
from longspan.numerics.tensors import counting
from longspan.patterns.blocks.canonical import check_indices, check_masks, clip, renumber
from longspan.patterns.blocks.grid import Grid, on_cpu
from longspan.patterns.blocks.masks import EMPTY, FULL, MaskTable, content

__all__ = ["BlockCSR", "HeadBlocks", "find_csr", "remember_csr"]


@frozen(slots=False, init=False, eq=False, repr=False)
class BlockCSR:
    """The kept blocks of a `(q_len, kv_len)` attention matrix, row by row. Immutable: never write to its tensors.

    Key 0 is at position 0, query 0 at position `query_offset`. Blocks are cut at multiples of `block_size`, so block
    row `i` holds the queries at positions `(first_row + i) * block_size` on, as far as they exist.

    Two values with the same kept pairs are equal and have the same tensors: masks are cleared outside the sequence,
    distinct and in order of first use; a block that keeps all of its existing pairs is full.

    Args:
        block_size: tokens a block, each way.
        q_len, kv_len: tokens.
        indptr: `(rows + 1,)` integers; row `i` has the blocks `indptr[i]` to `indptr[i + 1]`.
        indices: `(nnz,)` integers, the block columns, ascending in a row.
        mask_ids: `(nnz,)` integers: 0 for a full block, t > 0 for a partial one with mask `t - 1`. None: all are full.
        masks: `(T, block_size, block_size)` bool, True for a pair that is kept. None: there are none.
        query_offset: position of the first query, in tokens.

    Raises:
        ArgumentError: wrong shapes or types, an `indptr` that falls or does not fit, columns that are out of range,
            unsorted or given twice, numbers without a mask, partial blocks that keep nothing.
    """

    is_frozen: ClassVar[bool] = True
    block_size: int
    q_len: int
    kv_len: int
    query_offset: int
    indptr: Tensor
    indices: Tensor
    mask_ids: Tensor
    masks: Tensor

    @on_cpu
    def __init__(
        self,
        block_size: int,
        q_len: int,
        kv_len: int,
        indptr: Tensor,
        indices: Tensor,
        mask_ids: Tensor | None = None,
        masks: Tensor | None = None,
        query_offset: int = 0,
    ) -> None:
        grid = Grid(block_size, q_len, kv_len, query_offset)
        rows, columns = check_indices(grid, indptr, indices)
        states, table = check_masks(grid, mask_ids, masks, columns)
        keys = rows * grid.columns + columns
        kept = clip(grid, keys, states, table)
        if bool((kept == EMPTY).any()):
            where = int((kept == EMPTY).nonzero()[0])
            name = f"block ({int(rows[where])}, {int(columns[where])}), which keeps no pair of the sequence"
            raise ArgumentError("masks", name, "at least one kept pair in every stored block", "leave the block out")
        self._fill(grid, keys, kept, table)

    @classmethod
    def of(cls, grid: Grid, keys: Tensor, states: Tensor, table: MaskTable) -> BlockCSR:
        """From `(n,)` int64 block keys, ascending, and their states, which are not checked."""
        states = clip(grid, keys, states, table)
        kept = states != EMPTY
        if not bool(kept.all()):
            keys, states = keys[kept], states[kept]
        csr = cls.__new__(cls)
        csr._fill(grid, keys, states, table)
        return csr

    def _fill(self, grid: Grid, keys: Tensor, states: Tensor, table: MaskTable) -> None:
        starts = counting(grid.rows + 1) * grid.columns
        indptr = torch.searchsorted(keys, starts)
        indices = (keys - torch.repeat_interleave(starts[:-1], indptr.diff())).to(torch.int32)
        numbers, masks = renumber(states, table)
        self.__dict__.update(
            block_size=grid.block_size,
            q_len=grid.q_len,
            kv_len=grid.kv_len,
            query_offset=grid.query_offset,
            indptr=indptr,
            indices=indices,
            mask_ids=numbers,
            masks=masks,
        )

    @property
    def grid(self) -> Grid:
        """The grid that the blocks lie on."""
        return Grid(self.block_size, self.q_len, self.kv_len, self.query_offset)

    @property
    def first_row(self) -> int:
        """The number of the first block row: position // block_size of the first query."""
        return self.query_offset // self.block_size

    @property
    def rows(self) -> int:
        """How many block rows there are."""
        return len(self.indptr) - 1

    @property
    def columns(self) -> int:
        """How many block columns there are."""
        return -(-self.kv_len // self.block_size)

    @property
    def nnz(self) -> int:
        """How many blocks are stored, full and partial."""
        return len(self.indices)

    @property
    def nbytes(self) -> int:
        """Bytes of the index and of the masks."""
        return sum(x.numel() * x.element_size() for x in (self.indptr, self.indices, self.mask_ids, self.masks))

    @cached_property
    @on_cpu
    def pairs(self) -> int:
        """Kept query-key pairs, counted exactly."""
        if not self.nnz:
            return 0
        low, high = self.grid.row_spans()
        heights = torch.repeat_interleave(high - low, self.indptr.diff())
        sizes = torch.nn.functional.pad(self.masks.sum((1, 2)), (1, 0))[self.mask_ids]
        whole = heights * self.grid.column_spans()[self.indices]
        return int(torch.where(self.mask_ids == FULL, whole, sizes).sum())

    @property
    def density(self) -> float:
        """Kept pairs over all pairs; 0 where there is no pair."""
        return self.pairs / max(1, self.q_len * self.kv_len)

    @cached_property
    def digest(self) -> str:
        """A name for the content: equal values have equal digests."""
        hashed = blake2b(digest_size=16)
        hashed.update(repr((self.block_size, self.q_len, self.kv_len, self.query_offset)).encode())
        for tensor in (self.indptr, self.indices, self.mask_ids, self.masks):
            hashed.update(content(tensor))
        return hashed.hexdigest()

    @on_cpu
    def keys(self) -> Tensor:
        """`(nnz,)` int64, ascending: row * columns + column, rows counted from the first."""
        rows = torch.repeat_interleave(counting(self.rows), self.indptr.diff())
        return rows * self.columns + self.indices

    @on_cpu
    def to_dense(self) -> Tensor:
        """`(q_len, kv_len)` bool, True where a query sees a key. For oracles: it is as large as it says."""
        b, rows, columns = self.block_size, self.rows, self.columns
        dense = torch.zeros(rows, columns, b, b, dtype=torch.bool, device="cpu")
        masks = torch.cat([torch.ones(1, b, b, dtype=torch.bool, device="cpu"), self.masks])
        row = torch.repeat_interleave(counting(rows), self.indptr.diff())
        dense[row, self.indices.long()] = masks[self.mask_ids]
        start = self.query_offset - self.first_row * b
        flat = dense.transpose(1, 2).reshape(rows * b, columns * b)
        return flat[start : start + self.q_len, : self.kv_len].contiguous()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockCSR):
            return NotImplemented
        return self is other or self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        full = int((self.mask_ids == FULL).sum())
        offset = f", query_offset={self.query_offset}" if self.query_offset else ""
        return (
            f"<BlockCSR {self.q_len:,} x {self.kv_len:,} tokens{offset}, block_size={self.block_size}: {self.nnz:,} of "
            f"{self.rows * self.columns:,} blocks, {full:,} full, {self.nnz - full:,} partial with "
            f"{len(self.masks):,} masks; density {self.density:.3%}, {self.nbytes:,} bytes>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        lengths = (self.block_size, self.q_len, self.kv_len)
        return type(self), (*lengths, self.indptr, self.indices, self.mask_ids, self.masks, self.query_offset)

    def __copy__(self) -> BlockCSR:
        return self

    def __deepcopy__(self, memo: object) -> BlockCSR:
        return self


@frozen
class HeadBlocks:
    """The distinct layouts of a pattern, and for each head the index of its own."""

    layouts: tuple[BlockCSR, ...]
    of_head: tuple[int, ...]

    def __getitem__(self, head: int) -> BlockCSR:
        """The layout of one head."""
        return self.layouts[self.of_head[head]]

    @property
    def nbytes(self) -> int:
        """Bytes of all layouts; a shared one counts once."""
        return sum(layout.nbytes for layout in self.layouts)

    @property
    def density(self) -> float:
        """Kept pairs over all pairs, over all heads."""
        return sum(self[head].density for head in range(len(self.of_head))) / max(1, len(self.of_head))


_known: WeakValueDictionary[str, BlockCSR] = WeakValueDictionary()


def remember_csr(csr: BlockCSR) -> BlockCSR:
    """The layout, or an equal one that somebody holds already: `find_csr` gives it back for as long as it is held."""
    return _known.setdefault(csr.digest, csr)


def find_csr(digest: str) -> BlockCSR:
    """The layout of that digest.

    Raises:
        ArgumentError: nobody in this process holds it any more, or ever did.
    """
    csr = _known.get(digest)
    if csr is None:
        raise ArgumentError(
            "pattern",
            f"csr:{digest}",
            "a layout that this process still holds",
            "keep the BlockSparse pattern in a variable for as long as its text or a compiled graph is used",
        )
    return csr
