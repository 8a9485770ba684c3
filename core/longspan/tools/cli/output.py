"""What the commands print with: results on stdout, everything else on stderr.

On a terminal, lines are broken between words at its width; a pipe gets them whole. What the stream's encoding lacks is
written in ASCII.
"""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from longspan.errors import ArgumentError
from longspan.tools.cli.tables import render, wrap

__all__ = [
    "check_writable",
    "console_of",
    "fail",
    "held_warnings",
    "is_terminal",
    "lines",
    "note",
    "out",
    "plain_streams",
    "quiet_stdout",
    "say",
    "table",
    "warn",
    "write",
]

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it: 128 and the signal's number."""
PIPED_WIDTH = 120
"""Columns of a table where stdout is no terminal and `COLUMNS` does not say."""
ERRORS = "longspan"
"""Our way to write what an encoding lacks, by Python's name for such ways."""
ASCII = {"×": "x", "−": "-", "─": "-", "━": "-", "│": "|", "•": "*", "…": ".", "≤": "<", "≥": ">"}
"""Each as wide as what it stands for."""

_held: list[Text] | None = None
"""Warnings that wait while a bar is drawn on the terminal."""


def plain_streams() -> None:
    """Have stdout and stderr write in ASCII what their encoding lacks, rather than raise."""
    codecs.register_error(ERRORS, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a test's or a notebook's stream may have none
        if reconfigure is not None:
            reconfigure(errors=ERRORS)


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(ASCII.get(sign) or ascii(sign)[1:-1] for sign in lacking), error.end


def out() -> Console:
    """Stdout. Made anew each time, since tests and shells exchange the stream."""
    return console_of(sys.stdout)


def note() -> Console:
    """Stderr."""
    return console_of(sys.stderr)


@contextmanager
def held_warnings() -> Iterator[list[Text]]:
    """Within the block, warnings wait in the list that is yielded; whoever asked for it shows them."""
    global _held
    before, _held = _held, []
    try:
        yield _held
    finally:
        _held = before


def console_of(file: TextIO) -> Console:
    """A console that prints what it is given, without rich's markup."""
    width = None if file.isatty() or os.environ.get("COLUMNS", "").isdigit() else PIPED_WIDTH
    return Console(file=file, width=width, highlight=False, markup=False, emoji=False)


def is_terminal(file: TextIO) -> bool:
    """Whether a line can be drawn over again there. Colours in a pipe (`FORCE_COLOR`) make no terminal of it."""
    return file.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def say(text: str, style: str = "") -> None:
    """A line on stdout.

    Args:
        text: without markup. Lines after the first are indented as the first is.
        style: rich's words for it.
    """
    write(out(), text, style)


def write(console: Console, text: str | Text, style: str = "") -> None:
    """A line on a console, broken between words where that is a terminal."""
    line = Text(text, style) if isinstance(text, str) else text
    if not console.file.isatty():
        lines(console, [line])
        return
    indent = len(line.plain) - len(line.plain.lstrip(" "))
    lines(console, wrap(line, console.width, indent))


def lines(console: Console, given: Sequence[Text]) -> None:
    """Lines as they are."""
    for line in given:
        console.print(line, soft_wrap=True)


def fail(error: object) -> None:
    """`error: ...` on stderr."""
    write(note(), Text.assemble(("error: ", "bold red"), (str(error), "red")))


def warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """`warning: ...` on stderr, in place of Python's form with the line of code."""
    line = Text.assemble(("warning: ", "bold yellow"), str(message))
    if _held is None:
        write(note(), line)
    else:
        _held.append(line)


def table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str | Text]]) -> None:
    """A table on stdout, never wider than it and without a broken word: see `longspan.tools.cli.tables`.

    A column is a heading and whether it holds numbers, which stand right. Where the last column is a text that has no
    room beside the others, it stands beneath its row.
    """
    console = out()
    lines(console, render(columns, rows, console.width, rule="─"))


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold.

    Raises:
        ArgumentError: why it cannot.
    """
    existed = path.exists()
    try:
        with path.open("a", encoding="utf-8"):
            pass
        if not existed:
            path.unlink()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ArgumentError("--output", f"{path}: {why}", "a file that can be written") from None


@contextmanager
def quiet_stdout() -> Iterator[TextIO]:
    """Whatever plugins print when imported or run goes to stderr, so that stdout is the command's alone: it is yielded.

    Native code prints to the file descriptor, past `sys.stdout`, so the descriptor is turned too, where there is one.
    """
    before = sys.stdout
    before.flush()
    try:
        out, err = sys.__stdout__.fileno(), sys.__stderr__.fileno()  # type: ignore[union-attr]
        kept = os.dup(out)
    except (AttributeError, OSError, ValueError):  # no descriptors here, as under a test's capture
        with redirect_stdout(sys.stderr):
            yield before
        return
    try:
        os.dup2(err, out)
        with _reopened(before, kept) as own, redirect_stdout(sys.stderr):
            yield own
    finally:
        os.dup2(kept, out)
        os.close(kept)


@contextmanager
def _reopened(stream: TextIO, descriptor: int) -> Iterator[TextIO]:
    """A stream that writes where `descriptor` does; the stream itself where it never wrote to a descriptor."""
    if stream is not sys.__stdout__:
        yield stream
        return
    own = os.fdopen(os.dup(descriptor), "w", encoding=stream.encoding, errors=stream.errors)
    try:
        yield own
    finally:
        with suppress(BrokenPipeError):  # said already, by whoever wrote
            own.close()
