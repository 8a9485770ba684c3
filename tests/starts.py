"""Starts of longspan in processes of their own, forked from one that has imported torch, with plugins to discover."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SERVER = """
import gc, json, os, resource, signal, sys, traceback
import torch
torch.set_num_threads(1)
import longspan as ls
from longspan.tools.cli import main
assert ls.registry.discovery.registry.generation == 0, "a start would inherit what was discovered"
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
gc.freeze()
print("ready", flush=True)
for line in iter(sys.stdin.readline, ""):
    task = json.loads(line)
    if os.fork():
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
        continue
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{task['folder']}/{stream}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.environ.update(task["env"])
    sys.path[:0] = task["path"]
    code = 0
    try:
        exec(task["code"], {"ls": ls, "main": main, "torch": torch})
    except SystemExit as leaving:
        code = leaving.code
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if task["ends"]:
        sys.exit(code)
    os._exit(code)
"""

GOOD = """
import os, sys
from longspan import Capabilities, blockwise, hookimpl
with open(os.environ["ACME_LOG"], "a") as log:
    log.write(__name__ + "\\n")
{body}
@hookimpl
def longspan_capabilities():
    return Capabilities(devices=("cpu",), dtypes=("float32", "float64"), patterns=("dense",), causal=True)
@hookimpl
def longspan_kernel(problem):
    return lambda q, k, v: blockwise.forward(q, k, v, is_causal=problem.is_causal, scale=problem.scale)
"""

LIST = """
import json, warnings
warnings.simplefilter("ignore")
print(json.dumps({row.name: [row.state, row.error] for row in ls.backends()}))
"""


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        assert self.code in (0, 1), self.stderr
        return json.loads(self.stdout)


class Starts:
    """Starts of longspan with a folder of distributions on the path and a cache of their own."""

    def __init__(self, server: subprocess.Popen[str], folder: Path) -> None:
        self.site, self.cache, self.log, self._folder = folder / "site", folder / "cache", folder / "log", folder
        self.site.mkdir()
        self._server = server

    def install(self, name: str, body: str = "", version: str = "1.0", *, dist: str = "", source: str = GOOD) -> None:
        """A distribution `acme-NAME` whose module does `body` when it is imported."""
        dist = dist or f"acme-{name}"
        module = dist.replace("-", "_")
        for old in self.site.glob(f"{module}-*.dist-info"):
            shutil.rmtree(old)
        (self.site / f"{module}.py").write_text(source.format(body=textwrap.dedent(body)))
        info = self.site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[longspan.backends]\n{name} = {module}\n")

    @property
    def environment(self) -> dict[str, str]:
        return {"LONGSPAN_CACHE": str(self.cache), "ACME_LOG": str(self.log)}

    def __call__(self, code: str = LIST, ends: bool = False, **variables: str) -> Done:
        """One start. `ends`: as an interpreter does, with all that belongs to it; it takes its time over that."""
        task = {"code": code, "env": {**self.environment, **variables}, "path": [str(self.site)], "ends": ends}
        print(json.dumps({**task, "folder": str(self._folder)}), file=self._server.stdin, flush=True)
        code_line = self._server.stdout.readline()
        return Done(int(code_line), *((self._folder / name).read_text() for name in ("stdout", "stderr")))

    def cli(self, *words: str, **variables: str) -> Done:
        """One start of the command line."""
        return self(f"main({list(words)!r})", **variables)

    @property
    def imported(self) -> list[str]:
        """The modules that any start has begun to import, in order."""
        return self.log.read_text().split() if self.log.exists() else []

    @property
    def files(self) -> list[str]:
        folder = self.cache / "quarantine"
        return sorted(os.listdir(folder)) if folder.exists() else []


@pytest.fixture(scope="module")
def server():
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LONGSPAN_", "XDG_", "PYTEST_"))}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.wait(30)


@pytest.fixture
def starts(server, tmp_path):
    return Starts(server, tmp_path)
