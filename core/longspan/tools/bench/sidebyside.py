"""Alternatives side by side: interleaved rounds, medians and spread, the rows that tell them, and the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from longspan.registry.profile import machine_name

__all__ = ["Rows", "interleave", "machine", "ratio", "report", "summary"]


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


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and least, in microseconds."""
    low, mid, high = _quartiles(seconds)
    return {"median_us": 1e6 * mid, "q1_us": 1e6 * low, "q3_us": 1e6 * high, "min_us": 1e6 * min(seconds)}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """How one side compares to another: the median of the rounds' ratios with its quartiles, and of the least times."""
    rounds = [a / b for a, b in zip(over, under, strict=True)]
    low, mid, high = _quartiles(rounds)
    return {"median": mid, "q1": low, "q3": high, "of_least": min(over) / min(under)}


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, mid, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return low, mid, high


class Rows:
    """Rows for `longspan bench`'s table, and beneath them the seconds of every round.

    `rows`: each has `work` and `figure`, with a limit also `limit` and `holds`, of measured ratios also `quartiles`.
    `rounds`: for each comparison the seconds a call of each side, one figure a round.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.rounds: dict[str, dict[str, list[float]]] = {}

    def add(self, work: str, figure: float, sign: str = "", limit: float = 0.0, **more: Any) -> None:
        """A figure; `sign` is `<=` or `>=`, or empty where there is no limit."""
        row: dict[str, Any] = {"work": work, "figure": figure}
        if sign:
            row["limit"] = f"{sign} {limit:g}"
            row["holds"] = figure >= limit if sign == ">=" else figure <= limit
        self.rows.append({**row, **more})

    def keep_rounds(self, work: str, seconds: Mapping[str, list[float]]) -> None:
        """Keep the seconds of every round of a comparison, by side."""
        self.rounds[work] = dict(seconds)

    def compare(
        self,
        work: str,
        over: Sequence[float],
        under: Sequence[float],
        sign: str = "",
        limit: float = 0.0,
        *,
        unit: float = 1.0,
        **more: Any,
    ) -> None:
        """A ratio of two sides' rounds, in units of `unit`: the median, judged by the limit, and the quartiles."""
        spread = ratio(over, under)
        quartiles = f"{spread['q1'] / unit:.3f}-{spread['q3'] / unit:.3f}"
        self.add(work, spread["median"] / unit, sign, limit, quartiles=quartiles, **more)


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was."""
    return {
        "cpu": machine_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def report(name: str, result: Mapping[str, Any]) -> None:
    """Print the result and the machine as JSON."""
    print(json.dumps({"benchmark": name, "machine": machine(), **result}, indent=1))
