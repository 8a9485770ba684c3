"""Finding backends: entry points read before import, one broken plugin never in the way of the others.

pluggy's own loader stops at the first broken entry point and drops duplicates in directory order, hence this loop. It
runs at the first plan or listing, never at `import longspan`, and keeps a ledger row for every entry point it saw.
"""

from __future__ import annotations

import inspect
import os
import re
import threading
import time
import warnings
import weakref
from collections import defaultdict
from contextlib import nullcontext
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
from attrs import evolve

from longspan import hookspecs
from longspan.defaults import Defaults
from longspan.errors import DuplicateBackend, PluginError, PluginWarning
from longspan.policy import flag, is_name, names
from longspan.quarantine import Watch
from longspan.spec import BackendInfo, Candidate, Capabilities, Problem, Reason

__all__ = ["GROUP", "Registry", "registry"]

GROUP = "longspan.backends"
DEFAULTS = "longspan-defaults"
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
        self._extensions: set[str] = set()
        self._unimported: list[EntryPoint] = []  # kept out by LONGSPAN_BLOCK, which may be lifted
        self._block: tuple[str, ...] = ()
        self._found = self._busy = False
        self.generation = 0
        _registries.add(self)

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
        if not is_name(name):
            raise PluginError(
                f"name={name!r} is no backend name: letters, digits, _, - and . only. Next: give another name"
            )
        self.discover()
        with self._lock:
            if self._busy:
                raise PluginError("register() while plugins are being imported. Next: call it after the import")
            if name in self._ledger or self._manager.has_plugin(name):
                raise DuplicateBackend(
                    f"{name!r} is taken by {_whose(self._ledger.get(name))}. Next: give another name, or "
                    f"longspan.unregister({name!r}) first"
                )
            if hasattr(plugin, "longspan_capabilities"):
                row = BackendInfo(name, "loaded", description=_summary(plugin))
                self._ledger[name] = _commit(self._manager, plugin, row)
            else:
                _verify(self._manager, plugin, name)
                self._manager.register(plugin, name)
                self._extensions.add(name)
            self.generation += 1

    def unregister(self, name: str) -> None:
        """Remove a plugin by name.

        Raises:
            PluginError: there is none of this name.
        """
        self.discover()
        with self._lock:
            if name not in self._ledger and name not in self._extensions:
                raise PluginError(f"nothing is registered as {name!r}. Next: `longspan backends` lists what is")
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            self._ledger.pop(name, None)
            self._extensions.discard(name)
            self.generation += 1

    def discover(self) -> None:
        """Read the entry points, once, and those that `LONGSPAN_BLOCK` kept out when it lets them in.

        Raises:
            PluginError: a plugin is broken and `LONGSPAN_STRICT` is set.
            PolicyError: an environment variable cannot be read.
        """
        if self._found and not self._unimported:
            return
        with self._lock:
            if self._busy:  # a plugin lists backends while it is imported: it sees what there is so far
                return
            if not self._found or (self._unimported and names("LONGSPAN_BLOCK") != self._block):
                self._busy = True
                try:
                    self._discover()
                finally:
                    self._busy = False

    def _discover(self) -> None:
        strict, allowed, blocked = flag("LONGSPAN_STRICT"), names("LONGSPAN_PLUGINS"), names("LONGSPAN_BLOCK")
        points = self._unimported if self._found else _points()
        welcome: dict[str, list[EntryPoint]] = defaultdict(list)
        rows, unimported = [], []
        for point in sorted(points, key=lambda point: (point.name, _distribution(point))):
            if not is_name(point.name):
                error = "no backend name: letters, digits, _, - and . only. Next: rename the entry point"
                rows.append(evolve(_row(point), state="broken", error=error))
            elif point.name in blocked:
                unimported.append(point)
                rows.append(evolve(_row(point), error="blocked by LONGSPAN_BLOCK"))
            elif allowed and not _allowed(point, allowed):
                rows.append(evolve(_row(point), error=f"not among LONGSPAN_PLUGINS={','.join(allowed)}"))
            else:
                welcome[point.name].append(point)
        watch = Watch()
        try:
            for same in welcome.values():
                own = [point for point in same if _distribution(point) == BUILTIN]  # nobody else takes its name
                taken = own if len(own) == 1 else same if len(same) == 1 else []
                rows += [self.load(point, watch) if point in taken else _duplicate(point, same) for point in same]
            for row in rows:
                if row.state in ("broken", "duplicate", "incompatible"):
                    _complain(row, strict)
        except BaseException:  # an interrupt, or a complaint that stops: as if nothing had been read
            for name in welcome:
                if self._manager.has_plugin(name) and name not in self._extensions:
                    self._manager.unregister(name=name)
            raise
        finally:
            watch.close()
        fresh = {row.name for row in rows}
        self._extra = [row for row in self._extra if row.name not in fresh or row.state != "blocked"]
        for name in fresh:  # of one name, the row that was let in stands for it
            same_name = (row for row in rows if row.name == name)
            main, *others = sorted(same_name, key=lambda row: (row.state == "blocked", row.state == "duplicate"))
            self._ledger[name] = main
            self._extra += others
        self._unimported, self._block, self._found = unimported, blocked, True
        self.generation += 1

    def load(self, point: EntryPoint, watch: Watch) -> BackendInfo:
        """Import one entry point that is welcome, and say what became of it. `longspan.doctor` imports elsewhere."""
        return _load(self._manager, point, watch)


_registries: weakref.WeakSet[Registry] = weakref.WeakSet()


class _Unsupported:
    """A backend's `longspan_unsupported` as a plain function."""

    def __init__(self, hook: pluggy.HookCaller) -> None:
        self._hook = hook

    def __call__(self, problem: Problem) -> tuple[Reason, ...]:
        try:
            found = tuple(self._hook(problem=problem) or ())
        except Exception as error:  # noqa: BLE001 - a backend at fault is refused; the others are not affected
            return (Reason("broken", "longspan_unsupported", f"{type(error).__name__}: {error}", "reasons", "mend it"),)
        if not all(isinstance(reason, Reason) for reason in found):
            return (Reason("broken", "longspan_unsupported", repr(found), "a list of longspan.Reason", "mend it"),)
        return found


class _Incompatible(PluginError):
    """The plugin was written for another version of the hook contract."""


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(Defaults(), DEFAULTS)
    return manager


def _points() -> list[EntryPoint]:
    """Entry points of the group; one that is listed twice by the same distribution counts once."""
    found: dict[tuple[str, str, str], EntryPoint] = {}
    for point in entry_points(group=GROUP):
        found.setdefault((point.name, point.value, point.dist.name if point.dist else ""), point)
    return list(found.values())


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else ""


def _row(point: EntryPoint) -> BackendInfo:
    version = point.dist.version if point.dist else ""
    return BackendInfo(point.name, "blocked", _distribution(point), version, opt_in=_distribution(point) != BUILTIN)


def _allowed(point: EntryPoint, allowed: tuple[str, ...]) -> bool:
    """Whether the allow-list names the backend, or its distribution as pip would (PEP 503)."""
    distribution = _distribution(point)
    words = {point.name, "builtin" if distribution == BUILTIN else point.name}
    return bool(words & set(allowed)) or _canonical(distribution) in map(_canonical, allowed)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _duplicate(point: EntryPoint, same: list[EntryPoint]) -> BackendInfo:
    owners = sorted(f"{_distribution(one)} {one.dist.version if one.dist else ''}".strip() for one in same)
    error = f"claimed by {' and '.join(owners)}. Next: uninstall one of them, or name the other in LONGSPAN_PLUGINS"
    return evolve(_row(point), state="duplicate", error=error)


def _load(manager: pluggy.PluginManager, point: EntryPoint, watch: Watch) -> BackendInfo:
    """Import one entry point, and say what became of it. Our own modules crash nothing and are not watched."""
    row, start = _row(point), time.perf_counter()
    watched = row.distribution not in ("", BUILTIN)
    if watched and (crash := watch.crash(row.name, row.distribution, row.version)):
        return evolve(row, state="broken", error=str(crash))
    try:
        with watch.importing(row.name, row.distribution, row.version) if watched else nullcontext():
            plugin = point.load()
            row = _commit(manager, plugin, evolve(row, state="loaded", description=_summary(plugin)))
    except _Incompatible as error:
        row = evolve(row, state="incompatible", error=str(error))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a plugin does on import, the others go on
        row = evolve(row, state="broken", error=f"{type(error).__name__}: {error}")
    return evolve(row, import_ms=round(1e3 * (time.perf_counter() - start), 3))


def _commit(manager: pluggy.PluginManager, plugin: Any, row: BackendInfo) -> BackendInfo:
    """Check a backend in full, and only then add it to the manager."""
    if not hasattr(plugin, "longspan_capabilities"):
        raise PluginError("no longspan_capabilities hook. Next: see the ten-line backend in the README")
    if inspect.isclass(plugin):
        raise PluginError(f"{plugin.__name__} is a class. Next: pass an object of it")
    try:
        can = plugin.longspan_capabilities()
    except Exception as error:
        raise PluginError(f"longspan_capabilities: {type(error).__name__}: {error}. Next: mend the plugin") from error
    if not isinstance(can, Capabilities):
        raise PluginError(
            f"longspan_capabilities() returned {type(can).__name__}. Next: return a longspan.Capabilities"
        )
    if can.api != hookspecs.API:
        raise _Incompatible(f"written for api={can.api}, this longspan has api={hookspecs.API}. Next: update either")
    _verify(manager, plugin, row.name)
    manager.register(plugin, row.name)
    return evolve(row, capabilities=can, opt_in=row.opt_in or can.opt_in)


def _verify(manager: pluggy.PluginManager, plugin: Any, name: str) -> None:
    """Register in a scratch manager first: a plugin that is refused leaves nothing behind."""
    try:
        hash(plugin)
    except TypeError as error:
        raise PluginError(f"{type(plugin).__name__} has no hash. Next: compare its objects by identity") from error
    if other := manager.get_name(plugin):
        raise PluginError(f"this plugin is registered as {other!r} already. Next: pass another object")
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
        raise PluginError(f"{error}.{hint} Next: use one of {', '.join(hooks)}") from error
    if not scratch.get_hookcallers(plugin):
        raise PluginError(f"{type(plugin).__name__} implements no hook. Next: mark functions with longspan.hookimpl")


def _summary(plugin: object) -> str:
    return next(iter((getattr(plugin, "__doc__", None) or "").strip().splitlines()), "")


def _whose(row: BackendInfo | None) -> str:
    return f"{row.distribution} {row.version}".strip() if row and row.distribution else "this process"


def _complain(row: BackendInfo, strict: bool) -> None:
    text = f"backend {row.name!r} of {_whose(row)} is {row.state}: {row.error}"
    if strict:
        raise PluginError(f"{text} (LONGSPAN_STRICT is set)")
    warnings.warn(f"{text}. The others are not affected; see `longspan backends`", PluginWarning, stacklevel=4)


registry = Registry()
"""The backends of this process."""


def _after_fork() -> None:
    """A lock held by another thread at the fork would stay locked for ever in the child."""
    for one in _registries:
        one._lock = threading.RLock()
        if one._busy:  # the thread that was discovering is not here: what it registered has no ledger row
            one._busy = False
            for name, _ in one._manager.list_name_plugin():
                if name not in one._ledger and name not in one._extensions and name != DEFAULTS:
                    one._manager.unregister(name=name)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
