"""A verdict in a table's cells, the same in `explain` and in `demo`."""

from __future__ import annotations

from rich.text import Text

from longspan import Resolution, Verdict

__all__ = ["word"]


def word(resolution: Resolution, verdict: Verdict) -> Text:
    """`chosen`, `ok`, `by name only` (it fits, and auto does not take it unasked) or `no`."""
    if verdict.name == resolution.chosen:
        return Text("chosen", "bold green")
    if not verdict.ok:
        return Text("no", "red")
    return Text("by name only", "yellow") if verdict.reasons else Text("ok", "green")
