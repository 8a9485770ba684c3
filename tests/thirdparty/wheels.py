"""Builds the distributions of `packages/` and the template of the documentation as wheels, offline, and installs them.

The sources are copied first, since a build leaves its traces beside them. `python tests/thirdparty/wheels.py` builds
all but `crash` and installs them into the running environment: for tox, and not for an environment of your own.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
TEMPLATE = HERE.parents[1] / "docs" / "examples" / "third_party_backend"
SOURCES = {path.parent.name: path.parent for path in sorted(HERE.glob("packages/*/pyproject.toml"))}
SOURCES["template"] = TEMPLATE
TRACES = shutil.ignore_patterns("__pycache__", "build", "dist", "*.egg-info", ".*_cache")


def pip(*arguments: str | Path) -> None:
    """pip, which may fetch nothing."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--isolated", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


def build(folder: Path) -> dict[str, Path]:
    """The wheel of each distribution, by the name of its folder."""
    found = {}
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes of one test run, the first builds them
        if not (folder / "sources").exists():
            _build(folder)
    for name, source in SOURCES.items():
        project = next(line for line in (source / "pyproject.toml").read_text().splitlines() if line[:6] == "name =")
        distribution = project.split('"')[1].replace("-", "_")
        (found[name],) = folder.glob(f"wheels/{distribution}-*-none-any.whl")
    return found


def _build(folder: Path) -> None:
    for name, source in SOURCES.items():
        shutil.copytree(source, folder / "sources" / name, ignore=TRACES)
    sources = [folder / "sources" / name for name in SOURCES]
    offline = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder / "wheels")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda some: pip(*offline, *some), (sources[::2], sources[1::2])))


def install(wheels: Mapping[str, Path], names: Iterable[str], target: Path | None = None) -> None:
    """Install some of the wheels into a folder of their own, or into the running environment."""
    where = ("--target", target) if target else ()
    pip("install", "--quiet", "--force-reinstall", "--no-deps", "--no-index", *where, *(wheels[name] for name in names))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheels = build(Path(folder))
        install(wheels, [name for name in wheels if name != "crash"])


if __name__ == "__main__":
    main()
