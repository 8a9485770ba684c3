"""Two checkouts of longspan side by side: kernels, what a call adds, importing, discovery.

A process for each checkout; they take turns, one call at a time, in an order that turns too. A figure is the median of
the pairs' ratios, new over old, with its quartiles; below 1 the new one is faster. An old checkout is had by
`git worktree add FOLDER COMMIT`; both are measured as they lie, on this interpreter's torch.
Run: python tests/benchmarks/commits.py OLD [NEW] [--rounds 25] [--only dilated] [--json FILE]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import longspan as ls

HERE = Path(__file__).resolve().parents[2]
KERNELS: dict[str, dict[str, Any]] = {
    "dense": {"n": 2048, "heads": 8},
    "causal": {"n": 2048, "heads": 8, "is_causal": True},
    "wide": {"n": 2048, "heads": 4, "dim": 128},
    "short": {"n": 128, "heads": 8, "batch": 32},
    "window": {"n": 8192, "pattern": "SlidingWindow(256, 0)"},
    "dilated": {"n": 8192, "pattern": "Dilated((1024, 4096), (1, 4))"},
    "grouped": {"n": 8192, "heads": 4, "pattern": "Dilated((2048, 4096), (1, 2), heads='grouped')"},
    "blocks": {"n": 4096, "pattern": "local_blocks(2, block_size=128)"},
    "shared heads": {"n": 2048, "heads": 8, "kv_heads": 2},
    "dropout": {"n": 2048, "heads": 4, "dropout_p": 0.1},
    "long": {"n": 16384, "heads": 1},
}
CALLS: dict[str, dict[str, Any]] = {
    "plan": {"n": 8, "heads": 1, "dim": 8, "backend": "sdpa"},
    "attention": {"n": 8, "heads": 1, "dim": 8, "backend": "sdpa", "through": "attention"},
    "attention, auto, causal": {"n": 8, "heads": 1, "dim": 8, "is_causal": True, "through": "attention"},
    "window, lowered": {"n": 64, "heads": 1, "dim": 8, "backend": "sdpa", "pattern": "SlidingWindow(16, 0)"},
    "blocks, lowered": {"n": 256, "heads": 1, "dim": 8, "backend": "sdpa", "pattern": "local_blocks(2, block_size=64)"},
    "top-k": {"n": 256, "heads": 1, "dim": 8, "backend": "sdpa", "pattern": "TopKBlocks(2, block_size=64)"},
}
FRESH = {"import": "import longspan", "discovery": "import longspan; longspan.backends()"}


def ready(given: dict[str, Any], dtype: str) -> dict[str, Any]:
    """What is timed of a case, by the name of the figure: calls without arguments."""
    batch, heads, dim = given.get("batch", 1), given.get("heads", 2), given.get("dim", 64)
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(batch, count, given["n"], dim, generator=generator).to(getattr(torch, dtype))

    query, dout, key, value = draw(heads), draw(heads), *(draw(given.get("kv_heads", heads)) for _ in range(2))
    pattern = eval(f"ls.{given.get('pattern', 'Dense()')}")
    arguments = {name: given[name] for name in ("is_causal", "dropout_p") if name in given}
    if "kv_heads" in given:
        arguments["enable_gqa"] = True
    backend = given.get("backend", "cpu_fused" if given["n"] > 64 else None)
    if given.get("through") == "attention":
        return {"call": lambda: ls.attention(query, key, value, pattern, backend=backend, **arguments)}
    plan = ls.plan(ls.Problem.like(query, key, value, pattern=pattern, **arguments), backend=backend)
    if given in CALLS.values():
        return {"call": lambda: plan(query, key, value)}
    seed = {"dropout_seed": 3} if "dropout_p" in given else {}
    out, lse = plan(query, key, value, **seed)
    again = {"seed": 3} if seed else {}
    return {
        "forward": lambda: plan(query, key, value, **seed),
        "backward": lambda: plan.backward(dout, query, key, value, out, lse, **again),
    }


def work() -> None:
    """A worker: seconds a call for each `[name, dtype, figure, calls]` that comes in."""
    made: dict[tuple[str, str], dict[str, Any]] = {}
    print(Path(ls.__file__).resolve().parents[2], flush=True)
    with torch.no_grad():
        for line in sys.stdin:
            name, dtype, figure, calls = json.loads(line)
            if (name, dtype) not in made:
                made[name, dtype] = ready({**KERNELS, **CALLS}[name], dtype)
            run = made[name, dtype][figure]
            start = time.perf_counter()
            for _ in range(calls):
                run()
            print((time.perf_counter() - start) / calls, flush=True)


class Side:
    """A checkout and its worker."""

    def __init__(self, tree: Path, cache: str) -> None:
        self.environment = {**os.environ, "PYTHONPATH": f"{tree}/core:{tree}/plugins", "LONGSPAN_CACHE": cache}
        self._worker = subprocess.Popen(
            [sys.executable, __file__, "--work"],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        served = self._read()
        if Path(served) != tree:
            raise SystemExit(f"asked for {tree}, measured {served}")

    def _read(self) -> str:
        assert self._worker.stdout is not None
        if not (line := self._worker.stdout.readline()):
            raise SystemExit("a worker ended; its error is above")
        return line.strip()

    def seconds(self, *asked: object) -> float:
        """One measurement."""
        assert self._worker.stdin is not None
        self._worker.stdin.write(json.dumps(asked) + "\n")
        self._worker.stdin.flush()
        return float(self._read())

    def fresh(self, code: str) -> float:
        """Seconds of a process of its own."""
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], env=self.environment, cwd="/", check=True, capture_output=True)
        return time.perf_counter() - start


def rows(old: Side, new: Side, rounds: int, only: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each case and figure."""
    asked: list[tuple[str, str, str, int]] = []
    for name in KERNELS:
        asked += [(name, dtype, way, 1) for dtype in ("float32", "bfloat16") for way in ("forward", "backward")]
    asked += [(name, "float32", "call", 100) for name in CALLS]
    for name, *rest in asked:
        if not only or name in only:
            times = _pairs(lambda side, a=(name, *rest): side.seconds(*a), old, new, rounds)
            yield {"case": name, "dtype": rest[0], "figure": rest[1], **times}
    for name, code in FRESH.items():
        if not only or name in only:
            yield {
                "case": name,
                "dtype": "",
                "figure": "seconds",
                **_pairs(lambda side, c=code: side.fresh(c), old, new, rounds),
            }


def _pairs(measure: Any, old: Side, new: Side, rounds: int) -> dict[str, Any]:
    measure(old), measure(new)
    found: dict[Side, list[float]] = {old: [], new: []}
    for number in range(rounds):
        for side in (old, new) if number % 2 else (new, old):
            found[side].append(measure(side))
    low, mid, high = statistics.quantiles((b / a for a, b in zip(found[old], found[new], strict=True)), n=4)
    medians = {"old_us": 1e6 * statistics.median(found[old]), "new_us": 1e6 * statistics.median(found[new])}
    return {"ratio": mid, "q1": low, "q3": high, **medians, "of_least": min(found[new]) / min(found[old])}


def main() -> None:
    options = ArgumentParser(description=__doc__)
    options.add_argument("old", type=Path)
    options.add_argument("new", type=Path, nargs="?", default=HERE)
    options.add_argument("--rounds", type=int, default=25)
    options.add_argument("--only", nargs="*", default=[])
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    trees = {"old": given.old.resolve(), "new": given.new.resolve()}
    heads = {
        side: subprocess.check_output(["git", "-C", tree, "rev-parse", "HEAD"], text=True)
        for side, tree in trees.items()
    }
    found = []
    with tempfile.TemporaryDirectory() as cache:
        sides = [Side(tree, f"{cache}/{side}") for side, tree in trees.items()]
        for row in rows(*sides, given.rounds, given.only):
            found.append(row)
            name = f"{row['case']}, {row['figure']} {row['dtype']}"
            times = f"{row['old_us']:10.1f} -> {row['new_us']:.1f} us"
            print(f"{name:42} {row['ratio']:.3f} ({row['q1']:.3f} to {row['q3']:.3f}) {times}", flush=True)
    if given.json:
        from longspan.tools.bench.sidebyside import machine  # here: a worker of an old checkout may lack it

        result = {"benchmark": "commits", "commits": heads, "machine": machine(), "rows": found}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--work"] else main()
