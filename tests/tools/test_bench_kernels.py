"""`longspan bench kernels` and `--profile`: what they print, and that they measure what they say."""

from __future__ import annotations

import json
from argparse import ArgumentParser

import pytest
import torch

import longspan as ls
from longspan.registry.profile import forget_profiles, profile_path
from longspan.tools.bench import kernels
from longspan.tools.bench.apart import peak_bytes
from longspan.tools.cli import main


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(kernels, "LONG", ((1, 2, 96, 16),))
    monkeypatch.setattr(kernels, "SHORT", ((2, 2, 32, 16),))
    monkeypatch.setattr(kernels, "peak_bytes", lambda side, *_: 2**20 if side == "SDPA" else 3 * 2**20)


def run(*arguments):
    parser = ArgumentParser()
    kernels.add_arguments(parser)
    return kernels.run(parser.parse_args(arguments))


@pytest.mark.parametrize("backend", ["cpu_fused", "sdpa"])
def test_rows_say_what_was_measured_against_which_limit(small, backend):
    found = run("--quick", "--backend", backend)
    assert found["backend"] == backend
    assert set(found["peaks_gflops"]) == {"float32", "bfloat16"} and found["bandwidth_gbs"] > 0
    works = [row["work"] for row in found["rows"]]
    assert len(works) == len(set(works))
    for words in ("forward", "backward", "causal / full", "ten lines", "peak MiB"):
        assert any(words in work for work in works), words
    for row in found["rows"]:
        sign, limit = row["limit"].split()
        assert row["holds"] is (row["figure"] >= float(limit) if sign == ">=" else row["figure"] <= float(limit))
    for sides in found["rounds"].values():
        assert all(second > 0 for seconds in sides.values() for second in seconds)
    json.dumps(found)


def test_by_hand_is_the_pattern():
    tensors = [torch.randn(1, 4, 8192, 8) for _ in range(3)]
    mine = ls.attention(*tensors, kernels.GROUPED, backend="reference")
    torch.testing.assert_close(kernels.grouped_by_hand(*tensors), mine, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["SDPA", "cpu_fused"])
def test_a_footprint_is_that_of_the_call(side):
    shape = (1, 4, 2048, 64)
    out = 4 * 2048 * 64 * 4
    assert peak_bytes(side, shape, "float32", False) < 8 * out + 2**24


def test_the_profile_command_changes_what_auto_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path))
    monkeypatch.setattr("longspan.tools.bench.peaks.SIDE", 64)
    few = [ls.Problem(batch=1, heads=2, q_len=64, head_dim=64, is_causal=True)]
    monkeypatch.setattr("longspan.tools.bench.profiling._problems", lambda device, quick: few)
    forget_profiles()
    try:
        main(["bench", "--profile", "--json"])
    except SystemExit as ended:
        assert not ended.code
    try:
        found = json.loads(capsys.readouterr().out)
        assert found["file"] == str(profile_path("cpu"))
        assert "fastest measured on this machine" in ls.explain(ls.Problem(batch=1, heads=2, q_len=64, head_dim=64)).why
    finally:
        forget_profiles()


def test_the_profile_of_a_device_that_is_not_here():
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--profile", "--device", "nonsense"])
    assert ended.value.code == 2
