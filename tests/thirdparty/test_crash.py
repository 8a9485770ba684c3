"""A package that takes the interpreter down when imported: suffered once, then left alone, and never by `--isolate`."""

from __future__ import annotations

import json
import signal

import pytest

ONLY = {"LONGSPAN_PLUGINS": "crash,good,sdpa"}
BY_NAME = "x = torch.ones(1, 1, 3, 4)\nprint(ls.attention(x, x, x).sum().item())"


@pytest.fixture(scope="module")
def shown(site, tmp_path_factory):
    """What happens first, and what happens next; `isolated` keeps its records elsewhere, as if nothing had happened."""
    here, elsewhere = site("crash", "good"), {"LONGSPAN_CACHE": str(tmp_path_factory.mktemp("cache"))}
    first = here.forks(
        suffered={"code": BY_NAME},
        isolated={"cli": ["doctor", "--isolate", "--json"], "env": ONLY | elsewhere},
        safe={"code": BY_NAME, "env": {"LONGSPAN_PLUGINS": "builtin"} | elsewhere},
    )
    following = here.forks(
        computed={"code": BY_NAME},
        listing={"cli": ["backends", "--json"]},
        doctor={"cli": ["doctor", "--json"], "env": ONLY},
        strict={"cli": ["backends"], "env": {"LONGSPAN_STRICT": "1"}},
    )
    return first | following


def test_nothing_can_be_done_about_the_first_time(shown):
    assert shown["suffered"].code == -signal.SIGABRT


def test_the_safe_mode_never_meets_it(shown):
    assert (shown["safe"].code, shown["safe"].stdout, shown["safe"].stderr) == (0, "12.0\n", "")


def test_isolated_the_doctor_survives_and_reports_it(shown):
    done = shown["isolated"]
    assert done.code == 1, done.stderr
    assert "SIGABRT" in rows(done)["crash"]["error"]
    assert rows(done)["crash"]["state"] == "broken"
    assert rows(done)["good"]["state"] == "loaded"
    assert done.imported == []


def test_the_next_start_leaves_it_alone_and_goes_on(shown):
    assert shown["computed"].code == 0, shown["computed"].stderr
    assert shown["computed"].stdout == "12.0\n"
    assert shown["computed"].imported == ["acme_good"]
    listed = shown["listing"].rows
    assert listed["crash", "acme-crash"]["state"] == "broken"
    assert listed["good", "acme-good"]["state"] == "loaded"
    for done in (shown["computed"], shown["listing"]):
        assert done.stderr.count("acme-crash 1.0") == 1
        assert "Traceback" not in done.stderr


def test_the_doctor_says_how_to_release_it(shown):
    done = shown["doctor"]
    assert done.code == 1
    assert "longspan doctor --release crash" in done.stdout
    assert rows(done)["crash"]["state"] == "broken"


def test_strict_names_it(shown):
    assert (shown["strict"].code, shown["strict"].stdout) == (2, "")
    (line,) = [line for line in shown["strict"].stderr.splitlines() if line.startswith("error:")]
    assert "acme-crash 1.0" in line


def rows(done):
    return {row["name"]: row for row in json.loads(done.stdout)["ledger"]}
