"""What the commands print with: results on stdout, everything else on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["fail", "note", "out", "quiet_stdout", "say", "table", "warn"]

PIPED_WIDTH = 120
"""Columns where stdout is no terminal and `COLUMNS` does not say."""


def out() -> Console:
    """Stdout. Made anew each time, since tests and shells exchange the stream."""
    return _console(sys.stdout)


def note() -> Console:
    """Stderr."""
    return _console(sys.stderr)


def _console(file: TextIO) -> Console:
    width = None if file.isatty() or os.environ.get("COLUMNS", "").isdigit() else PIPED_WIDTH
    return Console(file=file, width=width, highlight=False, markup=False, emoji=False)


def say(text: str, style: str = "") -> None:
    """A line on stdout, not broken by us: the terminal wraps it, and a pipe gets it whole."""
    out().print(Text(text, style), soft_wrap=True)


def fail(error: object) -> None:
    """`error: ...` on stderr."""
    note().print(Text.assemble(("error: ", "bold red"), (str(error), "red")), soft_wrap=True)


def warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """`warning: ...` on stderr, in place of Python's form with the line of code."""
    note().print(Text.assemble(("warning: ", "bold yellow"), str(message)), soft_wrap=True)


def table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str | Text]]) -> None:
    """A table on stdout. A column is a heading and whether it holds numbers: they stand right and are never broken."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for heading, is_number in columns:
        shown.add_column(
            Text(heading), justify="right" if is_number else "left", no_wrap=is_number, overflow="fold", vertical="top"
        )
    for row in rows:
        shown.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    out().print(shown)


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Whatever plugins print when imported or run goes to stderr, so that stdout is the command's alone.

    Native code prints to the file descriptor, past `sys.stdout`, so the descriptor is turned too, where there is one.
    """
    sys.stdout.flush()
    try:
        out, err = sys.__stdout__.fileno(), sys.__stderr__.fileno()  # type: ignore[union-attr]
        kept = os.dup(out)
    except (AttributeError, OSError, ValueError):  # no descriptors here, as under a test's capture
        with redirect_stdout(sys.stderr):
            yield
        return
    try:
        os.dup2(err, out)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, out)
        os.close(kept)
