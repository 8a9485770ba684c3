"""`longspan demo`: the main job on a real text, as a table or as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from longspan.tools.cli import output
from longspan.tools.cli.progress import progress
from longspan.tools.cli.tables import Grid
from longspan.tools.demo import DEFAULT_TOKENS, Report, Row, run

__all__ = ["demo"]

COLUMNS = (
    ("backend", False, 0),
    ("", False, 7),
    ("tokens", True, 0),
    ("ms", True, 6),
    ("tokens/s", True, 9),
    ("MiB", True, 5),
    ("error", True, 7),
    ("× dense", True, 7),
)
"""Heading, whether it holds numbers, and how wide; 0: as wide as what is known to stand in it."""
DISPENSABLE = ("tokens/s", "MiB")
"""What a narrow terminal goes without, the first first: the first follows from the tokens and the time."""


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

    A backend too slow for the whole text runs on its beginning, unless it is chosen or named: the table says on how
    many tokens each ran. Exit code 1 where a backend's result is further from the float64 oracle than it may be, 130
    after Ctrl-C, which prints what there is.
    """
    with progress() as shown:
        table = None if as_json else _Table(shown.console)
        report = run(
            text,
            tokens=tokens,
            backend=backend,
            device=device,
            dtype=dtype,
            seed=seed,
            on_step=shown.step,
            **({} if table is None else {"on_report": table.update}),
        )
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        _explain(report)
    for line in report.failures:
        output.fail(line)
    if report.interrupted:
        ran = len([row for row in report.rows if row.state != "refused"])
        output.fail(f"interrupted after {ran} of {len(_taking_part(report))} backends")
        raise typer.Exit(output.INTERRUPTED)
    if report.failures:
        raise typer.Exit(1)


def _taking_part(report: Report) -> list[str]:
    """The backends that run, by name."""
    chosen = report.resolution
    if chosen.decided_by == "argument":
        return [chosen.chosen] if chosen.chosen is not None else []
    return [verdict.name for verdict in chosen.candidates if verdict.ok]


class _Table:
    """Headings once the comparison is known, then a line for each backend that ran."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._grid: Grid | None = None
        self._kept: tuple[int, ...] = ()

    def update(self, report: Report) -> None:
        """Show what is new in the report."""
        if self._grid is None:
            _introduce(report, self._console)
            self._kept, self._grid = _grid(report, self._console.width)
            output.lines(self._console, [Text(), *self._grid.head("─")])
        elif (row := report.rows[-1]).state != "refused":  # said below the table, with its reasons
            cells = _cells(report, row)
            output.lines(self._console, list(self._grid.row([cells[index] for index in self._kept])))


def _introduce(report: Report, console: Console) -> None:
    problem = report.resolution.problem
    output.write(console, f"{report.tokens:,} tokens, the bytes of {report.text}", "bold")
    for line in report.notes:
        output.write(console, f"note: {line}", "yellow")
    output.write(
        console,
        f"causal {problem.pattern.spec}, {problem.heads} heads of {problem.head_dim}, {problem.dtype}, "
        f"{report.device}, torch {report.torch}, seed {report.seed}",
    )
    output.write(console, _dense(report))


def _dense(report: Report) -> str:
    base = report.baseline
    last = base.measured[-1]
    measured = f"dense SDPA (causal, torch's own): {_time(last.ms)} on the first {last.tokens:,} tokens"
    if base.is_measured:
        return measured.replace("the first", "all")
    lengths = [f"{timing.tokens:,}" for timing in base.measured[-3:]]
    grown = f"{', '.join(lengths[:-1])} and {lengths[-1]}"
    return f"{measured}; about {_time(base.ms)} on all {base.tokens:,}, extrapolated from measured {grown}"


def _time(ms: float) -> str:
    return f"{ms:,.0f} ms" if ms < 10_000 else f"{ms / 1e3:,.0f} s"


def _grid(report: Report, width: int) -> tuple[tuple[int, ...], Grid]:
    """The columns that there is room for, and their grid."""
    known = {"backend": max(map(len, ["backend", *_taking_part(report)])), "tokens": len(f"{report.tokens:,}")}
    columns = list(enumerate(COLUMNS))

    def made() -> Grid:
        widths = [known.get(heading, most) for _, (heading, _, most) in columns]
        widths = [max(wide, len(heading)) for wide, (_, (heading, _, _)) in zip(widths, columns, strict=True)]
        return Grid(tuple((heading, is_number) for _, (heading, is_number, _) in columns), tuple(widths))

    for heading in DISPENSABLE:
        if made().width > width:
            columns = [column for column in columns if column[1][0] != heading]
    return tuple(index for index, _ in columns), made()


def _cells(report: Report, row: Row) -> tuple[str | Text, ...]:
    """Of every column; what does not fit into a cell is said in full below the table."""
    if row.state == "failed":
        verdict = Text("failed", "bold red")
    elif row.chosen:
        verdict = Text("chosen", "bold green")
    else:
        verdict = Text("by name", "yellow") if row.reasons else Text("ok", "green")
    return (
        row.name,
        verdict,
        f"{row.tokens:,}" if row.tokens else "n/a",
        _number(row.ms, ",.0f"),
        _number(row.tokens_per_s, ",.0f"),
        _number(row.peak_mib, ",.0f"),
        _number(row.error, ".1e"),
        f"{'~' * row.dense_extrapolated}{_number(row.speedup, _digits(row.speedup), '×')}",
    )


def _digits(value: float | None) -> str:
    """About three."""
    return ",.0f" if value is None or value >= 100 else ".1f" if value >= 10 else ".2f"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "n/a" if value is None else f"{value:{form}}{unit}"


def _explain(report: Report) -> None:
    """What the table cannot say."""
    problem = report.resolution.problem
    output.say("")
    if any(row.dense_extrapolated for row in report.rows):
        output.say("~ dense attention did not run on so many tokens: its time there is extrapolated, as said above")
    output.say("MiB: the peak beyond the inputs, the result included")
    output.say(
        f"error: the largest difference from the float64 oracle in {report.rows_checked} sampled rows of "
        f"{problem.heads} heads; at most {report.tolerance:.1e} passes: twice what naive torch in "
        f"{problem.dtype} loses there ({report.naive_error:.1e}), or what roundings of the result and the log-sum-exp "
        "alone may lose"
    )
    _remark(report)
    output.say(_decision(report), "bold")


def _remark(report: Report) -> None:
    """What became of backends that did not run on everything."""
    ran = [row for row in report.rows if row.state != "refused"]
    for row in ran:
        if row.failure:
            output.say(f"{row.name}: failed: {row.failure}", "red")
    short = [row for row in ran if 0 < row.tokens < report.tokens]
    if short:
        listed = ", ".join(f"{row.name} (the first {row.tokens:,})" for row in short)
        output.say(f"too slow for all tokens in the time there is: {listed}; --backend {short[0].name} runs all")
    if named := [row.name for row in ran if row.reasons]:
        output.say(f"run here, and never taken by auto unless named: {', '.join(named)}")
    if refused := [row for row in report.rows if row.state == "refused"]:
        output.say("do not run here:")
        for row in refused:
            for reason in row.reasons:
                output.say(f"  {row.name}: {reason}")


def _decision(report: Report) -> str:
    resolution = report.resolution
    if resolution.decided_by == "auto":
        return f"auto took {resolution.chosen}: {resolution.why}"
    return f"{resolution.chosen or 'nothing'} was chosen by {resolution.decided_by}, not by auto: {resolution.why}"
