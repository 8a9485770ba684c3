"""`longspan doctor`: what works here, what does not, and the line that would mend it; itself it always works."""

from __future__ import annotations

import ctypes
import json
import os
import textwrap
import time
from pathlib import Path

import pytest
import torch

import longspan as ls
from longspan import Capabilities, Device, Reason
from longspan.registry import quarantine
from longspan.spec.backend import BackendInfo
from longspan.spec.installing import pip
from longspan.spec.resolution import Candidate
from longspan.tools.doctor import gpus, machine, settings, unusable
from longspan.tools.doctor.settings import in_environment, readable
from starts import GOOD, Starts

PIP = pip()
BUILTIN = {
    "block_sparse_batched", "cpu_fused", "flash", "flex", "pascal_fp32", "reference", "sdpa", "torch_sparse",
    "xformers",
}  # fmt: skip
CPU_ONLY = pytest.mark.skipif(torch.cuda.device_count() > 0, reason="what is of no use on a machine without a GPU")


def by_name(rows):
    return {row["name"]: row for row in rows}


def lines(report, broken=True):
    """The lines that mend, by what they mend; of what is broken, or merely offered."""
    return {one["what"]: one["lines"] for one in report["to_fix"] if one["broken"] is broken}


def the_one(found):
    (one,) = found
    return one


# --- where all is well ----------------------------------------------------------------------------------------------


def test_a_healthy_installation(starts):
    done = starts.cli("doctor", "--json")
    report = done.json
    assert (done.code, report["ok"], lines(report)) == (0, True, {})
    rows = by_name(report["ledger"])
    assert set(rows) >= BUILTIN
    for row in rows.values():
        assert (row["state"], row["error"]) == ("loaded", "")
        assert row["import_ms"] > 0
        assert (row["distribution"], row["version"]) == ("longspan", ls.__version__)
    here = report["machine"]
    assert here["torch"] == torch.__version__
    assert here["cuda_initialized"] is False
    cpu = here["devices"][0]
    assert (cpu["device"], cpu["usable"]) == ("cpu", True)
    assert cpu["name"]
    assert torch.backends.cpu.get_cpu_capability() in cpu["capability"]
    assert report["policy"]["backend"] is None
    assert [one["name"] for one in report["environment"]] == ["LONGSPAN_CACHE"]
    assert report["quarantine"] == {"directory": f"{starts.cache}/quarantine", "writable": True, "crashes": []}


@CPU_ONLY
def test_what_is_of_no_use_here_is_no_fault(starts):
    report = starts.cli("doctor", "--json").json
    useless = {one["backend"]: one for one in report["unusable"]}
    assert set(useless) == {"flash", "pascal_fp32", "xformers"}
    reason = useless["flash"]["reasons"][0]
    assert (reason["device"], reason["here"], reason["code"]) == ("cpu", True, "device")
    for name, what in (("flash", "flash-attn --no-build-isolation"), ("xformers", "'xformers>=0.0.30'")):
        package = [reason for reason in useless[name]["reasons"] if reason["code"] == "package"]
        assert [(one["here"], one["fix"]) for one in package] == [(False, f"{PIP} install {what}")]
        assert useless[name]["fixes"] == [], "to install it mends nothing on a CPU"
    assert report["ok"] is True


def test_the_table_says_it_all(starts):
    done = starts.cli("doctor", COLUMNS="300")
    assert done.code == 0
    assert done.stderr == ""
    versions = (f"torch {torch.__version__}", f"longspan {ls.__version__}", "pluggy")
    for word in (*versions, "sdpa", "policy: auto", "to fix"):
        assert word in done.stdout
    assert "Traceback" not in done.stdout


# --- broken plugins -------------------------------------------------------------------------------------------------


@pytest.fixture
def crowd(starts):
    starts.install("lib", "raise OSError('libfoo.so: cannot open')")
    starts.install("exits", "sys.exit(3)")
    starts.install("twice", dist="acme-one")
    starts.install("twice", dist="acme-two")
    starts.install("typo", "@hookimpl\ndef longspan_kernal(problem): ...")
    starts.install("future", source=GOOD.replace("causal=True)", "causal=True, api=99)"))
    starts.install("crash", "if 'MENDED' not in os.environ: os.abort()")
    starts()
    starts.install("fine", "print('a banner')")
    return starts


def test_each_fault_is_listed_with_the_line_that_mends_it(crowd):
    done = crowd.cli("doctor", "--json")
    report = done.json
    assert (done.code, report["ok"]) == (1, False)
    assert "a banner" in done.stderr
    rows = {(row["name"], row["distribution"]): row for row in report["ledger"]}
    states = {name: row["state"] for (name, _), row in rows.items() if name not in BUILTIN}
    assert states == {
        "lib": "broken", "exits": "broken", "twice": "duplicate", "typo": "broken", "future": "incompatible",
        "crash": "broken", "fine": "loaded",
    }  # fmt: skip
    mends = {what.split()[0]: found for what, found in lines(report).items()}
    assert mends == {
        "lib": [f"{PIP} install --upgrade acme-lib", "export LONGSPAN_BLOCK=lib"],
        "exits": [f"{PIP} install --upgrade acme-exits", "export LONGSPAN_BLOCK=exits"],
        "typo": [f"{PIP} install --upgrade acme-typo", "export LONGSPAN_BLOCK=typo"],
        "future": [f"{PIP} install --upgrade acme-future", "export LONGSPAN_BLOCK=future"],
        "twice": [f"{PIP} uninstall acme-one", f"{PIP} uninstall acme-two"],
        "crash": ["longspan doctor --release crash"],
    }
    assert [crash["name"] for crash in report["quarantine"]["crashes"]] == ["crash"]
    text = crowd.cli("doctor", COLUMNS="300")
    assert text.code == 1
    assert "libfoo.so: cannot open" in text.stdout
    for found in mends.values():
        for line in found:
            assert any(shown.strip().removeprefix("or ") == line for shown in text.stdout.splitlines()), line
    for done in (text, crowd.cli("doctor", LONGSPAN_STRICT="1")):
        assert "Traceback" not in done.stdout + done.stderr
        assert "error:" not in done.stderr
        assert "warning:" not in done.stderr, "it stands in the report"


def test_the_lines_do_mend(crowd):
    """The release, and the settings one after the other, as a user would type them."""
    assert crowd.cli("doctor", "--release", "crash").code == 0
    variables = {"MENDED": "1", "LONGSPAN_PLUGINS": "builtin,acme-one,lib,exits,typo,future,crash,fine"}
    for left in (4, 3, 2, 1):
        report = crowd.cli("doctor", "--json", **variables).json
        found = list(lines(report).values())
        assert len(found) == left
        assert report["ok"] is False
        name, _, value = found[0][-1].removeprefix("export ").partition("=")
        variables[name] = value
    report = crowd.cli("doctor", "--json", **variables).json
    assert report["ok"] is True
    rows = {row["distribution"]: row["state"] for row in report["ledger"]}
    assert rows["acme-crash"] == rows["acme-fine"] == rows["acme-one"] == "loaded"


# --- isolate --------------------------------------------------------------------------------------------------------


DYING = ("recovered", "crash", "leaves", "exits", "hangs")


@pytest.fixture(scope="module")
def apart(server, tmp_path_factory):
    """A report with `--isolate` over every way to die; what the reporting process had imported; how the run went."""
    here = Starts(server, tmp_path_factory.mktemp("apart"))
    here.install("recovered", "if 'MENDED' not in os.environ: os.abort()")
    here()
    here.install("crash", "os.abort()")
    here.install("leaves", "os._exit(3)")
    here.install("exits", "sys.exit(3)")
    body = """
        import subprocess, time
        open(os.environ["ACME_LOG"] + ".pid", "w").write(str(subprocess.Popen(["sleep", "600"]).pid))
        time.sleep(600)
    """
    here.install("hangs", body)
    body = """
        import threading, time
        import torch
        os.system("echo a native banner")
        threading.Thread(target=time.sleep, args=(600,)).start()
        torch.cuda.is_initialized = lambda: True
    """
    here.install("eager", body)
    here.install("kept-out", "os.abort()")
    code = """
        import sys
        try:
            main(["doctor", "--isolate", "--json", "--timeout", "6"])
        finally:
            sys.stderr.write("imported: " + " ".join(name for name in sys.modules if name.startswith("acme")) + "\\n")
    """
    started = time.monotonic()
    packages = ",".join(f"acme-{name}" for name in (*DYING, "eager", "kept-out"))
    done = here(textwrap.dedent(code), MENDED="1", LONGSPAN_PLUGINS=packages, LONGSPAN_BLOCK="kept-out")
    return here, done, time.monotonic() - started


def test_a_crash_is_reported_and_not_suffered(apart):
    _, done, _ = apart
    assert done.code == 1
    rows = by_name(done.json["ledger"])
    states = {name: row["state"] for name, row in rows.items() if name not in BUILTIN}
    assert states == {
        **dict.fromkeys(DYING, "broken"), "eager": "loaded", "kept-out": "blocked"
    }  # fmt: skip
    assert "SIGABRT" in rows["crash"]["error"]
    assert "acme_crash.py:" in rows["crash"]["error"], "the line that crashed"
    assert "exit code 3" in rows["leaves"]["error"]
    assert rows["exits"]["error"] == "SystemExit: 3"
    assert "after 6 s" in rows["hangs"]["error"]
    assert rows["eager"]["import_ms"] > 0


def test_the_lines_that_mend_it_apart(apart):
    report = apart[1].json
    mends = {what.split()[0]: found for what, found in lines(report).items()}
    block = "export LONGSPAN_BLOCK=kept-out,{}".format
    for name in ("crash", "leaves", "exits", "hangs"):
        assert mends[name] == [f"{PIP} install --upgrade acme-{name}", block(name)]
    assert mends["recovered"] == ["longspan doctor --release recovered"]
    offered = {what.split()[0]: found for what, found in lines(report, broken=False).items()}
    assert offered["eager"] == [block("eager")]


def test_nothing_is_imported_in_the_process_that_reports(apart):
    _, done, _ = apart
    assert done.stderr.splitlines()[-1] == "imported: "
    assert done.json["isolated"] is True


def test_what_is_kept_out_is_not_imported_apart_either(apart):
    here, _, _ = apart
    assert sorted(here.imported) == sorted(f"acme_{name}" for name in ("recovered", *DYING, "eager"))


def test_what_died_apart_is_not_in_quarantine_for_that(apart):
    here, done, _ = apart
    assert [crash["name"] for crash in done.json["quarantine"]["crashes"]] == ["recovered"]
    assert len(here.files) == 1


def test_what_recovered_says_so(apart):
    row = by_name(apart[1].json["ledger"])["recovered"]
    assert "just now it was imported apart, and did not crash" in row["error"]


def test_neither_a_hang_nor_what_it_started_holds_it_up(apart):
    """Not a time that is asserted, but that nobody waited for a sleep of ten minutes."""
    here, _, seconds = apart
    assert seconds < 300
    assert quarantine._started(int(Path(f"{here.log}.pid").read_text())) is None


@pytest.mark.parametrize(
    "words",
    ["--timeout 5", "--isolate --timeout 0", "--isolate --timeout -1", "--isolate --release x"],
)
def test_options_that_do_not_fit_are_refused(starts, words):
    done = starts.cli("doctor", *words.split())
    assert (done.code, done.stdout) == (2, "")
    assert "Next:" in done.stderr


# --- the environment ------------------------------------------------------------------------------------------------


def test_variables_that_cannot_be_read_are_shown(starts):
    starts.install("fine")
    unread = {
        "LONGSPAN_BACKEND": "a,b", "LONGSPAN_PREFER": "a|b", "LONGSPAN_STRICT": "perhaps",
        "LONGSPAN_BLOCK": "fine crash",
    }  # fmt: skip
    done = starts.cli("doctor", "--json", **unread)
    report = done.json
    assert (done.code, report["ok"]) == (1, False)
    found = by_name(report["environment"])
    for name, value in unread.items():
        assert found[name]["value"] == value
        assert name in found[name]["error"]
        assert [f"unset {name}"] in lines(report).values()
    assert "error" in report["policy"]
    assert by_name(report["ledger"])["fine"]["state"] == "blocked"
    assert starts.imported == [], "it may be what the variable was to keep out"
    assert by_name(report["ledger"])["sdpa"]["state"] == "loaded"
    text = starts.cli("doctor", COLUMNS="300", **unread)
    assert text.code == 1
    assert "Traceback" not in text.stdout + text.stderr
    assert "unset LONGSPAN_STRICT" in text.stdout


@pytest.mark.parametrize(
    ("variables", "broken", "line"),
    [
        ({"LONGSPAN_BACKEND": "spda"}, True, "export LONGSPAN_BACKEND=sdpa"),
        ({"LONGSPAN_PREFER": "reference,spda"}, True, "export LONGSPAN_PREFER=reference,sdpa"),
        ({"LONGSPAN_BLOCK": "nobody-at-all"}, True, "unset LONGSPAN_BLOCK"),
        ({"LONGSPAN_PLUGINS": "builtin,acme_fnie"}, False, "export LONGSPAN_PLUGINS=builtin,acme-fine"),
        ({"LONGSPAN_BAKEND": "sdpa"}, False, "unset LONGSPAN_BAKEND"),
        ({"LONGSPAN_BACKEND": "fine", "LONGSPAN_BLOCK": "fine"}, True, "unset LONGSPAN_BACKEND"),
    ],
)
def test_names_that_nobody_has(starts, variables, broken, line):
    starts.install("fine")
    done = starts.cli("doctor", "--json", **variables)
    assert done.code == int(broken)
    assert the_one(lines(done.json, broken).values()) == [line]


def test_names_that_somebody_has_are_no_fault(starts):
    starts.install("fine")
    for plugins in ("builtin,fine", "builtin,acme_fine", "builtin,Acme.Fine"):
        variables = {
            "LONGSPAN_PLUGINS": plugins, "LONGSPAN_BACKEND": "fine", "LONGSPAN_PREFER": "sdpa", "LONGSPAN_BLOCK": "flex"
        }  # fmt: skip
        report = starts.cli("doctor", "--json", **variables).json
        assert report["ok"] is True
        assert report["to_fix"] == []
        assert (report["policy"]["backend"], report["policy"]["backend_from"]) == ("fine", "environment")
        assert report["policy"]["block"] == ["flex"]
        assert by_name(report["ledger"])["flex"]["state"] == "blocked"


@CPU_ONLY
def test_asking_for_what_is_of_no_use_here_is_a_fault(starts):
    done = starts.cli("doctor", "--json", LONGSPAN_BACKEND="flash")
    assert done.code == 1
    (what,) = lines(done.json)
    assert "flash serves no problem here" in what


def test_the_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("LONGSPAN_STRICT", "x")
    monkeypatch.setenv("LONGSPAN_PREFER", "sdpa")
    monkeypatch.delenv("LONGSPAN_PLUGINS", raising=False)
    before = settings()
    made = readable(before, {"LONGSPAN_PREFER": "sdpa", "LONGSPAN_STRICT": "x", "PATH": "/"})
    assert made == {"LONGSPAN_PREFER": "sdpa", "PATH": "/"}
    with pytest.raises(KeyError), in_environment({"LONGSPAN_PLUGINS": "builtin"}) as changed:
        assert changed
        assert [one.name for one in settings()] == ["LONGSPAN_PLUGINS"]
        raise KeyError
    assert settings() == before
    with in_environment(dict(os.environ)) as changed:
        assert not changed


# --- usability ------------------------------------------------------------------------------------------------------

CPU, HOPPER, PASCAL = Device("cpu"), Device.parse("sm_90"), Device.parse("sm_61")


def candidate(unsupported=lambda problem: (), **claims):
    fields = {"devices": ("cpu",), "dtypes": ("float32",), "patterns": ("dense",), **claims}
    return Candidate(BackendInfo("mine", "loaded", capabilities=Capabilities(**fields)), unsupported)


def missing(problem):
    return (Reason("package", "acme", "not installed", "the package acme", "pip install acme"),)


@pytest.mark.parametrize(
    "one",
    [
        candidate(),
        candidate(patterns=("window",)),
        candidate(patterns=("dilated",)),
        candidate(patterns=("block_sparse",)),
        candidate(head_dim_min=200, head_dim_max=256, head_dim_multiple=8),
        candidate(head_dim_max=16, head_dim_multiple=16),
        candidate(dtypes=("float16", "float64")),
        candidate(lambda one: () if one.dtype == "float64" else missing(one), dtypes=("float16", "float64")),
        candidate(lambda one: () if one.is_causal else missing(one), causal=True),
        Candidate(BackendInfo("mine", "broken")),
    ],
)
def test_what_serves_some_problem_is_of_use(one):
    assert unusable(one, [HOPPER, CPU]) is None


def test_a_missing_package_on_a_device_that_is_here_gets_its_line():
    found = unusable(candidate(missing, devices=("cuda>=8.0",)), [CPU, HOPPER])
    assert found.fixes == ("pip install acme",)
    assert [(device, reason.code) for device, reason in found.reasons] == [("cpu", "device"), ("sm_90", "package")]
    assert found.elsewhere == ()
    assert type(found).from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_device_that_is_too_old_has_no_line():
    found = unusable(candidate(missing, devices=("cuda>=8.0",)), [CPU, PASCAL])
    assert found.fixes == ()
    assert [(device, reason.code) for device, reason in found.elsewhere] == [("sm_80", "package")]
    assert type(found).from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_no_device_is_made_up_where_none_can_be():
    """Of which a capability says only what it is not."""
    found = unusable(candidate(missing, devices=("cuda<7.0",)), [CPU])
    assert [reason.code for _, reason in found.reasons] == ["device"]
    assert found.elsewhere == ()


def test_what_claims_nothing_is_of_no_use():
    found = unusable(candidate(devices=(), dtypes=()), [CPU])
    assert [reason.field for _, reason in found.reasons] == ["devices", "dtypes"]


# --- devices --------------------------------------------------------------------------------------------------------


class Nvml:
    """NVIDIA's management library, as far as it is asked."""

    def __init__(self, *found, broken=()):
        self.found, self.broken, self.open = found, broken, 0

    def __call__(self, library):
        return self

    def nvmlInit_v2(self):
        self.open += 1
        return 0

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = len(self.found)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, number, handle):
        handle._obj.value = number.value + 1
        return 15 if number.value in self.broken else 0

    def nvmlDeviceGetCudaComputeCapability(self, handle, major, minor):
        major._obj.value, minor._obj.value = self.found[handle.value - 1][1]
        return 0

    def nvmlDeviceGetName(self, handle, text, length):
        text.value = self.found[handle.value - 1][0].encode()

    def nvmlDeviceGetUUID(self, handle, text, length):
        text.value = f"GPU-{handle.value}".encode()


@pytest.fixture
def two_gpus(monkeypatch):
    nvml = Nvml(("NVIDIA GeForce GTX 1080", (6, 1)), ("NVIDIA H100", (9, 0)), ("fell off the bus", (8, 0)), broken=(2,))
    monkeypatch.setattr(ctypes, "CDLL", nvml)
    return nvml


def test_gpus_are_listed_by_their_driver(two_gpus):
    assert [(gpu.device.name, gpu.name, gpu.uuid) for gpu in gpus.nvidia()] == [
        ("sm_61", "NVIDIA GeForce GTX 1080", "GPU-1"),
        ("sm_90", "NVIDIA H100", "GPU-2"),
    ]
    assert two_gpus.open == 0


def test_without_a_driver_there_are_none():
    assert gpus.nvidia("libno-such-library.so.1") == ()
    assert gpus.nvidia("libc.so.6") == (), "not the library that was expected"
    assert gpus.amd(Path("/nowhere")) == ()


def test_amds_are_listed_by_the_kernel(tmp_path):
    for number, version in enumerate((0, 90402, 90010, 110000)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "properties").write_text(f"simd_count 4\ngfx_target_version {version}\nx 1\n")
    assert [gpu.device.name for gpu in gpus.amd(tmp_path)] == ["gfx942", "gfx90a", "gfx1100"]


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (None, (False, False)), ("0", (False, True)), ("1", (True, False)), ("1,0", (False, False)), ("", (True, True)),
        ("-1", (True, True)), ("0,-1,1", (False, True)), ("GPU-2", (True, False)), ("MIG-abc", (False, False)),
    ],
)  # fmt: skip
def test_what_a_variable_hides(two_gpus, text, hidden):
    environ = {} if text is None else {"CUDA_VISIBLE_DEVICES": text}
    assert tuple(gpus.is_hidden(gpu, "CUDA_VISIBLE_DEVICES", environ) for gpu in gpus.nvidia()) == hidden


@pytest.mark.parametrize(
    ("device", "built_for", "runs"),
    [
        ("sm_61", ["sm_75", "sm_80", "sm_90"], False), ("sm_61", ["sm_50", "sm_60"], True), ("sm_61", [], True),
        ("sm_86", ["sm_80"], True), ("sm_80", ["sm_86"], False), ("sm_90", ["sm_90a"], True),
        ("sm_120", ["sm_90", "compute_90"], True), ("sm_89", ["compute_90"], False), ("sm_90", ["odd"], False),
        ("sm_100", ["sm_90a"], False), ("sm_100", ["compute_90a"], False),
    ],
)  # fmt: skip
def test_what_a_build_of_torch_runs_on(device, built_for, runs):
    assert gpus.runs_on(Device.parse(device), built_for) is runs


def test_a_gpu_that_torch_cannot_use_is_listed_with_the_line(two_gpus, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    here = machine()
    assert here.torch_build == "CPU only"
    for local in here.devices[1:3]:
        assert "without CUDA" in local.why
        assert local.fix == "pip install --force-reinstall torch"
    assert here.usable == (Device("cpu"),)

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    here = machine()
    assert here.torch_build == "CUDA 12.8"
    old, new = here.devices[1:3]
    assert "built for sm_75, sm_80, sm_90 only" in old.why
    assert old.fix.startswith("pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/")
    assert (new.why, new.fix) == ("", "")
    assert here.usable == (Device("cpu"), HOPPER)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert machine().devices[2].fix == "unset CUDA_VISIBLE_DEVICES"
    assert torch.cuda.is_initialized() is False


# --- CUDA, threads, forks, spawned processes ------------------------------------------------------------------------


def test_sixteen_threads_at_once_then_a_fork(starts):
    starts.install("fine")
    starts.install("broken", "raise OSError('gone')")
    code = """
        import json, os, signal, threading
        from concurrent.futures import ThreadPoolExecutor
        from longspan.tools.doctor import examine
        go = threading.Barrier(16)
        x = torch.ones(1, 1, 3, 4)
        def work(number):
            go.wait(60)
            if number % 2:
                return ls.plan(ls.Problem.like(x, x, x), backend="fine").backend
            return [(row.name, row.state) for row in examine().ledger.rows]
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(work, range(16)))
        child = os.fork()
        if not child:
            signal.alarm(30)
            good = not examine().ok and torch.allclose(ls.attention(x, x, x, backend="fine"), x)
            os._exit(0 if good else 1)
        code = os.waitstatus_to_exitcode(os.wait()[1])
        print(json.dumps([found[1::2], len({str(one) for one in found[::2]}), code, torch.cuda.is_initialized()]))
    """
    done = starts(textwrap.dedent(code))
    assert done.json == [["fine"] * 8, 1, 0, False]
    assert starts.imported == ["acme_broken", "acme_fine"]
    assert starts.files == []


def test_a_spawned_process_after_it(starts):
    starts.install("fine")
    code = """
        import multiprocessing
        from longspan.tools.doctor import examine
        assert examine().ok
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            report = pool.apply_async(examine).get(120)
        print([row.state for row in report.ledger.rows if row.name == "fine"], report.ok, report.cuda_initialized)
    """
    assert starts(textwrap.dedent(code)).stdout == "['loaded'] True False\n"
