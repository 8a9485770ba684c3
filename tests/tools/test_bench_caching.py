"""`longspan bench`: what it lists, refuses and prints; the benches of cache and arena measure what they say."""

from __future__ import annotations

import json

import pytest

from longspan.tools import cli
from longspan.tools.bench import cache, contract
from longspan.tools.bench.contract import perform
from longspan.tools.bench.sidebyside import interleave, machine, ratio, summary
from longspan.tools.meter import faults, resident


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_the_benches_are_listed(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    assert all(one.NAME in out for one in contract.benches())
    assert {"cache", "buffers", "stress"} <= {one.NAME for one in contract.benches()}


def test_the_list_is_json_for_machines(capsys):
    code, out, _ = run(capsys, "--json")
    assert code == 0 and [one["name"] for one in json.loads(out)] == [one.NAME for one in contract.benches()]
    assert all(one["help"] for one in json.loads(out))


def test_steps_are_announced_and_an_interruption_keeps_what_there_is(capsys, monkeypatch):
    seen, found = [], []

    def stop():
        raise KeyboardInterrupt

    given = [("one", lambda: found.append(1)), ("two", stop), ("three", lambda: found.append(3))]
    assert perform(given, lambda *step: seen.append(step)) is False
    assert found == [1] and seen == [("one", 0, 3), ("two", 1, 3)]
    monkeypatch.setattr(cache, "_model", stop)
    code, out, err = run(capsys, "cache", "--rounds", "1")
    assert code == 130 and "hit / added_us" in out and "interrupted" in err and "Traceback" not in err
    assert "[1/6] a hit" in err


@pytest.mark.parametrize("given", [("--rounds", "0"), ("--longest", "-1"), ("--rounds", "many")])
def test_numbers_that_no_bench_can_take(capsys, given):
    code, out, err = run(capsys, "cache", *given)
    assert (code, out) == (2, "") and given[1] in err and "Next: " in err


def test_an_unknown_bench_gets_the_nearest(capsys):
    code, _, err = run(capsys, "cahce")
    assert code == 2 and "longspan bench cache" in err


def test_an_option_that_a_bench_does_not_have(capsys):
    code, _, err = run(capsys, "cache", "--no-such-option")
    assert code == 2 and "--no-such-option" in err
    code, out, _ = run(capsys, "cache", "--options")
    assert code == 0 and "--rounds" in out


def test_json_and_a_file_are_the_same(capsys, tmp_path):
    path = tmp_path / "found.json"
    code, out, _ = run(capsys, "cache", "--rounds", "2", "--longest", "128", "--json", "--output", str(path))
    found = json.loads(out)
    assert code == 0 and found == json.loads(path.read_text())
    assert found["benchmark"] == "cache" and found["machine"]["torch"]
    assert found["model"]["misses"] == 1 and found["model"]["hit_rate"] >= 0.99
    assert found["model"]["plans_made_by_attention"] == 1
    assert set(found["plans_on_over_off"]) == {f"{name} N=128" for name in ("dense", "longnet", "window")}


def test_a_file_that_cannot_be_written(capsys, tmp_path):
    code, _, err = run(capsys, "stress", "--seconds", "600", "--output", str(tmp_path))  # refused before the work
    assert code == 2 and "--output" in err


def test_buffers(capsys):
    code, out, _ = run(capsys, "buffers", "--rounds", "1", "--tokens", "1024", "--steps", "10", "--json", "--backward")
    found = json.loads(out)
    assert code == 0 and found["steps"]["auto"]["held_after_the_plans_are_dropped"] == 0
    assert found["calls"]["window bfloat16 training"]["faults"].keys() == {"on", "off"}


def test_the_helpers():
    seen = []
    found = interleave({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=3, calls=2, warm=1)
    assert "".join(seen) == "ab" + "aabb" + "bbaa" + "aabb"
    assert {len(one) for one in found.values()} == {3}
    assert summary([1e-6, 2e-6, 3e-6])["median_us"] == pytest.approx(2.0)
    assert summary([2e-6])["median_us"] == pytest.approx(2.0)
    assert ratio([2.0, 4.0, 8.0], [1.0, 2.0, 2.0])["median"] == 2.0
    assert machine()["cores"] and resident() > 2**20
    before = faults()
    bytearray(2**26)[:: 2**12] = b"x" * 2**14
    assert faults() > before
