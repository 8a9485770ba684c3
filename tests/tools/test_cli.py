"""The command line: what stands on stdout and stderr, the exit codes, the JSON forms, and every kind of bad input."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from attrs import evolve

import longspan as ls
from longspan import blockwise
from longspan.tools.cli import main
from longspan.tools.demo import baseline

DEVICES = ("cpu", "cuda", "sm_61", "sm_70", "sm_80", "sm_90", "gfx942", "mps")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # problems this small only wait for a second thread, on a busy machine for long
    for variable in ("LONGSPAN_BACKEND", "LONGSPAN_PREFER", "LONGSPAN_BLOCK", "COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    others = [row.name for row in ls.backends() if row.name not in ("sdpa", "reference")]
    with ls.use(block=others):  # whatever else is installed is tested elsewhere
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"In the beginning was the word, and the word was attention. " * 20)
    return path


@pytest.fixture
def cli(capsys):
    """Runs the command line in this process: `code, stdout, stderr = cli("backends", "--json")`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return int(caught.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def register():
    names = []

    def add(name: str, backend: object) -> None:
        ls.register(backend, name=name)
        names.append(name)

    yield add
    for name in names:
        ls.unregister(name)


class Backend:
    """A backend whose kernel returns `factor` times what it should."""

    def __init__(self, factor: float = 1.0, devices: tuple[str, ...] = ("cpu",)) -> None:
        self.factor, self.devices = factor, devices

    @ls.hookimpl
    def longspan_capabilities(self):
        return ls.Capabilities(devices=self.devices, dtypes=("float32",), patterns=("dense",), causal=True)

    @ls.hookimpl
    def longspan_kernel(self, problem):
        print("[a plugin that talks]")

        def forward(q, k, v):
            out, lse = blockwise.forward(q, k, v, is_causal=problem.is_causal, scale=problem.scale)
            return self.factor * out, lse

        return forward


def one_line(printed: str) -> str:
    """A table's text without its layout, so that what wrapped in a cell of the last column reads on."""
    return " ".join(printed.split())


# ------------------------------------------------------------------------------------------------- the whole line


def test_alone_it_shows_help(cli):
    code, out, err = cli()
    assert code == 0 and err == ""
    assert all(word in out for word in ("Usage", "demo", "backends", "explain", "--version"))


def test_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["longspan", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("longspan", run_name="__main__")
    assert not ended.value.code and "longspan" in capsys.readouterr().out


def test_version(cli):
    assert cli("--version") == (0, f"longspan {ls.__version__}\n", "")


@pytest.mark.parametrize("command", ["demo", "backends", "explain"])
def test_every_command_has_help_and_json(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0 and "--json" in out


def test_what_is_no_error_of_the_librarys_own_propagates(monkeypatch):
    def defect():
        raise ZeroDivisionError

    monkeypatch.setattr(ls, "backends", defect)
    with pytest.raises(ZeroDivisionError):
        main(["backends"])


def test_a_plugins_warning_is_one_line_on_stderr(cli, monkeypatch):
    def warn():
        warnings.warn("backend 'acme' is broken", ls.PluginWarning, stacklevel=2)
        return ()

    monkeypatch.setattr(ls, "backends", warn)
    assert cli("backends", "--json") == (0, "[]\n", "warning: backend 'acme' is broken\n")


# -------------------------------------------------------------------------------------------------------- backends


def test_backends_as_json(cli):
    code, out, err = cli("backends", "--json")
    rows = json.loads(out)
    assert code == 0 and err == ""
    for row in rows:
        assert row.keys() == {
            "name", "state", "distribution", "version", "description", "opt_in", "error", "import_ms"
        }  # fmt: skip
        assert row["state"] in ("loaded", "blocked", "broken", "duplicate", "incompatible")
        assert isinstance(row["opt_in"], bool) and isinstance(row["import_ms"], float)
    found = {row["name"]: row for row in rows}
    assert found["sdpa"]["state"] == found["reference"]["state"] == "loaded"
    assert found["sdpa"]["opt_in"] is False and found["reference"]["opt_in"] is True
    assert found["sdpa"]["distribution"] == "longspan" and found["sdpa"]["error"] == ""


def test_backends_as_a_table_loses_no_word(cli, monkeypatch):
    error = "ImportError: [bold]libacme.so.7[/bold] was not found; " + "set the path of the library, " * 20
    row = ls.BackendInfo("acme", "broken", "acme-attention", "2.1", error=error)
    monkeypatch.setattr(ls, "backends", lambda: (row, evolve(row, name="fine", state="loaded", error="")))
    for columns in ("60", "100", "400"):
        monkeypatch.setenv("COLUMNS", columns)
        code, out, _ = cli("backends")
        assert code == 0 and "…" not in out and "acme" in out and "broken" in out
        assert out.count("library,") == 20 and "[bold]libacme.so.7[/bold]" in out.replace("\n", "").replace(" ", "")
        assert max(map(len, out.splitlines())) <= int(columns)


# --------------------------------------------------------------------------------------------------------- explain


def resolution_of(out: str) -> dict:
    data = json.loads(out)
    assert {"chosen", "decided_by", "candidates"} <= data.keys()
    for candidate in data["candidates"]:
        assert candidate.keys() == {"name", "ok", "reasons"}
        for reason in candidate["reasons"]:
            assert reason.keys() == {"code", "field", "got", "want", "fix"}
    return data


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pattern", ["dense", "dilated:2048/1,4096/2:grouped:block"])
def test_explain_answers_for_any_device(cli, device, pattern):
    given = ("explain", "--device", device, "--pattern", pattern, "--causal", "--grad", "--dtype", "float16")
    code, out, err = cli(*given, "--json")
    data = resolution_of(out)
    chosen = data["chosen"]
    assert (code, err) == (0, "") and chosen is not None and data["decided_by"] == "auto"
    assert {candidate["name"]: candidate["ok"] for candidate in data["candidates"]}[chosen] is True
    assert f"{pattern} q=(1,8,8192,64) float16 {device} causal grad" == data["problem"]
    code, out, err = cli(*given)
    assert (code, err) == (0, "")
    assert f"decided by auto: {chosen} " in out and "work: " in out and "by name only" in out
    if device in ("sm_61", "gfx942"):
        assert f"note: this machine has no {device}" in out


def test_explain_is_what_the_library_says(cli):
    _, out, _ = cli("explain", "--shape", "2,8,100,32", "--kv-shape", "2,4,50,32", "--device", "sm_90", "--json")
    given = {"batch": 2, "heads": 8, "q_len": 100, "head_dim": 32, "kv_heads": 4, "kv_len": 50}
    problem = ls.Problem(**given, device="sm_90", dtype="bfloat16")
    assert json.loads(out) == json.loads(ls.explain(problem).to_json())


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", "float32"),
        ("mps", "float32"),
        ("sm_61", "float32"),
        ("sm_75", "float16"),
        ("cuda", "float16"),
        ("sm_90", "bfloat16"),
        ("gfx942", "bfloat16"),
    ],
)
def test_explain_takes_the_dtype_that_a_device_is_used_with(cli, device, dtype):
    _, out, _ = cli("explain", "--device", device)
    assert out.startswith(f"dense q=(1,8,8192,64) {dtype} {device}") and f"note: in {dtype}, as {device} is used" in out
    _, out, _ = cli("explain", "--device", device, "--dtype", "float64")
    assert out.startswith(f"dense q=(1,8,8192,64) float64 {device}") and "is used" not in out


def test_explain_says_how_much_work_a_pattern_is(cli):
    code, out, _ = cli("explain", "--shape", "1,1,8,4", "--pattern", "dilated:4/1")
    assert code == 0 and "work: 1 dense call, 32 query-key pairs per batch entry, 50.0% of dense attention's" in out
    assert cli("explain", "--shape", "1,8,0,64")[0] == 0


def test_explain_of_a_backend_by_name(cli, register):
    register("mine", Backend())
    data = resolution_of(cli("explain", "--backend", "mine", "--json")[1])
    assert (data["chosen"], data["decided_by"]) == ("mine", "argument")
    register("elsewhere", Backend(devices=("mps",)))
    code, out, err = cli("explain", "--backend", "elsewhere", "--json")
    assert code == 1 and err == "" and resolution_of(out)["chosen"] is None
    code, out, err = cli("explain", "--backend", "elsewhere", "--dtype", "float64")
    assert code == 1 and err == ""
    assert "device is cpu (needs mps); fix: " in one_line(out) and "dtype is float64 (needs float32)" in one_line(out)
    assert "elsewhere was named, and does not fit" in out


def test_explain_fits_a_narrow_terminal_and_loses_no_word(cli, register, monkeypatch):
    register("elsewhere", Backend(devices=("mps",)))
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = cli("explain", "--device", "sm_61")
    assert "…" not in out
    assert "device is sm_61 (needs mps); fix: choose another backend or device" in one_line(out)


# ------------------------------------------------------------------------------------------------------------ demo


def test_demo_as_json(cli):
    code, out, err = cli("demo", "--tokens", 1024, "--device", "cpu", "--json")
    data = json.loads(out)
    assert code == 0 and data["ok"] is True and data["failures"] == [] and "error: " not in err
    assert data["tokens"] == data["tokens_wanted"] == 1024 and data["device"].startswith("cpu")
    dense = data["dense"]
    assert dense.keys() == {"tokens", "ms", "measured", "extrapolated"} and dense["ms"] > 0
    assert [one["tokens"] for one in dense["measured"]] == [512, 1024] and dense["extrapolated"] is False
    assert data["interrupted"] is False
    rows = {row["name"]: row for row in data["backends"]}
    for name in ("sdpa", "reference"):
        row = rows[name]
        assert row.keys() == {
            "name", "state", "chosen", "reasons", "failure", "ms", "runs", "tokens_per_s", "peak_mib", "error",
            "tokens", "dense_ms", "dense_extrapolated", "speedup",
        }  # fmt: skip
        assert row["state"] == "ran" and 0 < row["error"] <= data["tolerance"] < 1e-5
        assert row["ms"] > 0 and row["tokens_per_s"] > 0 and row["speedup"] > 0
    assert rows["reference"]["reasons"][0]["code"] == "opt_in"
    assert [name for name in rows if rows[name]["chosen"]] == [data["resolution"]["chosen"]]


def test_demo_as_a_table(cli, text, register):
    register("elsewhere", Backend(devices=("mps",)))
    code, out, err = cli("demo", text, "--tokens", 500, "--device", "cpu")
    assert code == 0 and "error: " not in err
    for words in ("500 tokens, the bytes of", str(text), "tokens/s", "MiB", "auto took ", "× dense"):
        assert words in out
    assert "elsewhere: device is cpu (needs mps); fix: " in out and "…" not in out and "~" not in out
    assert "on all 500 tokens" in out
    assert "[1/" in err and "reference" in err


def test_demo_says_that_dense_attention_was_extrapolated(cli, monkeypatch):
    monkeypatch.setattr(baseline, "PATIENCE_MS", 0.0)
    code, out, _ = cli("demo", "--tokens", 2304, "--device", "cpu", "--backend", "sdpa")
    assert code == 0 and "on all 2,304, extrapolated from measured 512, 1,024 and 2,048" in out
    (row,) = [line for line in out.splitlines() if line.startswith("sdpa  ")]
    assert "2,304" in row and re.search(r" ~[0-9.,]+×$", row)
    assert "~ dense attention did not run on so many tokens" in out


def test_demo_says_which_backend_was_too_slow(cli, monkeypatch):
    monkeypatch.setattr(sys.modules["longspan.tools.demo.run"], "SECONDS", 0.0)
    monkeypatch.setattr(sys.modules["longspan.tools.demo.prefix"], "PROBE_MS", 0.0)
    code, out, _ = cli("demo", "--tokens", 2304, "--device", "cpu")
    assert code == 0 and "reference (the first 2,048); --backend reference runs all" in out
    (row,) = [line for line in out.splitlines() if line.startswith("reference  by name")]
    assert row.split()[3] == "2,048" and "~" not in row


def test_demo_says_that_the_text_is_short(cli, text):
    _, out, _ = cli("demo", text, "--device", "cpu", "--backend", "sdpa")
    assert f"note: the text has {text.stat().st_size:,} bytes, fewer than the 131,072 tokens asked for" in out


def test_demo_fails_where_a_backend_is_wrong(cli, text, register):
    register("corrupt", Backend(factor=1.01))
    code, out, err = cli("demo", text, "--tokens", 300, "--device", "cpu", "--json")
    rows = {row["name"]: row for row in json.loads(out)["backends"]}
    assert code == 1 and json.loads(out)["ok"] is False
    assert rows["corrupt"]["state"] == "failed" and rows["sdpa"]["state"] == "ran"
    assert 0.005 < rows["corrupt"]["error"] <= 0.03
    assert re.search("error: corrupt: error 0.0[01].* exceeds the tolerance", err)
    code, out, err = cli("demo", text, "--tokens", 300, "--device", "cpu", "--backend", "corrupt")
    assert code == 1 and "corrupt: failed: error 0.0" in out and "error: corrupt: " in err


def test_stdout_is_json_alone_even_where_a_plugin_prints(cli, text, register):
    register("talking", Backend())
    code, out, err = cli("demo", text, "--tokens", 100, "--device", "cpu", "--backend", "talking", "--json")
    assert code == 0 and json.loads(out)["ok"] is True and "[a plugin that talks]" in err


def test_demo_with_a_backend_from_the_environment(cli, text, monkeypatch):
    monkeypatch.setenv("LONGSPAN_BACKEND", "reference")
    code, out, _ = cli("demo", text, "--tokens", 100, "--device", "cpu")
    assert code == 0 and "reference was chosen by environment, not by auto" in out


# ------------------------------------------------------------------------------------------------------- bad input

BAD = {
    "no such file": (("demo", "nowhere.txt"), "TEXT: got 'nowhere.txt', which does not exist"),
    "a directory": (("demo", "."), "TEXT: got '.', a directory"),
    "an empty file": (("demo", os.devnull), f"TEXT: got '{os.devnull}', an empty file"),
    "no tokens": (("demo", "--tokens", "0"), "--tokens: got 0; want a number of at least 1"),
    "negative tokens": (("demo", "--tokens", "-5"), "--tokens: got -5"),
    "unknown backend": (("demo", "--backend", "sdpb"), "backend 'sdpb' (from the argument) is not registered. Did you"),
    "unknown device": (("demo", "--device", "gpu"), "device: got 'gpu'; want cpu, cuda"),
    "absent device": (("demo", "--device", "sm_61"), "--device: got 'sm_61'; want auto, or a device of this machine"),
    "a negative seed": (("demo", "--seed", "-1"), "--seed: got -1; want a whole number from 0"),
    "unknown dtype": (("demo", "--dtype", "int8"), "--dtype: got 'int8'; want float16 or"),
    "explain: unknown backend": (("explain", "--backend", "x"), "Known: "),
    "explain: unknown device": (("explain", "--device", "sm61x9"), "device: got 'sm61x9'"),
    "explain: unknown dtype": (("explain", "--dtype", "int8"), "dtype: got int8; want float16 or"),
    "explain: unknown pattern": (("explain", "--pattern", "sparse"), "pattern: got 'sparse'; want dense"),
    "explain: half a branch": (("explain", "--pattern", "dilated:64"), "pattern: got 'dilated:64'"),
    "explain: no segment": (("explain", "--pattern", "dilated:0/1"), "segment_lengths: got (0,)"),
    "explain: too few heads": (
        ("explain", "--shape", "1,1,8,8", "--pattern", "dilated:4/1,8/2:grouped"),
        "2 branches and 1 heads",
    ),
    "explain: three numbers": (("explain", "--shape", "1,8,64"), "--shape: got '1,8,64'; want four whole numbers"),
    "explain: no number": (("explain", "--shape", "1,8,x,64"), "--shape: got '1,8,x,64'"),
    "explain: a negative number": (("explain", "--shape=1,8,-1,64"), "--shape: got '1,8,-1,64'"),
    "explain: no width": (("explain", "--shape", "1,8,64,0"), "head_dim: got 0"),
    "explain: another batch": (
        ("explain", "--kv-shape", "2,8,8192,64"),
        "--kv-shape: got '2,8,8192,64'; want the batch",
    ),
    "explain: heads that do not divide": (("explain", "--kv-shape", "1,3,8192,64"), "3 key heads for 8 query heads"),
    "explain: no offset": (("explain", "--kv-shape", "1,8,9000,64", "--causal"), "--query-offset 808 the last with"),
    "explain: a negative offset": (("explain", "--query-offset", "-1"), "query_offset: got -1"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("form", ["table", "json"])
def test_bad_input_is_one_block_on_stderr(cli, arguments, words, form):
    code, out, err = cli(*arguments, *(["--json"] if form == "json" else []))
    assert (code, out) == (2, "")
    *steps, last = err.splitlines()
    assert last.startswith("error: ") and words in last and ("want" in last or "Known: " in last)
    assert all(step.startswith("[") for step in steps)


def test_a_backend_that_does_not_fit_is_refused_with_every_reason(cli, text, register):
    register("elsewhere", Backend(devices=("mps",)))
    code, out, err = cli("demo", text, "--device", "cpu", "--dtype", "float64", "--backend", "elsewhere")
    assert (code, out) == (2, "")
    assert "device is cpu (needs mps)" in err and "dtype is float64 (needs float32)" in err and "Next: " in err


def test_an_environment_variable_that_cannot_be_read(cli, monkeypatch):
    monkeypatch.setenv("LONGSPAN_BACKEND", "sdpa,,")
    code, out, err = cli("explain")
    assert (code, out) == (2, "") and err.startswith("error: LONGSPAN_BACKEND='sdpa,,': entry '' is no backend name")


def test_nothing_is_computed_before_bad_input_is_refused(cli, text, monkeypatch):
    def never(*_, **__):
        raise AssertionError("too early")

    monkeypatch.setattr(sys.modules["longspan.tools.demo.run"], "embed", never)
    assert cli("demo", text, "--backend", "unheard-of")[0] == 2


# -------------------------------------------------------------------------------------------------- other processes


def python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environ}
    )


def test_importing_the_library_imports_no_backend_no_printing_and_no_cuda():
    python(
        """
import sys, longspan, torch
heavy = [name for name in sys.modules if name.split(".")[0] in ("longspan_plugins", "typer", "rich")]
assert not heavy, heavy
assert not torch.cuda.is_initialized()
assert longspan.backends()
problem = longspan.Problem(batch=1, heads=8, q_len=64, head_dim=64)
for device in ("cpu", "cuda", "sm_61", "sm_90", "gfx942", "mps"):
    longspan.explain(problem, device=device)
assert not torch.cuda.is_initialized()
assert not [name for name in sys.modules if name.split(".")[0] in ("typer", "rich")]
"""
    )


def test_piped_output_is_plain_and_wide_enough():
    done = python(
        "import sys; from longspan.tools.cli import main; main(sys.argv[1:] or ['explain', '--device', 'sm_61'])",
        NO_COLOR="1",
        PYTHONIOENCODING="utf-8",
    )
    assert "\x1b" not in done.stdout and done.stderr == ""
    assert "backend is by name only (needs to be named); fix: backend='reference'" in done.stdout
