"""The commands put together, and what happens to an error of the library's own or of the system's."""

from __future__ import annotations

import errno
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from longspan import LongspanError, PluginWarning, __version__
from longspan.tools.cli import output
from longspan.tools.cli.backends import backends
from longspan.tools.cli.bench import bench
from longspan.tools.cli.demo import demo
from longspan.tools.cli.doctor import doctor
from longspan.tools.cli.explain import explain
from longspan.tools.cli.matrix import matrix
from longspan.tools.cli.plot import plot
from longspan.tools.cli.verify import verify

__all__ = ["app", "main"]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class _Commands(TyperGroup):
    """Says in a sentence that it was interrupted."""

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            output.fail("interrupted")
            raise typer.Exit(output.INTERRUPTED) from None


app = typer.Typer(
    name="longspan",
    cls=_Commands,
    help="Interchangeable attention backends for long sequences.",
    add_completion=False,
    pretty_exceptions_enable=False,  # a defect's traceback is printed as Python prints it
)


def _add(command: Callable[..., None], **given: Any) -> None:
    """Its docstring is the help; a paragraph is one line there, for the terminal to break where it ends."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    app.command(help="\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs), **given)(command)


_add(demo)
_add(backends)
_add(explain)
_add(doctor)
_add(matrix)
_add(plot)
_add(bench, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
_add(verify)


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
    """Run the command line and exit: 0, 1 where the answer is no, 2 where the question was wrong, 130 after Ctrl-C.

    An error of the library's own is one block on stderr, without a traceback, and so is what the system refuses:
    memory, room on a disk. A reader that went away (`| head`) ends it in silence. Any other exception propagates.

    Args:
        arguments: as typed after `longspan`; None: those of this process.
    """
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    output.plain_streams()
    with warnings.catch_warnings():
        warnings.showwarning = output.warn
        warnings.simplefilter("always", PluginWarning)  # a broken plugin is said, whatever this process filters
        try:
            try:
                app(args=arguments)
            finally:
                sys.stdout.flush()  # here, where it can still be said that it does not work
        except LongspanError as error:
            output.fail(error)
            sys.exit(2)
        except BrokenPipeError:
            _drop_stdout()
            sys.exit(1)
        except (MemoryError, OSError, RuntimeError) as error:
            if not (said := _refused_by_the_system(error)):
                raise
            _drop_stdout()
            output.fail(said)
            sys.exit(1)


def _refused_by_the_system(error: Exception) -> str:
    """What to say of memory or room that is not there; nothing of any other error."""
    if isinstance(error, OSError):
        return f"{error.strerror}. Next: make room, or write elsewhere" if error.errno in NO_ROOM else ""
    text = str(error).partition("\n")[0]
    # torch has a class for a GPU's memory alone.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text or type(error).__name__ == "OutOfMemoryError":
        return f"not enough memory{text and f': {text}'}. Next: ask for fewer tokens, or free memory"
    return ""


def _drop_stdout() -> None:
    """What is still to be written goes nowhere: Python would try again at exit, and complain."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
