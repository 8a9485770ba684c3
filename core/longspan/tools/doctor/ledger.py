"""The ledger as the doctor sees it: backends loaded here, or each imported in an interpreter of its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from attrs import evolve, frozen

from longspan.errors import PluginWarning
from longspan.registry import quarantine
from longspan.registry.discovery import Registry, registry
from longspan.registry.loading import Entry, Loader
from longspan.spec.backend import BackendInfo
from longspan.spec.device import Device
from longspan.tools.doctor.isolation import Apart, import_apart
from longspan.tools.doctor.settings import in_environment
from longspan.tools.doctor.usability import Unusable, unusable

__all__ = ["Ledger", "ledger_apart", "ledger_here"]


@frozen
class Ledger:
    """Every row, what is of no use here, and the names of those in quarantine that may be released."""

    rows: tuple[BackendInfo, ...]
    unusable: tuple[Unusable, ...]
    releasable: tuple[str, ...] = ()


class _Deferred(Registry):
    """Sorts entry points as discovery does and imports none; `entries` are those that it would have imported."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []

    def load(self, entry: Entry, loader: Loader) -> BackendInfo:
        self.entries.append(entry)
        return entry.row()


def ledger_here(devices: tuple[Device, ...], environ: Mapping[str, str]) -> Ledger:
    """Import every backend that this environment lets in, in this process."""
    crashed = _crashed()
    with in_environment(environ) as changed, warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # what is broken is reported
        # The process's own registry is not to remember an environment that it never had.
        backends = Registry() if changed else registry
        rows = backends.backends()
        found = [unusable(candidate, devices) for candidate in backends.candidates()]
    releasable = tuple(row.name for row in rows if row.state == "broken" and _key(row) in crashed)
    return Ledger(rows, tuple(one for one in found if one is not None), releasable)


def ledger_apart(devices: tuple[Device, ...], environ: Mapping[str, str], timeout: float) -> Ledger:
    """Import each in an interpreter of its own, a few at once; those in quarantine too, as they can do no harm there.

    Raises:
        PluginError: this Python does not know its own executable.
    """
    crashed, sorter = _crashed(), _Deferred()
    with in_environment(environ), warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)
        rows = sorter.backends()
    apart = {_key(one.row): one for one in import_apart(sorter.entries, devices, environ, timeout)}
    releasable = [key[0] for key, one in apart.items() if key in crashed and one.row.state == "loaded"]
    rows = tuple(_told(row, apart.get(_key(row)), crashed.get(_key(row))) for row in rows)
    return Ledger(rows, tuple(one.unusable for one in apart.values() if one.unusable is not None), tuple(releasable))


def _told(row: BackendInfo, apart: Apart | None, crash: quarantine.Crash | None) -> BackendInfo:
    """The row with what an interpreter of its own made of it."""
    if apart is None:  # kept out, or a duplicate
        return row
    if crash is None or apart.row.state != "loaded":
        return apart.row
    return evolve(apart.row, state="broken", error=f"{crash} (just now it was imported apart, and did not crash)")


def _crashed() -> dict[tuple[str, str, str], quarantine.Crash]:
    return {(one.name, one.distribution, one.version): one for one in quarantine.crashes()}


def _key(row: BackendInfo) -> tuple[str, str, str]:
    return row.name, row.distribution, row.version
