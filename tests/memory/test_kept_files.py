"""A planted, a damaged and a foreign library, profile and file of layouts: none is used, and each is named.

Of the first two `longspan doctor` says so, of a file of layouts, whose name the caller gives, the error.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from test_compiled import COMPILER, evil, here, made  # noqa: F401 - fixtures

import longspan as ls
from longspan.memory.cache import PatternCache
from longspan.registry.profile import Measure, Profile, forget_profiles, machine_name
from longspan.tools.cli import main

HOW = ("planted", "damaged", "foreign")


@pytest.fixture
def doctor(capsys):
    """What `longspan doctor` says of each file, in its JSON and to a reader."""

    def run():
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["doctor", "--json"])
        found = json.loads(capsys.readouterr().out)["to_fix"]
        return {one["what"].partition(" ")[0]: (one["what"], one["lines"]) for one in found}

    return run


@pytest.fixture
def problem():
    return ls.Problem(batch=1, heads=2, q_len=24, head_dim=8, pattern=ls.SlidingWindow(5, 0))


@pytest.mark.skipif(COMPILER is None, reason="no C compiler: nothing is compiled")
@pytest.mark.parametrize("how", HOW)
def test_a_library(how, here, evil, give_away, doctor):  # noqa: F811
    here.load()
    (path,) = here.kept.glob("*.so")
    whole, (planted, trace) = path.read_bytes(), evil
    path.unlink()  # this process has it open
    if how == "planted":
        path.write_bytes(planted + bytes(len(whole) - len(planted)))
    elif how == "damaged":
        path.write_bytes(whole[:4096] + bytes(1) + whole[4097:-1] + b"?")
    else:
        path.write_bytes(whole)
        give_away(path)
    why = "another user" if how == "foreign" else "its content has another digest"
    what, lines = doctor()[str(path)] if os.geteuid() == path.parent.stat().st_uid else doctor()[str(here.cache)]
    assert why in what and lines
    found, _ = here.load()
    assert found.handle and not trace.exists()
    if os.geteuid() == path.parent.stat().st_uid:
        assert here.builds == 2 and path.read_bytes() == whole
        what, lines = doctor()[str(path.with_suffix(".refused"))]
        assert why in what and lines == [f"rm {path.with_suffix('.refused')}"]


@pytest.mark.parametrize("how", HOW)
def test_a_profile(how, tmp_path, monkeypatch, doctor, problem):
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path))
    forget_profiles()
    usual = ls.explain(problem).chosen
    measures = [Measure(name, "window", "float32", 24, took, took) for name, took in (("sdpa", 1.0), (usual, 2.0))]
    kept = Profile("cpu", machine_name(), torch.__version__, 2, {}, 1.0, tuple(measures))
    path = kept.save()
    assert ls.explain(problem).chosen == "sdpa", "a right one decides"
    held = json.loads(path.read_text())
    if how == "planted":
        path.chmod(0o666)
    elif how == "damaged":
        path.write_text(json.dumps({**held, "measures": [{**one, "tokens": 0} for one in held["measures"]]}))
    else:
        Profile("cpu", "another", torch.__version__, 2, {}, 1.0, kept.measures).save()
    forget_profiles()
    with pytest.warns(UserWarning, match=f"{path} .*: it is not used. Next: longspan bench --profile"):
        assert ls.explain(problem).chosen == usual
    what, lines = doctor()[str(path)]
    why = {"planted": "may be written to by others", "damaged": "another digest", "foreign": "another machine"}[how]
    assert why in what and lines == [f"rm {path}"]
    monkeypatch.undo()
    forget_profiles()


@pytest.mark.parametrize("how", HOW)
def test_a_file_of_layouts(how, tmp_path, problem, give_away):
    pytest.importorskip("safetensors")
    store, path = PatternCache(), tmp_path / "layouts"
    ls.plan(problem, backend="sdpa", pattern_cache=store)
    assert store.save(path) == 1 and PatternCache().load(path) == 1
    if how == "planted":
        os.chmod(path, 0o666)
    elif how == "damaged":
        data = path.read_bytes()
        at = data.index(b"rows") if b"rows" in data else len(data) // 2
        digit = next(place for place in range(at, len(data)) if 49 <= data[place] < 57)
        path.write_bytes(data[:digit] + bytes([data[digit] + 1]) + data[digit + 1 :])
    else:
        give_away(path)
    fresh = PatternCache()
    why = {"planted": "written to by others", "damaged": "another digest", "foreign": "another user"}[how]
    with pytest.raises(ls.ArgumentError, match=f"path: got {path}, which .*{why}.*Next: "):
        fresh.load(path)
    ls.plan(problem, backend="sdpa", pattern_cache=fresh)
    assert (fresh.stats.hits, fresh.stats.misses) == (0, 1), "laid out anew"


def test_the_doctor_shows_it_to_a_reader(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "kept"))
    monkeypatch.setenv("COLUMNS", "400")
    path = tmp_path / "kept" / "profile" / "cpu.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    (tmp_path / "kept").chmod(0o777)
    with pytest.raises(SystemExit) as left:
        main(["doctor"])
    shown = capsys.readouterr().out
    assert left.value.code == 1, "a profile that was measured is not used"
    for words in (f"{path} is damaged", f"rm {path}", f"{tmp_path}/kept may be written to by others (mode 0777)"):
        assert words in shown
    assert f"chmod go-w {tmp_path}/kept" in shown
