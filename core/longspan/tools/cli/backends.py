"""`longspan backends`: the ledger of what was found."""

from __future__ import annotations

import json
import re
from typing import Annotated

import typer
from rich.text import Text

import longspan
from longspan.spec.backend import BackendInfo
from longspan.tools.cli import output

__all__ = ["backends"]


def backends(
    details: Annotated[
        bool, typer.Option("--details", help="Where each comes from, what its import took, its whole description.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, for machines.")] = False,
) -> None:
    """List every backend that was found, the broken ones too."""
    with output.quiet_stdout():
        rows = longspan.backends()
    if as_json:
        print(json.dumps([row.to_dict() for row in rows], indent=2))
        return
    columns = [("backend", False), ("state", False), ("auto", False)]
    columns += [("from", False), ("import ms", True)] if details else []
    output.table([*columns, ("description", False)], [_cells(row, details) for row in rows])


def _cells(row: BackendInfo, details: bool) -> tuple[str | Text, ...]:
    state = Text(row.state, "green" if row.state == "loaded" else "yellow" if row.state == "blocked" else "red")
    auto = "" if row.state != "loaded" else "by name" if row.opt_in else "yes"
    if not details:
        return row.name, state, auto, row.error or _briefly(row.description)
    owner = f"{row.distribution} {row.version}".strip() or "this process"
    took = f"{row.import_ms:,.1f}" if row.import_ms else ""
    return row.name, state, auto, owner, took, row.error or row.description


def _briefly(description: str) -> str:
    """As far as the first sentence, or its first part."""
    return re.split(r"[:;]\s|\.\s|\.$", description, maxsplit=1)[0]
