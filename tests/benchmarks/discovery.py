"""What finding backends costs beyond importing them, with 30 distributions installed that each bring one.

Each round is a new interpreter with 30 folders of metadata on its path, and 30 modules that define the smallest
backend. Imports are timed apart: what a plugin does when it is imported is its own affair. On a busy machine read the
CPU's clock: the work is done by one thread.

Run: python tests/benchmarks/discovery.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from longspan.tools.bench.sidebyside import report, summary

BACKEND = """
from longspan import Capabilities, hookimpl

@hookimpl
def longspan_capabilities():
    return Capabilities(devices=("cpu",), dtypes=("float32",), patterns=("dense",))

@hookimpl
def longspan_kernel(problem):
    raise NotImplementedError
"""
METADATA = "Metadata-Version: 2.1\nName: acme-{number:02}\nVersion: 1.0\n"
ROUND = """
import importlib.metadata, json, time
import longspan
from longspan.registry.discovery import Registry

clocks = {"wall": time.perf_counter, "cpu": time.process_time}
now = lambda: [clock() for clock in clocks.values()]
since = lambda start: [1e6 * (clock() - at) for clock, at in zip(clocks.values(), start)]
registry, imports = Registry(), [0.0, 0.0]
load = importlib.metadata.EntryPoint.load

def timed(point):
    start = now()
    try:
        return load(point)
    finally:
        imports[:] = [so_far + more for so_far, more in zip(imports, since(start))]

importlib.metadata.EntryPoint.load = timed
start = now()
registry.discover()
total = since(start)
rows = [row for row in registry.backends() if row.distribution.startswith("acme-")]
start = now()
points = importlib.metadata.entry_points(group="longspan.backends")
scan = since(start)
found = {"beyond imports": [a - b for a, b in zip(total, imports)], "imports": imports, "scan of all metadata": scan}
print(json.dumps({
    "us": {name: dict(zip(clocks, us)) for name, us in found.items()},
    "rows": len(rows),
    "loaded": sum(row.state == "loaded" for row in rows),
    "distributions on the path": len(list(importlib.metadata.distributions())),
}))
"""


def install(folder: Path, count: int) -> None:
    """Distributions as pip would leave them, as far as discovery looks."""
    for number in range(count):
        metadata = folder / f"acme_{number:02}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(METADATA.format(number=number))
        (metadata / "entry_points.txt").write_text(f"[longspan.backends]\nacme_{number:02} = acme_{number:02}\n")
        (folder / f"acme_{number:02}.py").write_text(BACKEND)


def one_round(folder: Path, plugins: str) -> dict[str, Any]:
    """Microseconds by what they were spent on and by clock, and how much was found."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LONGSPAN_")}
    path = filter(None, (str(folder), environment.get("PYTHONPATH")))  # a checkout may be measured from elsewhere
    environment |= {"PYTHONPATH": os.pathsep.join(path), "LONGSPAN_CACHE": str(folder / "cache")}
    if plugins:
        environment["LONGSPAN_PLUGINS"] = plugins
    done = subprocess.run([sys.executable, "-c", ROUND], env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(count: int = 30, rounds: int = 9) -> None:
    sides: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as full:
        install(Path(full), count)
        for _ in range(rounds):
            sides.setdefault("none installed", []).append(one_round(Path(empty), ""))
            sides.setdefault(f"{count} installed", []).append(one_round(Path(full), ""))
            sides.setdefault(f"{count} installed, all blocked", []).append(one_round(Path(full), "builtin"))
    found = {
        name: {
            **{key: measured[0][key] for key in measured[0] if key != "us"},
            **{
                f"{what}, {clock}": summary([1e-6 * one["us"][what][clock] for one in measured])
                for what, clocks in measured[0]["us"].items()
                for clock in clocks
            },
        }
        for name, measured in sides.items()
    }
    report("discovery", {"sides": found, "limit_us": {f"{count} installed, beyond imports": 15_000}})


if __name__ == "__main__":
    main()
