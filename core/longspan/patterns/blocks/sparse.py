"""`BlockSparse`: the pattern that keeps chosen blocks, exact to the token, as a value that composes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from attrs import frozen
from torch import Tensor

from longspan.errors import ArgumentError, check_integer
from longspan.numerics.tensors import counting
from longspan.patterns.blocks.csr import BlockCSR, HeadBlocks
from longspan.patterns.blocks.grid import Grid, check_block_size, on_cpu
from longspan.patterns.blocks.masks import MaskTable
from longspan.patterns.blocks.primitives import ExplicitBlocks
from longspan.patterns.blocks.rules import And, Local, PerHead, Rule, evaluate
from longspan.patterns.blocks.text import parse_rule
from longspan.patterns.text import READERS
from longspan.patterns.window import SlidingWindow
from longspan.spec.pattern import Dense, Pattern

__all__ = ["BlockSparse", "per_head"]


@frozen(slots=False, init=False, repr=False)
class BlockSparse(Pattern):
    """Every query sees the keys of some blocks, with one softmax over all of them; a row without a block gives zero.

    Patterns of block-sparse attention come from builders (`local_blocks`, `global_blocks`, `bigbird`, ...) and compose:
    `a | b` keeps what either keeps, `a & b` what both keep, `~a` what `a` does not (`a.complement()`, where a function
    is compiled with fullgraph=True: torch's tracer has no rule for `~`), `a.causal()` what lies at the query or before
    it. A `SlidingWindow` or `Dense` may be an operand. Of two block sizes, one must divide the other;
    the result has the smaller. With packed documents, a pattern starts anew in each document.

    Args:
        block_size: tokens a block, each way. Lengths need not be multiples of it.
        layout: a rule, which fits every length (the builders make them); its text, such as `"local:1000,0|global:0"`;
            or a `BlockCSR`, which fits its own lengths alone; or a sequence of `BlockCSR`, one for each head.

    Raises:
        ArgumentError: a block size that does not divide those of the layout's parts, an empty layout, a text that
            is no rule.
    """

    kind: ClassVar[str] = "block_sparse"
    block_size: int
    layout: Rule

    def __init__(self, block_size: int, layout: Rule | str | BlockCSR | Sequence[BlockCSR]) -> None:
        check_block_size(block_size)
        rule = layout if isinstance(layout, Rule) else _rule(layout, block_size)
        for unit in rule.units:
            if unit % block_size:
                want = f"a block size that divides the layout's {unit}"
                raise ArgumentError("block_size", block_size, want, "build both with one block_size")
        self.__dict__.update(block_size=block_size, layout=rule)

    # ------------------------------------------------------------------------------------------------------- algebra

    def __or__(self, other: Pattern) -> BlockSparse:
        size, rule = _operand(self, other)
        return BlockSparse(size, self.layout | rule)

    def __and__(self, other: Pattern) -> BlockSparse:
        size, rule = _operand(self, other)
        return BlockSparse(size, self.layout & rule)

    def __ror__(self, other: Pattern) -> BlockSparse:
        size, rule = _operand(self, other)
        return BlockSparse(size, rule | self.layout)

    def __rand__(self, other: Pattern) -> BlockSparse:
        size, rule = _operand(self, other)
        return BlockSparse(size, rule & self.layout)

    def __invert__(self) -> BlockSparse:
        return self.complement()

    def complement(self) -> BlockSparse:
        """What this pattern does not keep: `~pattern`, in a form that torch.compile traces without a break."""
        return BlockSparse(self.block_size, self.layout.complement())

    def causal(self) -> BlockSparse:
        """What of this pattern lies at the query's own position or before it."""
        return BlockSparse(self.block_size, self.layout & Local(None, 0))

    # ----------------------------------------------------------------------------------------------------- as a value

    @property
    def heads(self) -> int | None:
        """How many heads the pattern is for; None: any number, all alike."""
        return self.layout.heads

    @property
    def spec(self) -> str:
        """`blocks:block_size:rule`."""
        return f"blocks:{self.block_size}:" + self.layout.text(self.block_size)

    @property
    def code(self) -> tuple[str, list[int]]:
        """The spec, and no numbers."""
        return self.spec, []

    def check(self, heads: int) -> None:
        """A pattern with a layout for each head needs as many heads."""
        own = self.heads
        if own is not None and own != heads:
            got = f"layouts for {own} heads, with {heads} heads"
            raise ArgumentError("pattern", got, "a layout for each head, or one for all", "use longspan.per_head")

    def __repr__(self) -> str:
        if isinstance(self.layout, ExplicitBlocks):
            return f"BlockSparse({self.block_size}, {self.layout.csr!r})"
        if isinstance(self.layout, PerHead) and all(isinstance(rule, ExplicitBlocks) for rule in self.layout.rules):
            distinct = dict.fromkeys(rule.csr for rule in self.layout.rules if isinstance(rule, ExplicitBlocks))
            return f"BlockSparse({self.block_size}, {len(self.layout.rules)} heads with layouts of {list(distinct)})"
        return f"BlockSparse({self.block_size}, {self.layout.text(self.block_size)!r})"

    # ---------------------------------------------------------------------------------------------------- for a length

    @on_cpu
    def csr(
        self, q_len: int, kv_len: int | None = None, *, is_causal: bool = False, query_offset: int = 0, heads: int = 1
    ) -> HeadBlocks:
        """The blocks of a sequence (of one document, where documents are packed), in O(non-zeros) time and memory.

        Args:
            q_len: queries, at positions `query_offset` on.
            kv_len: keys, at positions 0 on; `q_len` unless given.
            is_causal: only keys at the query's position or before it.
            query_offset: position of the first query; block rows are numbered by position // block_size.
            heads: how many heads; those with equal layouts share one.

        Raises:
            ArgumentError: another number of heads, or a given layout of another length.
        """
        grid = Grid(self.block_size, q_len, q_len if kv_len is None else kv_len, query_offset)
        check_integer("heads", heads, 1)
        self.check(heads)
        index_of: dict[Rule, int] = {}
        layouts: list[BlockCSR] = []
        of_head = []
        for head in range(heads):
            rule = self.layout.at(head)
            if rule not in index_of:
                csr = _blocks(rule, grid, is_causal)
                index_of[rule] = layouts.index(csr) if csr in layouts else len(layouts)
                layouts += [csr] if index_of[rule] == len(layouts) else []
            of_head.append(index_of[rule])
        return HeadBlocks(tuple(layouts), tuple(of_head))

    def density(
        self, q_len: int, kv_len: int | None = None, *, is_causal: bool = False, heads: int | None = None
    ) -> float:
        """Kept query-key pairs over all pairs, exactly."""
        return self.csr(q_len, kv_len, is_causal=is_causal, heads=heads or self.heads or 1).density

    def allowed(self, query: Tensor, key: Tensor, head: int, kv_len: int) -> Tensor:
        """The plain predicate, for oracles: which of these pairs one head keeps.

        Args:
            query: positions, `(q, 1)` int64.
            key: positions, `(1, k)` int64.
            head: the head's number.
            kv_len: how many keys there are in all.

        Returns:
            `(q, k)` bool.
        """
        return self.layout.allowed(query, key, head, kv_len)

    @on_cpu
    def to_dense(
        self,
        q_len: int,
        kv_len: int | None = None,
        *,
        heads: int | None = None,
        is_causal: bool = False,
        query_offset: int = 0,
    ) -> Tensor:
        """`(heads, q_len, kv_len)` bool by the plain predicate, not by way of `csr`. For oracles and small lengths."""
        kv_len = q_len if kv_len is None else kv_len
        heads = heads or self.heads or 1
        self.check(heads)
        check_integer("query_offset", query_offset)
        query, key = query_offset + counting(q_len)[:, None], counting(kv_len)[None, :]
        seen = (key <= query) if is_causal else torch.ones(q_len, kv_len, dtype=torch.bool, device="cpu")
        return torch.stack([self.allowed(query, key, head, kv_len) & seen for head in range(heads)])


def per_head(patterns: Sequence[BlockSparse | SlidingWindow | Dense]) -> BlockSparse:
    """A pattern for each head. Heads with equal layouts share one.

    Raises:
        ArgumentError: no pattern, block sizes of which none divides the others, no block-sparse pattern among them.
    """
    sizes = [pattern.block_size for pattern in patterns if isinstance(pattern, BlockSparse)]
    if not sizes:
        raise ArgumentError(
            "patterns", repr(list(patterns)), "at least one BlockSparse pattern", "e.g. local_blocks(256)"
        )
    like = BlockSparse(min(sizes), Local(None, None))
    return BlockSparse(min(sizes), PerHead(*[_operand(like, pattern)[1] for pattern in patterns]))


def _blocks(rule: Rule, grid: Grid, is_causal: bool) -> BlockCSR:
    if isinstance(rule, ExplicitBlocks) and rule.csr.grid == grid and not is_causal:
        return rule.csr
    table = MaskTable(grid.block_size)
    kept = evaluate(And(rule, Local(None, 0)) if is_causal else rule, grid, table)
    return BlockCSR.of(grid, kept.keys, kept.states, table)


def _operand(mine: BlockSparse, other: object) -> tuple[int, Rule]:
    """The block size that both have after composition, and the other's rule."""
    if isinstance(other, SlidingWindow):
        return mine.block_size, Local(other.left, other.right)
    if isinstance(other, Dense):
        return mine.block_size, Local(None, None)
    if not isinstance(other, BlockSparse):
        raise ArgumentError("pattern", repr(other), "a BlockSparse, SlidingWindow or Dense to compose with")
    small, large = sorted((mine.block_size, other.block_size))
    if large % small:
        raise ArgumentError(
            "block_size", f"{mine.block_size} and {other.block_size}", "block sizes of which one divides the other",
            "build both with one block_size",
        )  # fmt: skip
    return small, other.layout


def _rule(layout: object, block_size: int) -> Rule:
    if isinstance(layout, str):
        return parse_rule(layout, block_size)
    given: list[BlockCSR] = []
    for csr in layout if isinstance(layout, Sequence) else (layout,):
        if not isinstance(csr, BlockCSR):
            raise ArgumentError("layout", type(csr).__name__, "a rule, its text, a BlockCSR or a sequence of BlockCSR",
                                "build one with local_blocks, global_blocks, ...")  # fmt: skip
        given.append(csr)
        if csr.grid != given[0].grid:
            got = "layouts of different lengths or block sizes"
            raise ArgumentError("layout", got, "the same for every head", "make them alike, or use per_head")
    if not given:
        raise ArgumentError("layout", "an empty sequence", "a layout for each head", "give at least one BlockCSR")
    if not any(csr.nnz for csr in given):
        want = "at least one kept block"
        raise ArgumentError("layout", "an empty layout, which keeps no block", want, "check the layout's indptr")
    return (
        PerHead(*[ExplicitBlocks(csr) for csr in given]) if isinstance(layout, Sequence) else ExplicitBlocks(given[0])
    )


def _read(text: str) -> BlockSparse:
    """`blocks:SIZE:RULE`."""
    _, size, rule = [*text.split(":", 2), "", ""][:3]
    if not size.strip().isdecimal() or not rule:
        want = "blocks:SIZE:RULE"
        raise ArgumentError("pattern", repr(text), want, "e.g. blocks:128:local:1000,0|global:0")
    return BlockSparse(int(size), parse_rule(rule, int(size)))


READERS["blocks"] = _read
