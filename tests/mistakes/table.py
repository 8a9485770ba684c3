"""The table that the mistakes enter themselves into."""

from __future__ import annotations

from attrs import frozen

__all__ = ["TABLE", "Mistake", "mistake"]


@frozen
class Mistake:
    """A backend with one mistake.

    Args:
        wrong: what is wrong, in words.
        claim: what the claim that the kit finds broken says, or a part of it.
        backend: the plugin's class.
        full_only: why the quick cases cannot show it, where they cannot.
    """

    wrong: str
    claim: str
    backend: type
    full_only: str = ""

    @property
    def name(self) -> str:
        """The class's name."""
        return self.backend.__name__


TABLE: list[Mistake] = []


def mistake(wrong: str, claim: str, full_only: str = ""):
    """Enter a class into the table."""

    def enter(backend: type) -> type:
        TABLE.append(Mistake(wrong, claim, backend, full_only))
        return backend

    return enter
