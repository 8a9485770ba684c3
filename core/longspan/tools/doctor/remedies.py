"""What is to be fixed, and the line that does it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from attrs import evolve, frozen

from longspan.errors import nearest
from longspan.memory.folders import Unused
from longspan.registry.policy import is_name, names
from longspan.spec.backend import BackendInfo
from longspan.spec.installing import own_line, pip
from longspan.tools.doctor.ledger import Ledger
from longspan.tools.doctor.machine import Machine
from longspan.tools.doctor.settings import Setting

__all__ = ["Remedy", "remedies"]

OWN = "longspan"
"""The distribution of the built-in backends."""

LISTS = ("LONGSPAN_BACKEND", "LONGSPAN_PREFER", "LONGSPAN_BLOCK", "LONGSPAN_PLUGINS")
"""The variables that hold names."""


@frozen
class Remedy:
    """Something to fix. `lines`: shell commands (or Python, where the reason lies in a tensor), any one will do.

    `broken`: something that was to work does not; else it is an offer, and all is well without.
    """

    what: str
    lines: tuple[str, ...]
    broken: bool = True


def remedies(
    machine: Machine, ledger: Ledger, variables: tuple[Setting, ...], files: tuple[Unused, ...] = ()
) -> tuple[Remedy, ...]:
    """All of them, what is broken first."""
    listed = [*_settings(variables), *_names(ledger, variables), *_rows(ledger, variables)]
    listed += [Remedy(f"{file.path} {file.why}", (file.fix,), broken=file.broken) for file in files]
    listed += [
        Remedy(f"{local.name}: {local.why}", (local.fix,), broken=False) for local in machine.devices if local.why
    ]
    listed += [
        Remedy(f"{useless.backend} is installed and of no use here: {'; '.join(useless.texts)}", useless.fixes, False)
        for useless in ledger.unusable
        if useless.fixes
    ]
    listed += [
        Remedy(f"{row.name} works, and would be faster with {evolve(lack, fix='')}", (lack.fix,), broken=False)
        for row in ledger.rows
        for lack in row.lacks
        if lack.fix
    ]
    return tuple(sorted(listed, key=lambda remedy: not remedy.broken))


def _settings(variables: tuple[Setting, ...]) -> Iterator[Remedy]:
    for setting in variables:
        if setting.error:
            what = setting.error if setting.known else f"{setting.name}: {setting.error}"
            yield Remedy(what, (f"unset {setting.name}",), broken=setting.known)


def _names(ledger: Ledger, variables: tuple[Setting, ...]) -> Iterator[Remedy]:
    """Names in the environment that nobody has, and a backend asked for that cannot serve."""
    backends = {row.name for row in ledger.rows}
    owners = {row.distribution for row in ledger.rows if row.distribution} | {"builtin"}
    for setting in variables:
        if setting.name not in LISTS or setting.error:
            continue
        listed = names(setting.name, {setting.name: setting.value})
        known = backends | owners if setting.name == "LONGSPAN_PLUGINS" else backends
        for name in listed:
            if name in known or (known is not backends and _canonical(name) in map(_canonical, owners)):
                continue
            near = nearest(name, known, 0.5)
            hint = f"did you mean {near!r}?" if near else f"known are {', '.join(sorted(known))}"
            right = [near if word == name and near else word for word in listed if word != name or near]
            # Only the allow-list takes a name that nobody has.
            what = f"{setting.name}={setting.value}: {name!r} is nobody's name; {hint}"
            yield Remedy(what, (_export(setting.name, right),), broken=known is backends)
        if setting.name == "LONGSPAN_BACKEND" and listed and (why := _serves_nothing(listed[0], ledger)):
            yield Remedy(f"{setting.name}={setting.value}: {why}, so every call fails", (f"unset {setting.name}",))


def _canonical(name: str) -> str:
    """A distribution's name as the allow-list compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _serves_nothing(name: str, ledger: Ledger) -> str:
    states = [row.state for row in ledger.rows if row.name == name]
    if states and "loaded" not in states:
        return f"{name} is {states[0]}"
    return f"{name} serves no problem here" if name in {useless.backend for useless in ledger.unusable} else ""


def _rows(ledger: Ledger, variables: tuple[Setting, ...]) -> Iterator[Remedy]:
    claimed: dict[str, list[BackendInfo]] = {}
    for row in ledger.rows:
        what = f"{row.name} of {row.distribution} {row.version} is {row.state}: {row.error}"
        block = _export("LONGSPAN_BLOCK", [*_blocked(variables), row.name]) if is_name(row.name) else ""
        package = shlex.quote(row.distribution)
        if row.state == "loaded" and row.error:
            yield Remedy(f"{row.name} of {row.distribution} {row.version} {row.error}", (block,), broken=False)
        elif row.state == "duplicate":
            claimed.setdefault(row.name, []).append(row)
        elif row.state == "incompatible":
            yield Remedy(what, (f"{pip()} install --upgrade {package}", block))
        elif row.state == "broken" and row.name in ledger.releasable:
            yield Remedy(what, (f"longspan doctor --release {row.name}",))
        elif row.state == "broken" and row.distribution == OWN:
            yield Remedy(what, (own_line(),))
        elif row.state == "broken":
            lines = (f"{pip()} install --upgrade {package}", block) if block else (f"{pip()} uninstall {package}",)
            yield Remedy(what, lines)
    for name, same in claimed.items():
        third = [row.distribution for row in same if row.distribution != OWN]
        what = f"{name} is {same[0].error}"
        yield Remedy(what, tuple(f"{pip()} uninstall {shlex.quote(owner)}" for owner in third))


def _blocked(variables: tuple[Setting, ...]) -> list[str]:
    return [
        name
        for setting in variables
        if setting.name == "LONGSPAN_BLOCK" and not setting.error
        for name in names(setting.name)
    ]


def _export(variable: str, listed: list[str]) -> str:
    return f"export {variable}={','.join(dict.fromkeys(listed))}" if listed else f"unset {variable}"
