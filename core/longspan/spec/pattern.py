"""What every pattern is: a frozen value that says which keys a query may see. And the one that says: all of them."""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

__all__ = ["Dense", "Pattern"]


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
