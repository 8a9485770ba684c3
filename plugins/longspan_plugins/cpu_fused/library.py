"""The native kernels: compiled once for this processor with the C compiler that is there, and kept in the cache folder.

No compiler is needed for longspan to install and work: without one, `load` says why and torch's operators serve. The
file's name begins with a digest of the sources, the compiler and the processor, so that a
home folder shared by different machines never gives one of them another's instructions. `longspan.compiled` says when
a file that is there is trusted.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from math import lcm
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor

from longspan.plugin import compiled
from longspan_plugins.cpu_fused.binding import WORDS
from longspan_plugins.cpu_fused.gate import check_made
from longspan_plugins.cpu_fused.table import integers

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
        told, rows = (ctypes.c_int64 * 4)(), integers(branches)
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
        """Who computes, as `Kernel.library` names it: the kernels and how wide their vectors are, or torch."""
        return f"native, {self.lanes} lanes" if self.handle else "torch operators"


def compiler() -> tuple[str, ...] | None:
    """The C compiler: `$CC`, a path or a command with arguments, else the first of cc, gcc and clang; or None."""
    wanted = os.environ.get("CC", "").strip()
    try:
        words = shlex.split(wanted)
    except ValueError:  # a quote without its partner
        words = []
    for name, *arguments in ([wanted], words or [""], ["cc"], ["gcc"], ["clang"]):
        if path := shutil.which(name):
            return (path, *arguments)
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
    key, homes = _key(program), compiled.homes("cpu_fused")
    for home in homes:
        for code in home.find(key):
            with suppress(OSError, AttributeError):  # a folder that nothing may be loaded from
                return _open(code.address)
    for home in homes:
        if why := home.failure(key):
            return Library(None, refusal=why)
    try:
        return _fresh(program, key, homes)
    except subprocess.TimeoutExpired:
        why = f"{shlex.join(program)} did not make a library within {PATIENCE:g} seconds"
        for home in homes:
            with suppress(OSError):
                home.remember_failure(key, why)
                break
        return Library(None, refusal=why)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        said = getattr(error, "output", None) or str(error)
        return Library(None, refusal=f"{shlex.join(program)} did not make a library: {said[-400:]}")


def _open(address: str) -> Library:
    handle = ctypes.CDLL(address)
    for name in ("longspan_forward", "longspan_backward", "longspan_dilated", "longspan_job_size", "longspan_lanes"):
        getattr(handle, name).restype = ctypes.c_int64
    handle.longspan_forward.argtypes = handle.longspan_backward.argtypes = (ctypes.c_void_p,)
    if (size := handle.longspan_job_size()) != 8 * WORDS:
        raise OSError(f"the library takes jobs of {size} bytes, want {8 * WORDS}")
    return Library(handle, handle.longspan_lanes())


def _fresh(program: tuple[str, ...], key: str, homes: tuple[compiled.Home, ...]) -> Library:
    """Build the library and keep it in the first home that takes it; where none does, it is this process's alone."""
    with _built(program, homes) as path:
        data, kept = path.read_bytes(), []
        for home in homes:
            with suppress(OSError, AttributeError):
                kept.append(home.keep(key, data))
                return _open(kept[-1].address)
        try:
            return _open(str(path))
        except (OSError, AttributeError):  # what the compiler made is no library: nobody is to find it
            for code in kept:
                code.path.unlink(missing_ok=True)
            raise


@contextmanager
def _built(program: tuple[str, ...], homes: tuple[compiled.Home, ...]) -> Iterator[Path]:
    """The library in a folder that goes after the block: among the temporary files, or in a home if those are full."""
    places = [None, *(home.path for home in homes if home.path.is_dir() and not home.refusal())]
    for number, place in enumerate(places, 1):
        with ExitStack() as stack:
            try:
                scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="longspan-", dir=place))
                path = Path(scratch, "attention.so")
                _run([*program, *FLAGS, "-o", str(path), str(HERE / "attention.c"), "-lpthread", "-lm"], scratch)
            except (OSError, subprocess.CalledProcessError) as error:
                if number < len(places) and _is_full(error, place or tempfile.gettempdir()):
                    continue
                raise
            yield path
            return


def _is_full(error: OSError | subprocess.CalledProcessError, place: str | Path) -> bool:
    """Whether a build failed for want of room, so that it may do better elsewhere."""
    if isinstance(error, OSError):
        return True
    return "No space left" in error.output or "quota" in error.output or shutil.disk_usage(place).free < compiled.ROOM


def _run(command: list[str], scratch: str) -> None:
    """Run the compiler, which has processes of its own: on a timeout or an interrupt they go with it."""
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": scratch}
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        text=True,
        errors="replace",
    ) as process:
        try:
            said, _ = process.communicate(timeout=PATIENCE)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        said = said.strip() or f"exit code {process.returncode}, and it said nothing"
        raise subprocess.CalledProcessError(process.returncode, command, said)


def _key(program: tuple[str, ...]) -> str:
    """Under which the library is kept: a digest of the sources, the compiler, its flags and the processor."""
    compiler_file = os.stat(program[0])
    digest = hashlib.sha256()
    for part in (*FLAGS, *program, str(compiler_file.st_size), str(compiler_file.st_mtime_ns), _processor()):
        digest.update(part.encode() + b"\0")
    for source in sorted([*HERE.glob("*.h"), *HERE.glob("*.c")]):
        digest.update(source.read_bytes())
    return f"attention-{digest.hexdigest()[:24]}"


def _processor() -> str:
    """What tells one kind of processor from another: its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = {line.split(":")[0].strip(): line for line in reversed(lines) if ":" in line}
    return platform.machine() + "".join(told.get(key, "") for key in ("model name", "flags", "Features", "CPU part"))
