"""What a bench found, row by row: a figure, the limit that it is held to, and whether it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longspan.tools.bench.sidebyside import ratio

__all__ = ["Rows"]


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
