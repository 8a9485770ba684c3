"""Which benches there are: every module of this package that has a `NAME`."""

from __future__ import annotations

import pkgutil
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Protocol, cast

from longspan.errors import ArgumentError, nearest
from longspan.tools import bench
from longspan.tools.bench.steps import OnStep, silent

__all__ = ["Bench", "benches", "find"]


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
