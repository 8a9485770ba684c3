"""The conformance kit on installed packages: the sound one passes, the one that over-claims fails by its claims."""

from __future__ import annotations

import json
import shutil

import pytest
import wheels as building

SUITE = """
from longspan.testing import BackendConformance

class TestGood(BackendConformance):
    backend = "good"
    quick = True

class TestOverclaims(BackendConformance):
    backend = "overclaims"
    quick = True
"""
PYTEST = "import os, pytest, sys\nos.chdir({folder!r})\nsys.exit(pytest.main({options!r}))"
OPTIONS = ["-p", "no:cacheprovider", "--rootdir=.", "-c", "pyproject.toml", "-q", "-rA", "--tb=line"]


@pytest.fixture(scope="module")
def shown(site, tmp_path_factory):
    """`longspan verify`, a test suite on both, and the template's own tests, where they were copied to."""
    suite, template = tmp_path_factory.mktemp("suite"), tmp_path_factory.mktemp("template") / "copy"
    (suite / "pyproject.toml").touch()
    (suite / "test_mine.py").write_text(SUITE)
    shutil.copytree(building.TEMPLATE, template, ignore=building.TRACES)
    return site("good", "overclaims", "template").forks(
        good={"cli": ["verify", "good", "--json"]},
        overclaims={"cli": ["verify", "overclaims", "--json"]},
        suite={"code": PYTEST.format(folder=str(suite), options=OPTIONS)},
        template={"code": PYTEST.format(folder=str(template), options=OPTIONS)},
        **{command: {"cli": words} for command, words in readme_commands().items()},
    )


def readme_commands():
    """The command lines that the template's README shows, those that run the whole kit cut short."""
    lines = (building.TEMPLATE / "README.md").read_text(encoding="utf-8").splitlines()
    found = {line.split()[1]: line.split()[1:] for line in lines if line.startswith("   longspan ")}
    return {command: [*words, "--quick"] if command == "verify" else words for command, words in found.items()}


def test_the_good_wheel_passes_the_kit(shown):
    done = shown["good"]
    found = json.loads(done.stdout)
    assert (done.code, found["conformant"]) == (0, True), done.stderr
    assert (found["distribution"], found["version"]) == ("acme-good", "1.0")
    assert found["failures"] == found["declined"] == found["unproven"] == []
    assert found["cases"]["run"] >= 100
    assert {row["dtype"] for row in found["worst"] if row["device"] == "cpu"} == {"float32", "float64"}


def test_the_one_that_overclaims_fails_by_the_names_of_its_claims_and_by_no_other(shown):
    done = shown["overclaims"]
    found = json.loads(done.stdout)
    assert (done.code, found["conformant"]) == (1, False)
    claims = {failure["claim"] for failure in found["failures"]}
    assert claims == {"dropout=True", "gqa=True"}
    assert found["cases"]["run"] - found["cases"]["failed"] >= 100, "what it does, it does right"


@pytest.mark.parametrize("claim", ["dropout", "gqa"])
def test_the_command_prints_each_claim_that_fails_with_its_repair(shown, claim):
    lines = [line for line in shown["overclaims"].stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 2
    (line,) = [line for line in lines if f"overclaims claims {claim}=True, but " in line]
    assert f"Next: set {claim}=False" in line


def test_as_a_test_suite_the_good_one_passes(shown):
    lines = shown["suite"].stdout.splitlines()
    passed = [line for line in lines if line.startswith("PASSED test_mine.py::TestGood")]
    assert len(passed) >= 30
    assert [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED")) and "TestGood" in line] == []


@pytest.mark.parametrize("claim", ["dropout", "gqa"])
def test_as_a_test_suite_the_other_one_fails_with_a_message_that_names_the_claim(shown, claim):
    assert shown["suite"].code == 1
    failed = [line for line in shown["suite"].stdout.splitlines() if line.startswith("FAILED") and "TestOver" in line]
    assert any(f"overclaims claims {claim}=True, but " in line for line in failed)
    assert all("dropout=True" in line or "gqa=True" in line for line in failed)


def test_the_templates_own_tests_pass(shown):
    done = shown["template"]
    assert done.code == 0, done.stdout
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("PASSED tests/test_conformance.py::TestAcme")]) >= 100
    assert [line for line in lines if line.startswith(("SKIPPED", "XFAIL", "XPASS"))] == []


def test_the_commands_of_its_readme_work(shown):
    assert set(readme_commands()) == {"backends", "explain", "verify"}
    for command in readme_commands():
        assert shown[command].code == 0, shown[command].stderr
        assert "acme" in shown[command].stdout
    assert "decided by argument: acme was named" in shown["explain"].stdout
    assert "acme of acme-longspan 0.1.0: conformant" in shown["verify"].stdout
