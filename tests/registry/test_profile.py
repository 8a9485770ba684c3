"""The profile of a machine: kept, read back, refused where it is another machine's, and preferred to tiers."""

from __future__ import annotations

import json
import math
import os
import random
import re
import warnings

import pytest
import torch
from attrs import asdict, evolve, fields

import longspan as ls
from longspan.memory.arena import buffer_arena
from longspan.registry.profile import (
    MOST,
    VERSION,
    Measure,
    Profile,
    _digest,
    current_profile,
    forget_profiles,
    machine_name,
    profile_path,
    survey,
)
from longspan.tools.bench.buffers import threshold
from longspan.tools.bench.peaks import bandwidth, product_peak
from longspan.tools.bench.profiling import make_profile


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


def refused(why):
    """No profile, said in one warning that names the file, by the doctor too; and every plan is made."""
    path = str(profile_path("cpu"))
    forget_profiles()
    with pytest.warns(UserWarning, match=why) as heard:
        assert current_profile("cpu") is None
        assert ls.explain(problem()).chosen == "cpu_fused"
    assert [path in str(one.message) and "Next: " in str(one.message) for one in heard] == [True]
    (found,) = survey()
    assert found.path == path and re.search(why, found.why) and found.fix == f"rm {path}"
    return found


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", '{"version": 1', '{"version": true}', '{"version": 2, "measures": [3]}', "\x00",
        "[" * 10**5, '{"version": 2, "digest": ' + "9" * 5000 + "}", '"' + "x" * MOST + '"',
    ],
)  # fmt: skip
def test_a_file_that_is_no_profile_is_no_profile(text):
    profile_path("cpu").parent.mkdir(parents=True)
    profile_path("cpu").write_text(text)
    assert refused("damaged|larger").broken


def test_a_folder_or_a_pipe_in_its_place_is_no_profile():
    profile_path("cpu").parent.mkdir(parents=True)
    os.mkfifo(profile_path("cpu"))
    assert refused("is no file").broken
    profile_path("cpu").unlink()
    profile_path("cpu").mkdir()
    assert refused("is no file").broken


@pytest.mark.parametrize("field", ["machine", "torch", "device"])
def test_another_machines_profile_is_not_used(field):
    path = measured(sdpa=1e-3).save()
    evolved = evolve(measured(sdpa=1e-3), **{field: "another"})
    evolved.save().replace(path)
    assert not refused(f"measured with another {field} .'another'; here is").broken


def test_a_profile_of_another_form_is_not_used():
    path = measured(sdpa=1e-3).save()
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 1}))
    assert not refused("form 1").broken


def test_a_profile_that_others_may_have_written_is_not_used(give_away):
    path = measured(sdpa=1e-3).save()
    path.chmod(0o666)
    assert refused("may be written to by others .mode 0666").broken
    path.chmod(0o644)
    forget_profiles()
    assert current_profile("cpu") is not None
    give_away(path)
    assert refused("belongs to another user").broken


WRONG = (
    0, -1, 1.5, None, True, "", "x", [], {}, [[]], [None], {"a": None}, 10**400, 2**63, math.nan, math.inf, -math.inf
)  # fmt: skip
FIELDS = (
    *(one.name for one in fields(Profile)), *(f"measures.{one.name}" for one in fields(Measure)), "peaks.float32",
    "more",
)  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_checked_though_the_digest_is_right(field):
    """What a plan could stumble over: `tokens` of 0, no times, other types."""
    good = {"version": VERSION, **asdict(measured(sdpa=1e-3, cpu_fused=2e-3))}
    profile_path("cpu").parent.mkdir(parents=True, exist_ok=True)
    harmless = 0
    for wrong in (*WRONG, ...):
        held = json.loads(json.dumps(good))
        *above, name = field.split(".")
        place = held if not above else held["peaks"] if above == ["peaks"] else held["measures"][1]
        if wrong is ...:
            place.pop(name, None)
        else:
            place[name] = wrong
        profile_path("cpu").write_text(json.dumps({**held, "digest": _digest(held)}))
        forget_profiles()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            chosen = ls.explain(problem()).chosen
            chosen_with_gradients = ls.explain(problem(requires_grad=True, q_len=7)).chosen
        if current_profile("cpu") is None:
            assert [str(profile_path("cpu")) in str(one.message) for one in heard] == [True]
            assert chosen == chosen_with_gradients == "cpu_fused"
        else:
            harmless += 1
            profile_path("cpu").unlink()
            assert current_profile("cpu").save()
            forget_profiles()
            assert current_profile("cpu") is not None
    assert harmless < len(WRONG) and (harmless == 0 or field != "measures.tokens")


def test_no_damage_passes_and_none_makes_a_plan_raise():
    """One bit, one byte, a piece cut out, doubled, or replaced: some here, `FUZZ_CASES` of them by hand."""
    path, draw = measured(sdpa=1e-3, cpu_fused=2e-3).save(), random.Random(0)
    whole = path.read_bytes()
    assert current_profile("cpu") is not None
    for _ in range(int(os.environ.get("FUZZ_CASES", 300))):
        data, at = bytearray(whole), draw.randrange(len(whole))
        end = min(len(whole), at + draw.randrange(1, 40))
        match draw.randrange(5):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at] = (data[at] + draw.randrange(1, 256)) % 256
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end]
            case _:
                data[at:end] = draw.choice((b"null", b"NaN", b"1e999", b"[]", b"{", b'"\\ud800"', b"\xff\xfe", b"\n"))
        path.write_bytes(data)
        forget_profiles()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = current_profile("cpu")
        try:  # spaces between the values may differ
            same = json.loads(data) == json.loads(whole)
        except (ValueError, RecursionError):
            same = False
        assert found is None or same, bytes(data)


def test_without_a_home_plans_are_made(monkeypatch):
    def nowhere(name):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("longspan.registry.profile.cache_folder", nowhere)
    assert ls.explain(problem()).chosen == "cpu_fused" and survey() == ()
    with pytest.raises(ls.LongspanError, match="LONGSPAN_CACHE"):
        measured(sdpa=1.0).save()


def test_a_profile_is_written_in_one_step(monkeypatch):
    before = measured(sdpa=1e-3).save().read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ls.LongspanError, match="No space left"):
            measured(sdpa=1.0).save()
    assert profile_path("cpu").read_bytes() == before
    assert [path.name for path in profile_path("cpu").parent.iterdir()] == ["cpu.json"]


def test_it_reads_back_what_was_measured(monkeypatch):
    monkeypatch.setattr("longspan.tools.bench.peaks.SIDE", 64)
    monkeypatch.setattr("longspan.tools.bench.profiling.ENOUGH", 0.01)
    made = make_profile(torch.device("cpu"), quick=True)
    made.save()
    assert current_profile("cpu") == made
    assert {m.backend for m in made.measures if m.dtype == "float16"} >= {"sdpa", "cpu_fused"}
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
    assert arena.reserve("cpu").threshold == 5 * 2**20
    assert arena.reserve("cuda").threshold == arena.threshold
    with arena.serving_from(7):
        ls.plan(made.problem, "sdpa")  # which looks at the profile again
        assert arena.reserve("cpu").threshold == 7
    assert arena.threshold_on("cpu") == 5 * 2**20
    profile_path("cpu").unlink()
    forget_profiles()
    ls.plan(made.problem, "sdpa")
    assert arena.threshold_on("cpu") == arena.threshold


def test_where_it_pays_is_part_of_the_profile():
    found = threshold(1)
    assert found["pays_from_mib"] in (None, 1, 2, 4, 8, 16, 32, 64, 128)
    assert set(found["arena_over_torch"]) == {f"{mib} MiB" for mib in (1, 2, 4, 8, 16, 32, 64, 128)}
