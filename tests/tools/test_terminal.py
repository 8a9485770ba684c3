"""Every command in a terminal of 80, 100 and 160 columns, in pipes, with and without colour, in ASCII, interrupted.

A terminal is emulated (pyte). What is held: no line is wider than the terminal, no word is broken or lost on the way
from a very wide one, and what prints while a bar is drawn does not spoil it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pyte
import pytest

import longspan as ls

HERE = Path(__file__).parent
RAW = HERE.parents[1] / "docs" / "benchmarks"
WIDTHS = (80, 100, 160)
WIDE = 1000
SLOW = "flex,cpu_fused"  # what is compiled first
DEMO = ["demo", __file__, "--tokens", "600", "--device", "cpu"]
CANNED = """
import json
from longspan.tools.bench import contract
found = json.loads(open({path!r}).read())
class Bench:
    HELP = "canned"
    add_arguments = staticmethod(lambda parser: None)
    run = staticmethod(lambda args, on_step: on_step("a step", 0, 2) or {{**found, "complete": True}})
contract.find = lambda name: Bench
"""
FEW_CASES = """
from longspan.testing import certificate
every = certificate.cases_for
certificate.cases_for = lambda *given, **named: every(*given, **named)[::40]
"""
WORST = """
import longspan, longspan.tools.doctor.report as report
from attrs import evolve
from longspan.tools.cli import doctor
whole = doctor.examine
error = "ImportError: /opt/acme/lib/python3.11/site-packages/acme_attention/_kernels.cpython-311-x86_64.so: " + (
    "undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE "
) * 3
row = longspan.BackendInfo("acme_attention_with_a_long_name", "broken", "acme-attention-kernels", "2.1", error=error)
def examine(*given):
    found = whole(*given)
    setting = report.Setting("LONGSPAN_CACHE", "/very" + "/long/path/of/a/cache" * 9, "")
    ledger = evolve(found.ledger, rows=(*found.ledger.rows, row))
    return evolve(found, ledger=ledger, settings=(setting,))
doctor.examine = examine
"""
COMMANDS = {
    "backends": (["backends"], ""),
    "backends --details": (["backends", "--details"], ""),
    "explain": (["explain"], ""),
    "explain on a GPU": (["explain", "--device", "sm_90", "--pattern", "dilated:2048/1,4096/2", "--causal"], ""),
    "doctor": (["doctor"], ""),
    "doctor, at its worst": (["doctor"], WORST),
    "matrix": (["matrix"], ""),
    "bench": (["bench"], ""),
    "bench --options": (["bench", "kernels", "--options"], ""),
    "bench kernels": (["bench", "kernels"], CANNED.format(path=str(RAW / "2026-11-21-kernels.json"))),
    "bench block-sparse": (["bench", "block-sparse"], CANNED.format(path=str(RAW / "2026-11-21-block-sparse.json"))),
    "bench cache": (["bench", "cache"], CANNED.format(path=str(RAW / "2026-11-21-cache.json"))),
    "an error": (["demo", "--device", "sm_61"], ""),
    "an unknown name": (["explain", "--backend", "refrence"], ""),
}
HELP = ("demo", "backends", "explain", "doctor", "verify", "bench", "plot", "matrix")


@pytest.fixture(scope="module")
def terminal():
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "LONGSPAN_BLOCK": SLOW}
    for variable in ("LONGSPAN_BACKEND", "LONGSPAN_PREFER", "LONGSPAN_PLUGINS", "GITHUB_ACTIONS"):
        environ.pop(variable, None)
    server = subprocess.Popen(
        [sys.executable, str(HERE / "terminal_server.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ,
    )  # fmt: skip

    def ask(args, width=0, **task):
        server.stdin.write(json.dumps({"args": args, "width": width, **task}) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        assert "Traceback" not in answer["out"] + answer["err"], answer["out"] + answer["err"]
        return answer

    yield ask
    server.stdin.close()
    assert server.wait(30) == 0


@pytest.fixture(scope="module")
def screen(terminal):
    """The lines that stand on the screen in the end, and the whole answer; each command is run once a width."""

    @cache
    def made(name, width):
        args, setup = COMMANDS[name]
        answer = terminal(args, width, setup=setup)
        return lines(answer["out"], WIDE), answer

    return made


def lines(out, width):
    """What an emulator of this width shows, everything that scrolled away included."""
    shown = pyte.Screen(width, 400)
    pyte.ByteStream(shown).feed(out.encode("latin-1"))
    return [line.rstrip() for line in shown.display]


HEADINGS = {
    "backend",
    "bench",
    "description",
    "error",
    "measured",
    "reasons",
    "variable",
    "what",
    "why",
    "work",
    "kept",
}
"""Of columns that stand beneath or above their rows where there is no room for them."""


def words(shown):
    """What is written, without the lines of tables and panels, and without what an import took."""
    found = {word for line in shown for word in re.split(r"[\s│╭╮╰╯─┬┴|+]+", line) if word.strip("-")}
    return {word for word in found if not re.fullmatch(r"\d+\.\d", word)}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_wider_than_the_terminal_and_no_word_is_broken_or_lost(screen, name, width):
    shown, answer = screen(name, width)
    wide, _ = screen(name, WIDE)
    assert any(shown)
    most = {len(line) for line in shown}
    longest = max(len(word) for word in words(wide))  # a path of 200 letters has to be broken
    if longest <= width - 4:
        assert words(shown) - words(wide) == set()
        assert words(wide) - words(shown) - HEADINGS == set()
    assert max(most) <= width, [line for line in shown if len(line) > width]
    assert answer["code"] == screen(name, WIDE)[1]["code"]


@pytest.mark.parametrize("name", ["backends", "explain", "doctor", "matrix"])
def test_each_backend_has_its_name_whole_on_a_line(screen, name):
    shown, _ = screen(name, 80)
    for row in ls.backends():
        if row.distribution == "longspan" and (name != "matrix" or row.name not in SLOW):
            assert any(re.search(rf"(?<![\w]){row.name}(?![\w])", line) for line in shown), row.name


def test_the_list_of_backends_is_short(screen):
    shown, _ = screen("backends", 80)
    rows = [row for row in ls.backends() if row.distribution == "longspan"]
    assert len([line for line in shown if line]) <= 2 * len(rows) + 4


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", HELP)
def test_help_fits(terminal, command, width):
    shown = lines(terminal([command, "--help"], width)["out"], WIDE)
    wide = lines(terminal([command, "--help"], 400)["out"], WIDE)
    assert max(map(len, shown)) <= width
    assert words(shown) - words(wide) == set()


# -------------------------------------------------------------------------------------------- pipes, colours, ASCII

COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]m")


@pytest.mark.parametrize("name", ["backends", "explain", "doctor", "bench kernels", "an error"])
def test_a_pipe_gets_plain_text_and_all_of_it(terminal, screen, name):
    args, setup = COMMANDS[name]
    answer = terminal(args, setup=setup)
    both = answer["out"] + answer["err"]
    assert "\x1b" not in both and "\r" not in both
    told = words(both.encode("latin-1").decode().splitlines())
    assert words(screen(name, WIDE)[0]) - told - HEADINGS == set()


def test_colours_follow_the_environment(terminal):
    coloured = terminal(["backends"], 80)["out"]
    assert COLOUR.search(coloured)
    assert not COLOUR.search(terminal(["backends"], 80, environ={"NO_COLOR": "1"})["out"])
    piped = terminal([*DEMO, "--backend", "sdpa"], environ={"FORCE_COLOR": "1"})
    assert COLOUR.search(piped["out"]) and "\r" not in piped["out"] + piped["err"]
    assert not re.search(r"\x1b\[[0-9;?]*[A-HJKhl]", piped["out"] + piped["err"])  # no bar, no cursor


@pytest.mark.parametrize(("encoding", "width"), [("ascii", 0), ("ascii", 80), ("latin-1", 0)])
def test_an_encoding_that_lacks_our_signs(terminal, encoding, width):
    demo = terminal([*DEMO, "--backend", "sdpa"], width, encoding=encoding)
    sign = "x" if encoding == "ascii" else "×"
    assert demo["code"] == 0 and f"{sign} dense" in demo["out"] and "----" in demo["out"]
    assert encoding != "ascii" or (demo["out"] + demo["err"]).isascii()
    for args in (["backends"], ["explain"], ["explain", "--help"], ["bench"], ["demo", "nowhere×.txt"]):
        answer = terminal(args, width, encoding=encoding)
        assert answer["code"] in (0, 2) and (encoding != "ascii" or (answer["out"] + answer["err"]).isascii())


# ------------------------------------------------------------------------------------------- progress, interruptions


@pytest.mark.parametrize("width", WIDTHS)
def test_the_demos_table_fits_with_every_backend(terminal, width):
    answer = terminal(DEMO, width)
    shown = lines(answer["out"], WIDE)
    assert answer["code"] == 0 and max(map(len, shown)) <= width
    rows = [line for line in shown if re.match(r"\w+ +(chosen|ok|by name) +600 ", line)]
    assert {"sdpa", "reference", "block_sparse_batched", "torch_sparse"} <= {row.split()[0] for row in rows}
    head = next(line for line in shown if line.startswith("backend"))
    assert all(len(row) == len(head) for row in rows)
    start = shown.index(head)
    assert shown[start + 2 : start + 2 + len(rows)] == rows  # nothing between them
    assert not any(re.search(r"\d+/\d+ \d:\d\d", line) for line in shown)  # the bar is gone


NOISY = """
import os, time, warnings
from longspan.tools.demo.measurement import Measurement
run = Measurement.row
def row(self, verdict, **given):
    if verdict.ok:
        os.write(2, b"gcc: note: something of the compiler's own that is rather long and goes to the descriptor\\n")
        os.write(1, b"native code that prints\\n")
        warnings.warn("sparse tensors are in beta state, says somebody else entirely", UserWarning)
    return run(self, verdict, **given)
Measurement.row = row
"""


def test_what_others_print_waits_until_the_table_is_there(terminal):
    answer = terminal(DEMO, 80, setup=NOISY)
    shown = lines(answer["out"], WIDE)
    head = next(number for number, line in enumerate(shown) if line.startswith("backend"))
    end = shown.index("", head)
    between = shown[head:end]
    assert not any("gcc" in line or "warning" in line or "native code" in line for line in between[:4])
    text = " ".join(" ".join(shown).split())
    assert "goes to the descriptor" in text and "native code that prints" in text
    assert "warning: sparse tensors are in beta state, says somebody else entirely" in text


SECOND_HANGS = """
import time
from longspan.tools.demo.measurement import Measurement
run, turns = Measurement.row, []
def row(self, verdict, **given):
    turns.append(verdict.name) if verdict.ok else None
    if len(turns) == 2:
        print("hanging", flush=True)
        time.sleep(600)
    return run(self, verdict, **given)
Measurement.row = row
"""


@pytest.mark.parametrize("width", [0, 80])
def test_an_interrupted_demo_prints_what_there_is(terminal, width):
    answer = terminal(DEMO, width, setup=SECOND_HANGS, interrupt="sdpa  ")
    assert answer["code"] == 130
    assert re.search(r"sdpa +\S*chosen", answer["out"]) and "auto took sdpa" in answer["out"]
    assert "interrupted after 1 of " in answer["out" if width else "err"]
    itself = SECOND_HANGS.replace('print("hanging", flush=True)', "import os; os.kill(os.getpid(), 2)")
    as_json = terminal([*DEMO, "--json"], 0, setup=itself)
    found = json.loads(as_json["out"])
    assert as_json["code"] == 130 and found["interrupted"] is True
    assert [row["state"] for row in found["backends"] if row["name"] == "sdpa"] == ["ran"]


def test_an_interruption_before_there_is_anything(terminal):
    setup = "import os\nfrom longspan.tools.cli import demo\ndemo.run = lambda *_, **__: os.kill(os.getpid(), 2)"
    answer = terminal(["demo"], 0, setup=setup)
    assert (answer["code"], answer["out"], answer["err"]) == (130, "", "error: interrupted\n")


def test_every_bench_shows_its_steps(terminal):
    answer = terminal(["verify", "reference", "--quick", "--device", "cpu"], 80, setup=FEW_CASES)
    assert answer["code"] == 0 and max(map(len, lines(answer["out"], WIDE))) <= 80
    assert re.search(r"\d/\d", answer["out"])
    drawn = terminal(COMMANDS["bench cache"][0], 80, setup=COMMANDS["bench cache"][1])["out"]
    assert "0/2" in drawn and "a step" in drawn
    assert "[1/2] a step\n" in terminal(COMMANDS["bench cache"][0], 0, setup=COMMANDS["bench cache"][1])["err"]


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("args", [["backends", "--json"], ["backends"], ["matrix"], ["--help"], DEMO], ids=" ".join)
def test_a_reader_that_goes_away_ends_it_in_silence(terminal, args):
    answer = terminal(args, leaves=True)
    assert answer["code"] == 1 and not [line for line in answer["err"].splitlines() if not line.startswith("[")]


FULL = "import os; nowhere = os.open('/dev/full', os.O_WRONLY); os.dup2(nowhere, 1)"
SYSTEM = {
    "a full disk": (["backends"], FULL, "No space left on device"),
    "memory, by Python": (
        ["backends"], "import longspan\ndef no(): raise MemoryError\nlongspan.backends = no", "not enough memory"
    ),
    "memory, by torch": (
        ["backends"], "import longspan, torch\nlongspan.backends = lambda: torch.empty(2**60)", "not enough memory"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("args", "setup", "words"), SYSTEM.values(), ids=SYSTEM)
def test_what_the_system_refuses_is_one_line(terminal, args, setup, words):
    answer = terminal(args, setup=setup)
    (line,) = answer["err"].splitlines()
    assert answer["code"] == 1 and line.startswith("error: ") and words in line and "Next: " in line
