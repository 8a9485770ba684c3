"""One backend measured: warm up, run with the clock and the memory meter on, judge, compare with dense attention."""

from __future__ import annotations

from collections.abc import Callable

from attrs import evolve, frozen
from torch import Tensor

from longspan.planning.plan import plan
from longspan.spec.problem import Problem
from longspan.spec.resolution import Verdict
from longspan.tools.demo.judge import Judge
from longspan.tools.demo.prefix import affordable_prefix
from longspan.tools.demo.report import Baseline, Row
from longspan.tools.meter import PeakMemory, measure, timed

__all__ = ["Measurement"]


@frozen
class Measurement:
    """The same inputs, judge and dense baseline for every backend."""

    problem: Problem
    tensors: tuple[Tensor, Tensor, Tensor]
    judge: Judge
    baseline: Baseline

    def row(self, verdict: Verdict, *, chosen: bool, exact: bool, patience_ms: float) -> Row:
        """Run the backend if it fits.

        `exact`: False for an approximation, whose error is shown and not judged. `patience_ms`: a backend that would
        take longer for the whole runs on a prefix.
        """
        row = Row(name=verdict.name, state="refused", chosen=chosen, reasons=verdict.reasons)
        if not verdict.ok:
            return row
        try:
            row = self._run(evolve(row, state="ran"), patience_ms)
        except Exception as error:  # noqa: BLE001 - whatever a backend raises is its row's, the others still run
            return evolve(row, state="failed", failure=f"{type(error).__name__}: {error}")
        assert row.error is not None  # it ran
        if exact and row.error > self.judge.tolerance:
            wrong = f"error {row.error:.2g} exceeds the tolerance, {self.judge.tolerance:.2g}"
            return evolve(row, state="failed", failure=wrong)
        return row

    def _run(self, row: Row, patience_ms: float) -> Row:
        device = self.tensors[0].device
        tokens = affordable_prefix(self.problem, patience_ms, lambda tokens: self._warm(row.name, tokens))
        call = self._call(row.name, tokens)
        with PeakMemory(device) as memory:
            (out, _), first_ms = timed(call, device)
        error = self.judge.error(out)
        del out, _  # beside them, the next run's results would need memory of their own
        ms, runs = measure(call, device, first_ms)
        dense = self.baseline.at(tokens)
        return evolve(
            row,
            tokens=tokens,
            ms=ms,
            runs=runs,
            tokens_per_s=1e3 * tokens / ms,
            peak_mib=memory.mib,
            error=error,
            dense_ms=dense,
            dense_extrapolated=tokens == self.baseline.tokens and not self.baseline.is_measured,
            speedup=None if dense is None else dense / ms,
        )

    def _call(self, backend: str, tokens: int) -> Callable[[], tuple[Tensor, Tensor]]:
        """The first tokens by this backend."""
        planned = plan(self.problem.replace(q_len=tokens, kv_len=tokens), backend)
        query, key, value = (tensor[:, :, :tokens] for tensor in self.tensors)
        return lambda: planned(query, key, value)

    def _warm(self, backend: str, tokens: int) -> float:
        """Milliseconds of a second run, which does not do again what is done once only."""
        call = self._call(backend, tokens)
        call()
        return timed(call, self.tensors[0].device)[1]
