"""Rules as text: `local:1000,0|global:0,-1&~random:0.1,7`, with `~` before `&` before `|`, and brackets."""

from __future__ import annotations

import re

from longspan.errors import FURTHEST, ArgumentError
from longspan.patterns.blocks.csr import find_csr
from longspan.patterns.blocks.grid import check_block_size
from longspan.patterns.blocks.primitives import Dilation, ExplicitBlocks, GlobalBlocks, GlobalTokens, Hierarchy, Strides
from longspan.patterns.blocks.rules import Local, PerHead, Rule
from longspan.patterns.blocks.sampling import Drawn

__all__ = ["WANT", "parse_rule"]

WANT = (
    "local:LEFT,RIGHT, causal, all, global:BLOCK,..., tokens:POSITION,..., strided:STRIDE, dilated:REACH,RATE, "
    "hierarchical:NEAR, random:SHARE,SEED or csr:DIGEST, joined by |, & and ~, or heads(A;B;...)"
)
_TOKEN = re.compile(r"\s*(heads\(|[()|&~;]|[a-z]+(?::[^()|&~;\s@]*)?(?:@\d+)?)\s*")
_WHOLE, _NUMBER = r"\d+", r"-?\d+"
_FORMS = {
    "local": rf"({_WHOLE}|\*),({_WHOLE}|\*)",
    "causal": "",
    "all": "",
    "global": rf"{_NUMBER}(,{_NUMBER})*",
    "tokens": rf"{_NUMBER}(,{_NUMBER})*",
    "strided": _WHOLE,
    "dilated": rf"{_WHOLE},{_WHOLE}",
    "hierarchical": _WHOLE,
    "random": rf"(\d+|\d*\.\d+|\d+\.\d*|\d+(?:\.\d+)?e-?\d+),{_NUMBER}",
    "csr": "[0-9a-f]+",
}


def parse_rule(text: str, block_size: int) -> Rule:
    """Read a rule of a pattern of this block size.

    Raises:
        ArgumentError: the text is no rule; the message lists what there is.
    """
    tokens = []
    start = 0
    while start < len(text.rstrip()):
        match = _TOKEN.match(text, start)
        if match is None:
            raise _wrong(text)
        tokens.append(match[1])
        start = match.end()
    reader = _Reader(text, tokens, block_size)
    rule = reader.union()
    if reader.tokens:
        raise _wrong(text)
    return rule


def _wrong(text: str) -> ArgumentError:
    return ArgumentError("pattern", repr(text), WANT, "e.g. blocks:128:local:1000,0|global:0")


class _Reader:
    """Recursive descent, one method a precedence."""

    def __init__(self, text: str, tokens: list[str], block_size: int) -> None:
        self.text, self.tokens, self.block_size = text, tokens, block_size

    def next_is(self, token: str) -> bool:
        if self.tokens and self.tokens[0] == token:
            del self.tokens[0]
            return True
        return False

    def union(self) -> Rule:
        rule = self.intersection()
        while self.next_is("|"):
            rule = rule | self.intersection()
        return rule

    def intersection(self) -> Rule:
        rule = self.complement()
        while self.next_is("&"):
            rule = rule & self.complement()
        return rule

    def complement(self) -> Rule:
        return ~self.complement() if self.next_is("~") else self.atom()

    def atom(self) -> Rule:
        if self.next_is("("):
            rule = self.union()
            if self.next_is(")"):
                return rule
        elif self.next_is("heads("):
            rules = [self.union()]
            while self.next_is(";"):
                rules.append(self.union())
            if self.next_is(")"):
                return PerHead(*rules)
        elif self.tokens:
            return self.leaf(self.tokens.pop(0))
        raise _wrong(self.text)

    def leaf(self, token: str) -> Rule:
        body, _, unit_text = token.partition("@")
        word, _, rest = body.partition(":")
        if word not in _FORMS or re.fullmatch(_FORMS[word], rest) is None:
            raise _wrong(self.text)
        if any(int(number) > FURTHEST for number in re.findall(r"\d+", rest)) and word not in ("csr", "random"):
            raise _wrong(self.text)
        unit = check_block_size(int(unit_text or self.block_size))
        if unit_text and word in ("local", "causal", "all", "tokens", "csr"):
            raise _wrong(self.text)
        if word in ("causal", "all"):
            return Local(None, 0 if word == "causal" else None)
        if word == "csr":
            return ExplicitBlocks(find_csr(rest))
        parts = rest.split(",")
        if word == "local":
            left, right = (None if part == "*" else int(part) for part in parts)
            return Local(left, right)
        if word == "random":
            amount = int(parts[0]) if parts[0].isdecimal() else float(parts[0])
            if amount <= 0 or (isinstance(amount, float) and amount > 1):
                raise _wrong(self.text)
            return Drawn(amount, int(parts[1]), unit)
        numbers = tuple(int(part) for part in parts)
        if word == "global":
            return GlobalBlocks(numbers, unit)
        if word == "tokens":
            return GlobalTokens(numbers)
        if (0 in numbers and word != "dilated") or numbers[-1] == 0:
            raise _wrong(self.text)
        if word == "dilated":
            return Dilation(numbers[0], numbers[1], unit)
        return Strides(numbers[0], unit) if word == "strided" else Hierarchy(numbers[0], unit)
