"""`longspan demo`: the main job on a real text, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from longspan import Verdict
from longspan.cli import output
from longspan.cli.verdicts import word
from longspan.demo import DEFAULT_TOKENS, OnStep, Report, Row, run

__all__ = ["demo"]


def demo(
    text: Annotated[
        Path | None,
        typer.Argument(help="A text file; its bytes are the tokens. Default: the Python standard library's sources."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many bytes of the text to read.")] = DEFAULT_TOKENS,
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="Run this backend only.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...: one of this machine.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the projections and the rows that are checked.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Run causal dilated attention over a text with every backend that fits; check it, time it, compare it.

    A backend too slow for the whole text runs on its beginning, unless it is chosen or named, and the table says so.
    Exit code 1 where a backend's result is further from the float64 oracle than it may be.
    """
    with output.quiet_stdout(), _progress() as on_step:
        report = run(text, tokens=tokens, backend=backend, device=device, dtype=dtype, seed=seed, on_step=on_step)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        _show(report)
    for line in report.failures:
        output.fail(line)
    if report.failures:
        raise typer.Exit(1)


@contextmanager
def _progress() -> Iterator[OnStep]:
    """A bar on stderr; where that is no terminal, a line for each step."""
    console = output.note()
    if not console.is_terminal:
        yield lambda what, done, total: output.note().print(f"[{done + 1}/{total}] {what}", soft_wrap=True)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # A bar that is drawn often would take its share of the cores that are being timed.
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _show(report: Report) -> None:
    problem = report.resolution.problem
    output.say(f"{report.tokens:,} tokens, the bytes of {report.text}", "bold")
    for line in report.notes:
        output.say(f"note: {line}", "yellow")
    output.say(
        f"causal {problem.pattern.spec}, {problem.heads} heads of {problem.head_dim}, {problem.dtype}, "
        f"{report.device}, torch {report.torch}, seed {report.seed}"
    )
    base = report.baseline
    span = "" if base.whole else f"\n(first {base.tokens:,}\ntokens)"
    columns = [
        ("backend", False),
        ("chosen, or\nwhy not", False),
        ("ms", True),
        ("tokens/s", True),
        ("peak MiB\nover inputs", True),
        ("relative\nerror", True),
        (f"× dense SDPA{span}", True),
    ]
    output.table(columns, [_cells(report, row) for row in report.rows])
    for row in report.rows:
        for line in _remarks(report, row):
            output.say(f"{row.name}: {line}")
    tokens = "all" if base.whole else "the first"
    output.say(f"dense SDPA (causal, torch's own) took {base.ms:,.0f} ms on {tokens} {base.tokens:,} tokens")
    output.say(
        f"relative error: the largest of {report.rows_checked} sampled rows in {problem.heads} heads against the "
        f"float64 oracle; at most {report.tolerance:.1e} passes: twice what naive torch in {problem.dtype} loses there "
        f"({report.naive_error:.1e}), and two roundings of the log-sum-exp"
    )
    output.say(_decision(report), "bold")


def _cells(report: Report, row: Row) -> tuple[str | Text, ...]:
    """A row of the table; what does not fit into a cell is said in full below it."""
    if row.state == "failed":
        verdict = Text("failed", "bold red")
    else:
        verdict = word(report.resolution, Verdict(row.name, row.state == "ran", row.reasons))
    if row.state == "refused":
        verdict.append(f": {', '.join(dict.fromkeys(reason.field for reason in row.reasons))}")
    on = f"\n(first {row.compared_tokens:,})" if 0 < row.compared_tokens < report.baseline.tokens else ""
    return (
        row.name,
        verdict,
        _number(row.ms, ",.0f") + (f"\n(first {row.tokens:,})" if row.tokens < report.tokens and row.ms else ""),
        _number(row.tokens_per_s, ",.0f"),
        _number(row.peak_mib, ",.0f"),
        _number(row.error, ".1e"),
        _number(row.speedup, ".2f", f"×{on}"),
    )


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "n/a" if value is None else f"{value:{form}}{unit}"


def _remarks(report: Report, row: Row) -> list[str]:
    found = [f"failed: {row.failure}"] if row.failure else []
    if 0 < row.tokens < report.tokens:
        found.append(f"ran on the first {row.tokens:,} tokens, too slow for all here; --backend {row.name} runs all")
    return [*found, *map(str, row.reasons)]


def _decision(report: Report) -> str:
    resolution = report.resolution
    if resolution.decided_by == "auto":
        return f"auto took {resolution.chosen}: {resolution.why}"
    return f"{resolution.chosen or 'nothing'} was chosen by {resolution.decided_by}, not by auto: {resolution.why}"
