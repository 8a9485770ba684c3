"""The environment variables in force, those that cannot be read and those that name nothing among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from attrs import frozen

from longspan.errors import PolicyError, nearest
from longspan.registry.policy import flag, names

__all__ = ["Setting", "in_environment", "readable", "settings"]


def _one(variable: str, environ: Mapping[str, str]) -> object:
    if len(given := names(variable, environ)) > 1:
        raise PolicyError(f"{variable}={environ[variable]!r}: want one name. Next: use LONGSPAN_PREFER for an order")
    return given


READERS: dict[str, Callable[[str, Mapping[str, str]], object]] = {
    "LONGSPAN_BACKEND": _one,
    "LONGSPAN_PREFER": names,
    "LONGSPAN_BLOCK": names,
    "LONGSPAN_PLUGINS": names,
    "LONGSPAN_STRICT": flag,
    "LONGSPAN_CACHE": lambda variable, environ: environ[variable],
}
"""Every variable that longspan reads, and how."""


@frozen
class Setting:
    """An environment variable that is set. `error` says why it cannot be read; `known`: longspan reads it."""

    name: str
    value: str
    error: str = ""
    known: bool = True


def settings(environ: Mapping[str, str] = os.environ) -> tuple[Setting, ...]:
    """Every variable whose name begins with `LONGSPAN_`, by name."""
    return tuple(_setting(name, environ) for name in sorted(environ) if name.startswith("LONGSPAN_"))


def _setting(name: str, environ: Mapping[str, str]) -> Setting:
    value = environ[name]
    if name not in READERS:
        near = nearest(name, READERS)
        hint = f"Did you mean {near}?" if near else f"It reads {', '.join(READERS)}."
        return Setting(name, value, f"longspan reads no such variable. {hint}", known=False)
    try:
        READERS[name](name, environ)
    except PolicyError as error:
        return Setting(name, value, str(error))
    return Setting(name, value)


def readable(variables: tuple[Setting, ...], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """An environment in which backends can be listed: nothing in it raises.

    Where the block or the allow-list cannot be read, only built-in backends are let in: of the others nobody knows
    which were to be kept out.
    """
    unread = {setting.name for setting in variables if setting.error and setting.known}
    made = {name: value for name, value in environ.items() if name not in unread | {"LONGSPAN_STRICT"}}
    if unread & {"LONGSPAN_BLOCK", "LONGSPAN_PLUGINS"}:
        made["LONGSPAN_PLUGINS"] = "builtin"
    return made


@contextmanager
def in_environment(environ: Mapping[str, str]) -> Iterator[bool]:
    """Put these `LONGSPAN_` variables in place of the process's for a block; gives whether any differ."""
    before = _put(environ)
    try:
        yield before != _ours(os.environ)
    finally:
        _put(before)


def _put(wanted: Mapping[str, str]) -> dict[str, str]:
    before, after = _ours(os.environ), _ours(wanted)
    for name in before.keys() - after.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in after.items() if before.get(name) != value})
    return before


def _ours(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith("LONGSPAN_")}
