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
        found = certificate.verify(name, device, quick=quick, on_case=shown.step if drawn else None)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        _show(found)
    for line in found.messages():
        output.fail(line)
    if not found.conformant:
        raise typer.Exit(1)


def _show(found: Certificate) -> None:
    info = found.info
    owner = f"{info.distribution} {info.version}".strip() or "this process"
    output.say(f"{info.name} of {owner}: {'conformant' if found.conformant else 'not conformant'}", "bold")
    output.say(
        f"longspan {__version__}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{found.seconds:.1f} s{', --quick' if found.quick else ''}"
    )
    if found.worst:
        columns = [("device", False), ("dtype", False), ("forward", False), ("lse", False), ("gradient", False)]
        output.table(
            columns,
            [
                (device, dtype, *(_cell(row.get(what)) for what in ("forward", "lse", "gradient")))
                for (device, dtype), row in found.worst.items()
            ],
        )
        output.say(
            "worst error, and what is allowed there: 1e-12 in float64, else 2 times (gradients: 3 times) naive torch's"
        )
    output.say(
        f"cases: {found.computed} run, {len(found.of('failed'))} failed; {len(found.of('refused'))} refused, as they "
        f"must be; {len(found.of('declined'))} declined"
    )
    if found.absent:
        output.say(f"not on this machine: {', '.join(found.absent)}", "yellow")
    if found.unproven:
        output.say(f"declined here, so not proven: {'; '.join(found.unproven)}", "yellow")
        for reason in dict.fromkeys(outcome.reason for outcome in found.of("declined")):
            output.say(f"  {reason}", "yellow")


def _cell(worst: Worst | None) -> Text:
    if worst is None:
        return Text("n/a")
    measure = worst.measure
    text = f"{measure.error:.1e} of {measure.allowed:.1e}"
    return Text(text, "red" if measure.share > 1 else "")
