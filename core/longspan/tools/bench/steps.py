"""A bench as a list of steps: each is announced, and after Ctrl-C what was measured before is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["OnStep", "Step", "perform", "silent"]

OnStep = Callable[[str, int, int], None]
"""Called when a step begins: what it is, how many are done, and of how many."""
Step = tuple[str, Callable[[], object]]


def silent(*_: object) -> None:
    """No progress is shown."""


def perform(steps: Sequence[Step], on_step: OnStep) -> bool:
    """Run the steps in order; False where the user interrupted one (KeyboardInterrupt), which is then the last."""
    for done, (words, step) in enumerate(steps):
        on_step(words, done, len(steps))
        try:
            step()
        except KeyboardInterrupt:
            return False
    return True
