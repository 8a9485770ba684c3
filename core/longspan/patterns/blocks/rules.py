"""Rules: which pairs of tokens or blocks a block-sparse pattern keeps, before any length is known, and their algebra.

A rule says it twice. `blocks` lists the kept blocks, fast and in O(non-zeros); `allowed` is the plain predicate on
positions that oracles use. The two share no code, and the tests hold them against each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from attrs import frozen
from torch import Tensor

from longspan.errors import ArgumentError
from longspan.numerics.tensors import counting
from longspan.patterns.blocks.grid import Grid
from longspan.patterns.blocks.masks import MaskTable, all_full
from longspan.patterns.blocks.sets import Band, BlockSet, complement, everything, intersect, listed

__all__ = ["And", "Local", "Not", "Or", "PerHead", "Rule", "evaluate"]


class Rule:
    """Base of all rules: frozen, hashable values, composed with `|`, `&` and `~`.

    `unit` is the block size that a rule's blocks have, None for a rule that counts tokens. Rules write their own
    `__init__` into `__dict__`, as patterns do, so that torch.compile can trace it.
    """

    unit: int | None = None

    @property
    def heads(self) -> int | None:
        """How many heads the rule is for; None: any number."""
        return None

    @property
    def units(self) -> frozenset[int]:
        """The block sizes that the rule's parts have."""
        return frozenset() if self.unit is None else frozenset((self.unit,))

    def at(self, head: int) -> Rule:
        """The rule of one head."""
        return self

    def text(self, block_size: int) -> str:
        """The rule as text, in a pattern of this block size."""
        raise NotImplementedError

    def allowed(self, query: Tensor, key: Tensor, head: int, kv_len: int) -> Tensor:
        """Which pairs are kept: `(q, k)` bool for positions `(q, 1)` and `(1, k)`, int64."""
        raise NotImplementedError

    def blocks(self, grid: Grid, table: MaskTable) -> BlockSet:
        """The kept blocks on a grid of this rule's unit, or of any block size for a rule that counts tokens."""
        raise NotImplementedError

    def __or__(self, other: Rule) -> Rule:
        return Or(*_flat(Or, self, other))

    def __and__(self, other: Rule) -> Rule:
        return And(*_flat(And, self, other))

    def __invert__(self) -> Rule:
        return self.complement()

    def complement(self) -> Rule:
        """`~rule`."""
        return self.rule if isinstance(self, Not) else Not(self)


def _flat(kind: type[Or] | type[And], *rules: Rule) -> Iterator[Rule]:
    for rule in rules:
        if isinstance(rule, kind):
            yield from rule.rules
        else:
            yield rule


def _common_heads(rules: Sequence[Rule]) -> int | None:
    heads = None
    for rule in rules:
        if rule.heads is not None and heads is not None and rule.heads != heads:
            got = f"parts for {heads} and for {rule.heads} heads"
            raise ArgumentError("layout", got, "as many heads in every part that has its own layout for each head")
        heads = rule.heads if heads is None else heads
    return heads


@frozen(slots=False, init=False)
class _Composition(Rule):
    """Base of the rules that are made of several."""

    rules: tuple[Rule, ...]

    def __init__(self, *rules: Rule) -> None:
        _common_heads(rules)
        self.__dict__["rules"] = rules

    @property
    def heads(self) -> int | None:
        """As many as the parts that are for a number of heads, which agree; None where no part is."""
        return _common_heads(self.rules)

    @property
    def units(self) -> frozenset[int]:
        """The block sizes of all parts."""
        return frozenset().union(*[rule.units for rule in self.rules])

    def at(self, head: int) -> Rule:
        """The same composition of the head's rules."""
        return self if self.heads is None else type(self)(*[rule.at(head) for rule in self.rules])


@frozen(slots=False, init=False)
class Or(_Composition):
    """The pairs that some of the rules keep."""

    def text(self, block_size: int) -> str:
        """`a|b`."""
        return "|".join([rule.text(block_size) for rule in self.rules])

    def allowed(self, query: Tensor, key: Tensor, head: int, kv_len: int) -> Tensor:
        """The pairs that any part keeps."""
        return reduce(torch.logical_or, [rule.allowed(query, key, head, kv_len) for rule in self.rules])


@frozen(slots=False, init=False)
class And(_Composition):
    """The pairs that all of the rules keep."""

    def text(self, block_size: int) -> str:
        """`a&b`, unions in brackets."""
        return "&".join([_bracketed(rule, Or, block_size) for rule in self.rules])

    def allowed(self, query: Tensor, key: Tensor, head: int, kv_len: int) -> Tensor:
        """The pairs that every part keeps."""
        return reduce(torch.logical_and, [rule.allowed(query, key, head, kv_len) for rule in self.rules])


@frozen(slots=False, init=False)
class Not(Rule):
    """The pairs that a rule does not keep."""

    rule: Rule

    def __init__(self, rule: Rule) -> None:
        self.__dict__["rule"] = rule

    @property
    def heads(self) -> int | None:
        """As many as the rule is for."""
        return self.rule.heads

    @property
    def units(self) -> frozenset[int]:
        """The block sizes that the rule has."""
        return self.rule.units

    def at(self, head: int) -> Rule:
        """The complement of the head's rule."""
        return Not(self.rule.at(head))

    def text(self, block_size: int) -> str:
        """`~a`, compositions in brackets."""
        return "~" + _bracketed(self.rule, (Or, And), block_size)

    def allowed(self, query: Tensor, key: Tensor, head: int, kv_len: int) -> Tensor:
        """The pairs that the rule does not keep."""
        return ~self.rule.allowed(query, key, head, kv_len)


def _bracketed(rule: Rule, kinds: type[Rule] | tuple[type[Rule], ...], block_size: int) -> str:
    return f"({rule.text(block_size)})" if isinstance(rule, kinds) else rule.text(block_size)


@frozen(slots=False, init=False)
class PerHead(_Composition):
    """A rule for each head."""

    def __init__(self, *rules: Rule) -> None:
        if not rules:
            raise ArgumentError("layout", "no layout for any head", "a layout for each head", "give at least one")
        for rule in rules:
            if rule.heads is not None:
                raise ArgumentError("layout", "heads within heads", "one layout for each head", "flatten the list")
        self.__dict__["rules"] = rules

    @property
    def heads(self) -> int | None:
        """As many as there are rules."""
        return len(self.rules)

    def at(self, head: int) -> Rule:
        """The head's own rule."""
        return self.rules[head]

    def text(self, block_size: int) -> str:
        """`heads(a;b)`."""
        return "heads(" + ";".join([rule.text(block_size) for rule in self.rules]) + ")"

    def allowed(self, query: Tensor, key: Tensor, head: int, kv_len: int) -> Tensor:
        """The pairs that the head's own rule keeps."""
        return self.rules[head].allowed(query, key, head, kv_len)


@frozen(slots=False, init=False)
class Local(Rule):
    """Query `i` sees keys `i - left` to `i + right`, in tokens; None: no bound on that side."""

    left: int | None
    right: int | None

    def __init__(self, left: int | None, right: int | None) -> None:
        self.__dict__.update(left=left, right=right)

    def text(self, block_size: int) -> str:
        """`local:left,right`; `causal` and `all` where there is no bound."""
        if self.left is None and self.right is None:
            return "all"
        if self.left is None and self.right == 0:
            return "causal"
        return "local:" + ",".join(["*" if end is None else str(end) for end in (self.left, self.right)])

    def allowed(self, query: Tensor, key: Tensor, head: int, kv_len: int) -> Tensor:
        """The pairs whose distance lies within both bounds."""
        kept = (key >= 0) & (query >= 0)
        if self.left is not None:
            kept = kept & (key >= query - self.left)
        return kept if self.right is None else kept & (key <= query + self.right)

    def blocks(self, grid: Grid, table: MaskTable) -> BlockSet:
        """The blocks of a band, of which at most four a row are partial."""
        return Band(self.left, self.right).blocks(grid, table)


# --------------------------------------- from a rule to its blocks, in what its parts list, never in the grid's size


def evaluate(rule: Rule, grid: Grid, table: MaskTable) -> BlockSet:
    """The blocks that a rule without heads keeps on a grid, listed, in O(what is listed of its parts)."""
    if not grid.rows or not grid.columns:
        return BlockSet(
            torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(0, dtype=torch.int64, device="cpu")
        )
    kept = _evaluate(rule, False, grid, table)
    return everything(grid, complement(kept), table) if kept.absent else kept


def _evaluate(rule: Rule, flipped: bool, grid: Grid, table: MaskTable) -> BlockSet:
    """A rule's blocks, or with `flipped` those of its complement."""
    while isinstance(rule, Not):
        rule, flipped = rule.rule, not flipped
    if isinstance(rule, And):
        kept = _meet([(part, False) for part in rule.rules], grid, table)
    elif isinstance(rule, Or):  # a | b is ~(~a & ~b)
        kept = complement(_meet([(part, True) for part in rule.rules], grid, table))
    elif rule.unit is None or rule.unit == grid.block_size:
        kept = rule.blocks(grid, table)
    else:
        kept = _refined(rule, grid, table)
    return complement(kept) if flipped else kept


def _meet(parts: list[tuple[Rule, bool]], grid: Grid, table: MaskTable) -> BlockSet:
    """The blocks of all parts (flipped where so marked). Bands are not listed where something smaller is met."""
    within: Band | None = None
    outside: list[Band] = []
    sets: list[BlockSet] = []
    while parts:
        rule, flipped = parts.pop()
        if isinstance(rule, Not):
            parts.append((rule.rule, not flipped))
        elif isinstance(rule, Or if flipped else And):
            parts.extend((part, flipped) for part in rule.rules)
        elif isinstance(rule, Local) and not flipped:
            band = Band(rule.left, rule.right)
            within = band if within is None else within.meet(band)
        elif isinstance(rule, Local):
            outside.append(Band(rule.left, rule.right))
        else:
            sets.append(_evaluate(rule, flipped, grid, table))
    if within is not None and all(blocks.absent for blocks in sets):
        sets.append(within.blocks(grid, table))
        within = None
    if all(blocks.absent for blocks in sets):
        sets += [complement(band.blocks(grid, table)) for band in outside]
        outside = []
    sets.sort(key=lambda blocks: (blocks.absent, len(blocks.keys)))
    kept = reduce(lambda a, b: intersect(a, b, table), sets)
    if within is not None:
        kept = listed(kept.keys, table.meet(kept.states, within.at(grid, table, kept.keys)))
    for band in outside:
        kept = listed(kept.keys, table.without(kept.states, band.at(grid, table, kept.keys)))
    return kept


def _refined(rule: Rule, grid: Grid, table: MaskTable) -> BlockSet:
    """The blocks of a rule whose blocks are larger than the grid's, cut up."""
    assert rule.unit is not None
    size, times = grid.block_size, rule.unit // grid.block_size
    coarse, coarse_table = grid.scaled(rule.unit), MaskTable(rule.unit)
    large = rule.blocks(coarse, coarse_table)
    fine = [all_full(1, times, times)]
    for part in torch.split(coarse_table.masks, coarse_table.chunk):
        cut = part.view(-1, times, size, times, size).transpose(2, 3).reshape(-1, size, size)
        fine.append(table.add(cut).view(-1, times, times))
    step = counting(times)
    row = (large.keys // coarse.columns + coarse.first_row) * times - grid.first_row
    rows = row[:, None, None] + step[:, None]
    columns = (large.keys % coarse.columns * times)[:, None, None] + step[None, :]
    there = (rows >= 0) & (rows < grid.rows) & (columns < grid.columns)
    keys, order = (rows * grid.columns + columns)[there].sort()
    return listed(keys, torch.cat(fine)[large.states][there][order])
