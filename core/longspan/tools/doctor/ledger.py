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
from longspan.tools.doctor.isolation import IsolatedImport, import_isolated
from longspan.tools.doctor.settings import in_environment
from longspan.tools.doctor.usability import Unusable, unusable

__all__ = ["Ledger", "isolated_ledger", "local_ledger"]


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


def local_ledger(devices: tuple[Device, ...], environ: Mapping[str, str]) -> Ledger:
    """Import every backend that this environment lets in, in this process."""
    crashed = _crashed()
    with in_environment(environ) as changed, warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # what is broken is reported
        # The process's own registry is not to remember an environment that it never had.
        backends = Registry() if changed else registry
        rows = backends.backends()
        useless = [unusable(candidate, devices) for candidate in backends.candidates()]
    releasable = tuple(row.name for row in rows if row.state == "broken" and _key(row) in crashed)
    return Ledger(rows, tuple(backend for backend in useless if backend is not None), releasable)


def isolated_ledger(devices: tuple[Device, ...], environ: Mapping[str, str], timeout: float) -> Ledger:
    """Import each in an interpreter of its own, a few at once; those in quarantine too, as they can do no harm there.

    Raises:
        PluginError: this Python does not know its own executable.
    """
    crashed, sorter = _crashed(), _Deferred()
    with in_environment(environ), warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)
        rows = sorter.backends()
    apart = {_key(imported.row): imported for imported in import_isolated(sorter.entries, devices, environ, timeout)}
    releasable = [key[0] for key, imported in apart.items() if key in crashed and imported.row.state == "loaded"]
    rows = tuple(_merged(row, apart.get(_key(row)), crashed.get(_key(row))) for row in rows)
    return Ledger(
        rows,
        tuple(imported.unusable for imported in apart.values() if imported.unusable is not None),
        tuple(releasable),
    )


def _merged(row: BackendInfo, apart: IsolatedImport | None, crash: quarantine.Crash | None) -> BackendInfo:
    """The row with what an interpreter of its own made of it."""
    if apart is None:  # kept out, or a duplicate
        return row
    if crash is None or apart.row.state != "loaded":
        return apart.row
    return evolve(apart.row, state="broken", error=f"{crash} (just now it was imported apart, and did not crash)")


def _crashed() -> dict[tuple[str, str, str], quarantine.Crash]:
    return {(crash.name, crash.distribution, crash.version): crash for crash in quarantine.crashes()}


def _key(row: BackendInfo) -> tuple[str, str, str]:
    return row.name, row.distribution, row.version
