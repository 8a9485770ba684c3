"""A plugin that takes the interpreter down is imported once, and then not again until it is released.

Distributions are folders on the path with real metadata; starts are real processes, forked from one interpreter that
has imported longspan and discovered nothing, which is what a start is, without the seconds that importing torch takes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import asdict, evolve

import longspan as ls
from longspan.registry import quarantine
from longspan.registry.quarantine import Watch
from starts import GOOD, LIST


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The folder with the quarantine's files of this process."""
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path))
    return tmp_path / "quarantine"


def the_one_in(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def leave_a_file(cache: Path, **changes: Any) -> Path:
    """A file as a process leaves it that dies while it imports `crash` of acme 1.0; fields may differ."""
    watch = Watch()
    with watch.importing("crash", "acme", "1.0"):
        (mine,) = cache.glob(f"{os.getpid()}-*.importing")
        left = json.loads(mine.read_text())
    watch.close()
    path = cache / f"{len(list(cache.iterdir()))}-left.importing"
    path.write_text(json.dumps({**left, **changes}))
    return path


def dead_process() -> int:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return child


# --- the story ------------------------------------------------------------------------------------------------------


def test_what_crashed_once_is_not_imported_again(starts):
    starts.install("crash", "os.abort()")
    starts.install("fine")
    assert starts().code == -signal.SIGABRT
    assert starts.imported == ["acme_crash"]
    for _ in range(2):  # not only once
        rows = starts().json
        state, error = rows["crash"]
        assert state == "broken"
        assert error.startswith("crashed the interpreter while it was imported")
        assert error.endswith("Next: longspan doctor --release crash")
        assert rows["fine"] == rows["sdpa"] == rows["reference"] == ["loaded", ""]
    assert starts.imported == ["acme_crash", "acme_fine", "acme_fine"]


def test_a_new_interpreter_knows_too(starts):
    starts.install("crash", "import ctypes; ctypes.string_at(0)")
    environment = {**os.environ, **starts.environment, "PYTHONPATH": str(starts.site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "import longspan; longspan.backends()"],
        env=environment, check=False, timeout=120, capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    )  # fmt: skip
    assert done.returncode == -signal.SIGSEGV
    assert starts().json["crash"][0] == "broken"
    assert starts.imported == ["acme_crash"]


def test_attention_goes_on_and_warns_and_strict_raises(starts):
    starts.install("crash", "os.abort()")
    starts()
    done = starts("x = torch.ones(1, 1, 3, 4)\nprint(ls.attention(x, x, x).sum().item())")
    assert (done.code, done.stdout) == (0, "12.0\n")
    assert "PluginWarning: backend 'crash' of acme-crash 1.0 is broken: crashed the interpreter" in done.stderr
    done = starts.cli("backends", LONGSPAN_STRICT="1")
    assert done.code == 2
    assert "crashed the interpreter" in done.stderr
    assert starts.imported == ["acme_crash"]


def test_a_crash_of_the_capabilities_counts_too(starts):
    starts.install("crash", source=GOOD.replace("    return Capabilities", "    os.abort()\n    return Capabilities"))
    assert starts().code == -signal.SIGABRT
    assert starts().json["crash"][0] == "broken"


def test_the_plugin_that_was_being_imported_is_the_one_that_crashed(starts):
    """And not the one before it, nor the one after it."""
    starts.install("a-fine")
    starts.install("m-crash", "os.abort()")
    starts.install("z-fine")
    starts()
    rows = starts().json
    assert [rows[name][0] for name in ("a-fine", "m-crash", "z-fine")] == ["loaded", "broken", "loaded"]
    assert "--release m-crash" in rows["m-crash"][1]


def test_two_that_crash_are_found_one_after_the_other(starts):
    starts.install("a-crash", "os.abort()")
    starts.install("b-crash", "os.abort()")
    assert [starts().code for _ in range(3)] == [-signal.SIGABRT, -signal.SIGABRT, 0]
    assert starts.imported == ["acme_a_crash", "acme_b_crash"]


# --- release, and what is tried again -------------------------------------------------------------------------------


def test_released_it_is_imported_again(starts):
    starts.install("crash", "if 'MENDED' not in os.environ: os.abort()")
    starts()
    assert starts().json["crash"][0] == "broken"
    done = starts.cli("doctor", "--release", "crash")
    assert done.code == 0
    assert "released crash of acme-crash 1.0" in done.stdout
    assert starts.imported == ["acme_crash"], "to release is not to import"
    assert starts.files == []
    assert starts(MENDED="1").json["crash"] == ["loaded", ""]
    assert starts().code == -signal.SIGABRT
    assert starts().json["crash"][0] == "broken"


def test_releasing_right_after_the_crash(starts):
    """Before any other start has looked."""
    starts.install("crash", "if 'MENDED' not in os.environ: os.abort()")
    starts()
    assert starts.cli("doctor", "--release", "crash", "--json").json == {"released": ["crash"]}
    assert starts(MENDED="1").json["crash"][0] == "loaded"


def test_releasing_what_is_not_there_names_what_is(starts):
    starts.install("crash", "os.abort()")
    done = starts.cli("doctor", "--release", "crash")
    assert (done.code, done.stdout) == (2, "")
    assert "there is none" in done.stderr
    starts()
    done = starts.cli("doctor", "--release", "crahs")
    assert (done.code, done.stdout) == (2, "")
    assert "'crahs'" in done.stderr
    assert "in quarantine: crash" in done.stderr
    assert starts().json["crash"][0] == "broken"


def test_another_version_is_tried_and_the_old_one_stays(starts):
    starts.install("crash", "os.abort()")
    starts()
    starts.install("crash", version="1.1")
    assert starts().json["crash"] == ["loaded", ""]
    starts.install("crash", version="1.0")
    assert starts().json["crash"][0] == "broken"


def test_another_distribution_of_the_same_name_is_another_plugin(starts):
    starts.install("crash", "os.abort()")
    starts()
    shutil.rmtree(starts.site)
    starts.site.mkdir()
    starts.install("crash", dist="zeta-crash")
    assert starts().json["crash"] == ["loaded", ""]


@pytest.mark.parametrize("changed", ["torch.__version__ = '9.9'", "import sys; sys.prefix = '/elsewhere'"])
def test_another_torch_or_python_is_another_matter(starts, changed):
    """An extension crashes for what it was built against, and one user's environments share one cache."""
    starts.install("crash", "os.abort()")
    starts()
    assert starts(changed + LIST).code == -signal.SIGABRT
    assert starts().json["crash"][0] == "broken"


# --- what is no crash -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("raise KeyboardInterrupt", 130),
        ("import signal; os.kill(os.getpid(), signal.SIGINT)", 130),
        ("raise OSError('gone')", 0),
        ("sys.exit(3)", 0),
        ("raise GeneratorExit", 1),
    ],
)
def test_what_python_can_catch_is_no_crash(starts, body, code):
    starts.install("odd", f"if 'MENDED' not in os.environ:\n    {body}")
    assert starts().code == code
    assert starts.files == []
    assert starts(MENDED="1").json["odd"] == ["loaded", ""]


def test_a_process_that_is_still_importing_has_not_crashed(starts, tmp_path):
    starts.install("slow", "import time\nif 'SLOW' in os.environ: time.sleep(60)")
    starts.install("z-fine")
    code = """
        import os, signal, time
        child = os.fork()
        if not child:
            os.environ["SLOW"] = "1"
            ls.backends()
            os._exit(1)
        while not os.path.exists(os.environ["ACME_LOG"]):
            time.sleep(0.01)
        files = os.listdir(os.environ["LONGSPAN_CACHE"] + "/quarantine")
        states = [row.state for row in ls.backends() if row.name in ("slow", "z-fine")]
        os.kill(child, signal.SIGKILL)
        os.wait()
        print(files, states)
    """
    done = starts(textwrap.dedent(code))
    assert done.code == 0, done.stderr
    assert done.stdout.endswith("['loaded', 'loaded']\n")
    assert ".importing" in done.stdout


def test_forty_processes_at_once(starts):
    starts.install("fine")
    starts.install("other")
    code = """
        import os
        for _ in range(40):
            if not os.fork():
                rows = {row.name: row.state for row in ls.backends()}
                os._exit(0 if rows["fine"] == rows["other"] == "loaded" else 1)
        print({os.wait()[1] for _ in range(40)})
    """
    assert starts(textwrap.dedent(code)).stdout == "{0}\n"
    assert starts.files == []


def test_what_cannot_be_read_hides_no_other_record(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path))
    folder = tmp_path / "quarantine"
    (folder / "a-folder.crashed").mkdir(parents=True)
    (folder / "deep.crashed").write_text("[" * 100_000)
    crash = quarantine.Crash("z", "acme-z", "1", quarantine._environment(), 1, "0", quarantine._machine(), 0.0)
    (folder / "z.crashed").write_text(json.dumps(asdict(crash)))
    assert quarantine.crashes() == (crash,)


@pytest.mark.parametrize("leaves", ["removed", "empty", "other"])
def test_a_process_that_ends_well_after_its_file_was_read(tmp_path, monkeypatch, leaves):
    """Its file named an import when it was read, and its process was gone when that was looked up."""
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path))
    watch = Watch()

    def end(crash):
        path = next((tmp_path / "quarantine").glob("*.importing"))
        if leaves == "removed":
            path.unlink()
        else:
            path.write_text("" if leaves == "empty" else json.dumps(asdict(evolve(crash, name="other"))))
        return True

    with watch.importing("fine", "acme-fine", "1"):
        monkeypatch.setattr(quarantine, "_is_dead", end)
        assert quarantine.crashes() == ()
    watch.close()


def test_all_at_once_find_the_one_that_crashed(starts):
    """They find the same file, and only one of them can make it a record."""
    starts.install("crash", "os.abort()")
    starts()
    code = """
        import os, warnings
        warnings.simplefilter("ignore")
        for _ in range(30):
            if not os.fork():
                rows = {row.name: row.state for row in ls.backends()}
                os._exit(0 if rows["crash"] == "broken" else 1)
        print({os.wait()[1] for _ in range(30)})
    """
    assert starts(textwrap.dedent(code)).stdout == "{0}\n"
    assert starts.imported == ["acme_crash"]
    assert len(starts.files) == 1


def test_an_interpreter_that_ends_while_a_thread_imports(starts):
    starts.install("slow", "import time\nif 'SLOW' in os.environ: time.sleep(60)")
    code = """
        import os, threading, time
        threading.Thread(target=ls.backends, daemon=True).start()
        while not os.path.exists(os.environ["ACME_LOG"]):
            time.sleep(0.01)
    """
    assert starts(textwrap.dedent(code), ends=True, SLOW="1").code == 0
    assert starts.files == []
    assert starts().json["slow"][0] == "loaded"


def test_a_plugin_that_forks_while_it_is_imported(starts):
    """Its child unwinds the same stack, while the parent goes on to crash."""
    starts.install("forks", "if not os.fork(): sys.exit()\nos.wait()\nos.abort()")
    assert starts("import warnings; warnings.simplefilter('ignore'); ls.backends()").code == -signal.SIGABRT
    assert starts().json["forks"][0] == "broken"


def test_our_own_backends_cost_no_file(starts):
    starts.install("fine")
    assert starts(LONGSPAN_PLUGINS="builtin").json["fine"][0] == "blocked"
    assert not starts.cache.exists()


@pytest.mark.parametrize("place", ["/dev/null/cache", "/proc/nowhere", "~nobody-of-this-name/cache"])
def test_where_nothing_can_be_written_all_else_works(starts, place):
    starts.install("fine")
    done = starts(LIST.replace('"ignore"', '"error"'), LONGSPAN_CACHE=place)
    assert done.json["fine"] == ["loaded", ""]
    assert done.stderr == ""
    assert starts.cli("doctor", "--json", LONGSPAN_CACHE=place).json["ok"] is True


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_file_says_what_is_being_imported_and_by_whom(cache):
    watch = Watch()
    for name in ("a-longer-name", "one"):
        with watch.importing(name, "acme", "1.0"):
            said = json.loads(the_one_in(cache).read_text())
            assert (said["name"], said["distribution"], said["version"]) == (name, "acme", "1.0")
            assert said["pid"] == os.getpid()
            assert abs(said["when"] - time.time()) < 60
        assert the_one_in(cache).read_text() == ""
    watch.close()
    assert list(cache.iterdir()) == []
    assert quarantine.crashes() == ()


def test_a_dead_process_tells_of_a_crash(cache):
    path = leave_a_file(cache, pid=dead_process())
    (crash,) = quarantine.crashes()
    assert (crash.name, crash.distribution, crash.version) == ("crash", "acme", "1.0")
    assert not path.exists()
    assert the_one_in(cache).suffix == ".crashed", "a record, which outlives a reboot"
    assert quarantine.crashes() == (crash,)


def test_the_process_itself_tells_of_none(cache):
    path = leave_a_file(cache)
    assert quarantine.crashes() == ()
    assert path.exists()


def test_a_process_id_that_was_given_away_again(cache):
    leave_a_file(cache, started="1")
    assert [crash.pid for crash in quarantine.crashes()] == [os.getpid()]


def test_a_zombie_is_dead(cache):
    child = os.fork()
    if not child:
        held = Watch().importing("crash", "acme", "1.0")
        held.__enter__()
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        assert [crash.pid for crash in quarantine.crashes()] == [child]
    finally:
        os.waitpid(child, 0)


def test_a_fork_leaves_its_parents_file_alone(cache):
    watch = Watch()
    with watch.importing("one", "acme", "1.0"):
        child = os.fork()
        if not child:
            try:
                watch.close()
                with watch.importing("two", "acme", "1.0"):
                    pass
                watch.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert json.loads(the_one_in(cache).read_text())["name"] == "one"
    watch.close()
    assert list(cache.iterdir()) == []


def test_another_machine_or_boot_cannot_be_judged_and_is_swept_in_time(cache):
    path = leave_a_file(cache, pid=dead_process(), machine="another boot")
    assert quarantine.crashes() == ()
    assert path.exists()
    os.utime(path, (0, time.time() - 2 * 24 * 3600))
    assert quarantine.crashes() == ()
    assert not path.exists()


def test_a_record_stays_however_old(cache):
    leave_a_file(cache, pid=dead_process())
    quarantine.crashes()
    os.utime(the_one_in(cache), (0, 0))
    assert len(quarantine.crashes()) == 1


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"name": "x"}', "\x00\x00", '{"name": 1, "pid": "x"}'],
)
@pytest.mark.parametrize("suffix", [".importing", ".crashed"])
def test_files_that_cannot_be_read_tell_nothing(cache, text, suffix):
    cache.mkdir()
    (cache / f"odd{suffix}").write_text(text)
    assert quarantine.crashes() == ()
    assert quarantine.release("x") == ()


def test_a_file_with_fields_of_other_kinds_tells_nothing(cache):
    pid = dead_process()
    for changes in ({"name": "../../etc"}, {"name": 5}, {"pid": "5"}, {"pid": True}, {"when": None}, {"more": 1}):
        leave_a_file(cache, **{"pid": pid, **changes})
        assert quarantine.crashes() == (), changes


def test_a_file_of_another_user_tells_nothing(cache, monkeypatch):
    """Whether their processes live may be hidden from us."""
    leave_a_file(cache, pid=dead_process())
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    assert quarantine.crashes() == ()


def test_a_folder_that_can_only_be_read_still_tells(cache, monkeypatch):
    leave_a_file(cache, pid=dead_process())

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "replace", refuse)
    assert len(quarantine.crashes()) == len(quarantine.crashes()) == 1


def test_another_process_that_made_the_record_first(cache, monkeypatch):
    leave_a_file(cache, pid=dead_process())
    replace = Path.replace

    def too_late(path, record):
        replace(path, record)
        raise FileNotFoundError

    monkeypatch.setattr(Path, "replace", too_late)
    assert len(quarantine.release("crash")) == 1
    assert list(cache.iterdir()) == []


def test_releasing_one_name_leaves_the_others(cache):
    pid = dead_process()
    leave_a_file(cache, pid=pid)
    quarantine.crashes()
    leave_a_file(cache, pid=pid, name="other")
    leave_a_file(cache, pid=pid, version="2.0")
    assert {crash.version for crash in quarantine.release("crash")} == {"1.0", "2.0"}
    assert [crash.name for crash in quarantine.crashes()] == ["other"]
    assert quarantine.release("crash") == ()


@pytest.mark.parametrize(
    ("variables", "want"),
    [
        ({"LONGSPAN_CACHE": "/a/b"}, "/a/b/quarantine"),
        ({"LONGSPAN_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b/quarantine"),
        ({"LONGSPAN_CACHE": "~/c"}, "/home/me/c/quarantine"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/longspan/quarantine"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/longspan/quarantine"),
        ({"LONGSPAN_CACHE": " ", "XDG_CACHE_HOME": ""}, "/home/me/.cache/longspan/quarantine"),
        ({}, "/home/me/.cache/longspan/quarantine"),
    ],
)
def test_where_the_files_are(monkeypatch, variables, want):
    for name in ("LONGSPAN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert quarantine.directory() == Path(want)


def test_a_long_name_makes_a_file_too(cache):
    pid = dead_process()
    for end in ("x", "y"):
        leave_a_file(cache, pid=pid, name="n" * 300 + end, distribution="d" * 300, version="1+" + "v" * 300)
        quarantine.crashes()
    assert len(quarantine.crashes()) == 2


def test_a_crash_says_when_and_what_to_do(cache):
    leave_a_file(cache, pid=dead_process())
    (crash,) = quarantine.crashes()
    text = str(evolve(crash, when=0.0, pid=77))
    assert "process 77" in text
    assert text.split("Next: ")[1] == "longspan doctor --release crash"
    assert set(asdict(crash)) >= {"name", "distribution", "version", "pid", "started"}
    assert torch.__version__ in crash.environment
    assert issubclass(ls.PluginWarning, UserWarning)
