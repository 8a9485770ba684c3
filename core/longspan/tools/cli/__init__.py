"""The command line: `longspan backends`, `longspan explain`, `longspan demo`.

`import longspan` never comes here, so the library itself needs neither typer nor rich.
"""

from longspan.tools.cli.app import app, main

__all__ = ["app", "main"]
