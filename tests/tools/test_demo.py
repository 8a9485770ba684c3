"""The demonstration: its text, its inputs, its judge and meters, and what it says of good and bad backends."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from attrs import evolve

import longspan as ls
from longspan import blockwise
from longspan.spec.device import local_device
from longspan.tools.demo import PATTERN, Timing, baseline, judge, options, run
from longspan.tools.demo.inputs import embed, read_text
from longspan.tools.demo.judge import Judge, sample_rows
from longspan.tools.demo.prefix import START, affordable_prefix, growth, prefixes
from longspan.tools.meter import PeakMemory, measure, timed

CPU = torch.device("cpu")


class Backend:
    """A backend for tests: exact, until `spoil` is given what its kernel computed."""

    def __init__(self, spoil=lambda out, lse: (out, lse), **capabilities):
        self.spoil = spoil
        self.capabilities = {
            "devices": ("cpu",),
            "dtypes": ls.spec.backend.DTYPES,
            "patterns": ("dense",),
            "causal": True,
            **capabilities,
        }

    @ls.hookimpl
    def longspan_capabilities(self):
        return ls.Capabilities(**self.capabilities)

    @ls.hookimpl
    def longspan_kernel(self, problem):
        def forward(q, k, v):
            return self.spoil(*blockwise.forward(q, k, v, is_causal=problem.is_causal, scale=problem.scale))

        return forward


@contextmanager
def registered(name: str, backend: object) -> Iterator[None]:
    ls.register(backend, name=name)
    try:
        yield
    finally:
        ls.unregister(name)


@pytest.fixture(autouse=True)
def no_policy(monkeypatch):
    for variable in ("LONGSPAN_BACKEND", "LONGSPAN_PREFER", "LONGSPAN_BLOCK"):
        monkeypatch.delenv(variable, raising=False)
    others = [row.name for row in ls.backends() if row.name not in ("sdpa", "reference")]
    with ls.use(block=others):  # whatever else is installed is tested elsewhere
        yield


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(b"%d bottles of beer on the wall, " % count for count in range(99, 0, -1)))
    return path


def rows_of(report):
    return {row.name: row for row in report.rows}


# ---------------------------------------------------------------------------------------------------------- text


def test_the_tokens_are_the_bytes_of_the_file(text):
    found = read_text(text, 100)
    assert bytes(found.tokens.tolist()) == text.read_bytes()[:100]
    assert len(found) == 100 and found.source == str(text)


def test_a_short_text_is_used_whole_and_any_byte_is_a_token(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)))
    assert read_text(path, 1000).tokens.tolist() == list(range(256))


def test_the_default_text_is_the_standard_library_and_the_same_each_time():
    first, again = read_text(None, 300_000), read_text(None, 300_000)
    assert len(first) == 300_000 and torch.equal(first.tokens, again.tokens)
    assert "standard library" in first.source and "site-packages" not in first.source
    assert torch.equal(read_text(None, 1000).tokens, first.tokens[:1000])
    assert b"import" in bytes(first.tokens.tolist())


@pytest.mark.parametrize("count", [0, -1])
def test_no_tokens_are_refused(text, count):
    with pytest.raises(ls.ArgumentError, match=rf"--tokens: got {count}; want .* at least 1.*Next: "):
        read_text(text, count)


def test_files_that_cannot_serve_are_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "empty").touch()
    for path, words in (
        (tmp_path / "nowhere.txt", "does not exist"),
        (tmp_path, "a directory"),
        (tmp_path / "empty", "an empty file"),
        (tmp_path / ("x" * 5000), "too long"),
        (tmp_path / "null\0byte", "null byte"),
        (tmp_path / "empty" / "below", "Not a directory"),
    ):
        with pytest.raises(ls.ArgumentError, match=r"^TEXT: got ") as caught:
            read_text(path, 10)
        assert words in str(caught.value) and "Next: " in str(caught.value)

    def refuse(*_):
        raise PermissionError("no")

    monkeypatch.setattr(Path, "open", refuse)  # file modes do not stop root
    with pytest.raises(ls.ArgumentError, match=r"TEXT: got .*may not be read"):
        read_text(tmp_path / "empty", 10)


# --------------------------------------------------------------------------------------------------------- inputs


def test_inputs_follow_from_the_seed_and_have_the_contracts_shape():
    tokens = read_text(None, 500).tokens
    given = {"heads": 8, "head_dim": 64, "dtype": torch.float32, "device": CPU}
    first, again, other = (embed(tokens, seed=seed, **given) for seed in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        assert a.shape == (1, 8, 500, 64) and a.dtype == torch.float32
        assert torch.equal(a, b) and not torch.equal(a, c)
    assert len({x.data_ptr() for x in first}) == 3


def test_scores_are_neither_flat_nor_a_single_key():
    query, key, value = embed(
        read_text(None, 8000).tokens, heads=8, head_dim=64, seed=0, dtype=torch.float32, device=CPU
    )
    weights = (query[0, :, -1:] @ key[0].transpose(-1, -2) / 8).softmax(-1)
    effective = torch.exp(-(weights * weights.log()).sum(-1))  # the number of keys that an even softmax would need
    assert effective.min() > 20 and effective.max() < 0.8 * 8000
    assert 0.5 < value.std() < 2


def test_positions_tell_equal_bytes_apart():
    query, _, _ = embed(torch.zeros(9, dtype=torch.uint8), heads=1, head_dim=4, seed=0, dtype=torch.float32, device=CPU)
    assert len(torch.unique(query[0, 0], dim=0)) == 9


# ---------------------------------------------------------------------------------------------------------- judge


@pytest.mark.parametrize("length", [1, 2, 63, 64, 2048, 2049, 131_072])
def test_sampled_rows_hold_the_ends_and_the_borders(length):
    rows = sample_rows(length, PATTERN, seed=0).tolist()
    assert rows == sorted(set(rows)) and len(rows) == min(length, judge.ROWS)
    assert {0, length - 1} <= set(rows) <= set(range(length))
    assert {row for w in PATTERN.segment_lengths for row in (w - 1, w) if row < length} <= set(rows)
    assert sample_rows(length, PATTERN, seed=0).tolist() == rows


def small_judge(dtype=torch.float32, length=300, pattern=PATTERN):
    query, key, value = embed(read_text(None, length).tokens, heads=8, head_dim=64, seed=0, dtype=dtype, device=CPU)
    right = ls.attention(query, key, value, pattern, is_causal=True, backend="reference")
    return Judge(query, key, value, pattern, sample_rows(length, pattern, 0)), right


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_judge_passes_the_right_answer_in_every_dtype(dtype):
    jury, right = small_judge(dtype)
    assert jury.error(right) <= jury.tolerance <= max(50 * torch.finfo(dtype).eps, 1e-12)
    assert jury.naive_error <= jury.tolerance / 2


def test_the_judge_counts_keys_twice_that_two_branches_show():
    jury, right = small_judge(pattern=ls.Dilated((16, 64, 300), (1, 2, 3)))
    assert jury.error(right) <= jury.tolerance


def test_the_judge_refuses_what_is_wrong():
    jury, right = small_judge()
    wrong_row, wrong_head, nothing = right.clone(), right.clone(), right.clone()
    wrong_row[0, 3, 299, 5] += 1e-3
    wrong_head[0, 7] = 0
    nothing[0, 0, 0, 0] = math.nan
    for wrong in (wrong_row, wrong_head, right * 1.0001, right.roll(1, 2), right.roll(1, 1)):
        assert jury.error(wrong) > jury.tolerance
    assert jury.error(nothing) == math.inf


# --------------------------------------------------------------------------------------------------------- meters


def test_calls_are_repeated_only_while_they_are_cheap():
    calls = []
    ms, runs = measure(lambda: calls.append(1), CPU)
    assert len(calls) == runs == 3 and ms >= 0
    assert measure(lambda: calls.append(1), CPU, first=60_000.0) == (60_000.0, 1) and len(calls) == 3
    assert timed(lambda: "result", CPU)[0] == "result"


def test_peak_memory_sees_what_was_freed_again_and_nothing_before_it():
    held = torch.ones(32 * 2**18)  # 32 MiB before the block do not count
    with PeakMemory(CPU) as memory:
        torch.ones(64 * 2**18)
        torch.ones(16 * 2**18)
    if memory.mib is None:
        pytest.skip("this system does not say how much memory a process held")
    assert 60 < memory.mib < 90
    assert held[0] == 1


def test_memory_that_cannot_be_measured_is_not_stated(monkeypatch):
    monkeypatch.setattr("longspan.tools.meter._reset_high_water", lambda: None)
    with PeakMemory(CPU) as memory:
        torch.ones(10)
    assert memory.mib is None


def test_the_dense_prefix_grows_while_it_is_cheap(monkeypatch):
    q, k, v = torch.randn(3, 1, 1, 5000, 8)
    monkeypatch.setattr(baseline, "PATIENCE_MS", 1e9)
    whole = baseline.measure_dense(q, k, v)
    assert whole.is_measured and [one.tokens for one in whole.measured] == [512, 1024, 2048, 4096, 5000]
    assert whole.at(5000) == whole.ms == whole.measured[-1].ms and whole.at(1024) == whole.measured[1].ms
    monkeypatch.setattr(baseline, "PATIENCE_MS", 0.0)
    part = baseline.measure_dense(q, k, v)
    assert not part.is_measured and [one.tokens for one in part.measured] == [512, 1024, 2048]
    assert part.at(5000) == part.ms == baseline.extrapolate(part.measured, 5000) and part.at(4096) is None


def times(milliseconds):
    return [Timing(tokens=n, ms=milliseconds(n), runs=3) for n in (512, 1024, 2048)]


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        (lambda n: 3e-6 * n * n, 3e-6 * 2**34),
        (lambda n: 3e-6 * n * n + 0.01 * n, 3e-6 * 2**34 + 0.01 * 2**17),
        (lambda n: 1e-9 * n**3, 1e-9 * 2048**3 * 64**2),  # faster than the square: the square from the longest on
        (lambda n: 5.0 + 0.001 * n, (5.0 + 2.048) * 64**2),  # overheads alone: no growth is read from them
    ],
)
def test_dense_attention_is_extrapolated_by_its_square(law, expected):
    assert baseline.extrapolate(times(law), 2**17) == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------------------------- prefixes


def posed(length):
    return ls.Problem(batch=1, heads=8, q_len=length, head_dim=64, pattern=PATTERN, is_causal=True)


def test_prefixes_double_up_to_the_whole():
    assert list(prefixes(9000)) == [2048, 4096, 8192, 9000]
    assert list(prefixes(2048)) == [2048] and list(prefixes(7)) == [7]


def test_work_grows_with_the_patterns_pairs_and_not_with_the_square():
    assert growth(posed(131_072), 2048, 131_072) == pytest.approx(99, rel=0.01)
    assert growth(posed(131_072), 65_536, 131_072) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("ms_of_2048", "patience_ms", "expected", "probed"),
    [
        (1.0, 1e9, 131_072, 131_072),  # quick: runs ever longer prefixes, then the whole
        (100.0, 20_000.0, 131_072, 4096),  # slower: about 10 s for the whole, told from two short runs
        (100.0, 1_000.0, 8192, 4096),
        (9_000.0, 1_000.0, 2048, 2048),  # hopeless: the shortest prefix at least
        (9_000.0, math.inf, 131_072, 2048),  # named: the whole, however long it takes
    ],
)
def test_a_slow_backend_runs_on_the_prefix_that_it_manages(ms_of_2048, patience_ms, expected, probed):
    seen = []

    def run_ms(tokens):
        seen.append(tokens)
        return ms_of_2048 * growth(posed(tokens), 2048, tokens)

    assert affordable_prefix(posed(131_072), patience_ms, run_ms) == expected
    assert seen == [tokens for tokens in prefixes(131_072) if tokens <= probed]


# -------------------------------------------------------------------------------------------------------- options


def test_devices_and_dtypes():
    assert local_device("cpu") == CPU
    assert local_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert options.choose_dtype("bfloat16") is options.choose_dtype("torch.bfloat16") is torch.bfloat16
    for device in ("sm_61", "gfx942", "cuda:99", "cpu:1"):
        with pytest.raises(ls.ArgumentError, match=f"--device: got '{device}'; want auto, .* cpu.*longspan explain"):
            local_device(device, "--device")
    for device in ("gpu", "", "cuda:x"):
        with pytest.raises(ls.ArgumentError, match="device: got "):
            local_device(device, "--device")
    with pytest.raises(ls.ArgumentError, match="--dtype: got 'int8'; want float16 or bfloat16 or float32 or float64"):
        options.choose_dtype("int8")


def test_more_tokens_than_memory_holds_are_refused(monkeypatch):
    monkeypatch.setattr(options, "kernel_bytes", lambda *_: 2**30)
    with pytest.raises(
        ls.ArgumentError, match=r"--tokens: got 1,000,000 tokens, which need .* at most 69,\d{3} tokens"
    ):
        options.check_room(1_000_000, 512, torch.float32, CPU)
    options.check_room(69_000, 512, torch.float32, CPU)
    monkeypatch.setattr(options, "kernel_bytes", lambda *_: None)
    options.check_room(10**12, 512, torch.float32, CPU)


def test_an_endless_text_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(options, "kernel_bytes", lambda *_: 2**30)
    with pytest.raises(ls.ArgumentError, match=r"--tokens: got 99,999,999,999 tokens, which need .* at most 69,\d{3}"):
        run(Path("/dev/zero"), tokens=99_999_999_999, device="cpu")


# ------------------------------------------------------------------------------------------------------- the run


def test_every_backend_that_fits_is_right_at_4096_tokens():
    report = run(tokens=4096, device="cpu")
    assert report.failures == () and report.tokens == 4096 and report.rows_checked == 64
    ran = [row for row in report.rows if row.state != "refused"]
    assert {"sdpa", "reference"} <= {row.name for row in ran}
    for row in ran:
        assert row.state == "ran" and row.error <= report.tolerance < 1e-5 and row.tokens == 4096, row
        assert row.ms > 0 and row.runs >= 1 and row.dense_ms > 0
        assert row.tokens_per_s == pytest.approx(4096e3 / row.ms)
        assert row.speedup == pytest.approx(report.baseline.ms / row.ms)
        assert row.peak_mib is None or row.peak_mib > 4  # MiB, the result alone takes 8 MiB
    assert [row.name for row in report.rows if row.chosen] == [report.resolution.chosen]
    assert report.resolution.decided_by == "auto"


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(text, dtype):
    report = run(text, tokens=1000, dtype=dtype, device="cpu")
    assert report.failures == () and report.to_dict()["dtype"] == dtype


@pytest.mark.parametrize("tokens", [1, 2, 65])
def test_a_few_tokens_suffice(text, tokens):
    assert run(text, tokens=tokens, device="cpu").failures == ()


def test_a_short_text_is_noted(text):
    report = run(text, tokens=10_000, device="cpu", backend="sdpa")
    size = text.stat().st_size
    assert report.tokens == size and report.baseline.is_measured
    assert report.notes == (
        f"the text has {size:,} bytes, fewer than the 10,000 tokens asked for: all of them are used",
    )


def test_dense_attention_that_was_not_run_is_said_to_be_extrapolated(text, monkeypatch):
    monkeypatch.setattr(baseline, "PATIENCE_MS", 0.0)
    report = run(text, tokens=2500, device="cpu", backend="sdpa")
    (row,) = report.rows
    assert report.baseline.measured[-1].tokens == 2048 and not report.baseline.is_measured
    assert row.dense_extrapolated and row.speedup == pytest.approx(report.baseline.ms / row.ms)
    assert report.to_dict()["dense"]["extrapolated"] is True


def test_the_report_grows_row_by_row_and_survives_an_interruption(text):
    seen = []

    def stop(report):
        seen.append([row.name for row in report.rows])
        if len(report.rows) == 1:
            raise KeyboardInterrupt

    report = run(text, tokens=100, device="cpu", on_report=stop)
    assert seen == [[], [report.rows[0].name]] and report.interrupted and report.seconds > 0
    assert report.to_dict()["interrupted"] is True and report.to_dict()["ok"] is False


def test_a_backend_that_is_too_slow_runs_on_a_prefix_and_says_so(monkeypatch):
    monkeypatch.setattr(sys.modules["longspan.tools.demo.run"], "SECONDS", 0.0)
    monkeypatch.setattr(sys.modules["longspan.tools.demo.prefix"], "PROBE_MS", 0.0)
    report = run(tokens=3000, device="cpu")
    row = rows_of(report)["reference"]
    assert (row.state, row.tokens, row.dense_extrapolated) == ("ran", START, False)
    assert row.tokens_per_s == pytest.approx(1e3 * START / row.ms) and row.error <= report.tolerance
    assert rows_of(report)["sdpa"].tokens == 3000  # the one that is chosen has all the time it needs
    (named,) = run(tokens=3000, device="cpu", backend="reference").rows
    assert named.tokens == 3000


def test_a_backend_that_refuses_the_dense_parts_is_refused(text):
    class Picky(Backend):
        @ls.hookimpl
        def longspan_unsupported(self, problem):
            if problem.pattern.kind == "dense":
                return (ls.Reason("moon", "moon", "full", "a new moon", "wait"),)
            return ()

    with registered("picky", Picky()):
        row = rows_of(run(text, tokens=300, device="cpu"))["picky"]
    assert row.state == "refused" and [reason.code for reason in row.reasons] == ["moon"]


def test_steps_are_announced_in_order(text):
    seen = []
    run(text, tokens=100, device="cpu", on_step=lambda what, done, total: seen.append((what, done, total)))
    assert [done for _, done, _ in seen] == list(range(len(seen))) and {total for *_, total in seen} == {len(seen)}
    assert {"sdpa", "reference"} <= {what for what, *_ in seen}


def test_the_report_is_json_and_holds_the_resolution(text):
    data = json.loads(json.dumps(run(text, tokens=300, device="cpu").to_dict(), allow_nan=False))
    assert data["ok"] is True and data["resolution"]["chosen"] and data["pattern"] == PATTERN.spec
    assert {row["name"] for row in data["backends"]} >= {"sdpa", "reference"}


SPOILS = {
    "scaled": lambda out, lse: (out * 1.001, lse),
    "lse_shifted": lambda out, lse: (out, lse + 0.1 * torch.arange(lse.shape[-1]).sin()),
    "lse_base_2": lambda out, lse: (out, lse / math.log(2)),
    "one_head_lost": lambda out, lse: (out.index_fill(1, torch.tensor(0), 0.0), lse),
    "nan": lambda out, lse: (out * math.nan, lse),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_wrong_backend_fails(text, spoil):
    with registered("spoiled", Backend(spoil)):
        report = run(text, tokens=300, device="cpu", backend="spoiled")
    (row,) = report.rows
    assert row.state == "failed" and row.failure.startswith("error ") and "exceeds the tolerance" in row.failure
    assert report.failures == (f"spoiled: {row.failure}",)
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_wrong_backend_does_not_spoil_the_others(text):
    with registered("spoiled", Backend(SPOILS["scaled"])):
        rows = rows_of(run(text, tokens=300, device="cpu"))
    assert {name: rows[name].state for name in ("spoiled", "sdpa", "reference")} == {
        "spoiled": "failed",
        "sdpa": "ran",
        "reference": "ran",
    }


def test_a_kernel_that_peeks_ahead_fails(text):
    class Peeking(Backend):
        @ls.hookimpl
        def longspan_kernel(self, problem):
            return lambda q, k, v: blockwise.forward(q, k, v, is_causal=False, scale=problem.scale)

    with registered("peeking", Peeking()):
        assert run(text, tokens=300, device="cpu", backend="peeking").rows[0].state == "failed"


def test_an_honest_backend_of_this_process_runs_by_name_only(text):
    with registered("mine", Backend()):
        report = run(text, tokens=300, device="cpu")
    row = rows_of(report)["mine"]
    assert row.state == "ran" and not row.chosen and row.error <= report.tolerance
    assert [reason.code for reason in row.reasons] == ["opt_in"]


def test_a_backend_that_raises_is_a_failed_row(text):
    def burst(out, lse):
        raise RuntimeError("out of luck")

    with registered("bursting", Backend(burst)):
        report = run(text, tokens=300, device="cpu")
    assert rows_of(report)["bursting"].failure == "RuntimeError: out of luck"
    assert rows_of(report)["sdpa"].state == "ran"


def test_an_approximation_is_shown_and_not_judged(text):
    with registered("rough", Backend(SPOILS["scaled"], exact=False)):
        report = run(text, tokens=300, device="cpu")
    row = rows_of(report)["rough"]
    assert row.state == "ran" and row.error > report.tolerance and report.failures == ()


def test_a_backend_that_does_not_fit_is_refused_with_its_reasons(text):
    with registered("elsewhere", Backend(devices=("mps",))):
        report = run(text, tokens=300, device="cpu")
        row = rows_of(report)["elsewhere"]
        assert row.state == "refused" and row.ms is row.error is None
        assert [(reason.field, reason.want) for reason in row.reasons] == [("device", "mps")]
        with pytest.raises(ls.BackendUnavailable, match=r"(?s)elsewhere.*device is cpu \(needs mps\).*these fit: "):
            run(text, tokens=300, device="cpu", backend="elsewhere")


def test_a_named_backend_runs_alone(text):
    report = run(text, tokens=300, device="cpu", backend="reference")
    assert [(row.name, row.chosen) for row in report.rows] == [("reference", True)]
    assert report.resolution.decided_by == "argument"
    with pytest.raises(ls.UnknownBackend, match=r"'refrence'.*Did you mean 'reference'"):
        run(text, tokens=300, backend="refrence")


def test_a_wish_that_cannot_be_met_is_a_failure(text, monkeypatch):
    with registered("elsewhere", Backend(devices=("mps",))):
        monkeypatch.setenv("LONGSPAN_BACKEND", "elsewhere")
        report = run(text, tokens=300, device="cpu")
    assert report.failures == ("no backend was chosen: elsewhere was named, and does not fit",)
    assert rows_of(report)["sdpa"].state == "ran"


def test_where_nothing_fits_every_reason_is_told(text, monkeypatch):
    monkeypatch.setenv("LONGSPAN_BLOCK", "sdpa,reference")
    with pytest.raises(ls.BackendUnavailable, match=r"(?s)sdpa: .*blocked"):
        run(text, tokens=300, device="cpu")


def test_a_failed_row_and_a_number_that_is_not_finite_are_json_null(text):
    report = run(text, tokens=100, device="cpu", backend="sdpa")
    (row,) = report.rows
    broken = evolve(report, rows=(evolve(row, state="failed", failure="it is nan", error=math.nan),))
    data = broken.to_dict()
    assert data["ok"] is False and data["backends"][0]["error"] is None and data["failures"] == ["sdpa: it is nan"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_runs_it_too():
    report = run(tokens=16_384, device="cuda")
    assert report.failures == ()
    assert all(row.peak_mib is not None for row in report.rows if row.state == "ran")
