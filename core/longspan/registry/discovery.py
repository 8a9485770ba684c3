"""Finding backends: entry points read before import, one broken plugin never in the way of the others.

pluggy's own loader stops at the first broken entry point and drops duplicates in directory order, hence this loop. It
runs at the first plan or listing, never at `import longspan`, and keeps a ledger row for every entry point it saw.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import defaultdict
from functools import partial
from importlib.metadata import entry_points

import pluggy
from attrs import evolve

from longspan.errors import DuplicateBackend, PluginError, PluginWarning, warn_caller
from longspan.registry.hookspecs import Defaults
from longspan.registry.loading import (
    BUILTIN,
    Entry,
    Hooks,
    Loader,
    add_backend,
    add_extension,
    capabilities_of,
    entries_of,
)
from longspan.registry.policy import flag, is_name, names
from longspan.spec.backend import BackendInfo, Capabilities, Reason
from longspan.spec.problem import Problem
from longspan.spec.resolution import Candidate

__all__ = ["GROUP", "Registry", "registry"]

GROUP = "longspan.backends"
DEFAULTS = "longspan-defaults"


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
        self._unimported: list[Entry] = []  # kept out by LONGSPAN_BLOCK, which may be lifted
        self._denied: tuple[str, ...] = ()
        self._found = self._busy = False
        self.generation = 0
        _registries.add(self)

    # -- reading

    def backends(self) -> tuple[BackendInfo, ...]:
        """Every backend that was found, by name: what it is and can do, or why it was not loaded.

        The first call, here or by a plan, looks for installed backends and imports them; later ones cost nothing.

        Returns:
            A `BackendInfo` each. Its `state` is loaded, blocked, broken, duplicate or incompatible.
        """
        self.discover()
        return tuple(sorted([*self._ledger.values(), *self._extra], key=lambda row: (row.name, row.distribution)))

    def candidates(self) -> tuple[Candidate, ...]:
        """What the resolver chooses among: one candidate for each name."""
        self.discover()
        with self._lock:
            rows = sorted(self._ledger.values(), key=lambda row: row.name)
            return tuple(
                Candidate(row, partial(_unsupported, self.lane(row.name, "longspan_unsupported")))
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
        """Use your own backend in this process without installing it: `longspan.register(my_module, name="mine")`.

        From then on `longspan.attention(..., backend="mine")` takes it. What has no `longspan_capabilities` is an
        extension instead, whose hooks (a cache, an allocator, a timing wrapper) apply to every backend.

        Args:
            plugin: a module or an object whose functions are marked with `longspan.hookimpl`.
            name: letters, digits, `_`, `-` and `.`; what a backend is then asked for by.

        Raises:
            DuplicateBackend: the name is taken.
            PluginError: the name cannot be one, or the plugin does not do what its hooks promise.
        """
        if not is_name(name):
            raise PluginError(
                f"name={name!r} is no backend name: letters, digits, _, - and . only, and not auto. "
                "Next: give another name"
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
                self._ledger[name] = add_backend(self._manager, plugin, BackendInfo(name, "loaded"))
            else:
                add_extension(self._manager, plugin, name)
                self._extensions.add(name)
            self.generation += 1

    def unregister(self, name: str) -> None:
        """Remove a backend or an extension by the name that it was registered or found by. Plans are made anew.

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
            if name in self._extensions:
                self._extensions.discard(name)
                self._extra = [row for row in self._extra if row.name != name]  # the row of its fault
            self.generation += 1

    def refresh(self, plugin: object) -> None:
        """Ask a backend again what it can do, and make plans anew if that is something else than it was.

        For a backend that learns of this machine what could not be known when it was listed: that the compiler, which
        is there, cannot compile. A plugin that is not registered is left alone.

        Args:
            plugin: the module or object that was registered.
        """
        with self._lock:
            row = self._ledger.get(self._manager.get_name(plugin) or "")
            if row is not None and row.state == "loaded":
                again = capabilities_of(plugin)
                if again != row.capabilities:
                    self._ledger[row.name] = evolve(row, capabilities=again, opt_in=row.opt_in or again.opt_in)
                    self.generation += 1

    def provider(self, backend: str, hook: str) -> str:
        """The name of the plugin whose implementation of a hook a backend gets first; its own where none is."""
        impls = self.lane(backend, hook).get_hookimpls()
        return next((impl.plugin_name for impl in reversed(impls) if impl.plugin_name != DEFAULTS), backend)

    def note_fault(self, name: str, hook: str, error: Exception) -> None:
        """Put on the ledger that a plugin's cache or allocator failed and that the core's took over; warns of it once.

        Raises:
            PluginError: `LONGSPAN_STRICT` is set.
        """
        text = f"{hook}: {type(error).__name__}: {error}. The core's serves instead. Next: fix {name!r}"
        known = text
        with self._lock:
            if name in self._ledger:
                known, self._ledger[name] = self._ledger[name].error, evolve(self._ledger[name], error=text)
            elif name in self._extensions:
                known = next((row.error for row in self._extra if row.name == name), "")
                self._extra = [row for row in self._extra if row.name != name]
                self._extra.append(BackendInfo(name, "broken", error=text))
        if flag("LONGSPAN_STRICT"):
            raise PluginError(f"{text} (LONGSPAN_STRICT is set)") from error
        if known != text:
            warn_caller(f"{text}. Results are not affected", PluginWarning)

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
            if not self._found or (self._unimported and names("LONGSPAN_BLOCK") != self._denied):
                self._busy = True
                try:
                    self._discover()
                finally:
                    self._busy = False

    def _discover(self) -> None:
        strict, allowed, denied = flag("LONGSPAN_STRICT"), names("LONGSPAN_PLUGINS"), names("LONGSPAN_BLOCK")
        entries = self._unimported if self._found else entries_of(entry_points(group=GROUP))
        welcome: dict[str, list[Entry]] = defaultdict(list)
        rows, unimported = [], []
        for entry in entries:
            if not is_name(entry.name):
                error = "no backend name: letters, digits, _, - and . only, and not auto. Next: rename the entry point"
                rows.append(entry.row("broken", error))
            elif entry.name in denied:
                unimported.append(entry)
                rows.append(entry.row("blocked", "blocked by LONGSPAN_BLOCK"))
            elif allowed and not entry.is_among(allowed):
                rows.append(entry.row("blocked", f"not among LONGSPAN_PLUGINS={','.join(allowed)}"))
            else:
                welcome[entry.name].append(entry)
        loader = Loader(self._manager)
        try:
            for same in welcome.values():
                own = [entry for entry in same if entry.distribution == BUILTIN]  # nobody else takes its name
                taken = own if len(own) == 1 else same if len(same) == 1 else []
                rows += [self.load(entry, loader) if entry in taken else entry.duplicate(same) for entry in same]
            for row in rows:
                if row.state in ("broken", "duplicate", "incompatible"):
                    _complain(row, strict)
        except BaseException:  # an interrupt, or a complaint that stops: as if nothing had been read
            for name in welcome:
                if self._manager.has_plugin(name) and name not in self._extensions:
                    self._manager.unregister(name=name)
            raise
        finally:
            loader.close()
        fresh = {row.name for row in rows}
        self._extra = [row for row in self._extra if row.name not in fresh or row.state != "blocked"]
        for name in fresh:  # of one name, the row that was let in stands for it
            same_name = (row for row in rows if row.name == name)
            main, *others = sorted(same_name, key=lambda row: (row.state == "blocked", row.state == "duplicate"))
            self._ledger[name] = main
            self._extra += others
        self._unimported, self._denied, self._found = unimported, denied, True
        self.generation += 1

    def load(self, entry: Entry, loader: Loader) -> BackendInfo:
        """Import one entry point that is welcome, and say what became of it. The doctor imports elsewhere."""
        return loader.load(entry)


_registries: weakref.WeakSet[Registry] = weakref.WeakSet()


def _unsupported(hook: pluggy.HookCaller, problem: Problem) -> tuple[Reason, ...]:
    """What a backend's `longspan_unsupported` says of a problem."""
    try:
        reasons = tuple(hook(problem=problem) or ())
    except Exception as error:  # noqa: BLE001 - a backend at fault is refused; the others are not affected
        return (Reason("broken", "longspan_unsupported", f"{type(error).__name__}: {error}", "reasons", "fix it"),)
    if not all(isinstance(reason, Reason) for reason in reasons):
        return (Reason("broken", "longspan_unsupported", repr(reasons), "a list of longspan.Reason", "fix it"),)
    return reasons


def _new_manager() -> Hooks:
    manager = Hooks()
    manager.register(Defaults(), DEFAULTS)
    return manager


def _whose(row: BackendInfo | None) -> str:
    return f"{row.distribution} {row.version}".strip() if row and row.distribution else "this process"


def _complain(row: BackendInfo, strict: bool) -> None:
    text = f"backend {row.name!r} of {_whose(row)} is {row.state}: {row.error}"
    if strict:
        raise PluginError(f"{text} (LONGSPAN_STRICT is set)")
    warn_caller(f"{text}. The others are not affected; see `longspan backends`", PluginWarning)


registry = Registry()
"""The backends of this process."""


def _after_fork() -> None:
    """A lock held by another thread at the fork would stay locked for ever in the child."""
    for each in _registries:
        each._lock = threading.RLock()
        if each._busy:  # the thread that was discovering is not here: what it registered has no ledger row
            each._busy = False
            for name, _ in each._manager.list_name_plugin():
                if name not in each._ledger and name not in each._extensions and name != DEFAULTS:
                    each._manager.unregister(name=name)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
