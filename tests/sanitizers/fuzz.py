"""Drawn problems through native kernels that were built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitizers/fuzz.py --cases 10000 --seed 1     # draw
    python tests/sanitizers/fuzz.py --only 4711 --seed 1       # one of them again

A case is its seed and its number, whatever ran before. A report of the sanitizers, a crash, a result that is not the
reference's, or an error that is none of longspan's ends the run with the line that runs the case again.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-march=native", "-std=gnu11", "-shared", "-fPIC"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
ENVIRON = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:exitcode=99:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=99",
    "OMP_NUM_THREADS": "1",
}
KERNELS = ("longspan_forward", "longspan_backward", "longspan_dilated", "longspan_job_size", "longspan_lanes")


def compiler() -> list[str]:
    """The C compiler.

    Raises:
        LookupError: there is none.
    """
    from longspan_plugins.cpu_fused import library

    found = library.compiler()
    if found is None:
        raise LookupError("no C compiler")
    return list(found)


def preloaded() -> str:
    """What has to be there before Python allocates: AddressSanitizer, and the C++ library whose exceptions it watches.

    Raises:
        LookupError: one of them is missing; says which.
    """
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        asked = subprocess.run([*compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
        if asked.returncode or not Path(asked.stdout.strip()).is_absolute():
            raise LookupError(f"{shlex.join(compiler())} has no {name}")
        paths.append(asked.stdout.strip())
    return " ".join(paths)


def build(folder: Path) -> Path:
    """The kernels of the installed longspan, with sanitizers."""
    from longspan_plugins.cpu_fused import library

    target = folder / "sanitized.so"
    source = Path(library.__file__).with_name("attention.c")
    program = [*compiler(), *FLAGS, *SANITIZE, "-o", str(target), str(source), "-lpthread", "-lm"]
    subprocess.run(program, check=True)
    return target


def start(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this file under the sanitizers."""
    environ = {**os.environ, **ENVIRON, "LD_PRELOAD": preloaded(), "PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, "-W", "ignore", __file__, "--library", str(library), *arguments]
    return subprocess.run(program, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def current(folder: Path) -> Path:
    """Where the case that is running is written down."""
    return folder / "case.txt"


def use(path: Path) -> None:
    """Have `cpu_fused` run these kernels."""
    from longspan_plugins.cpu_fused import library

    handle = ctypes.CDLL(str(path))
    for name in KERNELS:
        getattr(handle, name).restype = ctypes.c_int64
    handle.longspan_forward.argtypes = handle.longspan_backward.argtypes = (ctypes.c_void_p,)
    made = library.Library(handle, handle.longspan_lanes())
    library.load = functools.cache(lambda: made)  # whether it was called is asked of the cache


def plant() -> None:
    """A gate that is open: results get the address of memory that is a row short."""
    import torch

    from longspan_plugins.cpu_fused import native

    def short(tensor: torch.Tensor, dtype: torch.dtype) -> int:
        held.append(torch.empty(max(0, tensor.numel() - tensor.shape[-1]), dtype=dtype, device="cpu"))
        return held[-1].data_ptr()

    held: list[torch.Tensor] = []
    native.check_made = short


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: 0)")
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument("--planted", action="store_true", help="with a mistake that the sanitizers have to find")
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    first, count = (given.first, given.cases) if given.only is None else (given.only, 1)
    if given.library is None:
        with tempfile.TemporaryDirectory(prefix="longspan-sanitizers-") as folder:
            more = ["--planted"] if given.planted else []
            numbers = ["--cases", str(count), "--first", str(first), "--seed", str(given.seed)]
            done = start(build(Path(folder)), *numbers, *more)
            print(done.stdout, end="")
            if done.returncode not in (0, 1):  # a report, or a crash
                print(f"Ended with {done.returncode}, in {current(Path(folder)).read_text()}")
        return done.returncode
    use(given.library)
    if given.planted:
        plant()
    from cases import run

    return run(given.seed, range(first, first + count), current(given.library.parent))


if __name__ == "__main__":
    sys.exit(main())
