"""Compiled code on disk: what is planted, damaged or another user's is never loaded; the doctor names it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import pytest

import longspan as ls
from longspan import compiled
from longspan.tools.doctor import examine
from longspan_plugins.cpu_fused import library

COMPILER = library.compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler: nothing is compiled")

COPIES = """#!/bin/sh
# Stands for a compiler: the library was made once, and copying it takes no time.
echo "$@" >> "{log}"
while [ "$1" != -o ]; do shift; done
cat "{made}" > "$2"
"""


@pytest.fixture(scope="module")
def made():
    """The library's bytes, built where all tests of the run have it."""
    assert library.load().handle
    paths = [path for base in compiled.homes("cpu_fused") for path in base.path.glob("*.so")]
    return paths[0].read_bytes()


class Here:
    """Folders of the test's own, and a compiler that counts how often it is called."""

    def __init__(self, folder):
        self.cache, self.temp, self.folder = folder / "cache", folder / "temp", folder
        self.kept, self.log = self.cache / "cpu_fused", folder / "log"

    @property
    def builds(self):
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def load(self):
        """What a new process gets, and what it is warned of."""
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            found = library.load.__wrapped__()
        return found, " ".join(str(one.message) for one in heard)

    def doctor(self):
        """Why the doctor says that a file is not used, and the line that mends it; each a remedy too."""
        report = examine().to_dict()
        told = {remedy["what"] for remedy in report["to_fix"]}
        assert all(f"{one['path']} {one['why']}" in told for one in report["files"])
        return {Path(one["path"]): one["why"] for one in report["files"]}


@pytest.fixture
def here(tmp_path, monkeypatch, made):
    found = Here(tmp_path)
    found.temp.mkdir()
    (tmp_path / "made.so").write_bytes(made)
    script = tmp_path / "copies"
    script.write_text(COPIES.format(log=found.log, made=tmp_path / "made.so"))
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("LONGSPAN_CACHE", str(found.cache))
    monkeypatch.setattr(tempfile, "tempdir", str(found.temp))
    return found


@pytest.fixture
def evil(tmp_path):
    """A library whose constructor leaves a trace."""
    trace, source, target = tmp_path / "trace", tmp_path / "evil.c", tmp_path / "evil.so"
    runs = f'__attribute__((constructor)) void run(void) {{ fclose(fopen("{trace}", "w")); }}'
    source.write_text(f"#include <stdio.h>\n{runs}\n")
    subprocess.run([*COMPILER, "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    return target.read_bytes(), trace


def the_one(folder, ending=".so"):
    (path,) = folder.glob(f"*{ending}")
    return path


# --- planted, damaged, foreign ---------------------------------------------------------------------------------------


def test_a_planted_library_never_runs(here, evil):
    """It has the place and the size of the right one, as the name does not hide."""
    (first, _), (planted, trace) = here.load(), evil
    assert first.handle and here.builds == 1
    path = the_one(here.kept)
    whole = path.read_bytes()
    path.unlink()  # this process has it open
    path.write_bytes(planted + bytes(len(whole) - len(planted)))
    assert "its content has another digest" in here.doctor()[path], "before anybody met it"
    again, said = here.load()
    assert not trace.exists()
    assert again.handle and here.builds == 2
    assert str(path) in said and "another digest" in said and "Next: longspan doctor" in said
    assert path.read_bytes() == whole
    aside = the_one(here.kept, ".refused")
    assert "another digest" in here.doctor()[aside], "afterwards too"
    ctypes.CDLL(str(aside))
    assert trace.exists(), "what was planted does run where nobody checks"


@pytest.mark.parametrize("how", ["bit", "zeros", "cut", "empty", "more"])
def test_a_damaged_library_is_built_anew(here, how):
    here.load()
    path = the_one(here.kept)
    whole = path.read_bytes()
    data = {
        "bit": bytes([*whole[:9000], whole[9000] ^ 1, *whole[9001:]]),
        "zeros": whole[:4096] + bytes(16384) + whole[20480:],
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "more": whole + b"\0",
    }[how]
    path.unlink()
    path.write_bytes(data)
    found, said = here.load()
    assert found.handle and here.builds == 2 and str(path) in said and "damaged" in said
    assert path.read_bytes() == whole
    assert "is damaged" in here.doctor()[the_one(here.kept, ".refused")]
    again, said = here.load()
    assert again.handle and said == "" and here.builds == 2


def test_another_users_library_is_refused(here, give_away, made):
    (here.kept).mkdir(parents=True)
    here.cache.chmod(0o700)
    here.kept.chmod(0o700)
    home = compiled.Home(here.kept)
    path = home.keep(library._key(library.compiler()), made).path
    assert here.load()[0].handle and here.builds == 0
    give_away(path)
    if os.geteuid() != os.stat(here.kept).st_uid:
        pytest.skip("to give only the file away takes root")
    assert "belongs to another user" in here.doctor()[path]
    found, said = here.load()
    assert found.handle and here.builds == 1 and "belongs to another user" in said and str(path) in said
    assert path.stat().st_uid == os.geteuid()
    assert "belongs to another user" in here.doctor()[the_one(here.kept, ".refused")]


def test_a_library_that_others_may_write_to_is_refused(here):
    here.load()
    path = the_one(here.kept)
    path.chmod(0o666)
    found, said = here.load()
    assert found.handle and here.builds == 2 and "may be written to by others (mode 0666)" in said


def test_a_name_without_a_digest_is_refused(here, evil):
    """As an earlier release named them: by key and size."""
    planted, trace = evil
    here.load()
    path = here.kept / f"{library._key(library.compiler())}-{len(planted)}.so"
    path.write_bytes(planted)
    assert "no digest" in here.doctor()[path]
    for other in set(here.kept.glob("*.so")) - {path}:
        other.unlink()
    found, said = here.load()
    assert found.handle and not trace.exists() and "no digest" in said


@pytest.mark.parametrize("which", ["cache", "kept"])
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_folder_that_others_may_write_to_is_not_used(here, evil, which, mode):
    """Even a right digest is worth nothing there."""
    planted, trace = evil
    home = compiled.Home(here.kept)
    path = home.keep(library._key(library.compiler()), planted).path
    folder = getattr(here, which)
    folder.chmod(mode)
    found, _ = here.load()
    assert found.handle and not trace.exists()
    assert the_one(here.temp / f"longspan-{os.geteuid()}" / "cpu_fused")
    assert here.load()[0].handle and here.builds == 1, "kept where the user's own folder is"
    told = here.doctor()
    assert "its folder" in told[path] and f"mode {mode:04o}" in told[path]
    if which == "cache":
        assert f"may be written to by others (mode {mode:04o})" in told[here.cache]


def test_another_users_folder_is_not_used(here, evil, give_away):
    planted, trace = evil
    path = compiled.Home(here.kept).keep(library._key(library.compiler()), planted).path
    give_away(here.cache)
    give_away(here.kept)
    found, _ = here.load()
    assert found.handle and not trace.exists() and path.exists()
    told = here.doctor()
    assert "belongs to another user" in told[here.cache] and "belongs to another user" in told[path]


def test_a_folder_taken_by_somebody_else_among_the_temporary_files(here, evil, give_away):
    """Its name can be guessed. Without any home the library is this process's alone."""
    planted, trace = evil
    scratch = here.temp / f"longspan-{os.geteuid()}" / "cpu_fused"
    path = compiled.Home(scratch).keep(library._key(library.compiler()), planted).path
    (here.cache).write_text("a file")
    give_away(scratch.parent)
    give_away(scratch)
    found, _ = here.load()
    assert found.handle and not trace.exists() and path.exists()
    assert [one.name for one in here.temp.iterdir()] == [scratch.parent.name], "nothing is left behind"


def test_a_link_to_another_users_file_is_refused(here, evil, tmp_path, give_away):
    planted, trace = evil
    if os.geteuid() != 0:
        pytest.skip("to give a file away takes root")
    path = compiled.Home(here.kept).keep(library._key(library.compiler()), planted).path
    path.rename(tmp_path / "theirs")
    path.symlink_to(tmp_path / "theirs")
    give_away(tmp_path / "theirs")
    found, said = here.load()
    assert found.handle and not trace.exists() and "belongs to another user" in said


def test_a_pipe_in_its_place_keeps_nobody_waiting(here):
    here.load()
    path = the_one(here.kept)
    path.unlink()
    os.mkfifo(path)
    assert here.load()[0].handle and here.builds == 2


def test_what_was_checked_is_what_is_loaded(here, evil):
    """The name may mean something else by the time that the loader is called."""
    planted, trace = evil
    here.load()
    (code,) = compiled.Home(here.kept).find(library._key(library.compiler()))
    code.path.unlink()
    code.path.write_bytes(planted)
    assert library._open(code.address).handle and not trace.exists()


# --- where it is kept -----------------------------------------------------------------------------------------------


def test_folders_are_the_users_alone_whatever_the_umask(here):
    before = os.umask(0)
    try:
        assert here.load()[0].handle
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (here.cache, here.kept)] == [0o700, 0o700]
    assert the_one(here.kept).stat().st_mode & 0o022 == 0
    assert here.doctor() == {}


def test_a_cache_folder_that_cannot_be_written_is_built_once_a_user(here):
    here.cache.write_text("a file")
    assert here.load()[0].handle and here.load()[0].handle
    assert here.builds == 1
    scratch = here.temp / f"longspan-{os.geteuid()}"
    assert scratch.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in here.temp.iterdir()] == [scratch.name]


def test_without_a_home_directory_it_is_kept_among_the_temporary_files(here, monkeypatch):
    def nowhere(name):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compiled, "cache_folder", nowhere)
    assert here.load()[0].handle and here.load()[0].handle and here.builds == 1
    assert compiled.survey() == ()


def fails_in(folder, error):
    """`os.open` that finds no room below a folder, as on a full disk."""
    real = os.open

    def opening(path, flags, *given, **more):
        if flags & os.O_CREAT and str(path).startswith(str(folder)):
            raise error
        return real(path, flags, *given, **more)

    return opening


def test_a_full_disk_leaves_the_other_place(here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails_in(here.cache, OSError(28, "No space left on device")))
        assert here.load()[0].handle
    assert list(here.kept.iterdir()) == []
    assert the_one(here.temp / f"longspan-{os.geteuid()}" / "cpu_fused")
    assert here.load()[0].handle and here.builds == 1


def test_a_compiler_without_room_among_the_temporary_files_builds_in_the_home(here, monkeypatch, tmp_path):
    full = tmp_path / "full"
    full.write_text(
        f'#!/bin/sh\ncase "$TMPDIR" in {here.temp}*) echo "No space left on device" >&2; exit 1;; esac\n'
        f'exec {tmp_path / "copies"} "$@"\n'
    )
    full.chmod(0o755)
    monkeypatch.setenv("CC", str(full))
    here.kept.mkdir(parents=True, mode=0o700)
    assert here.load()[0].handle and here.builds == 1
    assert [path.suffix for path in here.kept.iterdir()] == [".so"]


def test_a_compiler_that_takes_too_long_is_left_alone_for_a_while(here, monkeypatch, tmp_path):
    slow, children = tmp_path / "slow", tmp_path / "children"
    slow.write_text(f'#!/bin/sh\necho run >> "{here.log}"\nsleep 600 &\necho $! > "{children}"\nwait\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setattr(library, "PATIENCE", 0.5)
    first, _ = here.load()
    assert not first.handle and "within 0.5 seconds" in first.refusal and here.builds == 1
    child = int(children.read_text())
    for _ in range(100):  # a zombie may wait for its parent, which is not this process
        if not Path(f"/proc/{child}").exists() or "State:\tZ" in Path(f"/proc/{child}/status").read_text():
            break
        time.sleep(0.05)
    else:
        raise AssertionError("what the compiler started goes on")
    again, _ = here.load()
    note = the_one(here.kept, ".failed")
    assert not again.handle and here.builds == 1
    assert "not tried again before" in again.refusal and again.refusal.endswith(f"Next: rm {note}")
    assert "within 0.5 seconds" in here.doctor()[note]
    os.utime(note, (time.time() - compiled.RETRY - 1,) * 2)
    assert here.doctor() == {}
    monkeypatch.setattr(library, "PATIENCE", 120.0)
    slow.write_text((tmp_path / "copies").read_text())
    os.utime(slow, (1, 1))
    assert here.load()[0].handle and here.builds == 2


def test_what_a_compiler_makes_that_is_no_library_is_not_kept(here, tmp_path):
    (tmp_path / "made.so").write_bytes(b"rubbish!")
    found, _ = here.load()
    assert not found.handle and "did not make a library" in found.refusal
    assert not list(here.cache.rglob("*.so")) and not list(here.temp.rglob("*.so"))


def test_a_build_that_works_is_no_failure_any_more(here):
    key = library._key(library.compiler())
    home = compiled.Home(here.kept)
    home.remember_failure(key, "too slow")
    assert "too slow" in home.failure(key) and "too slow" in here.load()[0].refusal
    home.keep(key, (here.folder / "made.so").read_bytes())
    assert home.failure(key) == "" and here.load()[0].handle and here.builds == 0


# --- folders --------------------------------------------------------------------------------------------------------


def test_one_folder_for_all(monkeypatch):
    monkeypatch.delenv("LONGSPAN_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    for shared, want in (
        ("relative", "/home/me/.cache/longspan"),
        ("", "/home/me/.cache/longspan"),
        ("/x", "/x/longspan"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", shared)
        assert ls.cache_folder("cpu_fused") == Path(want) / "cpu_fused"
        assert ls.registry.profile.profile_path("cpu") == Path(want) / "profile" / "cpu.json"
        assert ls.registry.quarantine.directory() == Path(want) / "quarantine"
    monkeypatch.setenv("LONGSPAN_CACHE", "relative")
    assert ls.cache_folder("x") == Path.cwd() / "relative" / "x"
