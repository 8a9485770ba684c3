"""`TopKBlocks`: block-sparse attention whose blocks are chosen from what queries and keys hold."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from attrs import frozen
from torch import Tensor

from longspan.errors import ArgumentError, brief, check_integer
from longspan.numerics.tensors import counting
from longspan.patterns.blocks.csr import BlockCSR
from longspan.patterns.blocks.grid import check_block_size, on_cpu
from longspan.patterns.blocks.masks import MaskTable
from longspan.patterns.blocks.sparse import BlockSparse
from longspan.patterns.text import READERS
from longspan.patterns.topk.choice import BlockChoice, choose, states_of
from longspan.patterns.topk.scoring import BlockScoring, Scorer
from longspan.spec.pattern import Dense, Pattern
from longspan.spec.problem import Problem

__all__ = ["TopKBlocks", "scorings", "stand_in"]

GRADIENTS = ("none", "straight_through", "soft")


@frozen(slots=False, init=False, repr=False)
class TopKBlocks(Pattern):
    """Every block of queries sees its `k` best blocks of keys, with one softmax over all of their keys.

    An approximation of dense attention that somebody asked for: what is left out depends on the scorer. It equals dense
    attention where there are no more than `k` blocks, all of which are then kept. `choose` says which blocks are taken,
    `mass` what they keep. The choice is made at every call, for each batch entry, head and block of queries; then it
    runs as any block-sparse pattern.

    With `is_causal` the `k` blocks are among those up to the row's own, which is always one of them, cut at the
    diagonal; earlier rows have fewer. The default scorer then compares a block's first query, not the mean of its
    queries, with the means of the blocks before: nothing that a query is given depends on a later token. A scorer of
    your own must see to that itself: a row may depend on its first query and on what comes before it, no more. So
    `query_offset` matters: where the first query stands inside a block, it speaks for the rest of that block.

    Of equal scores the first is taken. Blocks of equal keys need not score equal to the last bit, as their products are
    summed in different orders; which of them is taken is the same in every run, and otherwise a matter of rounding.

    With packed documents each document has blocks and a choice of its own.

    The scorer is called as `scorer(query, key, scoring)` with the tensors as attention gets them (of one document,
    where documents are packed), `(batch, heads, q_len, head_dim)` and `(batch, kv_heads, kv_len, head_dim)`, and a
    `BlockScoring`, which says how the blocks lie and whose `represent(query)` and `pool(key)` summarise blocks as the
    default scorer does. It returns `(batch, heads, query blocks, key blocks)` of a floating dtype, the higher the
    better, finite wherever `scoring.candidates()` says that a block may be chosen. A scorer may be a `torch.nn.Module`;
    its parameters are yours to hand to the optimizer.

    The choice itself has no gradient: query, key and value get theirs through the kept blocks. The scorer's gradient
    is one of:

    - `"none"`: it gets none, and runs without autograd.
    - `"soft"`: the log of `count * softmax(scores of the row's kept blocks)` is added to all token scores of the block,
      so equal scores add nothing. Attention's result feels the scores, and its gradient is the true one while the
      choice stays the same. Under causality the row's own block has nothing added and is not counted: its score may
      know of keys after the query.
    - `"straight_through"`: attention's result is that of `"none"`; the scores get the gradient that such an addition
      would have, taken where it is zero: what each kept block's share of the softmax is worth.

    A scorer learns from blocks that compete: the share of one kept block is 1 whatever its score, so that `k` has to be
    2 at least for the last two, and 3 under causality, where the row's own block does not compete.

    The last two cost one more forward in the backward, over one kept block a row at a time (`"soft"` runs its own
    forward and backward that way too); gradients reach whatever the scorer made its scores from, query and key too.

    Args:
        k: how many blocks of keys each block of queries keeps.
        block_size: tokens a block, each way. Lengths need not be multiples of it.
        scorer: as above; None: scaled dot products of means.
        scorer_gradient: as above.

    Raises:
        ArgumentError: `k` or `block_size` below 1, a scorer that cannot be called, an unknown gradient. When it is
            used: scores that are NaN, infinite or of another shape, a scorer's gradient that would be zero.
    """

    kind: ClassVar[str] = "topk_blocks"
    k: int
    block_size: int
    scorer: Scorer | None
    scorer_gradient: str

    def __init__(
        self, k: int, block_size: int = 128, scorer: Scorer | None = None, scorer_gradient: str = "none"
    ) -> None:
        check_integer("k", k, 1)
        check_block_size(block_size)
        _check_scorer(scorer)
        if scorer_gradient not in GRADIENTS:
            raise ArgumentError("scorer_gradient", brief(scorer_gradient), " or ".join(map(repr, GRADIENTS)))
        if scorer_gradient != "none" and k == 1:
            raise _no_gradient(scorer_gradient, "k=1", 2)
        self.__dict__.update(k=k, block_size=block_size, scorer=scorer, scorer_gradient=scorer_gradient)

    @property
    def spec(self) -> str:
        """`topk_blocks:k:block_size`; a scorer of one's own and its gradient are named but not read back."""
        words = [self.kind, str(self.k), str(self.block_size)]
        words += [] if self.scorer is None else [f"scorer={_name(self.scorer)}"]
        words += [] if self.scorer_gradient == "none" else [self.scorer_gradient]
        return ":".join(words)

    @property
    def code(self) -> tuple[str, list[int]]:
        """The spec, and no numbers.

        Raises:
            ArgumentError: a scorer of one's own or a scorer's gradient, which no graph can hold.
        """
        if self.scorer is not None or self.scorer_gradient != "none":
            raise ArgumentError(
                "pattern",
                f"{self.spec} where torch traces, maps or wraps",
                "TopKBlocks with the default scorer and without its gradient, in a graph",
                "call attention in a function under torch.compiler.disable",
            )
        return f"{self.kind}:{self.k}:{self.block_size}", []

    def choose(
        self,
        query: Tensor,
        key: Tensor,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        cu_seqlens: Tensor | tuple[int, ...] | None = None,
        query_offset: int | None = None,
    ) -> BlockChoice:
        """The blocks that attention would keep: arguments as of `longspan.attention`. Without gradient.

        Raises:
            ArgumentError: as `longspan.attention`.
        """
        problem = Problem.like(
            query,
            key,
            key,
            self,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            cu_seqlens=cu_seqlens,
            query_offset=query_offset,
        )
        with torch.no_grad():
            parts = choose(self.k, self.scorer, scorings(problem), query, key)
            return BlockChoice(problem, query, key, parts)

    def mass(
        self,
        query: Tensor,
        key: Tensor,
        *,
        exact: bool = False,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        cu_seqlens: Tensor | tuple[int, ...] | None = None,
        query_offset: int | None = None,
    ) -> Tensor:
        """The share of dense attention's softmax mass that is kept, `(batch, heads)`: `choose(...).mass(exact=...)`."""
        return self.choose(
            query,
            key,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            cu_seqlens=cu_seqlens,
            query_offset=query_offset,
        ).mass(exact=exact)

    def __repr__(self) -> str:
        words = [f"k={self.k}", f"block_size={self.block_size}"]
        words += [] if self.scorer is None else [f"scorer={_name(self.scorer)}"]
        words += [] if self.scorer_gradient == "none" else [f"scorer_gradient={self.scorer_gradient!r}"]
        return f"TopKBlocks({', '.join(words)})"


def scorings(problem: Problem) -> tuple[tuple[int, BlockScoring], ...]:
    """For each document (or the whole sequence) the index of its first token, and its blocks.

    Raises:
        ArgumentError: dropout with packed documents; under causality, a scorer's gradient that would be zero.
    """
    pattern = problem.pattern
    assert isinstance(pattern, TopKBlocks)
    if problem.dropout_p and problem.documents is not None:  # a document runs alone, and would be dropped from like one
        want = "0.0 with cu_seqlens under TopKBlocks"
        raise ArgumentError("dropout_p", problem.dropout_p, want, "call attention for each document, or drop nothing")
    if pattern.scorer_gradient != "none" and problem.is_causal and pattern.k <= 2:
        raise _no_gradient(pattern.scorer_gradient, f"k={pattern.k} and is_causal", 3)
    if 0 in (problem.batch, problem.heads, problem.q_len, problem.kv_len):
        return ()

    def blocks(q_len: int, kv_len: int, query_offset: int) -> BlockScoring:
        return BlockScoring(pattern.block_size, q_len, kv_len, query_offset, problem.is_causal, problem.scale)

    parts = [(0, blocks(problem.q_len, problem.kv_len, problem.query_offset))]
    if problem.documents is not None:
        parts = [(a, blocks(b - a, b - a, 0)) for a, b in pairwise(problem.documents) if b > a]
    return tuple(parts)


def _no_gradient(given: str, at: str, least: int) -> ArgumentError:
    got = f"{given!r} with {at}, where the scorer's gradient is zero: its blocks do not compete"
    return ArgumentError("scorer_gradient", got, f"k of at least {least}", f"k={least}, or scorer_gradient='none'")


def _check_scorer(scorer: object) -> None:
    if scorer is not None and not callable(scorer):
        want = "a callable (query, key, scoring) -> scores, or None"
        raise ArgumentError("scorer", repr(scorer), want, "leave it out for dot products of means")


def _name(scorer: Scorer) -> str:
    return getattr(scorer, "__qualname__", type(scorer).__qualname__)


def _read(text: str) -> TopKBlocks:
    """`topk_blocks:K` or `topk_blocks:K:SIZE`."""
    _, *numbers = text.split(":")
    if not 1 <= len(numbers) <= 2 or not all(number.strip().isdecimal() for number in numbers):
        raise ArgumentError("pattern", repr(text), "topk_blocks:K or topk_blocks:K:SIZE", "e.g. topk_blocks:8:128")
    k, size = [*map(int, numbers), 128][:2]
    return TopKBlocks(k, size)


READERS[TopKBlocks.kind] = _read


@on_cpu
def stand_in(problem: Problem) -> Problem:
    """A block-sparse problem that costs as much, for resolving: its longest document, every row with adjacent blocks.

    Batch entries count as heads, since each has a layout of its own.
    """
    pattern = problem.pattern
    assert isinstance(pattern, TopKBlocks)
    parts = scorings(problem)
    if not parts:
        return problem.replace(pattern=Dense(), documents=None)
    scoring = max((scoring for _, scoring in parts), key=lambda scoring: scoring.kv_len)
    grid, kept = scoring.grid, min(pattern.k, scoring.columns)
    near = counting(kept)
    own = grid.row_numbers().clamp(max=grid.columns - 1)[:, None]
    table = MaskTable(grid.block_size)
    if problem.is_causal:
        columns = (own - near.flip(0)).flatten()
    else:
        columns = ((own - kept // 2).clamp(min=0, max=grid.columns - kept) + near).flatten()
    keys = (counting(grid.rows).repeat_interleave(kept) * grid.columns + columns)[columns >= 0]
    csr = BlockCSR.of(grid, keys, states_of(keys, scoring, table), table)
    return problem.replace(
        pattern=BlockSparse(pattern.block_size, csr),
        batch=1,
        heads=problem.batch * problem.heads,
        kv_heads=problem.batch * problem.kv_heads,
        q_len=scoring.q_len,
        kv_len=scoring.kv_len,
        is_causal=False,
        documents=None,
    )
