"""Every broken package at once, and sound ones beside them: nothing changes for who asked for none of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sites import BROKEN, CROWD, SOUND, THIRD, by_name_and_owner

import longspan

BUILTIN = {row.name for row in longspan.backends() if row.distribution == "longspan"}

RAISES = """
x = torch.ones(1, 1, 3, 4)
try:
    {call}
except ls.LongspanError as error:
    print(type(error).__name__, error)
"""
ATTENTION = """
import warnings
x = torch.randn(1, 2, 9, 4, dtype=torch.float64)
with warnings.catch_warnings():
    warnings.simplefilter("error", ls.PluginWarning)
    out = ls.attention(x, x, x, ls.Dilated((4, 9), (1, 2)))
assert out.isfinite().all()
print("computed")
"""
CHOICE = """
import json
problem = ls.Problem(batch=1, heads=2, q_len=9, head_dim=4, dtype="float64", pattern=ls.SlidingWindow(2, 1))
x = torch.randn(1, 2, 9, 4, dtype=torch.float64)
def choice(backend=None):
    made = ls.plan(problem, backend=backend)
    return [made.backend, made.resolution.decided_by, made(x, x, x)[0].isfinite().all().item()]
found = {"policy": choice(), "argument": choice("good"), "shy": choice("wants_opt_in")}
with ls.use(prefer=("good",)):
    found["prefer"] = choice()
with ls.use(backend="good"):
    found["context"] = choice()
with ls.use(block=BUILTIN):
    try:
        found["alone"] = choice()
    except ls.BackendUnavailable as error:
        found["alone"] = str(error)
open(REPORT, "w").write(json.dumps(found))
"""


@pytest.fixture(scope="module")
def alone(site):
    """What longspan chooses and computes where nothing else is installed."""
    return site().program("facts")


@pytest.fixture(scope="module")
def beside(site):
    """The same beside the crowd."""
    return site(*CROWD).program("facts")


@pytest.fixture(scope="module")
def runs(site, tmp_path_factory):
    """Command lines and short programs beside the crowd."""
    folder = tmp_path_factory.mktemp("choices")

    def cli(*words, **variables):
        return {"cli": words, "env": variables}

    def code(text, **variables):
        return {"code": text, "env": variables}

    def choice(**variables):
        path = folder / f"{len(variables)}.json"
        found = {"code": f"BUILTIN, REPORT = {sorted(BUILTIN)!r}, {str(path)!r}\n{CHOICE}", "env": variables}
        paths[frozenset(variables)] = path
        return found

    paths: dict[frozenset[str], Path] = {}
    strict, safe = {"LONGSPAN_STRICT": "1"}, {"LONGSPAN_PLUGINS": "builtin"}
    shape = ("--shape", "1,2,9,4", "--dtype", "float64")
    found = site(*CROWD).forks(
        listing=cli("backends", "--json"),
        table=cli("backends"),
        details=cli("backends", "--details"),
        explain=cli("explain", *shape, "--json"),
        explain_good=cli("explain", *shape, "--backend", "good", "--json"),
        explain_broken=cli("explain", *shape, "--backend", "broken_import"),
        explain_typo=cli("explain", *shape, "--backend", "goood"),
        strict=cli("backends", "--json", **strict),
        strict_explain=cli("explain", *shape, **strict),
        strict_attention=code(RAISES.format(call="ls.attention(x, x, x)"), **strict),
        strict_listing=code(RAISES.format(call="ls.backends()"), **strict),
        safe=cli("backends", "--json", **safe),
        safe_attention=code(ATTENTION, **safe),
        safe_strict=code(ATTENTION, **safe, **strict),
        allowed=cli("backends", "--json", LONGSPAN_PLUGINS="good,builtin"),
        allowed_by_distribution=cli("backends", "--json", LONGSPAN_PLUGINS="acme_good, builtin"),
        blocked=cli("backends", "--json", LONGSPAN_BLOCK="good,exits,dup_name"),
        choice=choice(),
        preferred=choice(LONGSPAN_PREFER="good"),
        named_broken=code(RAISES.format(call="ls.attention(x, x, x, backend='broken_import')")),
        named_twice=code(RAISES.format(call="ls.attention(x, x, x, backend='dup_name')")),
        named_wrongly=code(RAISES.format(call="ls.attention(x, x, x, backend='goood')")),
        preferred_broken=code(RAISES.format(call="print(ls.attention(x, x, x).sum())"), LONGSPAN_PREFER="exits"),
    )
    choices = {
        name: json.loads(path.read_text()) for name, path in zip(("choice", "preferred"), paths.values(), strict=True)
    }
    return found, choices


@pytest.fixture(scope="module")
def shown(runs):
    return runs[0]


@pytest.fixture(scope="module")
def choices(runs):
    return runs[1]


# --- nothing changes ------------------------------------------------------------------------------------------------


def without_offers(resolution):
    """What must not change. Where nothing fits unasked, `why` ends with the names that would serve if asked."""
    return {**resolution, "why": resolution["why"].split(" (by name: ")[0]}


def test_the_comparison_sees_something(alone, beside):
    assert len(alone["resolutions"]) == len(beside["resolutions"]) >= 1000
    assert len({one["chosen"] for one in alone["resolutions"].values()}) >= 2
    assert len(set(alone["results"].values())) == len(alone["results"]) == 24
    assert [row for row in alone["ledger"] if row["distribution"].startswith(THIRD)] == []


def test_installing_changes_no_choice_for_any_problem_on_any_device(alone, beside):
    before = {name: without_offers(one) for name, one in alone["resolutions"].items()}
    after = {name: without_offers(one) for name, one in beside["resolutions"].items()}
    assert [name for name in before if before[name] != after[name]] == []


def test_installing_changes_no_bit_of_a_result_or_gradient(alone, beside):
    assert beside["results"] == alone["results"]


def test_auto_takes_no_third_party_that_was_not_named(beside):
    assert {one["chosen"] for one in beside["resolutions"].values()} <= BUILTIN | {None}


def test_importing_longspan_imports_no_plugin_and_waits_for_none(beside):
    assert beside["import longspan"]["imported"] == []
    assert "acme_slow_import" in beside["imported"]


def test_listing_explaining_and_computing_initialise_no_cuda(beside):
    assert beside["import longspan"]["cuda"] is False
    assert beside["cuda"] is False


# --- the ledger -----------------------------------------------------------------------------------------------------


def owner(package):
    return THIRD + package.replace("_", "-")


@pytest.mark.parametrize("package", BROKEN)
def test_the_listing_shows_each_failure_with_its_distribution_and_text(shown, package):
    name, state, text = BROKEN[package]
    row = shown["listing"].rows[name, owner(package)]
    assert (row["state"], row["version"]) == (state, "1.0")
    assert text in row["error"]
    told = [line for line in shown["table"].stdout.splitlines() if line.split()[:2] == [name, state]]
    assert any(text in line for line in told)
    rows = [line.split()[:4] for line in shown["details"].stdout.splitlines()]
    assert rows.count([name, state, owner(package), "1.0"]) == 1


@pytest.mark.parametrize("package", SOUND)
def test_the_sound_ones_are_loaded_beside_them_and_wait_to_be_named(shown, package):
    row = shown["listing"].rows[package, owner(package)]
    assert (row["state"], row["opt_in"], row["error"]) == ("loaded", True, "")
    assert row["description"]


def test_the_built_in_ones_are_what_they_were(alone, shown):
    before = by_name_and_owner(alone["ledger"])
    after = {key: row for key, row in shown["listing"].rows.items() if not key[1].startswith(THIRD)}
    assert set(before) == set(after)
    for key, row in before.items():
        assert {**row, "import_ms": 0} == {**after[key], "import_ms": 0}


def test_the_ledger_times_each_import(shown):
    rows = shown["listing"].rows
    assert 300 <= rows["slow_import", "acme-slow-import"]["import_ms"] < 3000
    assert 0 < rows["good", "acme-good"]["import_ms"] < 300


def test_the_installed_command_prints_what_a_machine_can_read(site):
    """The console script itself, as a user calls it, while a plugin prints a banner."""
    script = Path(sys.executable).with_name("longspan")
    command = [script, "backends", "--json"]
    here = site(*CROWD)
    done = subprocess.run(command, env=here.environment(), capture_output=True, text=True, check=True, timeout=120)
    states = {row["name"]: row["state"] for row in json.loads(done.stdout)}
    broken = {name: state for name, state, _ in BROKEN.values()}
    assert states == dict.fromkeys((*BUILTIN, *SOUND), "loaded") | broken
    assert "ACME" in done.stderr, "what a plugin says is not lost"


# --- what the user is told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["listing", "table", "explain", "explain_good"])
def test_the_command_line_warns_in_one_line_for_each_broken_package(shown, run):
    lines = [line for line in shown[run].stderr.splitlines() if line.startswith("warning:")]
    for package, (name, state, text) in BROKEN.items():
        (line,) = [line for line in lines if f"{name!r} of {owner(package)} 1.0 is {state}" in line]
        assert text in line
    assert len(lines) == len(BROKEN)


def test_a_program_is_warned_in_one_line_for_each_broken_package(beside):
    lines = [line for line in beside.stderr.splitlines() if "PluginWarning:" in line]
    for package, (name, state, text) in BROKEN.items():
        (line,) = [line for line in lines if f"{name!r} of {owner(package)} 1.0 is {state}" in line]
        assert text in line
    assert len(lines) == len(BROKEN)


def test_no_traceback_reaches_anyone(shown, beside):
    texts = [beside.stdout, beside.stderr] + [text for done in shown.values() for text in (done.stdout, done.stderr)]
    assert [text for text in texts if "Traceback" in text] == []


def test_json_stays_readable_while_plugins_print(shown):
    for run in ("listing", "explain", "explain_good"):
        assert shown[run].json
        assert "ACME" in shown[run].stderr
    assert shown["explain"].json["chosen"] in BUILTIN
    assert shown["explain_good"].json["chosen"] == "good"


def test_json_stays_readable_when_a_native_library_prints(site):
    """Past sys.stdout, as C and C++ do: the file descriptor is what a pipe reads."""
    done = site("prints_native").python("-c", "from longspan.tools.cli import main; main()", "backends", "--json")
    assert done.returncode == 0
    states = {row["name"]: row["state"] for row in json.loads(done.stdout)}
    assert states["prints_native"] == "loaded"
    assert "[acme] runtime" in done.stderr


# --- strict ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["strict_attention", "strict_listing"])
def test_strict_raises_the_librarys_own_error_which_names_the_distribution(shown, run):
    done = shown[run]
    assert done.code == 0
    assert done.stdout.splitlines()[-1].startswith("PluginError backend ")
    assert sum(owner(package) in done.stdout for package in BROKEN) >= 1
    assert "LONGSPAN_STRICT" in done.stdout


@pytest.mark.parametrize("run", ["strict", "strict_explain"])
def test_strict_on_the_command_line_is_an_error_and_no_traceback(shown, run):
    done = shown[run]
    assert (done.code, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert any(owner(package) in line for package in BROKEN)


# --- allowed, blocked, named ----------------------------------------------------------------------------------------


def test_the_safe_mode_lists_the_built_in_ones_as_loadable_and_imports_nothing_else(shown):
    done = shown["safe"]
    assert {name for (name, _), row in done.rows.items() if row["state"] == "loaded"} == BUILTIN
    strangers = [row for row in done.rows.values() if row["distribution"] != "longspan"]
    assert len(strangers) == len(CROWD)
    assert {row["state"] for row in strangers} == {"blocked"}
    assert all("LONGSPAN_PLUGINS=builtin" in row["error"] for row in strangers)
    assert done.imported == []
    assert done.stderr == ""


@pytest.mark.parametrize("run", ["safe_attention", "safe_strict"])
def test_the_safe_mode_computes_without_a_word(shown, run):
    done = shown[run]
    assert (done.code, done.stdout, done.stderr, done.imported) == (0, "computed\n", "", [])


@pytest.mark.parametrize("run", ["allowed", "allowed_by_distribution"])
def test_one_package_can_be_allowed(shown, run):
    done = shown[run]
    assert {name for (name, _), row in done.rows.items() if row["state"] == "loaded"} == BUILTIN | {"good"}
    assert done.imported == ["acme_good"]
    assert done.stderr == ""


def test_what_is_blocked_is_not_imported(shown):
    done = shown["blocked"]
    states = {key: row["state"] for key, row in done.rows.items()}
    for package in ("good", "exits", "dup_name_one", "dup_name_two"):
        name = BROKEN[package][0] if package in BROKEN else package
        assert states.pop((name, owner(package))) == "blocked"
        assert f"acme_{package}" not in done.imported
        assert owner(package) not in done.stderr
    assert "blocked" not in states.values()
    assert {"acme_prints", "acme_slow_import", "acme_wants_opt_in"} <= set(done.imported)


def test_consent_is_a_name(choices):
    """By argument, by context, by preference: then a third party's backend is taken. Never by auto."""
    chosen, decided_by, finite = choices["choice"]["policy"]
    assert (chosen in BUILTIN, decided_by, finite) == (True, "auto", True)
    for found in choices.values():
        assert found["argument"] == ["good", "argument", True]
        assert found["context"] == ["good", "context", True]
        assert found["prefer"] == ["good", "context", True]
        assert found["shy"] == ["wants_opt_in", "argument", True]
    assert choices["preferred"]["policy"] == ["good", "environment", True]


def test_with_every_built_in_backend_blocked_auto_still_asks_before_it_takes_one(choices):
    said = choices["choice"]["alone"]
    assert isinstance(said, str), f"auto took {said}"
    assert "no backend fits unasked" in said
    assert "good" in said.split("by name: ")[1]


def test_naming_a_broken_backend_says_what_is_wrong_and_whose_it_is(shown):
    said = shown["named_broken"].stdout
    assert "BackendUnavailable" in said
    assert BROKEN["broken_import"][2] in said
    assert "fix or uninstall acme-broken-import" in said
    assert shown["explain_broken"].code == 1
    assert BROKEN["broken_import"][2] in shown["explain_broken"].stdout


def test_naming_a_name_that_two_claim_names_both(shown):
    said = shown["named_twice"].stdout
    assert "BackendUnavailable" in said
    assert "acme-dup-name-one 1.0 and acme-dup-name-two 1.0" in said


def test_a_name_that_nobody_has_gets_the_nearest(shown):
    assert "UnknownBackend" in shown["named_wrongly"].stdout
    assert "Did you mean 'good'?" in shown["named_wrongly"].stdout
    assert shown["explain_typo"].code == 2
    assert "Did you mean 'good'?" in shown["explain_typo"].stderr


def test_preferring_a_broken_backend_falls_back(shown):
    done = shown["preferred_broken"]
    assert done.code == 0
    assert "tensor(12.)" in done.stdout


# --- who takes a built-in backend's name ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def squatted(site):
    """Beside the crowd and a distribution that claims the name `sdpa`."""
    here = site(*CROWD, "dup_sdpa")
    code = "x = torch.ones(1, 1, 3, 4)\nprint(ls.attention(x, x, x, backend='sdpa').sum().item())"
    forks = here.forks(
        listing={"cli": ["backends", "--json"]},
        safe={"cli": ["backends", "--json"], "env": {"LONGSPAN_PLUGINS": "builtin"}},
        named={"code": code},
        safe_named={"code": code, "env": {"LONGSPAN_PLUGINS": "builtin"}},
    )
    return here, forks


def test_a_squatter_changes_no_choice_and_no_result(alone, squatted):
    facts = squatted[0].program("facts")
    before = {name: without_offers(one) for name, one in alone["resolutions"].items()}
    after = {name: without_offers(one) for name, one in facts["resolutions"].items()}
    assert [name for name in before if before[name] != after[name]] == []
    assert facts["results"] == alone["results"]


def test_a_squatter_leaves_the_built_in_backend_in_place_and_is_named(squatted):
    rows = squatted[1]["listing"].rows
    assert rows["sdpa", "longspan"]["state"] == "loaded"
    squatter = rows["sdpa", "acme-dup-sdpa"]
    assert squatter["state"] == "duplicate"
    assert "acme-dup-sdpa 1.0" in squatter["error"]
    assert f"longspan {longspan.__version__}" in squatter["error"]
    assert "acme_dup_sdpa" not in squatted[1]["listing"].imported
    lines = [line for line in squatted[1]["listing"].stderr.splitlines() if line.startswith("warning:")]
    assert len(lines) == len(BROKEN) + 1
    assert len([line for line in lines if "acme-dup-sdpa 1.0" in line]) == 1


def test_naming_what_a_squatter_claims_means_the_built_in_backend(squatted):
    done = squatted[1]["named"]
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "12.0"


def test_the_safe_mode_brings_it_back_whatever_happened(squatted):
    rows = squatted[1]["safe"].rows
    assert (rows["sdpa", "longspan"]["state"], rows["sdpa", "acme-dup-sdpa"]["state"]) == ("loaded", "blocked")
    assert squatted[1]["safe"].imported == []
    assert (squatted[1]["safe_named"].code, squatted[1]["safe_named"].stdout) == (0, "12.0\n")
