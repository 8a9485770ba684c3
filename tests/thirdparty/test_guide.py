"""The guide and the template: their code runs, their words are those of the library, and nothing is left out."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
import types

import attrs
import pytest
import torch
import wheels as building

import longspan as ls
from longspan.registry import hookspecs
from longspan.testing import oracle
from longspan.tools.cli.app import app

DOCS = building.TEMPLATE.parents[1]
GUIDE = (DOCS / "write_a_backend.md").read_text(encoding="utf-8")
README = (building.TEMPLATE / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((building.TEMPLATE / "pyproject.toml").read_text(encoding="utf-8"))
MODULE = re.compile(r"# (?P<name>\w+)\.py\n")


def blocks(text, language):
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.M | re.S)
    return [re.sub(r"^   ", "", block, flags=re.M) if language != "python" else block for block in found]


@pytest.fixture
def guide(monkeypatch):
    """The guide's modules, importable, and the namespace that its other blocks share."""
    for block in blocks(GUIDE, "python"):
        if match := MODULE.match(block):
            module = types.ModuleType(match["name"])
            exec(compile(block, f"{match['name']}.py", "exec"), module.__dict__)
            monkeypatch.setitem(sys.modules, match["name"], module)
    yield {}
    if any(row.name == "acme" for row in ls.backends()):
        ls.unregister("acme")


def test_the_guides_code_runs_and_computes_what_the_oracle_does(guide, capsys):
    before = {row.name for row in ls.backends()}
    for block in blocks(GUIDE, "python"):
        if not MODULE.match(block):
            exec(block, guide)
    want = oracle(guide["query"], guide["key"], guide["value"], guide["pattern"])
    torch.testing.assert_close(guide["out"].double(), want, rtol=1.3e-6, atol=1e-5)
    said = capsys.readouterr().out
    assert said.startswith("is_causal is True (needs False); fix: ")
    assert "print(" in GUIDE and f"# {said.split('; fix')[0]}; ..." in GUIDE, "the comment is what is printed"
    assert {row.name for row in ls.backends()} == before


def test_the_smallest_backend_is_conformant(guide):
    from longspan.testing import verify

    ls.register(sys.modules["acme_longspan"], name="acme")
    found = verify("acme", "cpu", quick=True)
    assert found.conformant, found.messages()


def test_the_guides_reasons_are_reasons(guide):
    (block,) = [block for block in blocks(GUIDE, "python") if "def longspan_unsupported" in block]
    exec(block, guide)
    long = ls.Problem(batch=1, heads=1, q_len=70_000, head_dim=8)
    (reason,) = guide["longspan_unsupported"](long)
    assert str(reason).startswith("kv_len is 70000 (needs at most 65536); fix: ")
    assert guide["longspan_unsupported"](long.replace(q_len=8, kv_len=8)) == []


def rows(heading):
    """The first cells of the table under a heading."""
    section = GUIDE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [line.split("|")[1] for line in lines]


def test_each_field_of_capabilities_is_explained():
    fields = [name for row in rows("What each field promises") for name in re.findall(r"`(\w+)`", row)]
    assert sorted(fields) == sorted(one.name for one in attrs.fields(ls.Capabilities))
    assert len(fields) == len(set(fields))


def test_each_hook_is_mentioned():
    hooks = {name for name in vars(hookspecs) if name.startswith("longspan_")}
    assert hooks <= set(re.findall(r"\blongspan_\w+", GUIDE))
    assert {name for name in re.findall(r"`(longspan_\w+)`", GUIDE)} <= hooks


def test_each_state_of_a_backend_is_explained():
    stated = re.search(r"`state` is one of ([\w, ]+)", ls.BackendInfo.__doc__)
    assert {row.strip(" `") for row in rows("When it does not load")} == set(stated[1].split(", "))


@pytest.mark.parametrize("text", [GUIDE, README], ids=["guide", "readme"])
def test_public_names_commands_variables_and_links_exist(text):
    for name in re.findall(r"\b(?:ls|longspan)\.([a-zA-Z_]+)", text.replace("longspan.backends]", "")):
        assert hasattr(ls, name) or name in ("testing", "backends", "md"), f"longspan.{name} is not there"
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    for command in re.findall(r"`longspan (\w+)|^ *longspan (\w+)", text, re.M):
        assert "".join(command) in commands, f"`longspan {''.join(command)}` is no command"
    known = {"LONGSPAN_BACKEND", "LONGSPAN_PREFER", "LONGSPAN_BLOCK", "LONGSPAN_PLUGINS", "LONGSPAN_STRICT"}
    assert set(re.findall(r"LONGSPAN_\w+", text)) <= known
    folder = DOCS if text is GUIDE else building.TEMPLATE
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (folder / target).exists(), f"{target} is not there"


def test_the_guides_entry_point_is_that_of_the_template_and_of_longspan_itself():
    (example,) = map(tomllib.loads, blocks(GUIDE, "toml"))
    assert example["project"]["entry-points"] == PROJECT["project"]["entry-points"]
    (group,) = example["project"]["entry-points"]
    assert importlib.metadata.entry_points(group=group).names


def test_the_template_is_what_its_readme_says():
    steps = re.findall(r"^(\d)\. \*\*", README, re.M)
    assert steps == ["1", "2", "3", "4", "5"]
    assert f'`acme = "{PROJECT["project"]["entry-points"]["longspan.backends"]["acme"]}"`' in README
    assert (building.TEMPLATE / "src" / "acme_longspan" / "kernel.py").exists()
    hooks = (building.TEMPLATE / "src" / "acme_longspan" / "__init__.py").read_text(encoding="utf-8")
    assert "import torch" not in hooks, "the module with the hooks imports nothing heavy"
    code = [line for line in hooks.splitlines() if line.strip() and not line.strip().startswith(('"""', "#", "from"))]
    assert len(code) <= 25
    assert "test" in PROJECT["project"]["optional-dependencies"], "step 4 installs it"


def test_the_template_is_built_into_a_wheel_that_holds_its_modules(wheels):
    import zipfile

    with zipfile.ZipFile(wheels["template"]) as wheel:
        names = set(wheel.namelist())
    assert {"acme_longspan/__init__.py", "acme_longspan/kernel.py"} <= names
    assert not [name for name in names if name.startswith("tests")]
