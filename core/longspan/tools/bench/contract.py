"""What a bench is, how its options are read and its steps performed, and which there are."""

from __future__ import annotations

import pkgutil
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

from longspan.errors import ArgumentError, nearest
from longspan.tools import bench

__all__ = ["Bench", "OnStep", "Step", "benches", "count", "duration", "find", "perform", "positive", "silent"]

OnStep = Callable[[str, int, int], None]
"""Called when a step begins: what it is, how many are done, and of how many."""
Step = tuple[str, Callable[[], object]]


def silent(*_: object) -> None:
    """No progress is shown."""


class Bench(Protocol):
    """A module that measures something."""

    NAME: str
    HELP: str

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Its own options."""

    def run(self, args: Namespace, on_step: OnStep = silent) -> dict[str, Any]:
        """Measure: plain values for JSON. `complete`: False where Ctrl-C ended it; the rest is what there was."""


def benches() -> Iterator[Bench]:
    """All benches, by name."""
    for info in pkgutil.iter_modules(bench.__path__, "longspan.tools.bench."):
        module = import_module(info.name)
        if hasattr(module, "NAME"):
            yield cast(Bench, module)


def find(name: str) -> Bench:
    """The bench of this name.

    Raises:
        ArgumentError: there is none.
    """
    known = {listed.NAME: listed for listed in benches()}
    if name not in known:
        near = nearest(name, known)
        fix = f"longspan bench {near}" if near else "longspan bench"
        raise ArgumentError("bench", repr(name), " or ".join(known), fix)
    return known[name]


def perform(steps: Sequence[Step], on_step: OnStep) -> bool:
    """Run the steps in order; False where the user interrupted one (KeyboardInterrupt), which is then the last."""
    for done, (words, step) in enumerate(steps):
        on_step(words, done, len(steps))
        try:
            step()
        except KeyboardInterrupt:
            return False
    return True


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def count(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def duration(text: str) -> float:
    """A duration above 0."""
    try:
        if 0 < (number := float(text)) < 1e9:
            return number
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text!r} is no number of seconds above 0")


def _whole(text: str, least: int) -> int:
    if text.isdecimal() and text.isascii() and len(text) < 16 and int(text) >= least:
        return int(text)
    raise ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
