"""One backend's turn: warm up, run with the clock and the memory meter on, judge, compare with dense attention."""

from __future__ import annotations

from attrs import evolve, frozen
from torch import Tensor

from longspan.demo.judge import Judge
from longspan.demo.meter import PeakMemory, measure, timed
from longspan.demo.report import Baseline, Row
from longspan.plan import Plan, plan
from longspan.spec import Problem, Verdict

__all__ = ["Trial"]

WARM_UP = 4096


@frozen
class Trial:
    """The same inputs, judge and dense baseline for every backend."""

    problem: Problem
    tensors: tuple[Tensor, Tensor, Tensor]
    judge: Judge
    baseline: Baseline

    def row(self, verdict: Verdict, *, chosen: bool, exact: bool) -> Row:
        """Run the backend if it fits. `exact`: False for an approximation, whose error is shown and not judged."""
        row = Row(name=verdict.name, state="refused", chosen=chosen, reasons=verdict.reasons)
        if not verdict.ok:
            return row
        try:
            row = self._run(evolve(row, state="ran"))
        except Exception as error:  # noqa: BLE001 - whatever a backend raises is its row's, the others still run
            return evolve(row, state="failed", failure=f"{type(error).__name__}: {error}")
        assert row.error is not None  # it ran
        if exact and not row.error <= self.judge.tolerance:  # so written that NaN fails too
            wrong = f"relative error {row.error:.2g} exceeds the tolerance, {self.judge.tolerance:.2g}"
            return evolve(row, state="failed", failure=wrong)
        return row

    def _run(self, row: Row) -> Row:
        length, device = self.problem.q_len, self.tensors[0].device
        planned = plan(self.problem, row.name)
        self._prefix(row.name, min(WARM_UP, length))  # what is done once only is not counted
        with PeakMemory(device) as memory:
            (out, _), first_ms = timed(lambda: planned(*self.tensors), device)
        error = self.judge.error(out)
        del out, _  # a second result beside this one would need its memory too
        ms, runs = measure(lambda: planned(*self.tensors), device, first_ms)
        prefix_ms = ms
        if not self.baseline.whole:
            short, tensors = self._prefix(row.name, self.baseline.tokens)
            prefix_ms, _ = measure(lambda: short(*tensors), device)
        return evolve(
            row,
            ms=ms,
            runs=runs,
            tokens_per_s=1e3 * length / ms,
            peak_mib=memory.mib,
            error=error,
            prefix_ms=prefix_ms,
            speedup=self.baseline.ms / prefix_ms,
        )

    def _prefix(self, backend: str, tokens: int) -> tuple[Plan, list[Tensor]]:
        """A plan for the first tokens, run once, and their tensors."""
        short = plan(self.problem.replace(q_len=tokens, kv_len=tokens), backend)
        tensors = [tensor[:, :, :tokens] for tensor in self.tensors]
        short(*tensors)
        return short, tensors
