"""`longspan matrix`: the support matrix of the built-in backends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from attrs import asdict

import longspan
from longspan.errors import ArgumentError
from longspan.tools.cli import output
from longspan.tools.matrix import HEADINGS, matrix_cells, render_matrix

__all__ = ["matrix"]


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
        output.table([(heading, False) for heading in HEADINGS], matrix_cells(rows))
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
