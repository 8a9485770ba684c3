"""Entry points as they are read, and importing one: checked in full before its hooks are added.

What is refused leaves nothing behind.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Iterable
from contextlib import nullcontext
from importlib.metadata import Distribution, EntryPoint
from typing import Any

import pluggy
from attrs import evolve, frozen

from longspan.errors import PluginError, nearest
from longspan.registry import hookspecs
from longspan.registry.quarantine import Watch
from longspan.spec.backend import BackendInfo, Capabilities

__all__ = ["BUILTIN", "Entry", "Hooks", "Loader", "add_backend", "add_extension", "capabilities_of", "entries_of"]

BUILTIN = "longspan"
"""The distribution whose backends auto may take unasked."""


@frozen(eq=False)
class Entry:
    """An entry point with the name and the version of its distribution, both empty where it has none.

    `importlib.metadata` parses the metadata again at every question, hence these copies.
    """

    point: EntryPoint
    distribution: str = ""
    version: str = ""

    @property
    def name(self) -> str:
        """The backend's name, on the left of the entry point."""
        return self.point.name

    @property
    def owner(self) -> str:
        """The distribution with its version, for messages."""
        return f"{self.distribution} {self.version}".strip()

    def is_among(self, allowed: Iterable[str]) -> bool:
        """Whether an allow-list names the backend, `builtin`, or its distribution as pip would (PEP 503)."""
        words = {self.name, "builtin" if self.distribution == BUILTIN else self.name}
        return bool(words & set(allowed)) or _canonical(self.distribution) in map(_canonical, allowed)

    def row(self, state: str = "blocked", error: str = "") -> BackendInfo:
        """The ledger's row while it is not imported."""
        opt_in = self.distribution != BUILTIN
        return BackendInfo(self.name, state, self.distribution, self.version, opt_in=opt_in, error=error)

    def duplicate(self, same: Iterable[Entry]) -> BackendInfo:
        """The row of one of several entry points with one name."""
        owners = " and ".join(sorted(entry.owner for entry in same))
        error = f"claimed by {owners}. Next: uninstall one of them, or name the other in LONGSPAN_PLUGINS"
        return self.row("duplicate", error)


def entries_of(points: Iterable[EntryPoint]) -> list[Entry]:
    """Entry points by name and distribution; one that is listed twice by the same distribution counts once."""
    asked: dict[Distribution, tuple[str, str]] = {}
    entries: dict[tuple[str, str, str], Entry] = {}
    for point in points:
        distribution, version = "", ""
        if point.dist is not None:
            if point.dist not in asked:
                asked[point.dist] = _name_and_version(point.dist)
            distribution, version = asked[point.dist]
        entries.setdefault((point.name, point.value, distribution), Entry(point, distribution, version))
    return sorted(entries.values(), key=lambda entry: (entry.name, entry.distribution))


def _name_and_version(distribution: Distribution) -> tuple[str, str]:
    metadata = distribution.metadata  # without `get` before Python 3.12
    name, version = (metadata[key] if key in metadata else "" for key in ("Name", "Version"))  # noqa: SIM401
    return name, version


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


HOOKS = tuple(hook for hook in vars(hookspecs) if hook.startswith("longspan_"))


class Hooks(pluggy.PluginManager):
    """A plugin manager that has the hook specifications."""

    def __init__(self) -> None:
        super().__init__(hookspecs.PROJECT)
        self.add_hookspecs(hookspecs)

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> pluggy.HookimplOpts | None:
        """As pluggy; most of what a module holds is no function, and pluggy looks at each through `inspect`."""
        if inspect.ismodule(plugin) and name in vars(plugin) and not inspect.isroutine(vars(plugin)[name]):
            return None
        return super().parse_hookimpl_opts(plugin, name)


class Loader:
    """Imports entry points into a plugin manager, for the time of one discovery."""

    def __init__(self, manager: Hooks) -> None:
        self._manager, self._watch, self._contract = manager, Watch(), _Contract()

    def load(self, entry: Entry) -> BackendInfo:
        """Import one entry point, and say what became of it. Our own modules crash nothing and are not watched."""
        row, start = entry.row(), time.perf_counter()
        watched = row.distribution not in ("", BUILTIN)
        if watched and (crash := self._watch.crash(row.name, row.distribution, row.version)):
            return evolve(row, state="broken", error=str(crash))
        try:
            with self._watch.importing(row.name, row.distribution, row.version) if watched else nullcontext():
                row = add_backend(self._manager, entry.point.load(), evolve(row, state="loaded"), self._contract)
        except _Incompatible as error:
            row = evolve(row, state="incompatible", error=str(error))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a plugin does on import, the others go on
            row = evolve(row, state="broken", error=f"{type(error).__name__}: {error}")
        return evolve(row, import_ms=round(1e3 * (time.perf_counter() - start), 3))

    def close(self) -> None:
        """End the watch over imports: nothing more is imported."""
        self._watch.close()


class _Contract:
    """The hook specifications in a scratch manager, in which plugins are tried one after the other."""

    def __init__(self) -> None:
        self._scratch: Hooks | None = None

    def check(self, plugin: Any, name: str) -> None:
        scratch, self._scratch = self._scratch or Hooks(), None  # one that saw a refusal is not used again
        try:
            scratch.register(plugin, name)
            scratch.check_pending()
        except pluggy.PluginValidationError as error:
            words = str(error).replace("'", " ").replace("(", " ").split()
            near = [match for word in words if word not in HOOKS and (match := nearest(word, HOOKS))]
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise PluginError(f"{error}.{hint} Next: use one of {', '.join(HOOKS)}") from error
        if not scratch.get_hookcallers(plugin):
            raise PluginError(
                f"{type(plugin).__name__} implements no hook. Next: mark functions with longspan.hookimpl"
            )
        scratch.unregister(name=name)
        self._scratch = scratch


class _Incompatible(PluginError):
    """The plugin was written for another version of the hook contract."""


def add_backend(manager: Hooks, plugin: Any, row: BackendInfo, contract: _Contract | None = None) -> BackendInfo:
    """Check a backend in full, and only then add it to the manager; the row with what it says of itself.

    Raises:
        PluginError: it does not keep the hook contract.
    """
    if not hasattr(plugin, "longspan_capabilities"):
        raise PluginError("no longspan_capabilities hook. Next: see the ten-line backend in the README")
    if inspect.isclass(plugin):
        raise PluginError(f"{plugin.__name__} is a class. Next: pass an object of it")
    can = capabilities_of(plugin)
    if can.api != hookspecs.API:
        raise _Incompatible(f"written for api={can.api}, this longspan has api={hookspecs.API}. Next: update either")
    row = evolve(row, description=_summary(plugin), capabilities=can, opt_in=row.opt_in or can.opt_in)
    add_extension(manager, plugin, row.name, contract)
    return row


def capabilities_of(plugin: Any) -> Capabilities:
    """What a plugin declares.

    Raises:
        PluginError: its hook raises, or returns something else.
    """
    try:
        can = plugin.longspan_capabilities()
    except Exception as error:
        raise PluginError(f"longspan_capabilities: {type(error).__name__}: {error}. Next: fix the plugin") from error
    if not isinstance(can, Capabilities):
        raise PluginError(
            f"longspan_capabilities() returned {type(can).__name__}. Next: return a longspan.Capabilities"
        )
    return can


def add_extension(manager: Hooks, plugin: Any, name: str, contract: _Contract | None = None) -> None:
    """Check a plugin's hooks, and only then add them to the manager.

    Raises:
        PluginError: one is none of ours, or there is none.
    """
    try:
        hash(plugin)
    except TypeError as error:
        raise PluginError(f"{type(plugin).__name__} has no hash. Next: compare its objects by identity") from error
    if other := manager.get_name(plugin):
        raise PluginError(f"this plugin is registered as {other!r} already. Next: pass another object")
    (contract or _Contract()).check(plugin, name)
    manager.register(plugin, name)


def _summary(plugin: object) -> str:
    return next(iter((getattr(plugin, "__doc__", None) or "").strip().splitlines()), "")
