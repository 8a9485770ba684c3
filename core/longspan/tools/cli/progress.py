"""Where a command works for long: its steps as a bar on a terminal, as lines elsewhere, and results as they come.

While a bar is drawn, nothing prints over it: warnings wait, and what goes to the process's descriptors past us (torch's
notices, a compiler's) is kept in a file. Both are shown when the work is over, however it ends.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TextIO

from rich import progress as bars
from rich.text import Text

from longspan.tools.cli import output

__all__ = ["Progress", "progress"]

BAR = 12
REST = 34
"""Columns of a line that the bar, the count and the clock take."""


class Progress:
    """Steps as lines on stderr; `console`, for results, is the command's stdout."""

    def __init__(self, results: TextIO) -> None:
        self.console = output.console_of(results)

    def step(self, what: str, done: int, total: int) -> None:
        """A step begins: what it is, how many are done, and of how many (0: unknown)."""
        output.note().print(Text(f"[{done + 1}/{total or '?'}] {what}"), soft_wrap=True)


class _Bar(Progress):
    """Steps as a bar on the terminal; results on stdout, above the bar where that is the same terminal."""

    def __init__(self, results: TextIO, bar: bars.Progress) -> None:
        super().__init__(results)
        self._bar, self._task = bar, bar.add_task("starting", total=None)
        if _same_terminal(results, bar.console.file):
            self.console = bar.console

    def step(self, what: str, done: int, total: int) -> None:
        room = max(10, self._bar.console.width - REST)
        short = what if len(what) <= room else what[: room - 3] + "..."
        self._bar.update(self._task, description=short, completed=done, total=total or None)


def _same_terminal(one: IO[str], other: IO[str]) -> bool:
    try:
        return one.isatty() and os.fstat(one.fileno()).st_rdev == os.fstat(other.fileno()).st_rdev
    except (OSError, ValueError):
        return False


@contextmanager
def progress() -> Iterator[Progress]:
    """While a command works: nobody else prints on stdout, and progress is shown on stderr."""
    own = sys.stderr is sys.__stderr__  # and not a test's or a notebook's
    if own and output.is_terminal(sys.stderr):
        with _drawn() as made:
            yield made
        return
    with output.quiet_stdout() as results:
        yield Progress(results)


@contextmanager
def _drawn() -> Iterator[Progress]:
    with output.quiet_stdout() as results, _terminal_of_its_own() as terminal:
        console = output.console_of(terminal)
        description = bars.TextColumn("{task.description}")
        columns = (bars.BarColumn(BAR), bars.MofNCompleteColumn(), bars.TimeElapsedColumn(), description)
        # A bar that is drawn often would take its share of the cores that are being timed.
        with bars.Progress(
            *columns, console=console, transient=True, refresh_per_second=4, redirect_stdout=False,
            redirect_stderr=False,
        ) as bar:  # fmt: skip
            yield _Bar(results, bar)


@contextmanager
def _terminal_of_its_own() -> Iterator[TextIO]:
    """Stderr for us alone; what others print there, and their warnings, come when the block is over."""
    err = sys.stderr.fileno()
    out = sys.__stdout__.fileno() if sys.__stdout__ is not None else err  # it stands for stderr meanwhile
    own = os.dup(err)
    try:
        with (
            tempfile.TemporaryFile("a+b") as kept,
            output.held_warnings() as warnings,
            os.fdopen(os.dup(own), "w", encoding=sys.stderr.encoding, errors=output.ERRORS) as terminal,
        ):
            try:
                for descriptor in (err, out):
                    os.dup2(kept.fileno(), descriptor)
                yield terminal
            finally:
                sys.stderr.flush()
                for descriptor in (err, out):
                    os.dup2(own, descriptor)
                kept.seek(0)
                console = output.console_of(terminal)
                for line in [*warnings, *_lines(kept.read())]:
                    output.write(console, line)
    finally:
        os.close(own)


def _lines(printed: bytes) -> Iterator[Text]:
    """What was printed, without what a carriage return wrote over."""
    for line in printed.decode("utf-8", "replace").splitlines():
        if text := line.rsplit("\r", 1)[-1].rstrip():
            yield Text.from_ansi(text)
