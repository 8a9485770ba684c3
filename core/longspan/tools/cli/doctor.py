"""`longspan doctor`: what works here, what does not, and the line that would fix it."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.text import Text

from longspan import ArgumentError
from longspan.registry import quarantine
from longspan.registry.policy import Policy
from longspan.spec.backend import BackendInfo
from longspan.tools.cli import output
from longspan.tools.doctor import Report, examine

__all__ = ["doctor"]

TIMEOUT = 60.0
COLORS = {"loaded": "green", "blocked": "yellow"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
    isolate: Annotated[
        bool,
        typer.Option("--isolate", help="Import each plugin in an interpreter of its own, where a crash does no harm."),
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help=f"With --isolate: a longer import hangs [{TIMEOUT:g}].")
    ] = None,
    release: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Let a backend be imported again that once crashed the interpreter."),
    ] = None,
) -> None:
    """Say what works here, what does not, and the line that would fix it. Exit code 1 where anything is broken.

    What crashed the interpreter while it was imported is in quarantine: not imported again before --release NAME, or
    before its distribution, Python or torch has another version.
    """
    if timeout is not None and not (isolate and timeout > 0):
        raise ArgumentError("--timeout", str(timeout), "a number of seconds above 0, with --isolate")
    if release is not None:
        if isolate:
            raise ArgumentError("--release", "--isolate beside it", "one of them", "release first, then --isolate")
        _release(release, as_json)
        return
    if isolate:
        output.note().print("importing each plugin in an interpreter of its own, a few seconds each", soft_wrap=True)
    with output.quiet_stdout():
        report = examine(isolate, TIMEOUT if timeout is None else timeout)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _show(report)
    if not report.ok:
        raise typer.Exit(1)


def _release(name: str, as_json: bool) -> None:
    try:
        released = quarantine.release(name)
    except OSError as error:
        want = "records that may be removed"
        raise ArgumentError("--release", str(error), want, f"remove it by hand: {quarantine.directory()}") from error
    if not released:
        held = ", ".join(dict.fromkeys(crash.name for crash in quarantine.crashes()))
        want = f"a backend in quarantine: {held}" if held else "a backend in quarantine, and there is none"
        raise ArgumentError("--release", repr(name), want, "`longspan doctor` lists what is broken")
    if as_json:
        print(json.dumps({"released": [crash.name for crash in released]}))
        return
    for crash in released:
        output.say(f"released {name} of {crash.distribution} {crash.version}: it is imported at the next start")


def _show(report: Report) -> None:
    here = report.machine
    output.say(
        f"longspan {here.longspan}, torch {here.torch} ({here.torch_build}), pluggy {here.pluggy}, "
        f"Python {here.python}, {here.system}",
        "bold",
    )
    rows = [(local.device.name, local.name, local.capability, local.why or "yes") for local in here.devices]
    output.table([("device", False), ("name", False), ("capability", False), ("torch can use it", False)], rows)
    columns = [("backend", False), ("state", False), ("from", False), ("import ms", True), ("error", False)]
    output.table(columns, [_cells(row) for row in report.ledger.rows])
    if report.isolated:
        output.say("each was imported in an interpreter of its own")
    if report.ledger.unusable:
        output.say("loaded, and of no use here", "bold")
        useless = [(found.backend, "\n".join(found.texts)) for found in report.ledger.unusable]
        output.table([("backend", False), ("why", False)], useless)
    if report.settings:
        variables = [(setting.name, setting.value, setting.error or "in force") for setting in report.settings]
        output.table([("variable", False), ("value", False), ("", False)], variables)
    else:
        output.say("environment: no LONGSPAN_ variable is set")
    output.say(f"policy: {report.policy if isinstance(report.policy, str) else _policy(report.policy)}")
    _show_remedies(report)


def _show_remedies(report: Report) -> None:
    if not report.remedies:
        output.say("to fix: nothing", "bold green")
        return
    output.say("to fix" if not report.ok else "to fix: nothing; what could be had besides", "bold")
    for number, remedy in enumerate(report.remedies, 1):
        output.say(f"{number}. {remedy.what}", "red" if remedy.broken else "")
        for rank, line in enumerate(remedy.lines):
            output.say(f"   {'or ' if rank else '   '}{line}", "bold")


def _cells(row: BackendInfo) -> tuple[str | Text, ...]:
    owner = f"{row.distribution} {row.version}".strip() or "this process"
    took = f"{row.import_ms:,.1f}" if row.import_ms else ""
    return row.name, Text(row.state, COLORS.get(row.state, "red")), owner, took, row.error


def _policy(policy: Policy) -> str:
    words = [f"backend {policy.backend} (from the {policy.backend_from})"] if policy.backend else ["auto"]
    words += [f"prefer {', '.join(policy.prefer)} (from the {policy.prefer_from})"] if policy.prefer else []
    words += [f"block {', '.join(policy.deny)}"] if policy.deny else []
    return "; ".join(words)
