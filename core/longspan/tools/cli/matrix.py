"""`longspan matrix`: what every built-in backend declares, on a terminal and as Markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from attrs import asdict

import longspan
from longspan.errors import ArgumentError
from longspan.spec.backend import BackendInfo, Capabilities
from longspan.tools.cli import output

__all__ = ["matrix", "render_matrix"]

HEAD = """# Support matrix

Generated from the backends' own `Capabilities` by `longspan matrix --output docs/support_matrix.md`; a test fails when
it is stale. What a backend does not run natively, the core lowers to its dense kernel.
"""


HEADINGS = (
    "backend",
    "devices",
    "dtypes",
    "native patterns",
    "arguments",
    "backward",
    "keeps NaN apart",
    "head_dim",
    "auto",
)


def matrix(
    target: Annotated[Path | None, typer.Option("--output", help="Write Markdown to this file.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 where the file is not up to date.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the declarations as JSON.")] = False,
    everyone: Annotated[bool, typer.Option("--all", help="Third parties' backends too.")] = False,
) -> None:
    """Show what each backend declares that it can do: on a terminal as a table of its width, else as Markdown."""
    with output.quiet_stdout():
        rows = [row for row in longspan.backends() if everyone or row.distribution == "longspan"]
    if as_json:
        print(json.dumps({row.name: asdict(row.capabilities) for row in rows if row.capabilities}, indent=2))
        return
    if target is None and sys.stdout.isatty():
        output.table([(heading, False) for heading in HEADINGS], _matrix_cells(rows))
        return
    text = render_matrix(rows)
    if target is None:
        print(text, end="")
    elif check:
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            print(f"{target} is out of date. Next: longspan matrix --output {target}")
            raise typer.Exit(1)
    else:
        try:
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ArgumentError("--output", f"{target}: {error.strerror}", "a file that can be written") from error


def render_matrix(rows: Iterable[BackendInfo]) -> str:
    """Markdown: one line a loaded backend, and one for each that is not, with the reason."""
    loaded = [row for row in rows if row.capabilities is not None]
    lines = [HEAD, f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    for name, *cells in _matrix_cells(loaded):
        lines.append(f"| {' | '.join([f'`{name}`', *cells])} |")
    lines += ["", *(f"- `{row.name}`: {row.description}" for row in loaded), ""]
    return "\n".join(lines)


def _matrix_cells(rows: Iterable[BackendInfo]) -> list[tuple[str, ...]]:
    """The cells below `HEADINGS`, of each loaded backend."""
    return [
        (
            row.name,
            ", ".join(can.devices),
            ", ".join(can.dtypes),
            ", ".join(can.patterns),
            ", ".join(_arguments(can)),
            "native" if can.backward else "the core's",
            ", ".join(can.contains_nonfinite),
            _head_dim(can),
            _auto(row, can),
        )
        for row in rows
        if (can := row.capabilities) is not None
    ]


def _arguments(can: Capabilities) -> list[str]:
    names = ("causal", "mask", "gqa", "dropout", "documents", "window", "query_offset", "deterministic")
    return [name for name in names if getattr(can, name)]


def _head_dim(can: Capabilities) -> str:
    text = f"{can.head_dim_min} to {can.head_dim_max}" if can.head_dim_max else f"from {can.head_dim_min}"
    return text + (f", multiples of {can.head_dim_multiple}" if can.head_dim_multiple > 1 else "")


def _auto(row: BackendInfo, can: Capabilities) -> str:
    if not can.exact:
        return "never: an approximation"
    if can.experimental:
        return "never: experimental"
    return "by name only" if row.opt_in else f"yes, tier {can.tier}"
