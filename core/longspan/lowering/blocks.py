"""A block-sparse pattern laid out for one problem: the kept blocks of every document, and which rows run together."""

from __future__ import annotations

from functools import cached_property

import torch
from attrs import frozen

from longspan.lowering.groups import Group, group_rows
from longspan.lowering.segments import Span
from longspan.patterns.blocks.csr import BlockCSR, HeadBlocks
from longspan.patterns.blocks.masks import FULL

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
    def block_size(self) -> int:
        """In tokens; 1 where there is no document."""
        return self.blocks[0].layouts[0].block_size if self.blocks else 1

    @property
    def possible(self) -> int:
        """All pairs within documents, over all heads: what dense attention computes."""
        both = zip(self.spans, self.blocks, strict=True)
        return max(1, sum(span.queries * span.keys * len(found.of_head) for span, found in both))

    @property
    def density(self) -> float:
        """Kept pairs over all pairs within documents, over all heads."""
        return self.pairs / self.possible

    @cached_property
    def computed(self) -> tuple[int, int]:
        """Pairs of full and of partial blocks, kept or masked, over all heads, for one batch entry."""
        made = [[_computed(csr) for csr in found.layouts] for found in self.blocks]
        each = [made[number][which] for number, found in enumerate(self.blocks) for which in found.of_head]
        return sum(full for full, _ in each), sum(partial for _, partial in each)

    @property
    def products(self) -> float:
        """Pairs that are computed, kept or masked, over those of dense attention."""
        return sum(self.computed) / self.possible

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
        words = [f"{full:,} full blocks of {self.block_size}"]
        words += [f"{partial:,} partial ones under masks"] if partial else []
        return f"{', '.join(words)}; density {self.density:.3%}, {self.pairs:,} query-key pairs per batch entry"

    def __repr__(self) -> str:
        return f"<BlockLayout of {len(self.spans)} document{'s' * (len(self.spans) != 1)}: {self}>"


def _full(csr: BlockCSR) -> int:
    return int((csr.mask_ids == FULL).sum())


def _computed(csr: BlockCSR) -> tuple[int, int]:
    with torch.device("cpu"):
        low, high = csr.grid.row_spans()
        pairs = torch.repeat_interleave(high - low, csr.indptr.diff()) * csr.grid.column_spans()[csr.indices.long()]
    full = int(pairs[csr.mask_ids == FULL].sum())
    return full, int(pairs.sum()) - full
