"""Timing of alternatives side by side: interleaved rounds, medians and spread, raw rounds kept."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def interleave(
    sides: Mapping[str, Callable[[], object]], *, rounds: int, calls: int = 1, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds a call of each side, one figure a round; the order turns from round to round."""
    names = list(sides)
    for name in names:
        for _ in range(warm):
            sides[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            side = sides[name]
            start = time.perf_counter()
            for _ in range(calls):
                side()
            seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, in microseconds."""
    low, mid, high = statistics.quantiles(seconds, n=4)
    return {"median_us": 1e6 * mid, "q1_us": 1e6 * low, "q3_us": 1e6 * high, "min_us": 1e6 * min(seconds)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = f"{names[0]} x {len(names)}" if names else model
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def report(name: str, result: dict[str, Any]) -> None:
    """Print the result and the machine as JSON."""
    print(json.dumps({"benchmark": name, "machine": machine(), **result}, indent=1))
