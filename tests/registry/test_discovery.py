"""Finding backends: entry points are read before anything is imported, one broken plugin never stops the others.

Entry points are made up in memory: an `EntryPoint` with a distribution, and modules whose body is a function.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.abc
import importlib.machinery
import inspect
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint

import pytest
import torch

import longspan as ls
from longspan import Capabilities, blockwise, hookimpl
from longspan.registry import discovery
from longspan.registry.discovery import GROUP, Registry

VARIABLES = ("LONGSPAN_BACKEND", "LONGSPAN_PREFER", "LONGSPAN_BLOCK", "LONGSPAN_PLUGINS", "LONGSPAN_STRICT")
CAN = Capabilities(devices=("cpu",), dtypes=("float32", "float64"), patterns=("dense",), causal=True, gqa=True)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    ls.backends()  # the process's own registry has read the real entry points before any are made up


class Distribution:
    """As much of a distribution as an entry point needs."""

    def __init__(self, name, version):
        self.name, self.version = name, version
        self.metadata = {"Name": name, "Version": version}


def good(module):
    """A backend, as a plugin's module would define it."""

    @hookimpl
    def longspan_capabilities():
        return CAN

    @hookimpl
    def longspan_kernel(problem):
        return lambda q, k, v: blockwise.forward(q, k, v, is_causal=problem.is_causal, scale=problem.scale)

    module.__doc__ = "A good backend.\n\nMore about it."
    module.longspan_capabilities = longspan_capabilities
    module.longspan_kernel = longspan_kernel


def raising(error):
    def body(module):
        raise error

    return body


class Site(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A site-packages in memory. `imported` is the order in which modules were imported."""

    def __init__(self, monkeypatch):
        self.points, self.bodies, self.imported, self.reads = [], {}, [], 0
        monkeypatch.setattr(discovery, "entry_points", self.entry_points)
        monkeypatch.setattr(sys, "meta_path", [self, *sys.meta_path])
        self.monkeypatch = monkeypatch

    def add(self, name, body=good, *, dist="acme", version="1.0", module=None):
        """An entry point `name` of a distribution, to a module with this body."""
        module = module or f"in_memory_{dist}_{name}".replace("-", "_").replace(".", "_")
        self.monkeypatch.delitem(sys.modules, module, raising=False)
        self.bodies[module] = body
        point = EntryPoint(name, module, GROUP)
        vars(point)["dist"] = Distribution(dist, version)
        self.points.append(point)
        return module

    def entry_points(self, **wanted):
        self.reads += 1
        return tuple(p for p in self.points if all(getattr(p, key) == value for key, value in wanted.items()))

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name in self.bodies else None

    def exec_module(self, module):
        self.imported.append(module.__name__)
        self.bodies[module.__name__](module)


@pytest.fixture
def site(monkeypatch):
    made = Site(monkeypatch)
    yield made
    for module in made.bodies:
        sys.modules.pop(module, None)


def quietly(registry):
    """The ledger by name, without the warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ls.PluginWarning)
        return {row.name: row for row in registry.backends()}


def lane_of(registry, name):
    """The kernel that this backend makes for a small problem."""
    problem = ls.Problem(batch=1, heads=1, q_len=3, head_dim=4)
    return registry.lane(name, "longspan_kernel")(problem=problem, layout=None, buffers=None)


# --- laziness -------------------------------------------------------------------------------------------------------


def in_a_new_python(code, **environment):
    """The JSON that a fresh interpreter prints last."""
    clean = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**clean, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_is_imported_before_the_first_listing_and_no_device_is_touched():
    before, rows, loaded, initialized = in_a_new_python("""
        import importlib.metadata, json, sys
        import torch
        real, reads = importlib.metadata.entry_points, []
        def watched(*args, **kwargs):
            reads.append(kwargs)
            return real(*args, **kwargs)
        importlib.metadata.entry_points = watched

        import longspan
        longspan.Problem(batch=1, heads=1, q_len=1, head_dim=1)
        with longspan.use(backend="anything"):
            pass
        plugins = lambda: sorted(name for name in sys.modules if name.startswith("longspan_plugins"))
        before = [plugins(), list(reads), torch.cuda.is_initialized()]

        rows = [row.to_dict() for row in longspan.backends()]
        print(json.dumps([before, rows, plugins(), torch.cuda.is_initialized()]))
    """)
    assert before == [[], [], False]
    assert {"sdpa", "reference"} <= {row["name"] for row in rows if row["state"] == "loaded"}
    assert "longspan_plugins.sdpa" in loaded
    assert initialized is False


def test_a_registry_reads_nothing_until_asked_and_then_once(site):
    site.add("one")
    registry = Registry()
    assert (site.reads, site.imported, registry.generation) == (0, [], 0)
    registry.backends()
    reads = site.reads
    assert site.imported == ["in_memory_acme_one"]
    generation = registry.generation
    registry.backends()
    registry.candidates()
    registry.discover()
    assert site.reads == reads
    assert registry.generation == generation


# --- the ledger -----------------------------------------------------------------------------------------------------


def test_a_row_says_whose_it_is_and_what_became_of_it(site):
    site.add("mine", dist="acme-kernels", version="2.3.1")
    (row,) = Registry().backends()
    assert (row.name, row.state, row.distribution, row.version) == ("mine", "loaded", "acme-kernels", "2.3.1")
    assert row.description == "A good backend."
    assert row.error == ""
    assert row.opt_in is True, "a third party's backend is taken only by name"
    assert row.capabilities == CAN
    assert row.import_ms >= 0


def test_longspans_own_backends_need_no_consent_unless_they_say_so(site):
    site.add("own", dist="longspan")

    def shy(module):
        good(module)
        module.longspan_capabilities = hookimpl(lambda: Capabilities(opt_in=True))

    site.add("shy", shy, dist="longspan")
    found = quietly(Registry())
    assert found["own"].opt_in is False
    assert found["shy"].opt_in is True


def test_a_distributions_metadata_are_read_once(site):
    """They are parsed anew at every question, and there may be many backends in a distribution."""

    class Counted(Distribution):
        asked = 0

        @property
        def metadata(self):
            Counted.asked += 1
            return {"Name": "acme", "Version": "3.0"}

        @metadata.setter
        def metadata(self, _):
            pass

    owner = Counted("acme", "3.0")
    for name in ("one", "two", "three"):
        site.add(name)
        vars(site.points[-1])["dist"] = owner
    rows = Registry().backends()
    assert {(row.distribution, row.version, row.state) for row in rows} == {("acme", "3.0", "loaded")}
    assert Counted.asked == 1


def test_a_distribution_without_a_name_or_a_version(site):
    site.add("one")
    site.points[-1].dist.metadata.clear()
    (row,) = Registry().backends()
    assert (row.distribution, row.version, row.state, row.opt_in) == ("", "", "loaded", True)


def test_no_entry_points_at_all(site):
    registry = Registry()
    assert registry.backends() == ()
    assert registry.candidates() == ()


BROKEN = {
    "missing import": (raising(ImportError("libacme.so.3: cannot open")), "ImportError: libacme.so.3"),
    "missing module": (raising(ModuleNotFoundError("No module named 'triton'")), "triton"),
    "syntax": (raising(SyntaxError("invalid syntax")), "SyntaxError"),
    "attribute": (raising(AttributeError("torch has no")), "AttributeError"),
    "leaves": (raising(SystemExit(3)), "SystemExit"),
    "leaves happily": (raising(SystemExit()), "SystemExit"),
    "recursion": (raising(RecursionError("deep")), "RecursionError"),
    "memory": (raising(MemoryError()), "MemoryError"),
    "assertion": (raising(AssertionError("needs Linux")), "needs Linux"),
    "odd text": (raising(RuntimeError("")), "RuntimeError"),
    "no hooks": (lambda module: None, "longspan_capabilities"),
}


def with_capabilities(answer):
    def body(module):
        good(module)
        module.longspan_capabilities = hookimpl(answer)

    return body


def fail():
    raise OSError("nvidia-smi not found")


BROKEN |= {
    "none": (with_capabilities(lambda: None), "NoneType"),
    "a dictionary": (with_capabilities(lambda: {"devices": ("cpu",)}), "dict"),
    "the class": (with_capabilities(lambda: Capabilities), "longspan.Capabilities"),
    "raises": (with_capabilities(fail), "nvidia-smi"),
    "unknown dtype": (with_capabilities(lambda: Capabilities(dtypes=("fp8",))), "fp8"),
    "unknown field": (with_capabilities(lambda: Capabilities(quantum=True)), "quantum"),
    "wants arguments": (with_capabilities(lambda problem: CAN), "problem"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_one_broken_plugin_does_not_stop_the_others(site, case):
    body, said = BROKEN[case]
    site.add("a-good")
    site.add("broken", body, dist="bad-company", version="0.9")
    site.add("z-good")
    registry = Registry()
    with pytest.warns(ls.PluginWarning) as warned:
        found = {row.name: row for row in registry.backends()}
    assert [found[name].state for name in ("a-good", "broken", "z-good")] == ["loaded", "broken", "loaded"]
    assert said in found["broken"].error
    assert found["broken"].capabilities is None
    assert len(warned) == 1
    text = str(warned[0].message)
    for word in ("broken", "bad-company", "0.9", said, "longspan backends"):
        assert word in text
    assert callable(lane_of(registry, "z-good"))
    with pytest.raises(ls.PluginError, match="broken"):
        registry.lane("broken", "longspan_kernel")


@pytest.mark.parametrize(
    "ask", [Registry.backends, Registry.candidates, Registry.discover], ids=lambda ask: ask.__name__
)
def test_the_warning_names_the_line_that_asked_and_is_said_once(site, ask):
    site.add("broken", raising(OSError("gone")))
    registry = Registry()
    with pytest.warns(ls.PluginWarning) as warned:
        line = inspect.currentframe().f_lineno + 1
        ask(registry)
        ask(registry)
    assert [(one.filename, one.lineno) for one in warned] == [(__file__, line)]


def test_the_warning_of_a_first_attention_names_the_users_line(tmp_path):
    info = tmp_path / "acme_gone-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-gone\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\ngone = acme_gone_module\n")
    (said,) = in_a_new_python("""
        import json, sys, warnings
        import torch, longspan
        lines = ["x = torch.ones(1, 1, 3, 4)", "def call():", "    longspan.attention(x, x, x)", "call()"]
        code = compile("\\n".join(lines), "mine.py", "exec")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            exec(code, {"__name__": "mine", "torch": torch, "longspan": longspan})
        print(json.dumps([[one.category.__name__, one.filename, one.lineno] for one in seen]))
    """, PYTHONPATH=str(tmp_path))  # fmt: skip
    assert said == ["PluginWarning", "mine.py", 3]


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
def test_an_interrupt_is_no_plugin_error_and_leaves_the_registry_usable(site, error):
    site.add("a-good")
    module = site.add("slow", raising(error()))
    site.add("z-good")
    registry = Registry()
    with pytest.raises(error):
        registry.backends()
    site.bodies[module] = good
    found = quietly(registry)
    assert {name: (row.state, row.error) for name, row in found.items()} == {
        "a-good": ("loaded", ""), "slow": ("loaded", ""), "z-good": ("loaded", "")
    }  # fmt: skip
    assert callable(lane_of(registry, "slow"))


def test_warnings_that_are_errors_leave_the_registry_usable(site):
    """As under `python -W error`: what was a warning stops the call, and may not break what it was not about."""
    site.add("a-good")
    site.add("broken", raising(OSError("gone")))
    site.add("z-good")
    registry = Registry()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with contextlib.suppress(ls.PluginWarning):
                registry.backends()
    found = quietly(registry)
    assert {name: row.state for name, row in found.items()} == {
        "a-good": "loaded", "broken": "broken", "z-good": "loaded"
    }  # fmt: skip
    assert "gone" in found["broken"].error
    assert callable(lane_of(registry, "a-good"))


@pytest.mark.parametrize("api", [0, 2, 99])
def test_a_plugin_for_another_contract_is_incompatible(site, api):
    site.add("future", with_capabilities(lambda: Capabilities(api=api)))
    site.add("z-good")
    with pytest.warns(ls.PluginWarning, match="incompatible"):
        found = {row.name: row for row in Registry().backends()}
    assert found["future"].state == "incompatible"
    assert f"api={api}" in found["future"].error
    assert "Next:" in found["future"].error
    assert found["z-good"].state == "loaded"


def with_hook(name, hook=lambda problem: None):
    def body(module):
        good(module)
        setattr(module, name, hookimpl(hook))

    return body


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("longspan_kernal", "longspan_kernel"),
        ("longspan_capabilites", "longspan_capabilities"),
        ("longspan_unsuported", "longspan_unsupported"),
        ("longspan_buffer", "longspan_buffers"),
        ("longspan_patern", "longspan_pattern"),
    ],
)
def test_a_typo_in_a_hooks_name_gets_a_hint(site, typo, meant):
    site.add("typo", with_hook(typo))
    row = quietly(Registry())["typo"]
    assert row.state == "broken"
    assert typo in row.error
    assert f"Did you mean {meant!r}" in row.error


def test_what_one_plugin_got_wrong_is_not_laid_at_the_nexts_door(site):
    """All are tried against the same specifications, and a refusal in between leaves no trace there."""

    def twice(module):
        good(module)
        module.one = hookimpl(lambda problem: None, specname="longspan_kernal")
        module.two = hookimpl(lambda problem: None, specname="longspan_kernal")

    site.add("a-good")
    site.add("b-typo", twice)
    site.add("c-good")
    site.add("d-argument", with_hook("longspan_unsupported", lambda probelm: ()))
    site.add("e-argument", with_hook("longspan_unsupported", lambda probelm: ()))
    site.add("z-good")
    found = quietly(Registry())
    assert [found[name].state for name in sorted(found)] == ["loaded", "broken", "loaded", "broken", "broken", "loaded"]
    assert "longspan_kernal" in found["b-typo"].error
    assert "longspan_kernal" not in found["e-argument"].error


def test_a_typo_in_a_hooks_argument_is_found_too(site):
    site.add("typo", with_hook("longspan_unsupported", lambda probelm: ()))
    row = quietly(Registry())["typo"]
    assert row.state == "broken"
    assert "probelm" in row.error


def test_a_backend_without_a_kernel_is_said_to_lack_it():
    """Found when it is loaded, or when a plan is made; never a crash."""

    class Empty:
        @hookimpl
        def longspan_capabilities(self):
            return CAN

    ls.register(Empty(), name="test-empty")
    try:
        with pytest.raises(ls.LongspanError, match="test-empty"):
            ls.plan(ls.Problem(batch=1, heads=1, q_len=3, head_dim=4), backend="test-empty")
    except ls.PluginError as refusal:
        assert "longspan_kernel" in str(refusal)
    finally:
        ls.unregister("test-empty")


# --- duplicates -----------------------------------------------------------------------------------------------------


def test_a_duplicate_name_is_an_error_that_names_both(site):
    site.add("fast", dist="acme", version="1.0")
    site.add("fast", dist="zeta", version="2.0")
    site.add("z-good")
    registry = Registry()
    with pytest.warns(ls.PluginWarning, match="acme 1.0 and zeta 2.0"):
        rows = registry.backends()
    fast = [row for row in rows if row.name == "fast"]
    assert [row.state for row in fast] == ["duplicate", "duplicate"]
    assert {row.distribution for row in fast} == {"acme", "zeta"}
    assert all("acme 1.0" in row.error and "zeta 2.0" in row.error and "Next:" in row.error for row in fast)
    assert not [name for name in site.imported if "fast" in name], "neither is imported: none wins"
    assert [row.state for row in rows if row.name == "z-good"] == ["loaded"]
    assert [candidate.name for candidate in registry.candidates()] == ["fast", "z-good"]


def test_the_same_entry_point_listed_twice_counts_once(site):
    """As an editable install and its metadata do."""
    site.add("fast")
    site.points.append(site.points[0])
    (row,) = Registry().backends()
    assert row.state == "loaded"
    assert len(site.imported) == 1


@pytest.mark.parametrize("name", ["fast one", "a,b", "ünïcode", "a|b"])
def test_a_name_that_no_policy_could_say_is_not_loaded(site, name):
    """Metadata allow such names, but `LONGSPAN_BLOCK` could not keep the plugin out."""
    site.add(name, module="in_memory_unsayable")
    site.add("z-good")
    found = quietly(Registry())
    assert found[name].state != "loaded"
    assert found["z-good"].state == "loaded"


def test_two_names_for_one_module(site):
    """An old name kept beside a new one: each is a backend, or the second says why not."""
    module = site.add("fast")
    site.add("fast-old", module=module)
    registry = Registry()
    found = quietly(registry)
    assert found["fast"].state == "loaded"
    if found["fast-old"].state != "loaded":
        assert "fast" in found["fast-old"].error
    assert callable(lane_of(registry, "fast"))


def test_the_safe_mode_brings_the_built_in_backends_back(site, monkeypatch):
    """A third party's package took the name `sdpa`. `LONGSPAN_PLUGINS=builtin` must still give a working library."""
    site.add("sdpa", dist="longspan")
    site.add("sdpa", dist="aaa-squatter")
    monkeypatch.setenv("LONGSPAN_PLUGINS", "builtin")
    registry = Registry()
    rows = {row.distribution: row for row in registry.backends()}
    assert rows["aaa-squatter"].state == "blocked"
    assert rows["longspan"].state == "loaded"
    assert site.imported == ["in_memory_longspan_sdpa"]
    (candidate,) = registry.candidates()
    assert candidate.info.state == "loaded"


def test_allowing_one_of_two_distributions_ends_the_quarrel(site, monkeypatch):
    site.add("fast", dist="acme")
    site.add("fast", dist="zeta")
    monkeypatch.setenv("LONGSPAN_PLUGINS", "zeta")
    registry = Registry()
    rows = {row.distribution: row for row in registry.backends()}
    assert rows["acme"].state == "blocked"
    assert rows["zeta"].state == "loaded"
    assert callable(lane_of(registry, "fast"))


# --- allow and block ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "want"),
    [
        ("one", {"one"}),
        ("acme", {"one", "two"}),
        ("builtin", {"own"}),
        ("builtin,two", {"own", "two"}),
        ("longspan", {"own"}),
        ("zeta", {"three"}),
        ("nobody", set()),
        ("", {"one", "two", "three", "own"}),
    ],
)
def test_the_allow_list_takes_names_distributions_and_builtin(site, monkeypatch, allowed, want):
    site.add("one", dist="acme")
    site.add("two", dist="acme")
    site.add("three", dist="zeta")
    site.add("own", dist="longspan")
    monkeypatch.setenv("LONGSPAN_PLUGINS", allowed)
    found = quietly(Registry())
    assert {name for name, row in found.items() if row.state == "loaded"} == want
    assert {row.state for name, row in found.items() if name not in want} <= {"blocked"}
    assert len(site.imported) == len(want), "what is not allowed is not imported"
    for name, row in found.items():
        if name not in want:
            assert "LONGSPAN_PLUGINS" in row.error


def test_the_allow_list_reads_distribution_names_as_pip_does(site, monkeypatch):
    """`acme-kernels`, `acme_kernels` and `Acme.Kernels` are one project (PEP 503)."""
    site.add("one", dist="Acme_Kernels")
    monkeypatch.setenv("LONGSPAN_PLUGINS", "acme-kernels")
    assert quietly(Registry())["one"].state == "loaded"


def test_what_is_blocked_is_not_imported(site, monkeypatch):
    site.add("bad", raising(AssertionError("imported")))
    site.add("good")
    monkeypatch.setenv("LONGSPAN_BLOCK", "bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {row.name: row for row in Registry().backends()}
    assert found["bad"].state == "blocked"
    assert "LONGSPAN_BLOCK" in found["bad"].error
    assert found["good"].state == "loaded"
    assert site.imported == ["in_memory_acme_good"]


def test_block_beats_allow(site, monkeypatch):
    site.add("one")
    monkeypatch.setenv("LONGSPAN_BLOCK", "one")
    monkeypatch.setenv("LONGSPAN_PLUGINS", "one,acme")
    assert quietly(Registry())["one"].state == "blocked"
    assert site.imported == []


def test_blocking_one_of_two_duplicates_by_name_blocks_both(site, monkeypatch):
    site.add("fast", dist="acme")
    site.add("fast", dist="zeta")
    monkeypatch.setenv("LONGSPAN_BLOCK", "fast")
    rows = Registry().backends()
    assert [(row.distribution, row.state) for row in rows] == [("acme", "blocked"), ("zeta", "blocked")]


def test_a_lifted_block_brings_a_quarrel_back(site, monkeypatch):
    site.add("fast", dist="acme")
    site.add("fast", dist="zeta")
    site.add("z-good")
    monkeypatch.setenv("LONGSPAN_BLOCK", "fast")
    registry = Registry()
    quietly(registry)
    monkeypatch.delenv("LONGSPAN_BLOCK")
    with pytest.warns(ls.PluginWarning, match="acme 1.0 and zeta 1.0"):
        rows = registry.backends()
    assert [(row.name, row.state) for row in rows] == [
        ("fast", "duplicate"), ("fast", "duplicate"), ("z-good", "loaded")
    ]  # fmt: skip


def test_a_block_that_moves_to_another_backend(site, monkeypatch):
    """The one is imported now; the other stays in memory, and the policy keeps it from being used."""
    site.add("one")
    site.add("two")
    monkeypatch.setenv("LONGSPAN_BLOCK", "one")
    registry = Registry()
    assert {name: row.state for name, row in quietly(registry).items()} == {"one": "blocked", "two": "loaded"}
    generation = registry.generation
    monkeypatch.setenv("LONGSPAN_BLOCK", "two")
    assert {name: row.state for name, row in quietly(registry).items()} == {"one": "loaded", "two": "loaded"}
    assert registry.generation > generation
    assert site.imported == ["in_memory_acme_two", "in_memory_acme_one"]
    assert callable(lane_of(registry, "one"))


def test_a_lifted_block_whose_plugin_is_broken_stops_no_other(site, monkeypatch):
    site.add("good")
    site.add("sick", raising(OSError("gone")))
    monkeypatch.setenv("LONGSPAN_BLOCK", "sick")
    registry = Registry()
    quietly(registry)
    monkeypatch.delenv("LONGSPAN_BLOCK")
    monkeypatch.setenv("LONGSPAN_STRICT", "1")
    with pytest.raises(ls.PluginError, match="sick"):
        registry.backends()
    monkeypatch.delenv("LONGSPAN_STRICT")
    assert {name: row.state for name, row in quietly(registry).items()} == {"good": "loaded", "sick": "broken"}
    assert callable(lane_of(registry, "good"))


def test_a_block_that_was_lifted_is_lifted(site, monkeypatch):
    """`LONGSPAN_BLOCK` is part of the policy, which is read when a plan is made."""
    site.add("one")
    monkeypatch.setenv("LONGSPAN_BLOCK", "one")
    registry = Registry()
    assert quietly(registry)["one"].state == "blocked"
    monkeypatch.delenv("LONGSPAN_BLOCK")
    assert quietly(registry)["one"].state == "loaded"
    assert [candidate.info.state for candidate in registry.candidates()] == ["loaded"]


@pytest.mark.parametrize("variable", ["LONGSPAN_BLOCK", "LONGSPAN_PLUGINS"])
def test_lists_that_cannot_be_read_stop_discovery_before_anything_is_imported(site, monkeypatch, variable):
    site.add("one")
    monkeypatch.setenv(variable, "a b")
    registry = Registry()
    with pytest.raises(ls.PolicyError, match=variable):
        registry.backends()
    assert site.imported == []
    monkeypatch.delenv(variable)
    assert quietly(registry)["one"].state == "loaded"


# --- strict ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["broken", "duplicate", "incompatible"])
def test_strict_raises_and_recovers(site, monkeypatch, kind):
    site.add("good")
    if kind == "duplicate":
        site.add("sick", dist="acme")
        site.add("sick", dist="zeta")
    else:
        site.add("sick", {"broken": raising(OSError("gone")), "incompatible": with_capabilities(
            lambda: Capabilities(api=9))}[kind])  # fmt: skip
    monkeypatch.setenv("LONGSPAN_STRICT", "1")
    registry = Registry()
    for _ in range(2):
        with pytest.raises(ls.PluginError, match="sick") as caught:
            registry.backends()
        assert kind in str(caught.value)
        assert "LONGSPAN_STRICT" in str(caught.value)
    monkeypatch.delenv("LONGSPAN_STRICT")
    with pytest.warns(ls.PluginWarning):
        found = {row.name: row for row in registry.backends()}
    assert found["good"].state == "loaded"
    assert found["sick"].state == kind
    assert callable(lane_of(registry, "good"))


def test_strict_has_nothing_against_healthy_and_blocked_plugins(site, monkeypatch):
    site.add("good")
    site.add("blocked", raising(OSError()))
    monkeypatch.setenv("LONGSPAN_BLOCK", "blocked")
    monkeypatch.setenv("LONGSPAN_STRICT", "1")
    assert {row.state for row in Registry().backends()} == {"loaded", "blocked"}


def test_strict_that_cannot_be_read(site, monkeypatch):
    site.add("good")
    monkeypatch.setenv("LONGSPAN_STRICT", "perhaps")
    registry = Registry()
    with pytest.raises(ls.PolicyError, match="LONGSPAN_STRICT"):
        registry.backends()
    monkeypatch.setenv("LONGSPAN_STRICT", "0")
    assert quietly(registry)["good"].state == "loaded"


# --- plugins that use the library while they are imported -----------------------------------------------------------


def test_a_plugin_may_list_backends_while_it_is_imported(site):
    registry = Registry()

    def body(module):
        registry.backends()
        good(module)

    site.add("curious", body)
    site.add("z-good")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # least of all a warning that it is broken
        found = {row.name: row for row in registry.backends()}
    assert {row.state for row in found.values()} == {"loaded"}
    assert sorted(site.imported) == ["in_memory_acme_curious", "in_memory_acme_z_good"]


def test_what_a_plugin_registers_while_it_is_imported_is_kept_or_refused(site):
    """Silently lost is what it may not be."""
    registry = Registry()

    class Extension:
        @hookimpl(wrapper=True)
        def longspan_kernel(self):
            made = yield
            return ("wrapped", made)

    def body(module):
        registry.register(Extension(), "timer")
        good(module)

    site.add("greedy", body)
    row = quietly(registry)["greedy"]
    if row.state == "loaded":
        assert lane_of(registry, "greedy")[0] == "wrapped"
        registry.unregister("timer")
    else:
        assert "register" in row.error


# --- register and unregister ----------------------------------------------------------------------------------------


class Mine:
    """Mine, in one line.

    And more lines.
    """

    def __init__(self, tag="mine"):
        self.tag = tag

    @hookimpl
    def longspan_capabilities(self):
        return CAN

    @hookimpl
    def longspan_kernel(self, problem):
        tag = self.tag

        def kernel(q, k, v):
            return blockwise.forward(q, k, v, is_causal=problem.is_causal, scale=problem.scale)

        kernel.tag = tag
        return kernel


def test_register_and_unregister(site):
    registry = Registry()
    registry.register(Mine(), "mine")
    (row,) = registry.backends()
    assert (row.name, row.state, row.description, row.opt_in) == ("mine", "loaded", "Mine, in one line.", True)
    assert lane_of(registry, "mine").tag == "mine"
    registry.unregister("mine")
    assert registry.backends() == ()
    with pytest.raises(ls.PluginError, match="mine"):
        registry.lane("mine", "longspan_kernel")
    registry.register(Mine("again"), "mine")
    assert lane_of(registry, "mine").tag == "again"


def test_every_change_has_a_new_generation(site):
    registry = Registry()
    seen = [registry.generation]
    registry.register(Mine(), "mine")
    seen.append(registry.generation)
    registry.register(Timer(), "timer")
    seen.append(registry.generation)
    registry.unregister("timer")
    seen.append(registry.generation)
    registry.unregister("mine")
    seen.append(registry.generation)
    assert seen == sorted(set(seen))


def test_a_new_generation_reaches_attention():
    x = torch.randn(1, 1, 3, 4)
    ls.register(Mine(), name="test-mine")
    try:
        ls.attention(x, x, x, backend="test-mine")
    finally:
        ls.unregister("test-mine")
    with pytest.raises(ls.UnknownBackend):
        ls.attention(x, x, x, backend="test-mine")


@pytest.mark.parametrize("taken", ["entry point", "registered", "broken", "extension"])
def test_a_taken_name_is_refused_and_says_by_whom(site, taken):
    registry = Registry()
    if taken == "entry point":
        site.add("name", dist="acme", version="1.2")
    elif taken == "broken":
        site.add("name", raising(OSError()), dist="acme", version="1.2")
    quietly(registry)
    if taken == "registered":
        registry.register(Mine(), "name")
    elif taken == "extension":
        registry.register(Timer(), "name")
    before, generation = registry.backends(), registry.generation
    with pytest.raises(ls.DuplicateBackend, match="'name'") as caught:
        registry.register(Mine(), "name")
    if taken in ("entry point", "broken"):
        assert "acme 1.2" in str(caught.value)
    assert "Next:" in str(caught.value)
    assert (registry.backends(), registry.generation) == (before, generation)


def test_what_the_duplicate_message_offers_works(site):
    registry = Registry()
    registry.register(Mine("first"), "name")
    with pytest.raises(ls.DuplicateBackend, match="unregister"):
        registry.register(Mine("second"), "name")
    registry.unregister("name")
    registry.register(Mine("second"), "name")
    assert lane_of(registry, "name").tag == "second"


def test_one_object_under_two_names(site):
    """Either both work or the library says so in its own words."""
    registry, plugin = Registry(), Mine()
    registry.register(plugin, "one")
    generation = registry.generation
    try:
        registry.register(plugin, "two")
    except ls.PluginError as refusal:
        assert "one" in str(refusal)
        assert [row.name for row in registry.backends()] == ["one"]
        assert registry.generation == generation
    else:
        assert lane_of(registry, "two").tag == "mine"
    assert lane_of(registry, "one").tag == "mine"


def test_a_plugin_that_has_no_hash(site):
    """A dataclass or an attrs class compares by value and has none. Refused, or as good as any; no trap for others."""

    @dataclasses.dataclass
    class Settings(Mine):
        tag: str = "mine"

    registry = Registry()
    registry.register(Mine("other"), "other")
    try:
        registry.register(Settings(), "settings")
    except ls.PluginError as refusal:
        assert "hash" in str(refusal)
    else:
        assert lane_of(registry, "settings").tag == "mine"
    assert lane_of(registry, "other").tag == "other"
    assert [one.name for one in registry.candidates() if one.name == "other"] == ["other"]


def test_unregister_what_is_not_there(site):
    registry = Registry()
    with pytest.raises(ls.PluginError, match="nobody") as caught:
        registry.unregister("nobody")
    assert "Next:" in str(caught.value)


def test_a_broken_plugin_can_be_unregistered_and_its_name_used(site):
    site.add("name", raising(OSError()))
    registry = Registry()
    quietly(registry)
    registry.unregister("name")
    registry.register(Mine(), "name")
    assert lane_of(registry, "name").tag == "mine"


def test_the_cores_own_defaults_cannot_be_unregistered(site):
    """They are no plugin of the user's, and nothing works without them."""
    registry = Registry()
    registry.register(Mine(), "mine")
    internal = [name for name, _ in registry._manager.list_name_plugin() if name != "mine"]
    assert internal
    for name in internal:
        with pytest.raises(ls.PluginError):
            registry.unregister(name)
    device = ls.Device("cpu")
    assert registry.lane("mine", "longspan_cache")(device=device) is not None
    assert registry.lane("mine", "longspan_allocator")(device=device) is not None


def module_of(**hooks):
    module = types.ModuleType("in_memory")
    vars(module).update(hooks)
    return module


BAD_PLUGINS = {
    "the class instead of an object": Mine,
    "None": None,
    "a function": good,
    "an object without hooks": object(),
    "a module without hooks": module_of(),
    "capabilities that are none": module_of(longspan_capabilities=hookimpl(lambda: 5)),
    "capabilities that raise": module_of(longspan_capabilities=hookimpl(fail)),
    "capabilities that are data": module_of(longspan_capabilities=CAN),
    "a typo": module_of(longspan_capabilities=hookimpl(lambda: CAN), longspan_kernal=hookimpl(lambda: 1)),
    "a typo in an extension": module_of(longspan_kernal=hookimpl(lambda: 1)),
    "another api": module_of(longspan_capabilities=hookimpl(lambda: Capabilities(api=7))),
}


@pytest.mark.parametrize("case", BAD_PLUGINS, ids=str)
def test_a_plugin_that_does_not_keep_the_contract_is_refused_and_leaves_nothing(site, case):
    registry = Registry()
    registry.backends()
    generation = registry.generation
    with pytest.raises(ls.PluginError):
        registry.register(BAD_PLUGINS[case], "bad")
    assert registry.backends() == ()
    assert registry.generation == generation
    registry.register(Mine(), "bad")
    assert lane_of(registry, "bad").tag == "mine"


@pytest.mark.parametrize("name", ["", " ", "a b", "a,b", "a|b", 5, None], ids=repr)
def test_names_that_no_policy_could_say_are_refused(site, name):
    """`LONGSPAN_BLOCK` must be able to name every backend."""
    registry = Registry()
    with pytest.raises(ls.LongspanError):
        registry.register(Mine(), name)
    assert registry.backends() == ()


# --- lanes: one of N out of a 1:N system ----------------------------------------------------------------------------


class Timer:
    """An extension: wraps the kernel of every backend."""

    def __init__(self):
        self.seen = []

    @hookimpl(wrapper=True)
    def longspan_kernel(self, problem):
        made = yield
        self.seen.append(made)
        return made


def test_a_wrapper_wraps_every_lane_and_only_while_it_is_there(site):
    site.add("point")
    registry, timer = Registry(), Timer()
    registry.register(Mine("one"), "one")
    registry.register(timer, "timer")
    registry.register(Mine("two"), "two")
    kernels = [lane_of(registry, name) for name in ("point", "one", "two")]
    assert timer.seen == kernels
    registry.unregister("timer")
    lane_of(registry, "one")
    assert len(timer.seen) == 3


def test_an_extension_is_no_backend(site):
    registry = Registry()
    registry.register(Timer(), "timer")
    assert registry.backends() == ()
    assert registry.candidates() == ()
    with pytest.raises(ls.PluginError, match="timer"):
        registry.lane("timer", "longspan_kernel")


def test_wrappers_nest_and_may_replace_the_kernel(site):
    class Tag:
        def __init__(self, letter):
            self.letter = letter

        @hookimpl(wrapper=True)
        def longspan_kernel(self):
            made = yield
            made.tag += self.letter
            return made

    registry = Registry()
    registry.register(Tag("x"), "x")
    registry.register(Mine("mine-"), "mine")
    registry.register(Tag("y"), "y")
    assert sorted(lane_of(registry, "mine").tag[5:]) == ["x", "y"]


def test_a_backends_hooks_stay_in_its_own_lane(site):
    class Private(Mine):
        @hookimpl
        def longspan_unsupported(self, problem):
            return [ls.Reason("never", "q_len")]

        @hookimpl(tryfirst=True)
        def longspan_allocator(self, device):
            return "private"

        @hookimpl(wrapper=True)
        def longspan_cache(self, device):
            yield
            return "private"

    registry = Registry()
    registry.register(Private(), "private")
    registry.register(Mine(), "mine")
    problem = ls.Problem(batch=1, heads=1, q_len=3, head_dim=4)
    verdicts = {one.name: tuple(one.unsupported(problem)) for one in registry.candidates()}
    assert verdicts == {"private": (ls.Reason("never", "q_len"),), "mine": ()}
    device = ls.Device("cpu")
    for hook in ("longspan_allocator", "longspan_cache"):
        assert registry.lane("private", hook)(device=device) == "private"
        assert registry.lane("mine", hook)(device=device) != "private"


def test_the_order_of_registration_chooses_no_backend(site):
    for order in (("one", "two"), ("two", "one")):
        registry = Registry()
        for name in order:
            registry.register(Mine(name), name)
        assert [lane_of(registry, name).tag for name in ("one", "two")] == ["one", "two"]
        assert [one.name for one in registry.candidates()] == ["one", "two"]


@pytest.fixture
def mine():
    ls.register(Mine(), name="test-mine")
    yield "test-mine"
    ls.unregister("test-mine")


def test_a_wrapper_sees_the_kernels_of_a_real_plan(mine):
    """Both built-in backends and a registered one, for a lowered pattern."""
    x = torch.randn(1, 2, 12, 4)
    timer = Timer()
    ls.register(timer, name="test-timer")
    try:
        problem = ls.Problem.like(x, x, x, ls.Dilated((4, 12), (1, 2)))
        for backend in ("sdpa", "reference", mine):
            before = len(timer.seen)
            ls.plan(problem, backend=backend)
            assert len(timer.seen) > before, backend
    finally:
        ls.unregister("test-timer")


class Store:
    def __init__(self):
        self.kept, self.hits = {}, 0

    def get(self, problem):
        self.hits += problem in self.kept
        return self.kept.get(problem)

    def put(self, problem, layout):
        self.kept[problem] = layout


def test_an_extension_may_replace_the_cache(mine):
    store = Store()

    class Extension:
        @hookimpl
        def longspan_cache(self, device):
            assert isinstance(device, ls.Device)
            return store

    x = torch.randn(1, 2, 12, 4)
    problem = ls.Problem.like(x, x, x, ls.Dilated((5, 12), (1, 2)))
    want, _ = ls.plan(problem, backend=mine)(x, x, x)
    ls.register(Extension(), name="test-cache")
    try:
        first, second = ls.plan(problem, backend=mine), ls.plan(problem, backend=mine)
        assert store.kept
        assert store.hits >= 1
        assert first.layout == second.layout
        assert torch.equal(second(x, x, x)[0], want)
    finally:
        ls.unregister("test-cache")
    kept = len(store.kept)
    ls.plan(problem.replace(scale=3.0), backend=mine)
    assert len(store.kept) == kept


def test_a_new_extension_for_patterns_is_asked_although_the_layout_was_kept(mine):
    """A kept layout is older than the extension, and would silently leave it out."""
    x = torch.randn(1, 2, 12, 4)
    problem = ls.Problem.like(x, x, x, ls.Dilated((6, 12), (1, 3)))
    ls.plan(problem, backend=mine)
    asked = []

    class Extension:
        @hookimpl(wrapper=True)
        def longspan_pattern(self, problem):
            asked.append(problem)
            return (yield)

    ls.register(Extension(), name="test-pattern")
    try:
        ls.plan(problem, backend=mine)
        assert problem in asked
    finally:
        ls.unregister("test-pattern")


# --- threads and processes ------------------------------------------------------------------------------------------


def test_sixteen_threads_discover_once(site):
    go = threading.Barrier(16)
    for number in range(5):
        site.add(f"plugin-{number}")
    site.add("broken", raising(OSError("gone")))
    registry = Registry()

    def work(number):
        go.wait(30)
        return registry.backends() if number % 2 else tuple(one.info for one in registry.candidates())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ls.PluginWarning)
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(work, range(16)))
    assert len(set(found)) == 1
    assert len(found[0]) == 6
    assert len(site.imported) == len(set(site.imported)) == 6
    assert registry.generation == 1


def test_threads_that_register_and_read_at_once(site):
    registry = Registry()
    go = threading.Barrier(8)

    def work(number):
        go.wait(30)
        for turn in range(20):
            name = f"mine-{number}-{turn}"
            registry.register(Mine(name), name)
            assert lane_of(registry, name).tag == name
            assert name in [one.name for one in registry.candidates()]
            assert name in [row.name for row in registry.backends()]
            registry.unregister(name)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert registry.backends() == ()
    assert registry.generation == 1 + 8 * 20 * 2


FORK = """
    import json, os, signal, sys, threading, warnings
    import torch
    torch.set_num_threads(1)
    import longspan as ls
    warnings.simplefilter("ignore")
    x = torch.ones(1, 1, 3, 4)

    def child_works(lock):
        held, done = threading.Event(), threading.Event()
        def hold():
            with lock:
                held.set()
                done.wait(60)
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(60)
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # a lock that stays locked would hang for ever
            out = ls.attention(x, x, x, ls.Dilated((2, 3), (1, 2)))
            ls.backends()
            os._exit(0 if out.shape == x.shape else 1)
        status = os.waitpid(child, 0)[1]
        done.set()
        thread.join()
        return os.waitstatus_to_exitcode(status)

    registry = sys.modules["longspan.registry.discovery"].registry
    found = {"none, before the first discovery": child_works(threading.Lock())}
    ls.backends()
    found["the registry's"] = child_works(registry._lock)
    attention = sys.modules.get("longspan.planning.attention")
    store = registry.lane("sdpa", "longspan_cache")(device=ls.Device("cpu"))
    for name, owner in (("the kept plans'", attention), ("the kept layouts'", store)):  # if they have one
        found[name] = child_works(getattr(owner, "_lock", threading.Lock()))
    ls.attention(x, x, x)

    # In the midst of discovery: one plugin is loaded, the next is being asked what it can do.
    import types
    from importlib.metadata import EntryPoint
    discovery, parent = sys.modules["longspan.registry.discovery"], os.getpid()
    asked, go_on = threading.Event(), threading.Event()
    def plugin(name, wait):
        def longspan_capabilities():
            if wait and os.getpid() == parent:
                asked.set()
                go_on.wait(60)
            return ls.Capabilities()
        made = types.ModuleType(name)
        made.longspan_capabilities = ls.hookimpl(longspan_capabilities)
        made.longspan_kernel = ls.hookimpl(lambda problem: None)
        sys.modules[name] = made
        return EntryPoint(name, name, discovery.GROUP)
    points = [plugin("a_good", False), plugin("slow", True), plugin("z_good", False)]
    discovery.entry_points = lambda **wanted: points
    half = discovery.Registry()
    thread = threading.Thread(target=half.backends)
    thread.start()
    asked.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        states = [row.state for row in half.backends()]
        os._exit(0 if states == ["loaded"] * 3 else 1)
    found["the registry's, in the midst of discovery"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    go_on.set()
    thread.join()
    assert [row.state for row in half.backends()] == ["loaded"] * 3
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def forked():
    """The exit status of a child that was forked while another thread held a lock; -14 where it hung."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    return in_a_new_python(FORK)


@pytest.mark.parametrize(
    "lock",
    [
        "none, before the first discovery",
        "the registry's",
        "the kept plans'",
        "the kept layouts'",
        "the registry's, in the midst of discovery",
    ],
)
def test_a_fork_while_another_thread_holds_a_lock(forked, lock):
    """In the child that thread does not exist: what it held must not stay held."""
    assert forked[lock] == 0


def _in_a_worker(made):
    torch.set_num_threads(1)
    x = torch.ones(1, 2, 5, 4)
    out, _ = made(x, x, x)
    return made.backend, [row.name for row in ls.backends()], torch.allclose(out, x)


def test_a_plan_runs_in_a_new_process():
    x = torch.ones(1, 2, 5, 4)
    made = ls.plan(ls.Problem.like(x, x, x, ls.Dilated((2, 4), (1, 2))), backend="reference")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        backend, names, right = pool.apply_async(_in_a_worker, (made,)).get(60)
    assert backend == "reference"
    assert {"sdpa", "reference"} <= set(names)
    assert right


# --- a backend that learns what this machine is --------------------------------------------------------------------


def test_a_backend_that_learned_something_is_asked_again_and_plans_are_made_anew():
    class Learning:
        tier = 3

        @hookimpl
        def longspan_capabilities(self):
            return Capabilities(devices=("cpu",), dtypes=("float32",), patterns=("dense",), tier=self.tier)

    registry, plugin = Registry(), Learning()
    registry.register(plugin, name="learning")
    before = registry.generation
    registry.refresh(plugin)
    assert registry.generation == before, "nothing changed, and plans are kept"
    plugin.tier = 4
    registry.refresh(plugin)
    assert registry.generation == before + 1
    assert registry.capabilities("learning").tier == 4
    registry.refresh(Learning())  # not registered
    assert registry.generation == before + 1
    plugin.tier = "high"
    with pytest.raises(ls.PluginError, match=r"Capabilities\.tier"):
        registry.refresh(plugin)
    assert registry.capabilities("learning").tier == 4
