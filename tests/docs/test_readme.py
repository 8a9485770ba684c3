"""The README's code runs, its commands are the ones that CI runs, and its links and names exist."""

import os
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import longspan as ls
from longspan.testing import oracle as dense_oracle
from longspan.tools.doctor.settings import READERS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


class Block(NamedTuple):
    """A fenced code block: the HTML comment right before it, its language, its text and the line it begins on."""

    marker: str
    language: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    fence = re.compile(r"(?:^<!-- (?P<marker>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
    return [
        Block(match["marker"] or "", match["language"], match["text"], text.count("\n", 0, match.start("text")) + 1)
        for match in fence.finditer(text)
    ]


BLOCKS = blocks(README)
PYTHON = [block for block in BLOCKS if block.language == "python"]
MODULE = re.compile(r"# (?P<name>\w+)\.py\n")  # a block that opens with a file's name is that file


FULL, SHORT = "torch.randn(3, 1, 8, 8192, 64)", "torch.randn(3, 1, 8, 777, 64)"
LENGTHS, SMALL = "segment_lengths=(2048, 4096)", "segment_lengths=(128, 512)"


def short(text: str) -> str:
    """The same code on a shorter sequence: the README's length keeps the oracle waiting for minutes."""
    for full, less in ((FULL, SHORT), (LENGTHS, SMALL), ("8192", "777"), ("3000", "300")):
        text = text.replace(full, less)
    return text


def execute(block: Block, namespace: dict[str, object], change: Callable[[str], str] = str) -> None:
    # Blank lines first, so that a traceback points at the README's own line.
    exec(compile("\n" * (block.line - 1) + change(block.text), str(ROOT / "README.md"), "exec"), namespace)


def oracle(namespace: dict[str, object], is_causal: bool = True) -> torch.Tensor:
    """The float64 answer for what the README computes: query, key, value, pattern."""
    query, key, value = (namespace[name] for name in ("query", "key", "value"))
    result = dense_oracle(query, key, value, namespace["pattern"], is_causal=is_causal)
    return result[0] if isinstance(result, tuple) else result


class Session:
    """The README read from the top: its modules are importable and its other Python blocks share one namespace."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.namespace: dict[str, object] = {}
        for block in PYTHON:
            if match := MODULE.match(block.text):
                module = types.ModuleType(match["name"])
                execute(block, module.__dict__)
                monkeypatch.setitem(sys.modules, match["name"], module)

    def run(self, block: Block) -> None:
        execute(block, self.namespace)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.delenv("LONGSPAN_BACKEND", raising=False)
    torch.manual_seed(0)
    yield Session(monkeypatch)
    if any(info.name == "acme" for info in ls.backends()):
        ls.unregister("acme")


def test_every_python_block_runs_in_order_as_it_is_pasted(tmp_path: Path) -> None:
    """In an interpreter of its own, in a folder with nothing but the files that the README says to save."""
    assert README.count(FULL) == README.count(LENGTHS) == 1
    script = []
    for block in PYTHON:
        if match := MODULE.match(block.text):
            (tmp_path / f"{match['name']}.py").write_text(block.text, encoding="utf-8")
        else:
            script += [f"# README.md, line {block.line}", short(block.text)]
    ending = (
        "import pickle\n"
        "kept.sum().backward(), run\n"
        "results = [x.detach() for x in (query, key, value, out, half, kept, query.grad)]\n"
        "pickle.dump(results, open('found', 'wb'))\n"
    )
    (tmp_path / "pasted.py").write_text("\n".join([*script, ending]), encoding="utf-8")
    given = {key: value for key, value in os.environ.items() if not key.startswith("LONGSPAN_") or "CACHE" in key}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "pasted.py"],
        cwd=tmp_path,
        env=given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "nothing greets the user but the answer"
    assert "chosen" in done.stdout  # the table that the first block prints
    query, key, value, out, half, kept, grad = pickle.loads((tmp_path / "found").read_bytes())
    pattern = ls.Dilated((128, 512), (1, 2))
    want, plain = (dense_oracle(query, key, value, pattern, is_causal=causal) for causal in (True, False))
    torch.testing.assert_close(out.double(), plain, rtol=1.3e-6, atol=1e-5)  # the last is the third party's
    torch.testing.assert_close(half.double(), want, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(kept.double(), plain.tanh(), rtol=1e-5, atol=1e-5)
    assert half.dtype == torch.bfloat16 and grad.isfinite().all() and grad.any()


def test_what_the_three_ways_of_choosing_compute_is_right(session: Session) -> None:
    named = [block for block in PYTHON if "out =" in block.text and "sdpa" in block.text]
    assert len(named) == 2  # the argument, the context
    execute(PYTHON[0], session.namespace, short)
    want = oracle(session.namespace)
    for block in (PYTHON[0], *named):
        session.namespace.pop("out", None)
        execute(block, session.namespace, short)
        if block is PYTHON[0]:
            want = oracle(session.namespace)
        out = session.namespace["out"]
        assert isinstance(out, torch.Tensor)
        torch.testing.assert_close(out.double(), want, rtol=1.3e-6, atol=1e-5)


def test_the_first_lines_run_as_they_are_printed(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    first = PYTHON[0]
    assert len(first.text.splitlines()) == 6
    session.run(first)
    out = session.namespace["out"]
    assert isinstance(out, torch.Tensor)
    assert out.shape == (1, 8, 8192, 64)
    assert out.isfinite().all()
    assert "sdpa" in capsys.readouterr().out  # the table


def test_the_other_patterns_run_as_they_are_printed(session: Session) -> None:
    session.run(PYTHON[0])
    others = next(block for block in PYTHON if "TopKBlocks" in block.text)
    session.run(others)
    out, query = (session.namespace[name] for name in ("out", "query"))
    assert isinstance(out, torch.Tensor) and isinstance(query, torch.Tensor)
    inputs = [session.namespace[name] for name in ("query", "key", "value")]
    rows = torch.tensor([0, 2999, 3000, 5000, 8191])
    want = dense_oracle(*inputs, ls.SlidingWindow(512), is_causal=True, cu_seqlens=(0, 3000, 8192), rows=rows)
    torch.testing.assert_close(out[:, :, rows].double(), want, rtol=1.3e-6, atol=1e-5)
    assert query.grad is not None and query.grad.isfinite().all() and query.grad.any()


def test_the_compiled_function_computes_the_same(session: Session) -> None:
    execute(PYTHON[0], session.namespace, short)
    line = next(line for block in PYTHON for line in block.text.splitlines() if "torch.compile" in line)
    compiled = line.replace("torch.compile(", "torch.compile(fullgraph=True, backend='eager', model=")
    exec(compiled, session.namespace)
    run: Any = session.namespace["run"]
    found = run(*(session.namespace[name] for name in ("query", "key", "value")))
    torch.testing.assert_close(found, session.namespace["out"])


def test_the_readmes_own_backend_is_conformant(session: Session) -> None:
    from longspan.testing import verify

    ls.register(sys.modules["acme_longspan"], name="acme")
    found = verify("acme", "cpu", quick=True)
    assert found.conformant, found.messages()


def test_the_third_party_backend_gives_exact_gradients_for_a_pattern_it_never_heard_of(session: Session) -> None:
    register = next(block for block in PYTHON if "ls.register" in block.text)
    pattern = ls.Dilated(segment_lengths=(16, 64), dilation_rates=(1, 3))
    inputs = [torch.randn(1, 4, 101, 8, requires_grad=True) for _ in range(3)]
    session.namespace.update(ls=ls, pattern=pattern, **dict(zip(("query", "key", "value"), inputs, strict=True)))
    session.run(register)
    out = session.namespace["out"]
    assert isinstance(out, torch.Tensor)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, inputs, dout)

    doubles = [x.detach().double().requires_grad_() for x in inputs]
    session.namespace.update(zip(("query", "key", "value"), doubles, strict=True))
    wanted = torch.autograd.grad(oracle(session.namespace, is_causal=False), doubles, dout.double())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1.3e-6, atol=1e-5)


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md"])
def test_the_guide_the_template_the_hooks_and_the_matrix_are_linked(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    for target in ("write_a_backend.md", "examples/third_party_backend/README.md", "hooks.md", "support_matrix.md"):
        assert f"](docs/{target})" in text, f"{path} does not link docs/{target}"


def test_dir_shows_the_public_names_alone() -> None:
    assert set(dir(ls)) == {*ls.__all__, "__version__"}
    assert all(hasattr(ls, name) for name in dir(ls))


def test_pytorchs_word_of_a_missing_numpy_greets_nobody() -> None:
    """The README imports longspan first, which keeps torch from saying it; so does the command line."""
    first = next(line for line in PYTHON[0].text.splitlines() if "import" in line)
    code = f"import sys; sys.modules['numpy'] = None\n{first}\nls.attention(*torch.zeros(3, 1, 1, 8, 8))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    command = "import sys; sys.modules['numpy'] = None; from longspan.tools.cli.app import main; main(['backends'])"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_backend_is_chosen_by_argument_context_and_environment_in_that_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [shell] = [block.text for block in BLOCKS if "LONGSPAN_BACKEND=" in block.text]
    variable, name = shell.split()[0].split("=")
    query = torch.randn(1, 2, 32, 8)
    problem = ls.Problem.like(query, query, query, pattern=ls.Dense())

    def decided(backend: str | None = None) -> tuple[str, str]:
        resolution = ls.plan(problem, backend=backend).resolution
        assert resolution.chosen is not None
        return resolution.chosen, resolution.decided_by

    monkeypatch.delenv(variable, raising=False)
    assert decided()[1] == "auto"
    monkeypatch.setenv(variable, name)
    assert decided() == (name, "environment")
    with ls.use(backend="reference"):
        assert decided() == ("reference", "context")
        assert decided("sdpa") == ("sdpa", "argument")


def test_the_entry_point_example_uses_the_group_that_is_read() -> None:
    [example] = [tomllib.loads(block.text) for block in BLOCKS if block.language == "toml"]
    [group] = example["project"]["entry-points"]
    builtin = PYPROJECT["project"]["entry-points"][group]
    names = {info.name: info.state for info in ls.backends()}
    assert {name: names[name] for name in builtin} == dict.fromkeys(builtin, "loaded")


def test_the_status_table_names_every_built_in_backend_and_what_auto_may_take() -> None:
    status = README.split("## Status\n")[1]
    said = {
        opt_in: set(re.findall(r"`(\w+)`", row)) - {"auto"}
        for opt_in, title in ((False, "backends that `auto` may take"), (True, "backends by name only"))
        for row in [line.split("|")[2] for line in status.splitlines() if line.startswith(f"| {title} |")]
    }
    builtin = PYPROJECT["project"]["entry-points"]["longspan.backends"]
    infos = {info.name: info for info in ls.backends() if info.name in builtin}
    assert infos.keys() == builtin.keys()
    assert said[False] | said[True] == builtin.keys()
    assert {name for name in said[False] if infos[name].opt_in} == set()


def test_every_extra_that_a_message_tells_to_install_exists() -> None:
    for path in [*(ROOT / "core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        for extra in re.findall(r"longspan\[([\w,]+)\]", path.read_text(encoding="utf-8")):
            for name in extra.split(","):
                assert name in PYPROJECT["project"]["optional-dependencies"], f"{path.name} names the extra {name}"


def test_the_quick_start_is_exactly_two_commands() -> None:
    section = README.split("## Quick start\n")[1].split("\n## ")[0]
    found = blocks(section)
    assert [block.marker for block in found] == ["quickstart: demo", "quickstart: test"]
    for block in found:
        [command] = block.text.splitlines()
        steps = command.split(" && ")
        assert steps[0] == "python3 -m venv .venv"  # from a fresh clone, with only Python on the machine
        assert steps[1].startswith(".venv/bin/pip install -c constraints.txt ")
        assert len(steps) == 3 and steps[2].startswith(".venv/bin/")
    assert README.count("<!-- quickstart:") == 2


def test_every_pip_command_in_the_documentation_uses_the_constraints() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run", ROOT / "tox.ini"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert "pip install" not in line or "constraints.txt" in line, f"{path.name}: {line}"


def test_the_constraints_pin_every_requirement_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert not [name for name, version in pins.items() if "+" in version]  # a build is the machine's choice
    extras = PYPROJECT["project"]["optional-dependencies"]
    tested = [line for name in ("test", "lint", "dev") for line in extras[name]]
    requirements = PYPROJECT["project"]["dependencies"] + tested
    for requirement in [*requirements, *PYPROJECT["build-system"]["requires"]]:
        name = re.match(r"[\w-]+", requirement)
        assert name is not None
        assert name[0] in pins or name[0] == "longspan", f"constraints.txt has no pin for {requirement}"


def ci(folder: Path) -> subprocess.CompletedProcess[str]:
    """What .ci/run takes from the README beside it, without running it."""
    command = ["bash", str(folder / ".ci" / "run"), "--list"]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, cwd=folder)


def checkout(folder: Path, readme: str) -> Path:
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


def test_ci_takes_its_commands_from_the_readme() -> None:
    commands = {block.marker: block.text for block in BLOCKS if block.marker}
    listed = ci(ROOT)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout == commands["quickstart: test"] + commands["quickstart: demo"]


def test_ci_follows_the_readme_when_it_changes(tmp_path: Path) -> None:
    changed = README.replace(" --dist loadfile\n", " --changed\n")
    assert changed != README
    assert "--changed" in ci(checkout(tmp_path, changed)).stdout


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<!-- quickstart: test -->", ""),
        ("<!-- quickstart: demo -->", ""),
        (".venv/bin/longspan demo\n```", ".venv/bin/longspan demo\necho a second command\n```"),
    ],
    ids=["no test command", "no demo command", "two commands"],
)
def test_ci_fails_loudly_when_the_readme_holds_no_single_command(tmp_path: Path, old: str, new: str) -> None:
    assert README.count(old) == 1
    listed = ci(checkout(tmp_path, README.replace(old, new)))
    assert listed.returncode != 0
    assert listed.stdout == ""
    assert "README.md must hold exactly one command" in listed.stderr


def test_the_table_of_variables_is_what_the_library_reads():
    rows = re.findall(r"^\| `(LONGSPAN_\w+)` \|", README, re.M)
    assert sorted(rows) == sorted(READERS)
