"""`longspan bench block-sparse`: that it measures what its rows say, on sizes too small to time anything."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import longspan as ls
from longspan.errors import ArgumentError, LongspanError
from longspan.tools import cli
from longspan.tools.bench import baselines, block_sparse, contract
from longspan.tools.bench.apart import LongWindow, measure_window
from longspan.tools.bench.baselines import Comparison, against_bigbird, against_flex, against_longformer
from longspan.tools.bench.sidebyside import Rows

ROW = {
    "work": str,
    "figure": float,
    "limit": str,
    "holds": bool,
    "quartiles": str,
    "density": float,
    "over_dense": float,
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bench(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "block-sparse", *arguments])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def same(contest, **tolerance):
    with torch.inference_mode():
        torch.testing.assert_close(contest.ours(), contest.theirs(), **tolerance)


# ---------------------------------------------------------------------------------------------------------------- rows


def test_rows_judge_by_the_median_and_keep_what_has_no_limit():
    rows = Rows()
    rows.compare("slower", [2.0, 4.0, 3.0], [1.0, 1.0, 1.0], "<=", 1.25, unit=2.0, density=0.5)
    rows.compare("faster", [2.0, 4.0, 3.0], [1.0, 1.0, 1.0], ">=", 3.0)
    rows.add("for information", 7.0)
    assert rows.rows[0] == {
        "work": "slower", "figure": 1.5, "limit": "<= 1.25", "holds": False, "quartiles": "1.000-2.000", "density": 0.5
    }  # fmt: skip
    assert rows.rows[1]["holds"] is True
    assert rows.rows[2] == {"work": "for information", "figure": 7.0}


# ------------------------------------------------------------------------------------------------------------- density


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_densities_give_a_row_for_each_direction_and_share(dtype):
    rows = Rows()
    block_sparse.densities(rows, "reference", 64, dtype, 2, block_sparse.LIMITS, heads=1, block_size=8)
    directions = ["forward", "backward"] + ["attention and autograd"] * (dtype == "float32")
    assert len(rows.rows) == 4 * len(directions)
    assert list(rows.rounds) == [f"reference {dtype} N=64 {direction}" for direction in directions]
    for seconds in rows.rounds.values():
        assert {name: len(one) for name, one in seconds.items()} == {
            "dense": 2,
            "10%": 2,
            "50%": 2,
            "90%": 2,
            "100%": 2,
        }
    for row in rows.rows:
        assert {key: type(value) for key, value in row.items()} == ROW
    assert [row["density"] for row in rows.rows[:4]] == [
        0.125,
        0.5,
        0.875,
        1.0,
    ]  # what was drawn, not what was asked for
    assert [row["limit"] for row in rows.rows[:4]] == ["<= 1.25", "<= 1.15", "<= 1.15", "<= 1.05"]


def test_the_figure_is_the_share_of_denses_time_over_the_density(monkeypatch):
    seconds = {"dense": [8.0, 8.0], "10%": [2.0, 2.0], "50%": [4.0, 4.0], "90%": [8.0, 8.0], "100%": [12.0, 12.0]}
    monkeypatch.setattr(block_sparse, "interleave", lambda sides, rounds: {name: seconds[name] for name in sides})
    rows = Rows()
    block_sparse.densities(rows, "reference", 64, "bfloat16", 2, block_sparse.LIMITS, heads=1, block_size=8)
    assert [row["figure"] for row in rows.rows] == [2.0, 1.0, pytest.approx(1 / 0.875), 1.5] * 2
    assert [row["over_dense"] for row in rows.rows] == [0.25, 0.5, 1.0, 1.5] * 2
    assert [row["holds"] for row in rows.rows] == [False, True, True, False] * 2


def test_without_limits_nothing_is_judged():
    rows = Rows()
    block_sparse.densities(rows, "sdpa", 32, "bfloat16", 1, heads=1, block_size=8)
    assert rows.rows and not any("limit" in row or "holds" in row for row in rows.rows)


# ----------------------------------------------------------------------------------------------------------- baselines


def test_a_baseline_that_computes_something_else_is_not_timed():
    def comparison(theirs):
        return Comparison("work", lambda: torch.ones(2), lambda: theirs, {"density": 0.5})

    rows = Rows()
    with pytest.raises(AssertionError):
        block_sparse.compare_baselines(rows, iter([comparison(torch.zeros(2))]), 1)
    assert not rows.rows
    block_sparse.compare_baselines(rows, iter([comparison(torch.ones(2))]), 3)
    (row,) = rows.rows
    assert row["work"] == "work" and row["limit"] == ">= 1" and row["density"] == 0.5 and row["apart"] == 0.0
    assert set(rows.rounds["work"]) == {"ours", "theirs"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_gets_the_masks_that_we_get(monkeypatch):
    """Uncompiled: what is compiled is the same function, and compiling takes longer than this file may."""
    compiling = torch.compile  # flex itself calls it too, with a backend of its own

    def mine_uncompiled(function, **given):
        return function if given == {"dynamic": False} else compiling(function, **given)

    monkeypatch.setattr(torch, "compile", mine_uncompiled)
    contests = list(against_flex("reference", 300, heads=2))
    assert len(contests) == 2
    for contest, pattern in zip(contests, (ls.random_blocks(0.1), ls.local_blocks(1023)), strict=True):
        same(contest, atol=1e-5, rtol=1e-5)
        assert pattern.spec in contest.work
        assert contest.more["compile_s"] >= 0
    assert contests[0].more["density"] == ls.random_blocks(0.1).density(300)


def test_compiled_code_of_earlier_runs_is_not_found(monkeypatch):
    import os

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    with baselines._nothing_compiled():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] != "mine"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    with baselines._nothing_compiled():
        assert os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == []
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("positions", [(), (0,), (0, 77)])
def test_longformer_computes_what_we_compute(positions):
    pytest.importorskip("transformers")
    contest = against_longformer("sdpa", 128, heads=2, window=32, positions=positions)
    same(contest, atol=2e-5, rtol=1e-4)
    assert contest.more["density"] == ls.longformer(32, positions).density(128)


def test_bigbird_computes_what_we_compute():
    pytest.importorskip("transformers")
    contest = against_bigbird("sdpa", 4096, heads=2)
    for _ in range(2):  # its blocks are handed out anew for each call
        same(contest, atol=2e-5, rtol=1e-4)
    blocks = 2 * 64 + 62 * 5 - 2 + 62 * 3  # two global rows; five of window and edges, where two coincide; three drawn
    assert contest.more["density"] == blocks / 64**2


def test_transformers_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LongspanError, match=r"pip install 'transformers>=5'"):
        baselines.need_transformers()
    code, out, err = bench(capsys, "--parts", "flex,transformers")
    assert code != 0 and not out and "transformers>=5" in err


def test_without_transformers_the_rest_runs_and_says_how_to_get_them(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(block_sparse, "perform", lambda steps, on_step: ran.extend(words for words, _ in steps) or True)
    ran = []
    code, out, _ = bench(capsys, "--quick")
    assert code == 0 and "note: " in out and "transformers>=5" in out
    assert ran and not any("Longformer" in words for words in ran) and any("FlexAttention" in words for words in ran)


# -------------------------------------------------------------------------------------------------- a million, and less


def test_a_long_window_is_measured_in_stages():
    what = LongWindow("sdpa", 1000, 30, threads=1, calls=2, block_size=16)
    found = measure_window(what)
    assert [one["stage"] for one in found] == ["index", "plan", "forward", "forward", "backward"]
    pattern = ls.local_blocks(30, 0, 16)
    csr = pattern.csr(1000, is_causal=True)
    assert found[0]["nbytes"] == csr.nbytes and found[0]["pairs"] == csr.layouts[0].pairs
    problem = ls.Problem(pattern=pattern, batch=1, heads=1, q_len=1000, kv_len=1000, head_dim=64, is_causal=True)
    assert found[1]["nbytes"] == ls.plan(problem, backend="sdpa").layout.nbytes
    assert all(one["seconds"] > 0 for one in found)
    assert all("beyond" in one for one in found[2:])


def test_each_stage_is_announced():
    said = []
    measure_window(LongWindow("reference", 64, 7, threads=1, calls=1, block_size=16), said.append)
    assert [words.rpartition(": ")[2] for words in said] == ["index", "plan", "forward", "backward", "backward"]
    assert all("N=64" in words for words in said)


def test_a_process_that_fails_is_an_error(capfd):
    with pytest.raises(LongspanError, match="0 of 4 stages"):
        measure_window(LongWindow("no_such_backend", 64, 7, threads=1, calls=1))
    assert "no_such_backend" in capfd.readouterr().err


def test_a_million_is_held_to_its_limits(monkeypatch):
    stages = [
        {"stage": "index", "seconds": 0.1, "nbytes": 11_000_000, "pairs": 1},
        {"stage": "plan", "seconds": 0.1, "nbytes": 9_000_000},
        *({"stage": "forward", "seconds": float(n), "beyond": 200_000_000 + 100_000_000 * (n == 2)} for n in (3, 2, 1)),
        {"stage": "backward", "seconds": 5.0, "beyond": 400_000_000},
    ]
    monkeypatch.setattr(block_sparse, "measure_window", lambda what, on_stage: stages)
    rows = Rows()
    block_sparse.million(rows, LongWindow("mine", 2**20, 1024, 2))
    assert [(row["figure"], row.get("holds")) for row in rows.rows] == [
        (pytest.approx(11.0), False),  # the index
        (pytest.approx(9.0), True),  # the program
        (pytest.approx(300.0), True),  # the worst forward's peak
        (pytest.approx(400.0), False),  # the backward's
        (0.1, None),
        (2.0, None),  # the median forward
        (5.0, None),
    ]
    for stage in stages[2:]:
        stage["beyond"] = None  # where the system does not say
    unknown = Rows()
    block_sparse.million(unknown, LongWindow("mine", 2**20, 1024, 2))
    assert len(unknown.rows) == 5


# --------------------------------------------------------------------------------------------------------- the command


def test_it_is_listed_and_runs_the_parts_asked_for(capsys, monkeypatch):
    assert "block-sparse" in {one.NAME for one in contract.benches()}
    asked = []
    monkeypatch.setattr(block_sparse, "measure_window", lambda what, on_stage: asked.append(what) or _stages(what))
    before = torch.get_num_threads()
    code, out, _ = bench(capsys, "--parts", "million", "--threads", "2", "--backend", "sdpa", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["benchmark"] == "block-sparse" and found["threads"] == 2 and found["backend"] == "sdpa"
    assert asked == [LongWindow("sdpa", 2**20, 1024, 2)]
    assert all({"work", "figure"} <= set(row) for row in found["rows"]) and len(found["rows"]) == 7
    assert torch.get_num_threads() == before


def _stages(what):
    none = {"seconds": 1.0, "nbytes": 1, "beyond": 1}
    return [{"stage": stage, **none} for stage in ("index", "plan", *["forward"] * what.calls, "backward")]


def test_bad_options_are_refused_by_name(capsys):
    code, _, err = bench(capsys, "--parts", "density,flax")
    assert code == 2 and "flax" in err and "density,flex" in err
    code, _, err = bench(capsys, "--parts", "million", "--threads", "0")
    assert code == 2 and "--threads" in err
    with pytest.raises(ArgumentError):
        block_sparse._parts("")


def test_tiles_give_a_row_for_each_block_size_and_direction():
    rows = Rows()
    block_sparse.tiles(rows, "reference", 256, "float32", 1)
    assert len(rows.rows) == 2 * 6
    assert all(row["figure"] > 0 for row in rows.rows)
