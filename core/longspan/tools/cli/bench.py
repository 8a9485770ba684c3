"""`longspan bench`: measurements, side by side, as a table or as JSON."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from attrs import asdict

from longspan.errors import ArgumentError
from longspan.registry.profile import Measure
from longspan.spec.device import local_device
from longspan.tools.bench import contract
from longspan.tools.bench.sidebyside import machine
from longspan.tools.cli import output
from longspan.tools.cli.progress import progress

__all__ = ["bench"]


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArgumentError(self.prog, message, "options that it has", f"{self.prog} --options")


def bench(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Which one; without it, they are listed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
    target: Annotated[Path | None, typer.Option("--output", help="Write the JSON to this file too.")] = None,
    options: Annotated[bool, typer.Option("--options", help="Print the bench's own options and exit.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Time every backend here, and let auto take the fastest from then on.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="Which device --profile times.")] = "cpu",
) -> None:
    """Measure this machine. Options that are not listed here are the bench's own: `longspan bench NAME --options`.

    Ctrl-C ends a bench with what was measured until then, and exit code 130.
    """
    if profile:
        _profile(device, as_json)
        return
    if name is None:
        _list(as_json)
        return
    chosen = contract.find(name)
    parser = _Parser(prog=f"longspan bench {name}", description=chosen.HELP, add_help=False)
    chosen.add_arguments(parser)
    if options:
        output.say(parser.format_help().rstrip())
        return
    args = parser.parse_args(context.args)
    if target is not None:
        output.check_writable(target)
    started = machine()
    with progress() as shown:
        result = {"benchmark": name, "machine": started, **chosen.run(args, shown.step)}
    text = json.dumps(result, indent=1)
    if target is not None:
        try:
            target.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ArgumentError("--output", f"{target}: {error.strerror}", "a file that can be written") from error
    if as_json:
        print(text)
    else:
        _show(result)
    if not result["complete"]:
        output.fail("interrupted; what was measured before is above" if result.get("rows", True) else "interrupted")
        raise typer.Exit(output.INTERRUPTED)


def _list(as_json: bool) -> None:
    benches = [(listed.NAME, listed.HELP) for listed in contract.benches()]
    if as_json:
        print(json.dumps([{"name": name, "help": help_} for name, help_ in benches], indent=1))
    else:
        output.table([("bench", False), ("", False)], benches)


def _profile(text: str, as_json: bool) -> None:
    from longspan.tools.bench.profiling import make_profile

    device = local_device(text, "--device")
    with progress() as shown:
        made = make_profile(device, on_step=shown.step, on_failure=output.warn)
        path = made.save()
    if as_json:
        print(json.dumps({"file": str(path), **asdict(made)}))
        return
    fastest: dict[tuple[str, str, int], Measure] = {}
    for measure in sorted(made.measures, key=lambda measure: measure.forward):
        fastest.setdefault((measure.pattern, measure.dtype, measure.tokens), measure)
    _rows_as_table(
        [
            {"pattern": pattern, "dtype": dtype, "tokens": tokens, "fastest": best.backend, "ms": 1e3 * best.forward}
            for (pattern, dtype, tokens), best in sorted(fastest.items())
        ]
    )
    output.say(f"{path}: auto takes the fastest of these from now on. Next: delete the file to go back to the table")


def _show(result: Mapping[str, Any]) -> None:
    if "rows" in result:
        _rows_as_table(result["rows"])
    else:
        told = {key: value for key, value in result.items() if key != "complete"}
        output.table([("what", False), ("measured", True)], list(_rows(told)))
    for line in result.get("notes", ()):
        output.say(f"note: {line}", "yellow")


def _rows_as_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Flat rows as a table; the union of their keys are the columns."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if not keys:
        return
    numbers = {key: all(isinstance(row.get(key, 0.0), float) for row in rows) for key in keys}
    columns = [(key.replace("_", " "), numbers[key]) for key in keys]
    output.table(columns, [[_cell(row.get(key, "")) for key in keys] for row in rows])


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _rows(result: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in result.items():
        where = f"{above} / {name}" if above else name
        if isinstance(value, Mapping):
            yield from _rows(value, where)
        elif isinstance(value, float):
            yield where, f"{value:,.4g}"
        elif not isinstance(value, list):
            yield where, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
