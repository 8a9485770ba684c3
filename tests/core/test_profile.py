"""The profile of a machine: kept, read back, refused where it is another machine's, and preferred to tiers."""

from __future__ import annotations

import json

import pytest
import torch
from attrs import evolve

import longspan as ls
from longspan.bench.buffers import threshold
from longspan.bench.peaks import bandwidth, product_peak
from longspan.bench.profiling import make_profile
from longspan.defaults import buffer_arena
from longspan.profile import Measure, Profile, current_profile, forget_profiles, machine_name, profile_path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path))
    forget_profiles()
    yield tmp_path
    forget_profiles()


def measured(**seconds):
    measures = tuple(Measure(name, "dense", "float32", 512, took, took) for name, took in seconds.items())
    return Profile("cpu", machine_name(), torch.__version__, 2, {"float32": 100.0}, 10.0, measures)


def problem(**changes):
    return ls.Problem(**{"batch": 1, "heads": 2, "q_len": 300, "head_dim": 64, **changes})


def test_without_a_profile_the_table_serves():
    assert current_profile("cpu") is None
    assert ls.explain(problem()).chosen == "cpu_fused"


def test_a_profile_goes_before_tiers_and_says_so():
    measured(sdpa=1e-3, cpu_fused=2e-3).save()
    found = ls.explain(problem())
    assert found.chosen == "sdpa"
    assert "fastest measured on this machine (sdpa 1 ms, cpu_fused 2 ms)" in found.why
    assert ls.explain(problem(dtype="bfloat16")).chosen == "cpu_fused", "not measured: the table's"
    assert ls.explain(problem(), device="sm_90").chosen == "sdpa", "another device's profile"
    with ls.use(prefer="cpu_fused"):
        assert ls.explain(problem()).chosen == "cpu_fused"
    assert ls.explain(problem(), backend="cpu_fused").chosen == "cpu_fused"


def test_a_profile_overrides_no_refusal_and_no_consent():
    measured(reference=1e-9, flex=1e-9, nobody=1e-9, sdpa=1e-3, cpu_fused=2e-3).save()
    assert ls.explain(problem()).chosen == "sdpa"
    assert ls.explain(problem(dropout_p=0.5)).chosen == "sdpa"


def test_the_nearest_length_and_the_backward_count():
    profile = measured(sdpa=1.0)
    more = Measure("sdpa", "dense", "float32", 8192, 5.0, 7.0)
    profile = Profile("cpu", profile.machine, profile.torch, 2, {}, 1.0, (*profile.measures, more))
    assert profile.seconds(problem(q_len=100)) == {"sdpa": 1.0}
    assert profile.seconds(problem(q_len=10**6)) == {"sdpa": 5.0}
    assert profile.seconds(problem(q_len=10**6, requires_grad=True)) == {"sdpa": 12.0}
    assert profile.seconds(problem(pattern=ls.SlidingWindow(3))) == {}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 99}', '{"version": 1, "measures": [3]}', "\x00"]
)
def test_a_file_that_is_no_profile_is_no_profile(text):
    profile_path("cpu").parent.mkdir(parents=True)
    profile_path("cpu").write_text(text)
    assert current_profile("cpu") is None
    assert ls.explain(problem()).chosen == "cpu_fused"


@pytest.mark.parametrize("field", ["machine", "torch"])
def test_another_machines_profile_is_not_used(field):
    path = measured(sdpa=1e-3).save()
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, field: "another"}))
    forget_profiles()
    assert current_profile("cpu") is None


def test_it_reads_back_what_was_measured(monkeypatch):
    monkeypatch.setattr("longspan.bench.peaks.SIDE", 64)
    monkeypatch.setattr("longspan.bench.profiling.ENOUGH", 0.01)
    made = make_profile(torch.device("cpu"), quick=True)
    made.save()
    assert current_profile("cpu") == made
    assert {m.backend for m in made.measures} >= {"sdpa", "cpu_fused", "pascal_fp32"}
    assert {m.pattern for m in made.measures} == {"dense", "window", "dilated"}
    assert all(m.forward > 0 and m.backward > 0 for m in made.measures)
    assert made.bandwidth > 0 and set(made.peaks) == {"float32", "bfloat16", "float16"}
    asked = problem(q_len=512, is_causal=True, pattern=ls.SlidingWindow(64, 0))
    times = made.seconds(asked)
    able = [verdict.name for verdict in ls.explain(asked).candidates if verdict.ok and not verdict.reasons]
    assert ls.explain(asked).chosen == min((name for name in able if name in times), key=times.get)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "file"))
    with pytest.raises(ls.LongspanError, match="LONGSPAN_CACHE"):
        measured(sdpa=1.0).save()


def test_peaks_are_rates():
    cpu = torch.device("cpu")
    assert product_peak(torch.float32, cpu, 1) > 0
    assert bandwidth(cpu, 1) > 0


def test_the_arena_serves_from_where_it_was_measured_to_pay(monkeypatch):
    arena = buffer_arena()
    monkeypatch.setattr(arena, "thresholds", {})
    evolve(measured(), workspace_threshold=5 * 2**20).save()
    made = ls.plan(ls.Problem(batch=1, heads=2, q_len=64, head_dim=8, pattern=ls.SlidingWindow(8, 0)), "sdpa")
    assert arena.thresholds == {"cpu": 5 * 2**20}
    assert arena.tenant("cpu").threshold == 5 * 2**20
    assert arena.tenant("cuda").threshold == arena.threshold
    with arena.serving_from(7):
        ls.plan(made.problem, "sdpa")  # which looks at the profile again
        assert arena.tenant("cpu").threshold == 7
    assert arena.threshold_on("cpu") == 5 * 2**20
    profile_path("cpu").unlink()
    forget_profiles()
    ls.plan(made.problem, "sdpa")
    assert arena.threshold_on("cpu") == arena.threshold


def test_where_it_pays_is_part_of_the_profile():
    found = threshold(1)
    assert found["pays_from_mib"] in (None, 1, 2, 4, 8, 16, 32, 64, 128)
    assert set(found["arena_over_torch"]) == {f"{mib} MiB" for mib in (1, 2, 4, 8, 16, 32, 64, 128)}
