"""Patterns: which keys a query may see. Values only; `longspan.lowering` turns them into dense calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from attrs import frozen

from longspan.errors import ArgumentError, brief

__all__ = ["FURTHEST", "READERS", "Dense", "Dilated", "Pattern", "SlidingWindow", "decode", "parse_pattern"]


FURTHEST = 2**62
"""Beyond it there are no positions or lengths: sums of two of them are to fit into int64."""


class Pattern:
    """Base of all patterns: frozen, hashable, printable values.

    They write their own `__init__`, into `__dict__`: that is what torch.compile can trace, so that a pattern may be
    built inside a compiled function.

    `kind` is the word that `Capabilities.patterns` uses; `spec` is the text that `parse_pattern` reads back;
    `positional` says that the result depends on where queries and keys stand, even without `is_causal`.
    """

    kind: ClassVar[str] = ""
    positional: ClassVar[bool] = True

    @property
    def spec(self) -> str:
        """The pattern as text, as on the command line."""
        return self.kind

    @property
    def code(self) -> tuple[str, list[int]]:
        """The pattern as words and numbers, for a graph in which numbers may be symbols; `decode` reads it back."""
        return self.kind, []

    def check(self, heads: int) -> None:
        """Raise `ArgumentError` if the pattern cannot be applied to this number of query heads."""


@frozen(slots=False, init=False)
class Dense(Pattern):
    """Every query sees every key (with `is_causal`, every key up to its own position)."""

    kind: ClassVar[str] = "dense"
    positional: ClassVar[bool] = False

    def __init__(self) -> None:
        pass


def _lengths(value: object, name: str) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ArgumentError(name, repr(value), "a non-empty tuple of positive integers", f"e.g. {name}=(2048, 4096)")
    for one in value:
        if not isinstance(one, int) or isinstance(one, bool) or one <= 0:
            raise ArgumentError(name, brief(tuple(value)), "positive integers", f"replace {brief(one)}")
        if one > FURTHEST:
            raise ArgumentError(name, brief(one), "positive integers of at most 2**62", "give the sequence's length")
    return tuple(value)


@frozen(slots=False, init=False)
class Dilated(Pattern):
    """LongNet's dilated attention (arXiv 2307.02486, sections 2.2 and 2.3).

    Branch `i` cuts the sequence into segments of `segment_lengths[i]` tokens. In each, head `h` keeps the positions
    `p` with `(p mod w) mod r == s` and attends among them; the last segment may be ragged, `w > N` is one segment.

    Args:
        segment_lengths: `w` of each branch, in tokens.
        dilation_rates: `r` of each branch, as many as segment lengths.
        heads: `"all"`: every head runs every branch, and branches mix by their softmax denominators, which is one
            softmax over the multiset union of their keys. `"grouped"`: heads are split in order into one group a
            branch (the remainder to the first groups), and each group runs its branch alone.
        offset: how `s` follows from the head under `"all"`: `"modulo"` is `h mod r` (the paper), `"block"` is
            `h // ceil(H / r)` (published torchscale weights). Under `"grouped"`, `s = i mod r` for branch `i`.

    Raises:
        ArgumentError: tuples of different lengths, lengths or rates that are not positive, unknown words.
    """

    kind: ClassVar[str] = "dilated"
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    heads: str
    offset: str

    def __init__(
        self,
        segment_lengths: int | Sequence[int],
        dilation_rates: int | Sequence[int],
        heads: str = "all",
        offset: str = "modulo",
    ) -> None:
        lengths = _lengths(segment_lengths, "segment_lengths")
        rates = _lengths(dilation_rates, "dilation_rates")
        if len(lengths) != len(rates):
            raise ArgumentError(
                "dilation_rates",
                f"{len(rates)} rates for {len(lengths)} segment lengths",
                "one rate for each segment length",
                "make both tuples equally long",
            )
        if heads not in ("all", "grouped"):
            raise ArgumentError("heads", repr(heads), "'all' or 'grouped'")
        if offset not in ("modulo", "block"):
            raise ArgumentError("offset", repr(offset), "'modulo' or 'block'")
        self.__dict__.update(segment_lengths=lengths, dilation_rates=rates, heads=heads, offset=offset)

    @property
    def spec(self) -> str:
        """`dilated:w/r,w/r[:grouped][:block]`."""
        branches = ",".join(f"{w}/{r}" for w, r in zip(self.segment_lengths, self.dilation_rates, strict=True))
        words = [word for word in (self.heads, self.offset) if word in ("grouped", "block")]
        return ":".join(["dilated", branches, *words])

    @property
    def code(self) -> tuple[str, list[int]]:
        """The head words, then segment lengths and rates."""
        return f"dilated:{self.heads}:{self.offset}", [*self.segment_lengths, *self.dilation_rates]

    def check(self, heads: int) -> None:
        """Under `"grouped"` every branch needs a head of its own."""
        branches = len(self.segment_lengths)
        if self.heads == "grouped" and heads < branches:
            raise ArgumentError(
                "pattern",
                f'heads="grouped" with {branches} branches and {heads} heads',
                f"at least {branches} heads",
                'use heads="all" or fewer branches',
            )


def _reach(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ArgumentError(name, brief(value), "a number of tokens of at least 0", "e.g. SlidingWindow(256, 0)")
    if value > FURTHEST:
        raise ArgumentError(name, brief(value), "a number of tokens of at most 2**62", "give the sequence's length")
    return value


@frozen(slots=False, init=False)
class SlidingWindow(Pattern):
    """Query `i` sees keys `i - left` to `i + right`, both ends included (with `is_causal`, none after `i`).

    Args:
        left: tokens before the query.
        right: tokens after it.

    Raises:
        ArgumentError: a reach that is negative or no integer.
    """

    kind: ClassVar[str] = "window"
    left: int
    right: int

    def __init__(self, left: int, right: int = 0) -> None:
        self.__dict__.update(left=_reach("left", left), right=_reach("right", right))

    @property
    def spec(self) -> str:
        """`window:left,right`."""
        return f"window:{self.left},{self.right}"

    @property
    def code(self) -> tuple[str, list[int]]:
        """Both reaches."""
        return self.kind, [self.left, self.right]


READERS: dict[str, Callable[[str], Pattern]] = {}
"""How to read texts that begin with other words: modules above this one add theirs."""


def decode(words: str, numbers: Sequence[int]) -> Pattern:
    """The pattern that `Pattern.code` took apart."""
    kind, *rest = words.split(":")
    if kind in READERS:
        return READERS[kind](words)
    if kind == "dense":
        return Dense()
    if kind == "window":
        return SlidingWindow(*numbers)
    half = len(numbers) // 2
    return Dilated(tuple(numbers[:half]), tuple(numbers[half:]), *rest)


def parse_pattern(text: str) -> Pattern:
    """Read a pattern from text.

    `dense`, `window:256,0`, `dilated:2048/1,4096/2`, `dilated:64/1,128/2:grouped:block`,
    `blocks:128:local:1000,0|global:0` and `topk_blocks:8:128` are such texts.

    Raises:
        ArgumentError: the text is none of these; the message shows one that is.
    """
    given: object = text
    if not isinstance(given, str):
        fix = "it is one already" if isinstance(given, Pattern) else "e.g. longspan.parse_pattern('dense')"
        raise ArgumentError("pattern", brief(given), "a text such as 'dilated:2048/1,4096/2'", fix)
    if re.search(r"\d{1000}", text):
        raise ArgumentError("pattern", brief(text), "numbers of fewer than 1,000 digits", "e.g. window:256,0")
    kind, _, rest = text.strip().partition(":")
    if kind in READERS:
        return READERS[kind](text.strip())
    want = (
        "dense, window:LEFT,RIGHT, dilated:LENGTH/RATE,... with optional :grouped and :block, blocks:SIZE:RULE or "
        "topk_blocks:K:SIZE"
    )
    fix = "e.g. dilated:2048/1,4096/2"
    if kind == "dense" and not rest:
        return Dense()
    if kind == "window":
        ends = rest.split(",")
        if len(ends) > 2 or not all(end.strip().isdecimal() for end in ends):
            raise ArgumentError("pattern", repr(text), want, "e.g. window:256,0")
        return SlidingWindow(*map(int, ends))
    if kind != "dilated":
        raise ArgumentError("pattern", repr(text), want, fix)
    branches, *words = rest.split(":")
    contradicts = {"all", "grouped"} <= set(words) or {"modulo", "block"} <= set(words)
    if contradicts or set(words) - {"all", "grouped", "modulo", "block"}:
        raise ArgumentError("pattern", repr(text), want, fix)
    try:
        pairs = [tuple(int(number) for number in branch.split("/")) for branch in branches.split(",")]
        lengths, rates = zip(*pairs, strict=True)
    except ValueError:
        raise ArgumentError("pattern", repr(text), want, fix) from None
    return Dilated(
        lengths,
        rates,
        heads="grouped" if "grouped" in words else "all",
        offset="block" if "block" in words else "modulo",
    )
