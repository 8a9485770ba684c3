"""Every line that the package tells its users to type: collected from the sources, and typed where that can be done."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

from longspan.spec import installing
from longspan.tools.cli.app import main

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
COMMAND = re.compile(
    r"(?:^|Next: |`|, or )((?:\{pip\(\)\} |pip |longspan |apt-get |dnf |yum |zypper |pacman |apk |xcode-select |"
    r"export |unset (?=[A-Z{])|python -m )[^`]*)"
)

RUNS = {
    "longspan backends": "longspan backends",
    "longspan explain": "longspan explain",
    "longspan explain --device {device.name}": "longspan explain --device sm_90",
    "longspan matrix --output docs/support_matrix.md": "longspan matrix --output {tmp}/support_matrix.md",
    "longspan matrix --output {target}": "longspan matrix --output {tmp}/support_matrix.md",
    "longspan doctor": "longspan doctor",
    "longspan bench": "longspan bench",
    "longspan bench {near}": "longspan bench kernels --help",
    "longspan bench {name}": "longspan bench cache --help",
    "longspan plot": "longspan plot --help",
    "unset {variable}": "unset LONGSPAN_BACKEND",
    "unset {setting.name}": "unset LONGSPAN_BACKEND",
    "unset CUDA_VISIBLE_DEVICES": "unset CUDA_VISIBLE_DEVICES",
    "export {variable}={','.join(dict.fromkeys(listed))}": "export LONGSPAN_BLOCK=flex,flash && longspan explain",
    "{pip()} install --upgrade {package}": "{pip} install --upgrade pluggy --dry-run --no-index --no-deps",
    "{pip()} uninstall {package}": "{pip} uninstall --help",
    "{pip()} uninstall {shlex.quote(owner)}": "{pip} uninstall --help",
}
"""Each line as it stands in the sources, and as it is typed here."""

ELSEWHERE = {
    "apt-get update && apt-get install -y gcc libc6-dev": "changes the machine",
    "dnf install -y gcc": "for another system",
    "yum install -y gcc": "for another system",
    "zypper install -y gcc": "for another system",
    "pacman -S --noconfirm gcc": "for another system",
    "apk add gcc musl-dev": "for another system",
    "xcode-select --install": "for another system",
    "longspan doctor --release {self.name}": "needs a plugin that crashed: tests/registry/test_quarantine.py runs it",
    "longspan doctor --release {row.name}": "needs a plugin that crashed: tests/registry/test_quarantine.py runs it",
    "longspan doctor --isolate --timeout {10 * timeout}": "starts ten interpreters: tests/tools/test_doctor.py runs it",
    "pip install --force-reinstall torch": "downloads torch for a GPU",
    "pip install --upgrade torch": "downloads torch for a GPU",
    "pip install --force-reinstall torch --index-url {OLD_GPUS}": "downloads torch for a GPU",
    "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/rocm6.4": "downloads torch",
    "longspan bench --profile": "measures for minutes: tests/registry/test_profile.py reads what it writes",
    "python -m xformers.info": "needs xformers",
}
"""Lines that are not typed here, and why."""


def texts(source: str) -> list[str]:
    """The string constants of a module that are no docstrings; f-strings with their fields as they are written."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    skipped = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in ast.walk(node) if part is not node}
    found = []
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            found.append(
                "".join(
                    str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
                    for part in node.values
                )
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def commands() -> set[str]:
    paths = [*(ROOT / "core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    found = {match[1] for path in paths for text in texts(path.read_text("utf-8")) for match in COMMAND.finditer(text)}
    return {one for one in found if not re.match(r"longspan (?:\{|reads |backend: )", one)}  # a version, a sentence


def test_every_line_is_typed_or_says_why_not():
    assert commands() == RUNS.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("line", RUNS)
def test_the_line_works(line, tmp_path, monkeypatch, capsys):
    typed = RUNS[line].replace("{tmp}", str(tmp_path)).replace("{pip}", installing.pip())
    for name in [name for name in os.environ if name.startswith("LONGSPAN_") and name != "LONGSPAN_CACHE"]:
        monkeypatch.delenv(name)
    command, _, rest = typed.partition(" && ")
    if rest:  # a variable is set, and then there is something to look at
        variable, _, value = command.removeprefix("export ").partition("=")
        monkeypatch.setenv(variable, value)
        command = rest
    if command.startswith("longspan "):
        try:
            main(shlex.split(command)[1:])
        except SystemExit as done:
            # What doctor answers with 1 is that something is broken here.
            assert done.code in (None, 0) or (command == "longspan doctor" and done.code == 1), capsys.readouterr().err
        assert capsys.readouterr().out or "--output" in command
    else:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


# --- what pip is told -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", ["plot", "bench", "cache"])
def test_an_extra_is_installed_by_its_packages_own_names(extra):
    line = installing.extra_line(extra)
    assert shlex.split(line)[-len(EXTRAS[extra]) :] == EXTRAS[extra]
    assert "longspan[" not in line


def test_no_line_names_an_extra_which_no_index_has():
    for path in [*(ROOT / "core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        assert not [text for text in texts(path.read_text("utf-8")) if "longspan[" in text], path


def test_the_backend_of_xformers_names_what_its_extra_does():
    text = (ROOT / "plugins" / "longspan_plugins" / "xformers.py").read_text(encoding="utf-8")
    assert [f'"{one}"' in text for one in EXTRAS["xformers"]] == [True]


def test_the_line_of_an_extra_runs():
    done = subprocess.run(  # safetensors is here, so that nothing is downloaded
        f"{installing.extra_line('cache')} --dry-run --no-index",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "already satisfied" in done.stdout, done.stderr


def test_pip_is_that_of_this_python(monkeypatch, tmp_path):
    ours, other = Path(sys.executable).parent, tmp_path / "bin"
    other.mkdir()
    (other / "pip").write_text("#!/bin/sh\n")
    (other / "pip").chmod(0o755)
    monkeypatch.setenv("PATH", str(other))
    assert installing.install_line("a>=1", "b") == f"{shlex.quote(sys.executable)} -m pip install 'a>=1' b"
    monkeypatch.setattr(sys, "executable", str(other / "python"))
    assert installing.install_line("a>=1", "b") == "pip install 'a>=1' b"
    assert ours != other


URLS = {
    "a folder": ({"url": "file:///home/me/long%20span", "dir_info": {}}, "'/home/me/long span'"),
    "editable": ({"url": "file:///home/me/longspan", "dir_info": {"editable": True}}, "-e /home/me/longspan"),
    "a wheel": ({"url": "file:///tmp/longspan-0.1.0.whl", "archive_info": {}}, "/tmp/longspan-0.1.0.whl"),
    "the net": (
        {"url": "https://x.org/longspan-0.1.0.tar.gz", "archive_info": {}},
        "https://x.org/longspan-0.1.0.tar.gz",
    ),
    "git": (
        {"url": "https://x.org/l.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
        "git+https://x.org/l.git@abc",
    ),
    "an index": (None, "longspan"),
    "damaged": ("{", "longspan"),
}


@pytest.mark.parametrize("case", URLS)
def test_longspan_is_installed_again_from_where_it_came(case, monkeypatch):
    said, place = URLS[case]

    class Installed:
        def read_text(self, name):
            assert name == "direct_url.json"
            return said if said is None or isinstance(said, str) else json.dumps(said)

    monkeypatch.setattr(installing, "distribution", lambda name: Installed())
    assert installing.own_line() == f"{installing.pip()} install --force-reinstall --no-deps {place}"


def test_longspan_itself_came_from_somewhere():
    assert distribution("longspan").version
    assert installing.own_line().startswith(f"{installing.pip()} install --force-reinstall --no-deps ")
