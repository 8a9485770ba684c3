"""The native kernels: compiled once for this processor with the C compiler that is there, and kept in the cache folder.

No compiler is needed for longspan to install and work: without one, `load` says why and the backend composes its work
from torch's operators. The file's name holds a digest of the sources, the compiler and the processor, so that a home
folder shared by different machines never gives one of them another's instructions.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from math import lcm
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor

from longspan import cache_folder
from longspan_plugins.cpu_fused.binding import WORDS
from longspan_plugins.cpu_fused.gate import check_made

__all__ = ["Library", "compiler", "failure", "installing", "load", "missing"]

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
PATIENCE = 120.0
"""Seconds that a compiler may take."""
HERE = Path(__file__).parent


@frozen
class Library:
    """The loaded kernels, or why there are none."""

    handle: ctypes.CDLL | None
    lanes: int = 0
    refusal: str = ""

    def dilated(
        self,
        branches: tuple[tuple[int, int, int], ...],
        documents: Tensor,
        is_causal: bool,
        tiles: int | None = None,
        segments: int | None = None,
        base: int = 0,
    ) -> list[int]:
        """How many tiles, segments, rows and keys heads with these branches (w, r, s) have; written where told to."""
        assert self.handle is not None  # callers ask for a program only then
        told, rows = (ctypes.c_int64 * 4)(), torch.tensor(branches, dtype=torch.int64, device="cpu")
        rows_at, documents_at = check_made(rows, torch.int64), check_made(documents, torch.int64)
        refused = self.handle.longspan_dilated(
            *(ctypes.c_int64(len(branches)), ctypes.c_void_p(rows_at)),
            ctypes.c_int64(lcm(*(r for _, r, _ in branches))),
            *(ctypes.c_int64(len(documents)), ctypes.c_void_p(documents_at), ctypes.c_int64(is_causal)),
            *(ctypes.c_void_p(tiles), ctypes.c_void_p(segments)),
            *(ctypes.c_int64(base), told),
        )
        assert not refused, "more branches, or a longer period, than the caller checked"
        return list(told)

    @property
    def name(self) -> str:
        """Who computes, for `Kernel.library`."""
        return f"native, {self.lanes} lanes" if self.handle else "torch operators"


def compiler() -> tuple[str, ...] | None:
    """The C compiler: `$CC`, a path or a command with arguments, else the first of cc, gcc and clang; or None."""
    wanted = os.environ.get("CC", "").strip()
    try:
        words = shlex.split(wanted)
    except ValueError:  # a quote without its partner
        words = []
    for name, *arguments in ([wanted], words or [""], ["cc"], ["gcc"], ["clang"]):
        if found := shutil.which(name):
            return (found, *arguments)
    return None


@cache
def missing() -> str:
    """What native kernels need and this machine has not, as far as can be told without compiling; empty: nothing.

    Asked once a process: what is declared when backends are listed is what runs later.
    """
    if os.name != "posix":
        return f"a POSIX system, and this is {os.name}"
    return "" if compiler() else "a C compiler, and none was found"


def failure() -> str:
    """What native kernels need where `load` could not make them; empty before it was asked, and where it could."""
    if not load.cache_info().currsize or load().handle is not None:
        return ""
    return f"a C compiler that works: {load().refusal}"


def installing() -> str:
    """The line that installs a C compiler here; nothing where none would help."""
    if os.name != "posix":
        return ""
    lines = {
        "apt-get": "apt-get update && apt-get install -y gcc libc6-dev",
        "dnf": "dnf install -y gcc",
        "yum": "yum install -y gcc",
        "zypper": "zypper install -y gcc",
        "pacman": "pacman -S --noconfirm gcc",
        "apk": "apk add gcc musl-dev",
        "xcode-select": "xcode-select --install",
    }
    named = "install gcc or clang, or set CC to a C compiler"
    return next((line for program, line in lines.items() if shutil.which(program)), named)


@cache
def load() -> Library:
    """The kernels of this machine, compiled if need be. Takes seconds once a machine; afterwards a file is loaded."""
    program = compiler()
    if program is None or missing():
        step = f". Next: {line}" if (line := installing()) else ""
        return Library(None, refusal=f"native kernels need {missing() or 'a C compiler'}{step}")
    try:
        try:
            return _kept(program, cache_folder("cpu_fused"))
        except (OSError, RuntimeError):  # no home, nothing may be written there, or nothing loaded from there
            with tempfile.TemporaryDirectory(prefix="longspan-") as scratch:
                return _open(_built(program, Path(scratch)))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return Library(None, refusal=f"{shlex.join(program)} did not make a library: {said.strip()[-400:]}")


def _open(path: Path) -> Library:
    handle = ctypes.CDLL(str(path))
    for name in ("longspan_forward", "longspan_backward", "longspan_dilated", "longspan_job_size", "longspan_lanes"):
        getattr(handle, name).restype = ctypes.c_int64
    handle.longspan_forward.argtypes = handle.longspan_backward.argtypes = (ctypes.c_void_p,)
    if (size := handle.longspan_job_size()) != 8 * WORDS:
        raise OSError(f"{path} takes jobs of {size} bytes, want {8 * WORDS}. Next: delete it")
    return Library(handle, handle.longspan_lanes())


def _kept(program: tuple[str, ...], folder: Path) -> Library:
    """The folder's library, built if it is not there. Its name ends with its size: loading half a file can crash."""
    digest = hashlib.sha256()
    for part in (*FLAGS, *program, _said([*program, "--version"]), _processor()):
        digest.update(part.encode() + b"\0")
    for source in sorted([*HERE.glob("*.h"), *HERE.glob("*.c")]):
        digest.update(source.read_bytes())
    name = f"attention-{digest.hexdigest()[:24]}"
    for path in folder.glob(f"{name}-*.so"):
        if path.name == f"{name}-{path.stat().st_size}.so":
            with contextlib.suppress(OSError, AttributeError):  # else it is damaged, and replaced
                return _open(path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed when whole: others may be building it too
        fresh = _built(program, Path(scratch))
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        path = folder / f"{name}-{fresh.stat().st_size}.so"
        os.replace(fresh, path)
    return _open(path)


def _built(program: tuple[str, ...], folder: Path) -> Path:
    path = folder / "attention.so"
    _said([*program, *FLAGS, "-o", str(path), str(HERE / "attention.c"), "-lpthread", "-lm"])
    return path


def _said(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
    return done.stdout


def _processor() -> str:
    """What tells one kind of processor from another: its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = {line.split(":")[0].strip(): line for line in reversed(lines) if ":" in line}
    return platform.machine() + "".join(told.get(key, "") for key in ("model name", "flags", "Features", "CPU part"))
