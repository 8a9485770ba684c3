"""`longspan backends`: the ledger of what was found."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.text import Text

import longspan
from longspan.cli import output
from longspan.spec import BackendInfo

__all__ = ["backends"]


def backends(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, for machines.")] = False,
) -> None:
    """List every backend that was found, the broken ones too."""
    with output.quiet_stdout():
        found = longspan.backends()
    if as_json:
        print(json.dumps([row.to_dict() for row in found], indent=2))
        return
    columns = [("backend", False), ("state", False), ("from", False), ("auto", False), ("import ms", True)]
    output.table([*columns, ("description", False)], [_cells(row) for row in found])


def _cells(row: BackendInfo) -> tuple[str | Text, ...]:
    state = Text(row.state, "green" if row.state == "loaded" else "yellow" if row.state == "blocked" else "red")
    owner = f"{row.distribution} {row.version}".strip() or "this process"
    auto = "" if row.state != "loaded" else "by name only" if row.opt_in else "yes"
    took = f"{row.import_ms:,.1f}" if row.import_ms else ""
    return row.name, state, owner, auto, took, row.error or row.description
