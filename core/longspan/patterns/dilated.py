"""`Dilated`: LongNet's dilated attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from attrs import frozen

from longspan.errors import FURTHEST, ArgumentError, brief, is_integer
from longspan.spec.pattern import Pattern

__all__ = ["Dilated"]


def _lengths(value: object, name: str) -> tuple[int, ...]:
    if is_integer(value):
        value = (value,)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ArgumentError(name, repr(value), "a non-empty tuple of positive integers", f"e.g. {name}=(2048, 4096)")
    for length in value:
        if not is_integer(length) or length <= 0:
            raise ArgumentError(name, brief(tuple(value)), "positive integers", f"replace {brief(length)}")
        if length > FURTHEST:
            raise ArgumentError(name, brief(length), "positive integers of at most 2**62", "give the sequence's length")
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
