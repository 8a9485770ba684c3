"""The ledger as the doctor sees it: backends loaded here, or each imported in an interpreter of its own.

What a plugin does there to the process is reported, and not suffered.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, evolve, frozen

from longspan.errors import PluginError, PluginWarning
from longspan.registry import quarantine
from longspan.registry.discovery import Registry, registry
from longspan.registry.loading import Entry, Loader
from longspan.spec.backend import BackendInfo
from longspan.spec.device import Device
from longspan.tools.doctor.settings import in_environment
from longspan.tools.doctor.usability import Unusable, unusable

__all__ = ["Ledger", "inside", "isolated_ledger", "local_ledger"]

AT_ONCE = max(1, min(4, os.cpu_count() or 1))
START = 300.0
"""Seconds that an interpreter may take to import longspan and torch, before a plugin's own time begins."""

PROGRAM = """
import json, sys
task = json.loads(sys.argv.pop())
sys.path[:] = task["path"]
from longspan.tools.doctor.ledger import inside
inside(task)
"""


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
    apart = {_key(imported.row): imported for imported in _import_isolated(sorter.entries, devices, environ, timeout)}
    releasable = [key[0] for key, imported in apart.items() if key in crashed and imported.row.state == "loaded"]
    rows = tuple(_merged(row, apart.get(_key(row)), crashed.get(_key(row))) for row in rows)
    return Ledger(
        rows,
        tuple(imported.unusable for imported in apart.values() if imported.unusable is not None),
        tuple(releasable),
    )


def _merged(row: BackendInfo, apart: _IsolatedImport | None, crash: quarantine.Crash | None) -> BackendInfo:
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


# --------------------------------------------------------------------------------------- interpreters of their own


@frozen
class _IsolatedImport:
    """What became of a plugin in its own interpreter: its row, why it is of no use here if so."""

    row: BackendInfo
    unusable: Unusable | None = None


def _import_isolated(
    entries: Iterable[Entry], devices: tuple[Device, ...], environ: Mapping[str, str], timeout: float
) -> list[_IsolatedImport]:
    """Import each entry point in a new interpreter with this environment, a few at once.

    A plugin that is not imported after `timeout` seconds is reported to hang. None is put into quarantine.

    Raises:
        PluginError: this Python does not know its own executable.
    """
    if not sys.executable:
        raise PluginError("sys.executable is empty: no other interpreter can be started. Next: leave out --isolate")
    waiting, done = deque(entries), []
    running: list[_Interpreter] = []
    with tempfile.TemporaryDirectory(prefix="longspan-doctor-") as cache:
        folder = Path(cache)
        environ = {**environ, "LONGSPAN_CACHE": cache}  # a quarantine of their own, gone with the folder
        try:
            while waiting or running:
                while waiting and len(running) < AT_ONCE:
                    entry = waiting.popleft()
                    running.append(_Interpreter(entry, devices, environ, folder / str(len(waiting))))
                for interpreter in [interpreter for interpreter in running if interpreter.is_over(timeout)]:
                    running.remove(interpreter)
                    done.append(interpreter.apart(timeout))
                time.sleep(0.02)
        finally:
            for interpreter in running:
                interpreter.kill()
    return done


class _Interpreter:
    """One plugin's interpreter: a process group, so that what it started ends with it."""

    def __init__(self, entry: Entry, devices: tuple[Device, ...], environ: Mapping[str, str], path: Path) -> None:
        self._row = entry.row()
        task = {
            "name": entry.name,
            "value": entry.point.value,
            "distribution": entry.distribution,
            "devices": [asdict(device) for device in devices],
            "path": [str(path) for path in sys.path],
        }
        # Files, and not pipes: a process that a plugin leaves behind would keep a pipe open.
        self._answer, self._said = path.with_suffix(".answer"), path.with_suffix(".said")
        self._begun: float | None = None
        self._started, self._hung = time.monotonic(), False
        with self._answer.open("wb") as answer, self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-c", PROGRAM, json.dumps(task)],
                stdin=subprocess.DEVNULL,
                stdout=answer,
                stderr=said,
                env=dict(environ),
                start_new_session=True,
            )

    def is_over(self, timeout: float) -> bool:
        """Whether it ended, or was made to as its time is up, which begins when all but the plugin is imported."""
        if self._process.poll() is not None:
            return True
        now = time.monotonic()
        if self._begun is None and self._answer.stat().st_size:
            self._begun = now
        self._hung = now - self._started > START if self._begun is None else now - self._begun > timeout
        if self._hung:
            self.kill()
        return self._hung

    def kill(self) -> None:
        """End it with all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def apart(self, timeout: float) -> _IsolatedImport:
        """What is to be said of the plugin, once the interpreter is over."""
        code = self._process.returncode
        answer, said = (
            path.read_text(encoding="utf-8", errors="replace").strip() for path in (self._answer, self._said)
        )
        if self._hung:
            seconds = timeout if self._begun is not None else START
            more = f"longspan doctor --isolate --timeout {10 * timeout:g}"
            return self._broken(f"hangs, or is slow: still being imported after {seconds:g} s. Next: {more}")
        if code == 0 and answer:
            return _read(json.loads(answer))
        if code < 0:
            return self._broken(f"crashed the interpreter with {_signal(-code)} while it was imported{_where(said)}")
        last = next(iter(said.splitlines()[-1:]), "")
        return self._broken(f"ended the interpreter with exit code {code} while it was imported{last and f': {last}'}")

    def _broken(self, error: str) -> _IsolatedImport:
        return _IsolatedImport(evolve(self._row, state="broken", error=error))


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _where(said: str) -> str:
    """The innermost line of Python that faulthandler saw."""
    match = re.search(r'^  File "(.+)", line (\d+) in ', said, re.M)
    return f" (at {match[1]}:{match[2]})" if match else ""


def _read(values: dict[str, Any]) -> _IsolatedImport:
    useless = values["unusable"]
    return _IsolatedImport(BackendInfo(**values["row"]), None if useless is None else Unusable.from_dict(useless))


# --------------------------------------------------------------------------------------------- in the other interpreter


class _OneEntry(Registry):
    """Imports one entry point and leaves all others."""

    def __init__(self, name: str, value: str, distribution: str) -> None:
        super().__init__()
        self._wanted = name, value, distribution

    def load(self, entry: Entry, loader: Loader) -> BackendInfo:
        wanted = (entry.name, entry.point.value, entry.distribution) == self._wanted
        return super().load(entry, loader) if wanted else entry.row()


def inside(task: dict[str, Any]) -> None:
    """What the other interpreter runs: import the plugin, print what became of it as JSON, leave at once."""
    answer = os.dup(1)
    os.dup2(2, 1)  # what a plugin prints is no answer
    sys.argv[:] = ["longspan"]
    warnings.simplefilter("ignore", PluginWarning)
    devices = [
        Device(**{**device, "capability": device["capability"] and tuple(device["capability"])})
        for device in task["devices"]
    ]
    os.write(answer, b"\n")  # from here on it is the plugin's time
    alone = _OneEntry(task["name"], task["value"], task["distribution"])
    row = next(row for row in alone.backends() if (row.name, row.distribution) == (task["name"], task["distribution"]))
    useless = next((unusable(candidate, devices) for candidate in alone.candidates() if candidate.info == row), None)
    if row.state == "loaded" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        error = "initialises CUDA when it is imported, and a fork cannot use it then. Next: tell its authors"
        row = evolve(row, error=error)
    values = {"row": row.to_dict(), "unusable": None if useless is None else useless.to_dict()}
    os.write(answer, json.dumps(values).encode())
    sys.stderr.flush()
    os._exit(0)  # threads that the plugin started would keep it waiting
