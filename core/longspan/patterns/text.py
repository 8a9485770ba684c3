"""Patterns from text, as on the command line, and from the words and numbers of a graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from longspan.errors import ArgumentError, brief
from longspan.patterns.dilated import Dilated
from longspan.patterns.window import SlidingWindow
from longspan.spec.pattern import Dense, Pattern

__all__ = ["READERS", "decode", "parse_pattern"]


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
