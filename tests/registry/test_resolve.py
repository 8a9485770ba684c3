"""The choice of a backend is a pure function: a CPU machine answers for every device ever made."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import longspan as ls
from longspan import Capabilities, Device, Problem, Reason
from longspan.registry.discovery import registry
from longspan.registry.policy import Policy
from longspan.registry.resolve import refusals, require, resolve
from longspan.spec.backend import BackendInfo
from longspan.spec.resolution import Candidate

DEVICES = ("cpu", "sm_61", "sm_70", "sm_80", "sm_90", "gfx942", "mps")
VARIABLES = ("LONGSPAN_BACKEND", "LONGSPAN_PREFER", "LONGSPAN_BLOCK", "LONGSPAN_PLUGINS", "LONGSPAN_STRICT")
ANY = {"devices": ("cpu", "cuda", "rocm", "mps"), "dtypes": ("float16", "bfloat16", "float32", "float64")}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def problem(**changes):
    return Problem(**{"batch": 2, "heads": 4, "q_len": 64, "head_dim": 64, **changes})


def candidate(name, *reasons, state="loaded", opt_in=False, error="", distribution="acme", **can):
    """A candidate; dense and causal on everything unless said otherwise."""
    can = {**ANY, "patterns": ("dense",), "causal": True, "opt_in": opt_in, **can}
    info = BackendInfo(
        name, state, distribution, "1.0", opt_in=opt_in, error=error,
        capabilities=Capabilities(**can) if state == "loaded" else None,
    )  # fmt: skip
    return Candidate(info, lambda problem: reasons)


# --- purity ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_devices(monkeypatch):
    """Anything that asks a device is an error."""

    def touched(*args, **kwargs):
        raise AssertionError("a device was touched")

    for name in (
        "init", "_lazy_init", "is_available", "is_initialized", "device_count", "current_device",
        "get_device_capability", "get_device_properties", "get_device_name", "mem_get_info", "synchronize",
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, touched)
    for module in ("mps", "xpu"):
        for name in ("is_available", "device_count", "synchronize"):
            if hasattr(getattr(torch, module, None), name):
                monkeypatch.setattr(getattr(torch, module), name, touched)


CHOSEN = {  # by auto, where it is not sdpa: what runs half precision best where
    ("float32", "cpu"): "cpu_fused", ("float16", "cpu"): "cpu_fused", ("float16", "sm_61"): "pascal_fp32",
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("pattern", ["dense", "dilated:32/1,64/2"])
def test_resolve_touches_no_device(no_devices, device, dtype, pattern):
    asked = problem(device=device, dtype=dtype, pattern=ls.parse_pattern(pattern), is_causal=True, requires_grad=True)
    found = resolve(asked, registry.candidates(), Policy())
    assert found.chosen == CHOSEN.get((dtype, device), "sdpa")
    assert found.decided_by == "auto"
    assert found["reference"].ok
    assert device in str(found)


@pytest.mark.parametrize("device", ["sm_60", "sm_61", "sm_62", "sm_70", "sm_75"])
def test_bfloat16_goes_to_no_device_without_it(no_devices, device):
    """Before sm_80 only what computes in float32 may take it."""
    found = resolve(problem(device=device, dtype="bfloat16"), registry.candidates(), Policy())
    assert found.chosen in (None, "pascal_fp32")
    assert {verdict.name for verdict in found.candidates if verdict.ok} <= {
        "pascal_fp32", "reference", "block_sparse_batched",
    }  # fmt: skip


def test_resolve_is_a_function_of_its_arguments(no_devices):
    candidates = registry.candidates()
    for device in DEVICES:
        asked = problem(device=device)
        first = resolve(asked, candidates, Policy())
        assert resolve(asked, candidates, Policy()) == first
        assert resolve(asked, candidates[::-1], Policy()) == first


@pytest.mark.parametrize("device", DEVICES)
def test_explain_answers_without_the_device_and_says_so(monkeypatch, device):
    def touched(*args, **kwargs):
        raise AssertionError("CUDA was touched")

    for name in ("init", "_lazy_init", "get_device_capability", "get_device_properties", "current_device"):
        monkeypatch.setattr(torch.cuda, name, touched)
    found = ls.explain(problem(), device=device)
    assert found.chosen == ("cpu_fused" if device == "cpu" else "sdpa")
    assert found.problem.device == Device.parse(device)
    if device == "cpu":
        assert found.notes == ()
    elif device not in torch_can_run():
        assert device in found.notes[0]
        assert found.notes[0] in str(found)


def torch_can_run():
    """The devices of the list that this machine may have; asked of torch alone."""
    found = {"cpu", "mps"} if torch.backends.mps.is_available() else {"cpu"}
    return found | set(DEVICES[1:6]) if torch.cuda.is_available() else found


def test_explain_takes_a_device_object_too():
    assert ls.explain(problem(), device=Device.parse("sm_90")) == ls.explain(problem(), device="sm_90")


def test_explain_does_not_change_the_problem():
    asked = problem()
    ls.explain(asked, device="sm_61")
    assert asked.device == Device("cpu")


# --- what auto may take ---------------------------------------------------------------------------------------------

UNASKED = {"opt_in": {"opt_in": True}, "experimental": {"experimental": True}, "approximate": {"exact": False}}


@pytest.mark.parametrize("code", UNASKED, ids=str)
@pytest.mark.parametrize("alone", [True, False])
def test_auto_never_takes_what_must_be_named(code, alone):
    shy = candidate("shy", tier=100, patterns=("dense", "dilated"), **UNASKED[code])
    others = [] if alone else [candidate("plain", tier=-100)]
    found = resolve(problem(), [shy, *others], Policy())
    assert found.chosen == (None if alone else "plain")
    assert found["shy"].ok, "it fits; it only has to be named"
    assert [reason.code for reason in found["shy"].reasons] == [code]
    assert "shy" in found["shy"].reasons[0].fix
    if alone:
        with pytest.raises(ls.BackendUnavailable, match="backend='shy'"):
            require(found)


@pytest.mark.parametrize("code", UNASKED, ids=str)
@pytest.mark.parametrize("place", ["argument", "context", "environment"])
def test_naming_is_consent(code, place):
    candidates = [candidate("shy", **UNASKED[code]), candidate("plain")]
    found = resolve(problem(), candidates, Policy(backend="shy", backend_from=place))
    assert (found.chosen, found.decided_by) == ("shy", place)
    assert found["shy"].reasons == ()
    found = resolve(problem(), candidates, Policy(prefer=("shy",), prefer_from=place))
    assert (found.chosen, found.decided_by) == ("shy", place)


def test_consent_to_one_is_none_to_another():
    candidates = [candidate("a", opt_in=True), candidate("b", opt_in=True), candidate("plain")]
    found = resolve(problem(head_dim=64), [candidate("a", opt_in=True, head_dim_max=32), *candidates[1:]],
                    Policy(prefer=("a",), prefer_from="context"))  # fmt: skip
    assert found.chosen == "plain"


@pytest.mark.parametrize("state", ["blocked", "broken", "duplicate", "incompatible"])
def test_what_is_not_loaded_is_never_taken_and_its_error_is_kept(state):
    sick = candidate("sick", state=state, error="ImportError: libacme.so.3")
    found = resolve(problem(), [sick, candidate("plain")], Policy())
    assert found.chosen == "plain"
    assert not found["sick"].ok
    assert found["sick"].reasons[0].code == state
    assert "libacme" in found["sick"].reasons[0].got
    named = resolve(problem(), [sick, candidate("plain")], Policy(backend="sick", backend_from="argument"))
    assert named.chosen is None
    with pytest.raises(ls.BackendUnavailable, match="libacme") as caught:
        require(named)
    assert caught.value.resolution is named


def test_what_was_kept_out_by_a_setting_is_not_called_broken():
    """Neither fixing nor uninstalling helps against LONGSPAN_PLUGINS."""
    kept_out = candidate("kept", state="blocked", error="not among LONGSPAN_PLUGINS=builtin")
    fix = resolve(problem(), [kept_out], Policy())["kept"].reasons[0].fix
    assert "uninstall" not in fix and "fix" not in fix


def test_nobody_registered():
    found = resolve(problem(), [], Policy())
    assert (found.chosen, found.candidates) == (None, ())
    assert str(found)
    with pytest.raises(ls.BackendUnavailable, match="Next:"):
        require(found)


# --- the order ------------------------------------------------------------------------------------------------------


def chosen(*candidates, pattern="dense", **policy):
    return resolve(problem(pattern=ls.parse_pattern(pattern)), candidates, Policy(**policy)).chosen


def test_native_support_of_the_pattern_comes_before_the_tier():
    native = candidate("z", patterns=("dense", "dilated"), tier=-5)
    assert chosen(candidate("a", tier=5), native, pattern="dilated:32/2") == "z"
    assert chosen(candidate("a", tier=5), native) == "a"
    assert chosen(candidate("a", patterns=("dilated",)), candidate("b"), pattern="dilated:32/2") == "a"


def test_a_higher_tier_comes_before_a_name():
    assert chosen(candidate("a"), candidate("b", tier=1)) == "b"
    assert chosen(candidate("b"), candidate("a")) == "a"
    assert chosen(candidate("a", tier=-1), candidate("b")) == "b"


def test_a_preference_comes_before_native_support():
    native = candidate("n", patterns=("dense", "dilated"), tier=9)
    plain, low = candidate("plain"), candidate("low", tier=-9)
    for prefer, want in ((("low",), "low"), (("plain", "low"), "plain"), (("low", "plain"), "low"), ((), "n")):
        assert chosen(native, plain, low, pattern="dilated:32/2", prefer=prefer) == want


def test_why_counts_those_that_auto_may_take_and_not_those_that_fit_by_name():
    by_name = candidate("consent", opt_in=True)
    alone = resolve(problem(), [candidate("plain"), by_name], Policy())
    assert [one.ok for one in alone.candidates] == [True, True]
    assert alone.why.startswith("plain is the only one that auto may take;")
    two = resolve(problem(), [candidate("plain"), candidate("second"), by_name], Policy())
    assert two.why.startswith("plain is the first of 2 that auto may take;")


def test_a_preference_that_does_not_fit_is_passed_over_and_said():
    found = resolve(
        problem(), [candidate("old", devices=("cuda",)), candidate("plain"), candidate("second")],
        Policy(prefer=("old", "second"), prefer_from="environment"),
    )  # fmt: skip
    assert (found.chosen, found.decided_by) == ("second", "environment")
    assert "old" in found.why
    nobody = resolve(
        problem(), [candidate("old", devices=("cuda",)), candidate("plain")],
        Policy(prefer=("old",), prefer_from="environment"),
    )  # fmt: skip
    assert (nobody.chosen, nobody.decided_by) == ("plain", "auto")
    assert "old" in nobody.why


def test_a_pattern_that_nobody_declares_is_lowered_only_to_dense():
    dilated_only = candidate("d", patterns=("dilated",))
    assert chosen(dilated_only) is None
    assert chosen(dilated_only, pattern="dilated:32/2") == "d"
    nothing = candidate("n", patterns=())
    assert chosen(nothing) is None
    assert chosen(nothing, pattern="dilated:32/2") is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"documents": (0, 10, 64)}, "documents|cu_seqlens"),
        ({"kv_heads": 2}, "gqa|kv_heads"),
        ({"kv_len": 96, "query_offset": 32}, "query_offset"),
    ],
    ids=repr,
)
def test_a_backend_without_dense_gets_no_problem_that_would_have_to_be_lowered(changes, word):
    """Its only kernel is for a pattern, and takes none of these: lowering would ask it for a dense kernel."""
    only = candidate("d", patterns=("dilated",))
    asked = problem(pattern=ls.Dilated((32,), (2,)), **changes)
    found = resolve(asked, [only], Policy())
    assert found.chosen is None
    assert re.search(word, " ".join(f"{reason.code} {reason.field}" for reason in found["d"].reasons))


@pytest.mark.parametrize("changes", [{"documents": (0, 10, 64)}, {"kv_heads": 2}, {"kv_len": 96, "query_offset": 32}])
def test_a_dense_backend_gets_every_argument_by_lowering(changes):
    assert resolve(problem(is_causal=True, **changes), [candidate("plain")], Policy()).chosen == "plain"


# --- reasons --------------------------------------------------------------------------------------------------------

UNFIT = {
    "device": ({"devices": ("cuda>=8.0",)}, {}, "cuda>=8.0"),
    "dtype": ({"dtypes": ("float16", "bfloat16")}, {}, "float16 or bfloat16"),
    "head_dim": ({"head_dim_max": 32}, {}, "32"),
    "pattern": ({"patterns": ("window",)}, {}, "window"),
    "is_causal": ({"causal": False}, {"is_causal": True}, "False"),
    "dropout_p": ({}, {"dropout_p": 0.1}, "0.0"),
    "deterministic": ({}, {"deterministic": True}, "False"),
}


@pytest.mark.parametrize("name", UNFIT, ids=str)
def test_reasons_are_data(name):
    can, changes, want = UNFIT[name]
    found = resolve(problem(**changes), [candidate("unfit", **can)], Policy())
    assert found.chosen is None
    (reason,) = found["unfit"].reasons
    assert isinstance(reason, Reason)
    assert reason.field == name
    assert want in reason.want
    assert reason.code and reason.got and reason.fix
    assert all(isinstance(getattr(reason, part), str) for part in ("code", "field", "got", "want", "fix"))
    assert str(reason) in str(found)


@pytest.mark.parametrize(
    ("can", "dim", "ok"),
    [
        ({"head_dim_max": 64}, 64, True), ({"head_dim_max": 64}, 65, False), ({"head_dim_min": 16}, 16, True),
        ({"head_dim_min": 16}, 15, False), ({"head_dim_multiple": 8}, 72, True), ({"head_dim_multiple": 8}, 71, False),
        ({}, 1, True), ({}, 4096, True),
    ],
)  # fmt: skip
def test_limits_of_the_head_dimension(can, dim, ok):
    found = resolve(problem(head_dim=dim), [candidate("c", **can)], Policy())
    assert found["c"].ok is ok
    if not ok:
        assert str(dim) in str(found["c"].reasons[0])


def test_every_reason_is_given_at_once():
    unfit = candidate("u", devices=("mps",), dtypes=("float16",), head_dim_max=8, head_dim_multiple=16, causal=False)
    found = resolve(problem(is_causal=True, dropout_p=0.5, head_dim=20), [unfit], Policy())
    fields = [reason.field for reason in found["u"].reasons]
    assert fields.count("head_dim") == 2
    assert {"device", "dtype", "head_dim", "is_causal", "dropout_p"} == set(fields)


def test_a_backends_own_reasons_count_and_keep_their_words():
    odd = Reason("odd", "q_len", "64", "an odd length", "drop a token")
    found = resolve(problem(), [candidate("o", odd), candidate("plain", tier=-1)], Policy())
    assert found.chosen == "plain"
    assert found["o"].reasons == (odd,)
    assert refusals(problem(), candidate("o", odd)) == (odd,)
    with pytest.raises(ls.BackendUnavailable, match="drop a token"):
        require(resolve(problem(), [candidate("o", odd)], Policy(backend="o", backend_from="argument")))


def test_a_backends_own_reasons_are_asked_of_the_problem_at_hand():
    seen = []
    info = candidate("o").info
    asked = problem(q_len=7)
    resolve(asked, [Candidate(info, lambda one: seen.append(one) or ())], Policy())
    assert seen == [asked]


# --- one broken plugin and the others -------------------------------------------------------------------------------


class Explosive:
    """A third party's backend whose refusal hook is at fault."""

    def __init__(self, answer):
        self.answer = answer

    @ls.hookimpl
    def longspan_capabilities(self):
        return Capabilities(devices=("cpu",), dtypes=("float32",), patterns=("dense",), causal=True)

    @ls.hookimpl
    def longspan_unsupported(self, problem):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    @ls.hookimpl
    def longspan_kernel(self, problem):
        raise AssertionError("not asked")


@pytest.mark.parametrize(
    "answer",
    [RuntimeError("driver too old"), ZeroDivisionError(), Reason("one", "q_len"), "no", ["no"], 5, [None]],
    ids=repr,
)
def test_a_refusal_hook_at_fault_does_not_stop_the_others(answer):
    """Installing a package changes no result: nobody named this one."""
    ls.register(Explosive(answer), name="test-explosive")
    try:
        found = ls.explain(problem())
        assert found.chosen == "cpu_fused"
        assert all(isinstance(reason, Reason) for reason in found["test-explosive"].reasons)
        assert not found["test-explosive"].ok
        found.to_json()
        with pytest.raises(ls.LongspanError, match="test-explosive"):
            ls.plan(problem(), backend="test-explosive")
    finally:
        ls.unregister("test-explosive")


# --- Resolution -----------------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    return problem(
        device=draw(st.sampled_from([*DEVICES, "sm_100", "cuda", "xpu"])),
        dtype=draw(st.sampled_from(["float16", "bfloat16", "float32", "float64"])),
        pattern=ls.parse_pattern(draw(st.sampled_from(["dense", "dilated:32/1,64/2", "dilated:8/3:grouped"]))),
        head_dim=draw(st.sampled_from([1, 64, 72, 300])),
        is_causal=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.1])),
        deterministic=draw(st.booleans()),
        requires_grad=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=60)
@given(asked=problems(), backend=st.sampled_from([None, "sdpa", "reference"]))
def test_a_resolution_survives_json_and_pickle_and_shows_itself(asked, backend):
    found = ls.explain(asked, backend=backend)
    data = json.loads(found.to_json())
    assert data == json.loads(json.dumps(found.to_dict()))
    assert data["chosen"] == found.chosen
    assert data["decided_by"] == found.decided_by == ("auto" if backend is None else "argument")
    assert [one["name"] for one in data["candidates"]] == [one.name for one in found.candidates]
    for one, verdict in zip(data["candidates"], found.candidates, strict=True):
        assert one["ok"] is verdict.ok
        assert tuple(Reason(**reason) for reason in one["reasons"]) == verdict.reasons
        assert all(set(reason) == {"code", "field", "got", "want", "fix"} for reason in one["reasons"])
    assert pickle.loads(pickle.dumps(found)) == found
    assert str(found) and "Resolution" in repr(found)
    oks = [verdict.ok for verdict in found.candidates]
    assert oks == sorted(oks, reverse=True), "those that fit come first"
    if found.chosen is None:
        with pytest.raises(ls.BackendUnavailable) as caught:
            require(found)
        assert "Next:" in str(caught.value).splitlines()[-1]
    else:
        assert found[found.chosen].ok
        assert require(found) == found.chosen
        if backend is None:
            assert found.candidates[0].name == found.chosen


def test_a_resolution_prints_as_a_table():
    lines = str(ls.explain(problem(is_causal=True), backend="reference")).splitlines()
    assert "causal" in lines[0]
    assert any(line.split()[:2] == ["reference", "chosen"] for line in lines)
    assert any(line.split()[:2] == ["sdpa", "ok"] for line in lines)
    assert any("argument" in line for line in lines)


def test_a_resolution_is_asked_by_name():
    found = ls.explain(problem())
    assert found["sdpa"].name == "sdpa"
    with pytest.raises(KeyError, match="nobody"):
        found["nobody"]


@pytest.mark.parametrize("where", ["backend", "prefer", "deny"])
def test_unknown_names_in_a_policy(where):
    value = "plian" if where == "backend" else ("plian",)
    with pytest.raises(ls.UnknownBackend, match="'plain'") as caught:
        resolve(problem(), [candidate("plain")], Policy(**{where: value}))
    assert caught.value.name == "plian"
    assert caught.value.known == ("plain",)
