"""What the demonstration found, as plain values."""

from __future__ import annotations

import math
from typing import Any

from attrs import asdict, frozen

from longspan.spec.backend import Reason
from longspan.spec.resolution import Resolution

__all__ = ["Baseline", "Report", "Row", "Timing"]


@frozen(kw_only=True)
class Timing:
    """The median milliseconds of `runs` calls on the first `tokens` tokens."""

    tokens: int
    ms: float
    runs: int


@frozen(kw_only=True)
class Baseline:
    """Causal dense attention by torch on all `tokens` tokens: `ms`, from what was `measured`, shortest first.

    Where the longest that was measured is shorter, `ms` is extrapolated, and no measurement.
    """

    tokens: int
    ms: float
    measured: tuple[Timing, ...]

    @property
    def is_measured(self) -> bool:
        """Whether `ms` was measured."""
        return self.measured[-1].tokens == self.tokens

    def at(self, tokens: int) -> float | None:
        """Milliseconds on a prefix that was measured, or on the whole; None for other lengths."""
        if tokens == self.tokens:
            return self.ms
        return next((timing.ms for timing in self.measured if timing.tokens == tokens), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "extrapolated": not self.is_measured}


@frozen(kw_only=True)
class Row:
    """One backend. None stands for what was not measured.

    `state` is `ran`, `refused` (for its `reasons`) or `failed` (`failure` says how: it raised, or its error is above
    the tolerance). `reasons` of a backend that ran say why auto does not take it. `tokens` is how many it ran on: fewer
    than all where it is too slow for them. On these, `ms` is the median of `runs`, `peak_mib` the memory beyond the
    inputs, the result included, and `error` the largest |got - oracle| / max(1, |oracle|) of the sampled rows.
    `speedup` is the time of dense attention on as many tokens, `dense_ms`, over `ms`; `dense_extrapolated` says that
    dense attention did not run on so many.
    """

    name: str
    state: str
    chosen: bool = False
    reasons: tuple[Reason, ...] = ()
    failure: str = ""
    tokens: int = 0
    ms: float | None = None
    runs: int = 0
    tokens_per_s: float | None = None
    peak_mib: float | None = None
    error: float | None = None
    dense_ms: float | None = None
    dense_extrapolated: bool = False
    speedup: float | None = None


@frozen(kw_only=True)
class Report:
    """The run so far: what was computed on what, the dense baseline, a row a backend, and who auto would have taken.

    `rows` grow while it runs. `interrupted`: the user stopped it (Ctrl-C) before all were there.

    `tolerance` is the largest error that passes, by the conformance kit's rule: twice `naive_error`, which naive torch
    in the same dtype makes on the same rows, or what roundings of the result and the log-sum-exp alone may lose.
    """

    text: str
    tokens: int
    tokens_wanted: int
    seed: int
    device: str
    torch: str
    resolution: Resolution
    rows_checked: int
    naive_error: float
    tolerance: float
    baseline: Baseline
    rows: tuple[Row, ...]
    seconds: float
    interrupted: bool = False

    @property
    def failures(self) -> tuple[str, ...]:
        """Everything that went wrong, one line each."""
        lines = [f"{row.name}: {row.failure}" for row in self.rows if row.state == "failed"]
        if self.resolution.chosen is None:
            lines.append(f"no backend was chosen: {self.resolution.why}")
        return tuple(lines)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader should know before reading the numbers."""
        notes = list(self.resolution.notes)
        if self.tokens != self.tokens_wanted:
            short = f"the text has {self.tokens:,} bytes, fewer than the {self.tokens_wanted:,} tokens asked for"
            notes.append(f"{short}: all of them are used")
        return tuple(notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, in which what is not finite is null (the failure's text names it)."""
        problem = self.resolution.problem
        return {
            "ok": not (self.failures or self.interrupted),
            "failures": list(self.failures),
            "notes": list(self.notes),
            "text": self.text,
            "tokens": self.tokens,
            "tokens_wanted": self.tokens_wanted,
            "heads": problem.heads,
            "head_dim": problem.head_dim,
            "pattern": problem.pattern.spec,
            "is_causal": problem.is_causal,
            "dtype": problem.dtype,
            "device": self.device,
            "torch": self.torch,
            "seed": self.seed,
            "rows_checked": self.rows_checked,
            "naive_error": _finite(self.naive_error),
            "tolerance": _finite(self.tolerance),
            "dense": self.baseline.to_dict(),
            "backends": [{key: _finite(value) for key, value in asdict(row).items()} for row in self.rows],
            "resolution": self.resolution.to_dict(),
            "seconds": self.seconds,
            "interrupted": self.interrupted,
        }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
