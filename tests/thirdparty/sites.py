"""Sites: folders into which wheels are installed, and in which programs are run; this environment stays as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

PROGRAMS = Path(__file__).parent / "programs"

BROKEN = {  # the name they claim, the state of their row, words of its text
    "broken_import": ("broken_import", "broken", "OSError: libfoo.so: cannot open shared object file"),
    "exits": ("exits", "broken", "SystemExit: 3"),
    "dup_name_one": ("dup_name", "duplicate", "acme-dup-name-one 1.0 and acme-dup-name-two 1.0"),
    "dup_name_two": ("dup_name", "duplicate", "acme-dup-name-one 1.0 and acme-dup-name-two 1.0"),
    "wrong_api": ("wrong_api", "incompatible", "api=99"),
    "unknown_hook": ("unknown_hook", "broken", "Did you mean 'longspan_kernel'?"),
}
SOUND = ("good", "slow_import", "overclaims", "wants_opt_in", "prints")
THIRD = "acme-"  # how their distributions begin
CROWD = (*BROKEN, *SOUND)
"""All that are installed at once. `dup_sdpa` joins them in tests of its own, `prints_native` and `crash` never do."""


class Site:
    """A folder with some distributions installed, on the path of the programs that are run in it."""

    def __init__(self, folder: Path, state: Path) -> None:
        self.folder, self._state = folder, state

    def environment(self, **variables: str) -> dict[str, str]:
        """This process's, without what would steer longspan or Python, and with the site on the path."""
        steering = ("LONGSPAN_", "PYTHON", "PYTEST_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(steering)}
        state = {name: str(self._state) for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME")}
        fixed = {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", "COLUMNS": "500", "NO_COLOR": "1"}
        return {**kept, **fixed, **state, **variables}

    def python(self, *arguments: str | Path, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        """A new interpreter in this site, whatever it comes to."""
        return subprocess.run(
            [sys.executable, *map(str, arguments)], env=self.environment(**variables), cwd=self._state, input=stdin,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def program(self, name: str, *arguments: str, stdin: str = "", **variables: str) -> Report:
        """A program of `programs/`, which writes what it found to the file that it is given."""
        path = self._state / f"{name}-{len(list(self._state.iterdir()))}.json"
        done = self.python(PROGRAMS / f"{name}.py", path, *arguments, stdin=stdin, **variables)
        assert done.returncode == 0, f"{name} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return Report(json.loads(path.read_text()), done.stdout, done.stderr)

    def forks(self, **runs: Mapping[str, Any]) -> dict[str, Done]:
        """Runs `{"cli": [...]}` or `{"code": "..."}`, with `env`, each in a process that knows of no plugin yet."""
        return {name: Done(**done) for name, done in self.program("forks", stdin=json.dumps(runs)).items()}


class Report(dict[str, Any]):
    """What a program found, and what it printed."""

    def __init__(self, found: Mapping[str, Any], stdout: str, stderr: str) -> None:
        super().__init__(found)
        self.stdout, self.stderr = stdout, stderr


class Done(NamedTuple):
    """How a run ended, what it printed, and which of the packages' modules it imported."""

    code: int
    stdout: str
    stderr: str
    imported: list[str]

    @property
    def json(self) -> Any:
        """Stdout as JSON, all of it."""
        assert self.code in (0, 1), self.stderr
        return json.loads(self.stdout)

    @property
    def rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The ledger that `longspan backends --json` printed."""
        return by_name_and_owner(self.json)


def by_name_and_owner(ledger: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows by name and distribution: two may claim one name."""
    found = {(row["name"], row["distribution"]): row for row in ledger}
    assert len(found) == len(ledger)
    return found
