"""A block-sparse pattern laid out for one problem: the kept blocks of every document, and which rows run together."""

from __future__ import annotations

from functools import cached_property

import torch
from attrs import frozen

from longspan.block_csr import BlockCSR, HeadBlocks
from longspan.block_groups import Group, group_rows
from longspan.block_tiles import FULL
from longspan.strips import Span

__all__ = ["BlockLayout"]


@frozen(slots=False, repr=False)
class BlockLayout:
    """The blocks of every document.

    Args:
        spans: the documents: where they lie, and which positions of them are there.
        blocks: for each document its distinct layouts, and which of them each head has.
    """

    spans: tuple[Span, ...]
    blocks: tuple[HeadBlocks, ...]

    @cached_property
    def groups(self) -> dict[tuple[int, int], tuple[Group, ...]]:
        """For each document and each of its distinct layouts the groups of block rows that run as one batch."""
        with torch.inference_mode(False), torch.device("cpu"):  # kept, whatever mode and device reign now
            return {
                (number, which): group_rows(span, csr)
                for number, (span, found) in enumerate(zip(self.spans, self.blocks, strict=True))
                for which, csr in enumerate(found.layouts)
            }

    @property
    def pairs(self) -> int:
        """Kept query-key pairs over all heads, for one batch entry; four times head_dim of it are the FLOPs needed."""
        return sum(found[head].pairs for found in self.blocks for head in range(len(found.of_head)))

    @property
    def density(self) -> float:
        """Kept pairs over all pairs within documents, over all heads."""
        both = zip(self.spans, self.blocks, strict=True)
        return self.pairs / max(1, sum(span.queries * span.keys * len(found.of_head) for span, found in both))

    @property
    def products(self) -> float:
        """The modelled cost: pairs that are computed, kept or masked, over those of dense attention."""
        both = list(zip(self.spans, self.blocks, strict=True))
        computed = sum(_computed(found[head]) for _, found in both for head in range(len(found.of_head)))
        return computed / max(1, sum(span.queries * span.keys * len(found.of_head) for span, found in both))

    @property
    def nbytes(self) -> int:
        """Bytes of the index and of the masks, and of the groups where they are made."""
        made: dict[tuple[int, int], tuple[Group, ...]] = self.__dict__.get("groups", {})
        return sum(found.nbytes for found in self.blocks) + sum(one.nbytes for some in made.values() for one in some)

    def count(self) -> tuple[int, int]:
        """How many full and how many partial blocks all heads have together, for one batch entry."""
        full = sum(_full(found[head]) for found in self.blocks for head in range(len(found.of_head)))
        return full, sum(found[head].nnz for found in self.blocks for head in range(len(found.of_head))) - full

    def __str__(self) -> str:
        full, partial = self.count()
        size = self.blocks[0].layouts[0].block_size if self.blocks else 0
        words = [f"batched dense calls over {full:,} full blocks of {size}"]
        words += [f"{partial:,} partial ones masked by the core"] if partial else []
        return f"{', '.join(words)}; density {self.density:.3%}, {self.pairs:,} query-key pairs per batch entry"

    def __repr__(self) -> str:
        return f"<BlockLayout of {len(self.spans)} document{'s' * (len(self.spans) != 1)}: {self}>"


def _full(csr: BlockCSR) -> int:
    return int((csr.tiles == FULL).sum())


def _computed(csr: BlockCSR) -> int:
    with torch.device("cpu"):
        low, high = csr.grid.row_spans()
        widths = csr.grid.column_spans()[csr.indices.long()]
    return int((torch.repeat_interleave(high - low, csr.indptr.diff()) * widths).sum())
