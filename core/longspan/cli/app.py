"""The commands put together, and what happens to an error of the library's own."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from longspan import LongspanError, PluginWarning, __version__
from longspan.cli import output
from longspan.cli.backends import backends
from longspan.cli.bench import bench
from longspan.cli.demo import demo
from longspan.cli.doctor import doctor
from longspan.cli.explain import explain
from longspan.cli.matrix import matrix
from longspan.cli.plot import plot
from longspan.cli.verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="longspan",
    help="Interchangeable attention backends for long sequences.",
    add_completion=False,
    pretty_exceptions_enable=False,  # a defect's traceback is printed as Python prints it
)
app.command()(demo)
app.command()(backends)
app.command()(explain)
app.command()(doctor)
app.command()(matrix)
app.command()(plot)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)
app.command()(verify)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longspan {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 where the answer is no, 2 where the question was wrong.

    An error of the library's own is one block on stderr, without a traceback. Any other exception propagates.

    Args:
        arguments: as typed after `longspan`; None: those of this process.
    """
    with warnings.catch_warnings():
        warnings.showwarning = output.warn
        warnings.simplefilter("always", PluginWarning)  # a broken plugin is said, whatever this process filters
        try:
            app(args=arguments)
        except LongspanError as error:
            output.fail(error)
            sys.exit(2)
