"""Plugins that took the interpreter down while they were imported: recognised at the next start, not imported again.

Before an entry point is imported its name goes into a file of this process, and out of it afterwards, however the
import ended. A file that still holds a name although its process is gone tells of a crash; it becomes a record, and the
plugin is left alone until it is released, or its distribution, torch or Python has another version. Where the files
cannot be written there is no quarantine, and nothing else changes.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, frozen

from longspan.memory.folders import cache_folder, make_folder
from longspan.registry.policy import is_name

__all__ = ["Crash", "Watch", "crashes", "directory", "release"]

IMPORTING, CRASHED = ".importing", ".crashed"
STALE = 24 * 3600.0
"""Seconds after which a file that tells nothing, being empty or of another machine, is swept away."""


@frozen
class Crash:
    """An entry point whose import did not come back, and the process it happened in.

    `environment` is the Python and the torch it was imported with, `machine` the boot and the process namespace that
    `pid` and `started` (in the kernel's clock ticks) belong to, `when` seconds since 1970.
    """

    name: str
    distribution: str
    version: str
    environment: str
    pid: int
    started: str
    machine: str
    when: float

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.when))
        return (
            f"crashed the interpreter while it was imported (process {self.pid}, {when}; or that was killed then), "
            f"so it is not imported again. Next: longspan doctor --release {self.name}"
        )


class Watch:
    """The file of one discovery: it holds the entry point that is being imported, and nothing in between."""

    def __init__(self) -> None:
        self._crashes: tuple[Crash, ...] | None = None
        self._path, self._file, self._pid = "", -1, os.getpid()
        self._process: tuple[int, str, str] | None = None

    def crash(self, name: str, distribution: str, version: str) -> Crash | None:
        """What an earlier process met when it imported this entry point, if it did not survive."""
        if self._crashes is None:
            self._crashes = crashes()
        wanted = (name, distribution, version)
        return next((past for past in self._crashes if (past.name, past.distribution, past.version) == wanted), None)

    @contextmanager
    def importing(self, name: str, distribution: str, version: str) -> Iterator[None]:
        """For the time of an import."""
        self._write(name, distribution, version)
        try:
            yield
        finally:  # an exception or an interrupt is no crash
            if self._ours():
                with suppress(OSError):
                    os.ftruncate(self._file, 0)

    def close(self) -> None:
        """Remove the file: nothing more is imported."""
        if self._ours():
            with suppress(OSError):
                os.close(self._file)
            _remove(self._path)
            _open.discard(self)
            self._file = -1

    def _ours(self) -> bool:
        """False without a file, and in a fork, whose parent goes on importing."""
        return self._file >= 0 and self._pid == os.getpid()

    def _write(self, name: str, distribution: str, version: str) -> None:
        if self._pid != os.getpid() or os.name != "posix":  # ids of processes mean something else elsewhere
            return
        try:
            if self._file < 0:
                self._create()
            self._process = self._process or _this_process()
            crash = Crash(name, distribution, version, _environment(), *self._process, time.time())
            text = json.dumps(asdict(crash)).encode()
            os.ftruncate(self._file, os.pwrite(self._file, text, 0))
        except (OSError, RuntimeError, ValueError):  # no folder that we may write to: no quarantine
            return

    def _create(self) -> None:
        folder, prefix = directory(), f"{self._pid}-"
        try:
            self._file, self._path = tempfile.mkstemp(IMPORTING, prefix, folder)
        except FileNotFoundError:
            make_folder(folder)
            self._file, self._path = tempfile.mkstemp(IMPORTING, prefix, folder)
        _open.add(self)


_open: set[Watch] = set()


@atexit.register
def _close() -> None:
    """A thread that imports while the interpreter ends never comes to its own `close`."""
    for watch in tuple(_open):
        watch.close()


def directory() -> Path:
    """Where the files are: `quarantine` in the cache folder.

    Raises:
        RuntimeError: there is no home directory.
    """
    return cache_folder("quarantine")


def crashes() -> tuple[Crash, ...]:
    """What crashed in this environment and was not released, by name; files of dead processes become records."""
    by_record = {_record_name(crash): crash for _, crash in _files() if crash.environment == _environment()}
    return tuple(sorted(by_record.values(), key=lambda crash: (crash.name, crash.distribution, crash.version)))


def release(name: str) -> tuple[Crash, ...]:
    """Forget the crashes of the backend of this name, in this environment; returns them.

    Raises:
        OSError: a record cannot be removed.
    """
    records = [(path, crash) for path, crash in _files() if crash.name == name and crash.environment == _environment()]
    for path, _ in records:
        path.unlink(missing_ok=True)
    return tuple(crash for _, crash in records)


def _files() -> list[tuple[Path, Crash]]:
    """All records, those made just now among them."""
    records: list[tuple[Path, Crash]] = []
    if os.name != "posix":
        return records
    try:
        entries = [entry for entry in os.scandir(directory()) if entry.name.endswith((IMPORTING, CRASHED))]
        for entry in entries:
            path = Path(entry.path)
            with suppress(OSError):  # its process came to the end of the import, or another was faster, or none of ours
                status = entry.stat(follow_symlinks=False)
                if status.st_uid != os.getuid():  # of others' processes we may not see whether they live
                    continue
                crash = _read(path)
                if entry.name.endswith(CRASHED):
                    records += [] if crash is None else [(path, crash)]
                elif crash is not None and _is_dead(crash):
                    records += _crashed(path, crash)
                elif (crash is None or crash.machine != _machine()) and time.time() - status.st_mtime > STALE:
                    _remove(path)
    except (OSError, RuntimeError):  # no such folder, or no home: nothing is known
        pass
    return records


def _read(path: Path) -> Crash | None:
    """None where the file is empty (nothing is being imported) or none of ours."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        crash = Crash(**values)
    except (ValueError, TypeError, RecursionError):
        return None
    types = {"pid": (int,), "when": (int, float)}
    fits = all(type(value) in types.get(field, (str,)) for field, value in asdict(crash).items())
    return crash if fits and is_name(crash.name) else None


def _crashed(path: Path, crash: Crash) -> list[tuple[Path, Crash]]:
    """The record of a process that is gone; none if it came to the end of its import after its file was read."""
    record = path.with_name(_record_name(crash))
    try:
        if _read(path) != crash:  # final by now
            return []
        path.replace(record)
    except FileNotFoundError:  # removed by its process, or made a record by another
        return [(record, crash)] if record.exists() else []
    except OSError:  # a folder that we may only read: the file goes on to tell what it tells
        return [(path, crash)]
    return [(record, crash)]


def _record_name(crash: Crash) -> str:
    key = json.dumps([crash.name, crash.distribution, crash.version, crash.environment])
    return f"{crash.name[:100]}-{sha256(key.encode()).hexdigest()[:16]}{CRASHED}"


def _remove(path: str | Path) -> None:
    with suppress(OSError):
        os.unlink(path)


# ------------------------------------------------------------------------------------------------------- processes


def _environment() -> str:
    """What an extension module is built against: a crash says nothing of another environment."""
    return f"{sys.prefix}, Python {platform.python_version()}, torch {torch.__version__}"


def _this_process() -> tuple[int, str, str]:
    pid = os.getpid()
    return pid, _started(pid) or "", _machine()


def _machine() -> str:
    """The boot and the process namespace: process ids of others mean nothing here."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _is_dead(crash: Crash) -> bool:
    """Whether the process is gone, or its id belongs to another one now; False where that cannot be known."""
    return crash.machine == _machine() and _started(crash.pid) != crash.started


def _started(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None where there is no such process or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None if os.path.isdir("/proc/self") else _alive(pid)
    state, *fields = text.rpartition(")")[2].split()  # the command before it may hold anything
    return None if state in "ZXx" else fields[18]


def _alive(pid: int) -> str | None:
    """Without /proc: an empty start time for a process that lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""
