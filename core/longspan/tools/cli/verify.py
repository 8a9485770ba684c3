"""`longspan verify`: the conformance kit without pytest, and the certificate that it writes."""

from __future__ import annotations

import json
import platform
import sys
from typing import Annotated

import torch
import typer
from rich.text import Text

from longspan import __version__
from longspan.testing import certificate
from longspan.testing.certificate import Certificate, Worst
from longspan.tools.cli import output
from longspan.tools.cli.progress import progress

__all__ = ["verify"]


def verify(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A backend, as `longspan backends` lists it.")],
    device: Annotated[
        str | None, typer.Option(help="Only on this device of this machine: cpu, cuda, cuda:1, ...")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The fewest cases that touch every claim.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Hold a backend to its own capabilities: what it claims must be right, what it does not claim must be refused.

    Exit code 1 where a claim does not hold, or where nothing could be run on this machine.
    """
    drawn = output.is_terminal(sys.stderr)  # thousands of lines are no help in a log
    with progress() as shown:
        sheet = certificate.verify(name, device, quick=quick, on_case=shown.step if drawn else None)
    if as_json:
        print(json.dumps(sheet.to_dict(), indent=2, allow_nan=False))
    else:
        _show(sheet)
    for line in sheet.messages():
        output.fail(line)
    if not sheet.conformant:
        raise typer.Exit(1)


def _show(sheet: Certificate) -> None:
    info = sheet.info
    owner = f"{info.distribution} {info.version}".strip() or "this process"
    output.say(f"{info.name} of {owner}: {'conformant' if sheet.conformant else 'not conformant'}", "bold")
    output.say(
        f"longspan {__version__}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{sheet.seconds:.1f} s{', --quick' if sheet.quick else ''}"
    )
    if sheet.worst:
        columns = [("device", False), ("dtype", False), ("forward", False), ("lse", False), ("gradient", False)]
        output.table(
            columns,
            [
                (device, dtype, *(_cell(row.get(what)) for what in ("forward", "lse", "gradient")))
                for (device, dtype), row in sheet.worst.items()
            ],
        )
        output.say(
            "worst error, and what is allowed there: 1e-12 in float64, else 2 times (gradients: 3 times) naive torch's"
        )
    output.say(
        f"cases: {sheet.computed} run, {len(sheet.of('failed'))} failed; {len(sheet.of('refused'))} refused, as they "
        f"must be; {len(sheet.of('declined'))} declined"
    )
    if sheet.absent:
        output.say(f"not on this machine: {', '.join(sheet.absent)}", "yellow")
    if sheet.unproven:
        output.say(f"declined here, so not proven: {'; '.join(sheet.unproven)}", "yellow")
        for reason in dict.fromkeys(outcome.reason for outcome in sheet.of("declined")):
            output.say(f"  {reason}", "yellow")


def _cell(worst: Worst | None) -> Text:
    if worst is None:
        return Text("n/a")
    measure = worst.measure
    text = f"{measure.error:.1e} of {measure.allowed:.1e}"
    return Text(text, "red" if measure.share > 1 else "")
