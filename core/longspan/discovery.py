"""Finding backends: entry points read before import, one broken plugin never in the way of the others.

pluggy's own loader stops at the first broken entry point and drops duplicates in directory order, hence this loop. It
runs at the first plan or listing, never at `import longspan`, and keeps a ledger row for every entry point it saw.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
from attrs import evolve

from longspan import hookspecs
from longspan.defaults import Defaults
from longspan.errors import DuplicateBackend, PluginError, PluginWarning
from longspan.policy import flag, names
from longspan.spec import BackendInfo, Candidate, Capabilities, Problem, Reason

__all__ = ["GROUP", "Registry", "registry"]

GROUP = "longspan.backends"
BUILTIN = "longspan"
"""The distribution whose backends auto may take unasked."""


class Registry:
    """All backends of this process, and the plugin manager that holds their hooks.

    Thread-safe. `generation` grows with every change, so that whoever keeps a plan can tell that it is out of date.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._manager = _new_manager()
        self._ledger: dict[str, BackendInfo] = {}
        self._extra: list[BackendInfo] = []  # rows that share a name with another
        self._found = False
        self.generation = 0

    # -- reading

    def backends(self) -> tuple[BackendInfo, ...]:
        """The ledger, broken plugins included, by name."""
        self.discover()
        return tuple(sorted([*self._ledger.values(), *self._extra], key=lambda row: (row.name, row.distribution)))

    def candidates(self) -> tuple[Candidate, ...]:
        """What the resolver weighs: one candidate a name."""
        self.discover()
        with self._lock:
            rows = sorted(self._ledger.values(), key=lambda row: row.name)
            return tuple(
                Candidate(row, _Unsupported(self.lane(row.name, "longspan_unsupported")))
                if row.state == "loaded"
                else Candidate(row)
                for row in rows
            )

    def capabilities(self, name: str) -> Capabilities:
        """What a loaded backend declared.

        Raises:
            PluginError: the backend is not loaded.
        """
        self.discover()
        with self._lock:
            row = self._ledger.get(name)
        if row is None or row.capabilities is None:
            raise PluginError(f"backend {name!r} is not loaded. Next: see `longspan backends`")
        return row.capabilities

    def lane(self, name: str, hook: str) -> pluggy.HookCaller:
        """One hook as this backend sees it: its own implementation, wrappers and extensions, then the core's default.

        Raises:
            PluginError: the backend is not loaded.
        """
        with self._lock:
            if name not in self._ledger or not self._manager.has_plugin(name):
                raise PluginError(f"backend {name!r} is not loaded. Next: see `longspan backends`")
            others = [
                plugin
                for other, plugin in self._manager.list_name_plugin()
                if other != name and other in self._ledger and plugin is not None
            ]
            return self._manager.subset_hook_caller(hook, others)

    # -- writing

    def register(self, plugin: object, name: str) -> None:
        """Add a plugin of this process: a module or an object with hook implementations.

        With `longspan_capabilities` it is a backend; without, an extension whose hooks apply to every backend.

        Raises:
            DuplicateBackend: the name is taken.
            PluginError: the plugin does not keep the hook contract.
        """
        self.discover()
        with self._lock:
            if name in self._ledger or self._manager.has_plugin(name):
                raise DuplicateBackend(
                    f"{name!r} is taken by {_whose(self._ledger.get(name))}. Next: give another name, or "
                    f"longspan.unregister({name!r}) first"
                )
            row = BackendInfo(name, "loaded", description=_summary(plugin))
            if hasattr(plugin, "longspan_capabilities"):
                self._ledger[name] = _commit(self._manager, plugin, row)
            else:
                _verify(plugin, name)
                self._manager.register(plugin, name)
            self.generation += 1

    def unregister(self, name: str) -> None:
        """Remove a plugin by name.

        Raises:
            PluginError: there is none of this name.
        """
        self.discover()
        with self._lock:
            if not self._manager.has_plugin(name) and name not in self._ledger:
                raise PluginError(f"nothing is registered as {name!r}. Next: `longspan backends` lists what is")
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            self._ledger.pop(name, None)
            self.generation += 1

    def discover(self) -> None:
        """Read the entry points, once.

        Raises:
            PluginError: a plugin is broken and `LONGSPAN_STRICT` is set.
            PolicyError: an environment variable cannot be read.
        """
        if self._found:
            return
        with self._lock:
            if not self._found:  # nobody was faster
                self._discover()

    def _discover(self) -> None:
        strict, allowed, blocked = flag("LONGSPAN_STRICT"), names("LONGSPAN_PLUGINS"), names("LONGSPAN_BLOCK")
        by_name: dict[str, list[EntryPoint]] = defaultdict(list)
        for point in _points():
            by_name[point.name].append(point)
        manager = _new_manager()
        ledger: dict[str, BackendInfo] = {}
        extra: list[BackendInfo] = []
        for name, points in sorted(by_name.items()):
            rows = [_load(manager, point, allowed, blocked, len(points) > 1) for point in points]
            ledger[name] = rows[0]
            extra += rows[1:]
        for row in [*ledger.values(), *extra]:
            if row.state in ("broken", "duplicate", "incompatible"):
                _complain(row, strict)
        self._manager, self._ledger, self._extra = manager, ledger, extra
        self._found = True
        self.generation += 1


class _Unsupported:
    """A backend's `longspan_unsupported` as a plain function."""

    def __init__(self, hook: pluggy.HookCaller) -> None:
        self._hook = hook

    def __call__(self, problem: Problem) -> Iterable[Reason]:
        return tuple(self._hook(problem=problem) or ())


class _Incompatible(PluginError):
    """The plugin was written for another version of the hook contract."""


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(Defaults(), "longspan-defaults")
    return manager


def _points() -> list[EntryPoint]:
    """Entry points of the group; one that is listed twice by the same distribution counts once."""
    found: dict[tuple[str, str, str], EntryPoint] = {}
    for point in entry_points(group=GROUP):
        found.setdefault((point.name, point.value, point.dist.name if point.dist else ""), point)
    return list(found.values())


def _load(
    manager: pluggy.PluginManager, point: EntryPoint, allowed: tuple[str, ...], blocked: tuple[str, ...], twice: bool
) -> BackendInfo:
    """Import one entry point, unless it may not be, and say what became of it."""
    distribution = point.dist.name if point.dist else ""
    row = BackendInfo(
        point.name, "blocked", distribution, point.dist.version if point.dist else "", opt_in=distribution != BUILTIN
    )
    if point.name in blocked:
        return evolve(row, error="blocked by LONGSPAN_BLOCK")
    if allowed and not {point.name, distribution, "builtin" if distribution == BUILTIN else ""} & set(allowed):
        return evolve(row, error=f"not among LONGSPAN_PLUGINS={','.join(allowed)}")
    if twice:
        return evolve(row, state="duplicate", error=_duplicate(point.name))
    start = time.perf_counter()
    try:
        plugin = point.load()
        row = evolve(row, state="loaded", description=_summary(plugin))
        row = _commit(manager, plugin, row)
    except _Incompatible as error:
        row = evolve(row, state="incompatible", error=str(error))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a plugin does on import, the others go on
        row = evolve(row, state="broken", error=f"{type(error).__name__}: {error}")
    return evolve(row, import_ms=round(1e3 * (time.perf_counter() - start), 3))


def _commit(manager: pluggy.PluginManager, plugin: object, row: BackendInfo) -> BackendInfo:
    """Check a backend in full, and only then add it to the manager."""
    if not hasattr(plugin, "longspan_capabilities"):
        raise PluginError("no longspan_capabilities hook. Next: see the ten-line backend in the README")
    can = plugin.longspan_capabilities()
    if not isinstance(can, Capabilities):
        raise PluginError(f"longspan_capabilities() returned {type(can).__name__}, want longspan.Capabilities")
    if can.api != hookspecs.API:
        raise _Incompatible(f"written for api={can.api}, this longspan has api={hookspecs.API}. Next: update either")
    _verify(plugin, row.name)
    manager.register(plugin, row.name)
    return evolve(row, capabilities=can, opt_in=row.opt_in or can.opt_in)


def _verify(plugin: object, name: str) -> None:
    scratch = pluggy.PluginManager(hookspecs.PROJECT)
    scratch.add_hookspecs(hookspecs)
    hooks = [hook for hook in vars(hookspecs) if hook.startswith("longspan_")]
    try:
        scratch.register(plugin, name)
        scratch.check_pending()
    except pluggy.PluginValidationError as error:
        words = str(error).replace("'", " ").replace("(", " ").split()
        near = [match for word in words for match in get_close_matches(word, hooks, n=1) if word not in hooks]
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise PluginError(f"{error}.{hint} Hooks: {', '.join(hooks)}") from error


def _summary(plugin: object) -> str:
    return next(iter((getattr(plugin, "__doc__", None) or "").strip().splitlines()), "")


def _whose(row: BackendInfo | None) -> str:
    return f"{row.distribution} {row.version}".strip() if row and row.distribution else "this process"


def _duplicate(name: str) -> str:
    owners: Iterable[Any] = (point.dist for point in entry_points(group=GROUP, name=name))
    listed = " and ".join(sorted({f"{dist.name} {dist.version}" if dist else "unknown" for dist in owners}))
    return f"claimed by {listed}. Next: uninstall one of them"


def _complain(row: BackendInfo, strict: bool) -> None:
    text = f"backend {row.name!r} of {_whose(row)} is {row.state}: {row.error}"
    if strict:
        raise PluginError(f"{text} (LONGSPAN_STRICT is set)")
    warnings.warn(f"{text}. The others are not affected; see `longspan backends`", PluginWarning, stacklevel=4)


registry = Registry()
"""The backends of this process."""


def _after_fork() -> None:
    """A lock held by another thread at the fork would stay locked for ever in the child."""
    registry._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
