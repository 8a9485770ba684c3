"""One dense kernel in ten lines, from a wheel: it serves every pattern and argument exactly, with gradients."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import wheels as building
from sites import BROKEN, CROWD, THIRD


@pytest.fixture(scope="module")
def judged(site):
    """Every case of `programs/oracle.py`, for the ten lines and for the template, which brings a backward."""
    return site("good", "template").program("oracle", "good", "acme")


def case_names():
    tree = ast.parse((Path(__file__).parent / "programs" / "oracle.py").read_text())
    (cases,) = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CASES"
    ]
    return [ast.literal_eval(key) for key in cases.keys]


def test_the_kernel_is_ten_lines():
    tree = ast.parse((building.SOURCES["good"] / "acme_good.py").read_text())
    (kernel,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "longspan_kernel"]
    assert kernel.end_lineno - kernel.lineno + 1 <= 10


@pytest.mark.parametrize("name", ["good", "acme"])
@pytest.mark.parametrize("case", case_names())
def test_it_equals_the_oracle(judged, name, case):
    found = judged[name][case]
    assert found["backend"] == name
    assert found["out"] <= 1e-12
    assert found["lse"] <= 1e-12
    assert found["gradients"] <= 1e-12
    assert found["lse gradients"] <= 1e-12


@pytest.mark.parametrize("case", case_names())
def test_it_is_that_kernel_which_ran(judged, case):
    forward, backward = judged["good"][case]["calls"]
    assert forward >= 1
    assert backward == 0, "it brings none"
    forward, backward = judged["acme"][case]["calls"]
    assert forward == backward >= 1


# --- threads and processes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(site):
    return site(*CROWD).program("processes")


def test_sixteen_threads_plan_at_once(processes):
    found = processes["threads"]
    assert found["named"] == ["good"] * 8
    assert len(set(found["auto"])) == 1
    assert found["auto"][0] not in CROWD
    assert max(found["errors"]) <= 1e-12
    assert found["ledgers"] == 1


def test_sixteen_threads_are_warned_once(processes):
    said = processes["threads"]["warnings"]
    assert len(said) == len(set(said)) == len(BROKEN)
    for package in BROKEN:
        assert any(f"of {THIRD}{package.replace('_', '-')} 1.0" in text for text in said)


def test_a_fork_after_discovery_runs_a_third_partys_plan(processes):
    assert processes["fork"] == 0


def test_a_spawned_process_finds_the_same_and_runs_a_plan_that_was_sent(processes):
    right, backend, names = processes["spawn"]
    assert right
    assert backend == "good"
    assert names == processes["names"]


def test_none_of_this_initialises_cuda(processes):
    assert processes["cuda"] is False
