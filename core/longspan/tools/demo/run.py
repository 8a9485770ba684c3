"""The demonstration's one procedure: read, embed, ask the oracle, and run every backend that fits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from attrs import evolve

from longspan.patterns.dilated import Dilated
from longspan.registry.discovery import registry
from longspan.registry.explain import explain
from longspan.registry.resolve import require
from longspan.spec.device import Device, local_device
from longspan.spec.problem import Problem
from longspan.tools.demo.baseline import measure_dense
from longspan.tools.demo.inputs import embed, read_text
from longspan.tools.demo.judge import Judge, sample_rows
from longspan.tools.demo.measurement import Measurement
from longspan.tools.demo.options import check_room, check_seed, choose_dtype, describe, room
from longspan.tools.demo.report import Report

__all__ = ["DEFAULT_TOKENS", "HEADS", "HEAD_DIM", "PATTERN", "OnReport", "OnStep", "run"]

DEFAULT_TOKENS = 131_072
HEADS = 8
HEAD_DIM = 64
PATTERN = Dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
"""LongNet's branches (arXiv 2307.02486, section 4.1)."""

SECONDS = 45.0
"""For all backends together. The one that is chosen has all the time it needs, and so has one that was named."""

OnStep = Callable[[str, int, int], None]
OnReport = Callable[[Report], None]


def _silent(*_: object) -> None:
    """Nothing is shown meanwhile."""


def run(
    text: Path | None = None,
    *,
    tokens: int = DEFAULT_TOKENS,
    backend: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    seed: int = 0,
    on_step: OnStep = _silent,
    on_report: OnReport = _silent,
) -> Report:
    """Causal dilated attention over a text's bytes, by every backend that fits or by the one named.

    Args:
        text: the file to read; None: the Python standard library's own sources.
        tokens: how many of its bytes; all where it has fewer.
        backend: only this one.
        device: `auto`, or a device of this machine.
        dtype: of query, key and value.
        seed: of the projections and of the rows that are checked.
        on_step: called when a step begins, with its description, the number of steps done and their total.
        on_report: called with the report so far: before the first backend runs, and with each row that is added.

    Returns:
        What was measured. A backend that raises or is wrong is a failed row; the others still run. One that auto did
        not take and that nobody named runs on a prefix where the whole would take too long, and its row says so. Where
        the user interrupts it (KeyboardInterrupt) while backends run, it holds the rows that there are.

    Raises:
        ArgumentError: a file, number, device or dtype that cannot serve.
        UnknownBackend: a name nobody registered.
        BackendUnavailable: the named backend does not fit, or none does.
    """
    start = time.perf_counter()
    where, kind = local_device(device, "--device"), choose_dtype(dtype)
    check_seed(seed)
    # Of a text that goes on for longer than memory does, no more is read than shows that.
    most = room(HEADS * HEAD_DIM, kind, where)
    source = read_text(text, tokens if most is None else min(tokens, most + 1))
    check_room(tokens if most is not None and len(source) > most else len(source), HEADS * HEAD_DIM, kind, where)
    problem = Problem(
        batch=1,
        heads=HEADS,
        q_len=len(source),
        head_dim=HEAD_DIM,
        dtype=str(kind),
        device=Device.of(where),
        pattern=PATTERN,
        is_causal=True,
    )
    resolution = explain(problem, backend=backend)
    verdicts = resolution.candidates if backend in (None, "auto") else (resolution[require(resolution)],)
    fitting = [verdict.name for verdict in verdicts if verdict.ok]
    if not fitting:
        require(resolution)  # raises, with every reason

    steps = ["embedding the text", "float64 oracle on sampled rows", "dense SDPA", *fitting]
    exact = {row.name: row.capabilities is None or row.capabilities.exact for row in registry.backends()}

    def begin(step: str) -> None:
        on_step(step, steps.index(step), len(steps))

    with torch.no_grad():
        begin(steps[0])
        tensors = embed(source.tokens, heads=HEADS, head_dim=HEAD_DIM, seed=seed, dtype=kind, device=where)
        begin(steps[1])
        judge = Judge(*tensors, PATTERN, sample_rows(len(source), PATTERN, seed))
        begin(steps[2])
        measurement = Measurement(problem, tensors, judge, measure_dense(*tensors))
        report = Report(
            text=source.source,
            tokens=len(source),
            tokens_wanted=tokens,
            seed=seed,
            device=describe(where),
            torch=torch.__version__,
            resolution=resolution,
            rows_checked=len(judge.rows),
            naive_error=judge.naive_error,
            tolerance=judge.tolerance,
            baseline=measurement.baseline,
            rows=(),
            seconds=0.0,
        )
        on_report(report)
        deadline = time.perf_counter() + SECONDS
        try:
            for verdict in verdicts:
                chosen, share_ms = verdict.name == resolution.chosen, 0.0
                if verdict.ok:
                    begin(verdict.name)
                    # The time that is left is shared among the backends that are left.
                    left_ms = 1e3 * max(0.0, deadline - time.perf_counter())
                    share_ms = left_ms / (len(fitting) - fitting.index(verdict.name))
                patience_ms = math.inf if chosen else share_ms
                row = measurement.row(verdict, chosen=chosen, exact=exact[verdict.name], patience_ms=patience_ms)
                report = evolve(report, rows=(*report.rows, row))
                on_report(report)
        except KeyboardInterrupt:
            report = evolve(report, interrupted=True)
    return evolve(report, seconds=round(time.perf_counter() - start, 3))
