"""`SlidingWindow`: keys at most so far away."""

from __future__ import annotations

from typing import Any, ClassVar

from attrs import frozen

from longspan.errors import ArgumentError, brief
from longspan.spec.pattern import FURTHEST, Pattern

__all__ = ["SlidingWindow"]


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
        """The kind, and how far the window reaches to the left and to the right."""
        return self.kind, [self.left, self.right]
