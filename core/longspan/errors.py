"""The exceptions and warnings that longspan raises, all under one root, and the checks of plain values."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TypeGuard

__all__ = [
    "FURTHEST",
    "ArgumentError",
    "BackendUnavailable",
    "DuplicateBackend",
    "LongspanError",
    "PluginError",
    "PluginWarning",
    "PolicyError",
    "UnknownBackend",
    "brief",
    "check_integer",
    "check_number",
    "is_integer",
    "nearest",
    "warn_caller",
]

FURTHEST = 2**62
"""Beyond it there are no positions or lengths: sums of two of them are to fit into int64."""
OURS = ("longspan", "longspan_plugins", "torch")
"""Packages whose lines a reader of a warning cannot change: ours, and the one that may stand between."""


class LongspanError(Exception):
    """Root of every exception that longspan raises on purpose."""


class ArgumentError(LongspanError, ValueError):
    """An argument that no backend could honour: names it, what was given and what would do."""

    def __init__(self, argument: str, got: object, want: str, fix: str = "") -> None:
        self.argument, self.got, self.want, self.fix = argument, got, want, fix or f"pass {want}"
        super().__init__(f"{argument}: got {got}; want {want}. Next: {self.fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.argument, str(self.got), self.want, self.fix)


def brief(value: object) -> str:
    """`repr(value)` for an error's text: short, whatever is handed in, a tensor or an integer of a thousand digits."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({type(value).__name__})"


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known word that is most like a misspelt one; empty where none is alike enough (`cutoff`, from 0 to 1)."""
    return next(iter(get_close_matches(word, known, n=1, cutoff=cutoff)), "")


class PolicyError(LongspanError, ValueError):
    """A setting (environment variable, `longspan.use`) that cannot be read."""


class UnknownBackend(LongspanError, LookupError):
    """A backend name that nobody registered."""

    def __init__(self, name: str, known: Iterable[str], said_by: str) -> None:
        self.name, self.known, self.said_by = name, tuple(sorted(known)), said_by
        near = nearest(name, self.known, 0.5)
        hint = f" Did you mean {near!r}?" if near else ""
        step = "`longspan backends` lists them with their states"
        if name.lower() == "auto":
            step = "name no backend, and longspan chooses"
        super().__init__(
            f"backend {name!r} ({said_by}) is not registered.{hint} Known: {', '.join(self.known) or 'none'}. "
            f"Next: {step}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.known, self.said_by)


class BackendUnavailable(LongspanError, RuntimeError):
    """No backend, or not the one asked for, can serve the problem; `.resolution` holds every reason."""

    def __init__(self, message: str, resolution: object) -> None:
        self.message, self.resolution = message, resolution
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.resolution)


class PluginError(LongspanError, RuntimeError):
    """A plugin that does not keep the hook contract."""


class DuplicateBackend(PluginError):
    """Two plugins claim one name."""


class PluginWarning(UserWarning):
    """A plugin could not be loaded; the others were."""


def warn_caller(text: str, category: type[Warning]) -> None:
    """Warn of what the innermost line outside longspan and torch brought about, however deep the calls below it are.

    Python has `skip_file_prefixes` for this from 3.12 on.
    """
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] in OURS and frame.f_back is not None:
        frame = frame.f_back
    seen = frame.f_globals.setdefault("__warningregistry__", {})  # for "once a line", as `warnings.warn` keeps it
    module = frame.f_globals.get("__name__", "<unknown>")
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno, module, seen)


def check_number(name: str, value: object) -> float:
    """`value` as a finite float, or `ArgumentError`."""
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond every float
        raise ArgumentError(name, brief(value), "a finite number", "give a number that a float can hold") from None
    raise ArgumentError(name, brief(value), "a finite number")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, and not True or False, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_integer(
    name: str, value: object, least: int = 0, most: int = FURTHEST, fix: str = "give no more than the sequence has"
) -> int:
    """`value` as an integer from `least` to `most`, or `ArgumentError`; `fix` says what to do about one beyond."""
    if not is_integer(value) or value < least:
        raise ArgumentError(name, brief(value), f"an integer of at least {least}", f"e.g. {name}={max(least, 1)}")
    if value > most:
        said = "2**62" if most == FURTHEST else f"{most:,}"
        raise ArgumentError(name, brief(value), f"an integer of at most {said}", fix)
    return value
