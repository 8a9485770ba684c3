"""`SlidingWindow`: keys at most so far away."""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from longspan.errors import check_integer
from longspan.spec.pattern import Pattern

__all__ = ["SlidingWindow"]


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
        self.__dict__.update(left=check_integer("left", left), right=check_integer("right", right))

    @property
    def spec(self) -> str:
        """`window:left,right`."""
        return f"window:{self.left},{self.right}"

    @property
    def code(self) -> tuple[str, list[int]]:
        """The kind, and how far the window reaches to the left and to the right."""
        return self.kind, [self.left, self.right]
