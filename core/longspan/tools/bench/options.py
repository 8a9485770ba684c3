"""What the benches' own options may hold."""

from __future__ import annotations

from argparse import ArgumentTypeError

__all__ = ["count", "duration", "positive"]


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
