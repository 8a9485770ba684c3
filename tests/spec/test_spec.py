"""The values that describe devices, problems and backends: frozen, hashable, picklable, claiming nothing unasked."""

from __future__ import annotations

import concurrent.futures
import json
import math
import multiprocessing
import pickle

import attrs
import pytest
import torch
from attrs.exceptions import FrozenInstanceError

import longspan as ls
from longspan import Capabilities, Device, Problem, Reason
from longspan.errors import LongspanError


def problem(**changes):
    return Problem(**{"batch": 2, "heads": 4, "q_len": 16, "head_dim": 8, **changes})


# --- Device ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "type_", "capability", "name"),
    [
        ("cpu", "cpu", None, "cpu"),
        ("CPU", "cpu", None, "cpu"),
        (" cpu ", "cpu", None, "cpu"),
        ("cuda", "cuda", None, "cuda"),
        ("cuda:3", "cuda", None, "cuda"),
        ("sm_61", "cuda", (6, 1), "sm_61"),
        ("sm61", "cuda", (6, 1), "sm_61"),
        ("SM_70", "cuda", (7, 0), "sm_70"),
        ("sm_80", "cuda", (8, 0), "sm_80"),
        ("sm_90", "cuda", (9, 0), "sm_90"),
        ("sm_90a", "cuda", (9, 0), "sm_90"),
        ("sm_100", "cuda", (10, 0), "sm_100"),
        ("sm_120", "cuda", (12, 0), "sm_120"),
        ("gfx942", "rocm", None, "gfx942"),
        ("gfx90a", "rocm", None, "gfx90a"),
        ("gfx1100", "rocm", None, "gfx1100"),
        ("rocm", "rocm", None, "rocm"),
        ("mps", "mps", None, "mps"),
        ("xpu", "xpu", None, "xpu"),
    ],
)
def test_device_parse(text, type_, capability, name):
    device = Device.parse(text)
    assert (device.type, device.capability, device.name, str(device)) == (type_, capability, name, name)


@pytest.mark.parametrize(
    "text", ["", "gpu", "sm", "sm_", "sm_9", "sm_x0", "gfx", "gfxyz", "cuda:", "cuda:x", "cuda:-1", "cpu cuda", "h100"]
)
def test_device_parse_refuses_and_shows_what_would_do(text):
    with pytest.raises(ls.ArgumentError, match="device") as caught:
        Device.parse(text)
    assert repr(text) in str(caught.value)
    assert "sm_90" in str(caught.value)


@pytest.mark.parametrize("name", ["cpu", "cuda", "sm_61", "sm_100", "gfx942", "rocm", "mps", "xpu"])
def test_a_device_name_reads_back(name):
    assert Device.parse(Device.parse(name).name) == Device.parse(name)


@pytest.mark.parametrize(
    ("text", "wanted", "fits"),
    [
        ("cpu", "cpu", True),
        ("cpu", "cuda", False),
        ("cpu", "cuda>=0.0", False),
        ("sm_61", "cuda", True),
        ("sm_61", "cuda>=6.1", True),
        ("sm_61", "cuda>=6.2", False),
        ("sm_61", "cuda>=8.0", False),
        ("sm_61", "cuda==6.1", True),
        ("sm_60", "cuda==6.1", False),
        ("sm_61", "cuda<7.0", True),
        ("sm_70", "cuda<7.0", False),
        ("sm_70", "cuda<=7.0", True),
        ("sm_75", "cuda<=7.0", False),
        ("sm_70", "cuda>7.0", False),
        ("sm_75", "cuda>7.0", True),
        ("sm_80", "cuda>=8.0", True),
        ("sm_90", "cuda>=8.0", True),
        ("sm_100", "cuda>=8.0", True),  # 10 is more than 8: numbers, not text
        ("sm_100", "cuda<9.0", False),
        ("gfx942", "rocm", True),
        ("gfx942", "cuda", False),
        ("rocm", "cuda>=8.0", False),
        ("mps", "mps", True),
        ("mps", "cpu", False),
        ("cuda", "cuda>=8.0", True),  # of unknown capability: taken to be recent enough
        ("cuda", "cuda==6.1", False),
        ("cuda", "cuda<7.0", False),
        ("cuda", "cuda", True),
    ],
)
def test_device_matches(text, wanted, fits):
    assert Device.parse(text).matches(wanted) is fits


def test_device_of_a_torch_device_is_what_parse_reads():
    assert Device.of(torch.device("cpu")) == Device.parse("cpu")
    assert Device.of(torch.device("meta")).type == "meta"


def test_the_ordinal_makes_no_other_kind_of_device():
    assert Device.parse("cuda:0") == Device.parse("cuda:1")
    assert hash(Device.parse("cuda:0")) == hash(Device.parse("cuda:1"))
    assert Device.parse("cuda:1").index == 1
    assert Device.parse("sm_80") != Device.parse("sm_90")


# --- Problem --------------------------------------------------------------------------------------------------------


def test_problem_fills_in_what_follows_from_the_other_fields():
    made = problem()
    assert (made.kv_heads, made.kv_len) == (4, 16)
    assert made.scale == 1 / math.sqrt(8)
    assert made.device == Device("cpu")
    assert made.pattern == ls.Dense()
    assert made.dtype == "float32"


def test_equal_problems_are_one_key():
    assert problem() == problem(kv_heads=4, kv_len=16, scale=1 / math.sqrt(8), dtype=torch.float32, device="cpu")
    assert hash(problem()) == hash(problem(kv_heads=4, kv_len=16))
    assert len({problem(), problem(), problem(is_causal=True)}) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 1}, {"heads": 8}, {"q_len": 15}, {"head_dim": 4}, {"kv_heads": 2}, {"kv_len": 12},
        {"dtype": "float64"},
        {"device": "sm_61"}, {"pattern": ls.Dilated((8,), (1,))}, {"is_causal": True}, {"scale": 1.0},
        {"dropout_p": 0.5}, {"documents": (0, 16)}, {"query_offset": 1}, {"requires_grad": True},
        {"deterministic": True},
    ],
    ids=repr,
)  # fmt: skip
def test_every_field_of_a_problem_tells_it_apart(change):
    assert problem(**change) != problem()
    assert problem().replace(**change) == problem(**{"kv_heads": 4, "kv_len": 16, "scale": 1 / math.sqrt(8), **change})


def test_problem_is_frozen_and_replace_leaves_it_alone():
    made = problem()
    with pytest.raises((FrozenInstanceError, AttributeError)):
        made.q_len = 3
    before = hash(made)
    assert made.replace(q_len=3).q_len == 3
    assert made.q_len == 16
    assert hash(made) == before


VALUES = [
    problem(),
    problem(pattern=ls.Dilated((8, 4), (1, 2), heads="grouped"), documents=(0, 3, 16), is_causal=True),
    problem(device="sm_61", dtype="bfloat16"),
    Device.parse("cuda:1"),
    Capabilities(devices=("cpu",), dtypes=("float32",), patterns=("dense",)),
    Reason("dtype", "dtype", "float64", "float16", "cast"),
    ls.BufferSpec("scratch", (3, 4)),
    ls.BackendInfo("mine", "broken", error="ImportError: no"),
    ls.Verdict("mine", False, (Reason("a", "b"),)),
    ls.explain(problem()),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_pickle_hash_and_show_themselves(value):
    again = pickle.loads(pickle.dumps(value))
    assert again == value
    assert hash(again) == hash(value)
    assert type(value).__name__ in repr(value)
    with pytest.raises((FrozenInstanceError, AttributeError)):
        setattr(value, attrs.fields(type(value))[0].name, "other")


def _key_of(pickled):
    made, text = pickle.loads(pickled)
    return made == problem(is_causal=True) and hash(made) == hash(problem(is_causal=True)) and str(made) == text


def test_a_hashed_problem_survives_another_process():
    """Hashes of text differ from process to process, so the kept hash may not travel."""
    made = problem(is_causal=True)
    hash(made)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(_key_of, pickle.dumps((made, str(made)))).result(60)


@pytest.mark.parametrize("name", ["batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim"])
@pytest.mark.parametrize("bad", [-3, 1.5, 2.0, "4", True, None], ids=repr)
def test_a_problem_has_whole_numbers(name, bad):
    with pytest.raises(ls.ArgumentError, match=name):
        problem(**{name: bad})


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("dtype", "int32"), ("dtype", torch.complex64), ("dtype", "half"), ("dtype", None),
        ("device", "gpu"), ("device", None),
        ("pattern", "dense"), ("pattern", None), ("pattern", ls.Dense),
        ("scale", math.inf), ("scale", -math.inf), ("scale", "1"),
        ("dropout_p", -0.1), ("dropout_p", 1.0), ("dropout_p", math.nan), ("dropout_p", "0"),
        ("query_offset", -1), ("query_offset", 1.5), ("query_offset", "0"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_problem_refuses_and_names_the_field(name, bad):
    with pytest.raises(ls.ArgumentError, match=name):
        problem(**{name: bad})


@pytest.mark.parametrize("name", ["scale", "dropout_p", "query_offset"])
def test_none_is_the_default_or_refused(name):
    """As in `attention`, where None stands for the default of two of them."""
    try:
        made = problem(**{name: None})
    except ls.ArgumentError as refusal:
        assert name in str(refusal)
        return
    assert made == problem()


@pytest.mark.parametrize(
    "bad", [(0, 17), (0, 99), (1, 16), (), (0, 9, 4), (0, -1), "016", (0, 1.5), 5], ids=repr
)  # fmt: skip
def test_a_problem_checks_its_documents(bad):
    """A plan trusts its problem: a boundary beyond the sequence would make it read its neighbour's memory."""
    with pytest.raises(ls.ArgumentError, match=r"documents|cu_seqlens"):
        problem(documents=bad)


def test_documents_need_as_many_queries_as_keys():
    with pytest.raises(ls.ArgumentError, match=r"documents|cu_seqlens"):
        problem(q_len=8, kv_len=16, documents=(0, 8))


def test_documents_as_a_list_are_refused_or_become_hashable():
    try:
        made = problem(documents=[0, 5, 16])
    except ls.ArgumentError:
        return
    assert hash(made) == hash(problem(documents=(0, 5, 16)))


def test_head_counts_must_divide():
    with pytest.raises(ls.ArgumentError, match="3 key heads for 4 query heads"):
        problem(kv_heads=3)
    with pytest.raises(ls.ArgumentError):
        problem(kv_heads=8)


def test_a_pattern_is_checked_against_the_heads():
    with pytest.raises(ls.ArgumentError, match="grouped"):
        problem(heads=2, pattern=ls.Dilated((4, 8, 16), (1, 1, 1), heads="grouped"))


def test_like_reads_the_tensors():
    query = torch.zeros(2, 6, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    key = torch.zeros(2, 3, 9, 8, dtype=torch.bfloat16)
    pattern = ls.Dilated((4,), (2,))
    made = Problem.like(
        query, key, key, pattern, is_causal=True, scale=0.5, dropout_p=0.25, enable_gqa=True, query_offset=4
    )
    assert made == Problem(
        batch=2, heads=6, kv_heads=3, q_len=5, kv_len=9, head_dim=8, dtype="bfloat16", pattern=pattern, is_causal=True,
        scale=0.5, dropout_p=0.25, query_offset=4, requires_grad=True,
    )  # fmt: skip


@pytest.mark.parametrize("which", [0, 1, 2])
def test_like_sees_a_gradient_wanted_of_any_input(which):
    inputs = [torch.zeros(1, 1, 3, 4, requires_grad=i == which) for i in range(3)]
    assert Problem.like(*inputs).requires_grad
    with torch.no_grad():
        assert not Problem.like(*inputs).requires_grad


def test_like_sees_the_deterministic_switch():
    x = torch.zeros(1, 1, 3, 4)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert Problem.like(x, x, x).deterministic
    finally:
        torch.use_deterministic_algorithms(before)
    assert not Problem.like(x, x, x).deterministic


def test_a_zero_head_dim_has_no_scale():
    with pytest.raises(ls.ArgumentError, match="head_dim"):
        problem(head_dim=0)


# --- Capabilities ---------------------------------------------------------------------------------------------------


def test_silence_claims_nothing():
    silent = Capabilities()
    poorest = {
        "devices": (), "dtypes": (), "patterns": (), "causal": False, "gqa": False, "dropout": False,
        "documents": False, "window": False, "query_offset": False, "backward": False, "deterministic": False,
        "experimental": False, "opt_in": False, "api": 1,
    }  # fmt: skip
    for name, value in poorest.items():
        assert getattr(silent, name) == value, name
    assert silent.exact is True


def test_every_switch_is_off_unless_asked_for():
    """A field added later must keep to the rule: a claim is never the default. `exact` is no claim but a duty."""
    claims = {
        a.name: a.default for a in attrs.fields(Capabilities) if isinstance(a.default, bool) and a.name != "exact"
    }
    assert claims and not any(claims.values())


def test_silent_capabilities_fit_no_problem():
    class Silent:
        @ls.hookimpl
        def longspan_capabilities(self):
            return Capabilities()

        @ls.hookimpl
        def longspan_kernel(self, problem):
            raise AssertionError("must not be asked")

    ls.register(Silent(), name="test-silent")
    try:
        verdict = ls.explain(problem())["test-silent"]
        assert not verdict.ok
        assert {reason.field for reason in verdict.reasons} >= {"device", "dtype", "pattern"}
        with pytest.raises(ls.BackendUnavailable):
            ls.plan(problem(), backend="test-silent")
    finally:
        ls.unregister("test-silent")


@pytest.mark.parametrize("name", ["devices", "dtypes", "patterns"])
def test_a_text_in_place_of_a_tuple_is_refused(name):
    with pytest.raises(ls.ArgumentError, match="tuple"):
        Capabilities(**{name: "float32"})


@pytest.mark.parametrize(
    "bad",
    [
        {"dtypes": ("fp8",)}, {"dtypes": ("torch.float32",)}, {"devices": ("cuda >= 8.0",)}, {"devices": ("cuda>=8",)},
        {"devices": ("sm_80",)}, {"devices": ("",)}, {"head_dim_multiple": 0}, {"head_dim_multiple": -8},
        {"head_dim_max": 0}, {"head_dim_max": "128"}, {"devices": (None,)}, {"dtypes": (torch.float32,)},
        {"tier": "high"}, {"api": "1"},
    ],
    ids=repr,
)  # fmt: skip
def test_capabilities_that_could_not_be_read_are_refused(bad):
    """Refused when they are declared: later they would stop the resolver for every other backend too."""
    with pytest.raises(ls.ArgumentError):
        Capabilities(**bad)


def test_capabilities_take_lists_and_stay_hashable():
    made = Capabilities(devices=["cpu"], dtypes=["float32"], patterns=["dense"])
    assert hash(made) == hash(Capabilities(devices=("cpu",), dtypes=("float32",), patterns=("dense",)))


# --- printing -------------------------------------------------------------------------------------------------------


def test_a_reason_reads_as_a_sentence_and_drops_nothing():
    text = str(Reason("dtype", "dtype", "float64", "float16 or bfloat16", "query.half()"))
    for part in ("dtype", "float64", "float16 or bfloat16", "query.half()"):
        assert part in text
    assert str(Reason("busy", "device")) == "device"


def test_backend_info_is_plain_for_json():
    for row in ls.backends():
        found = json.loads(json.dumps(row.to_dict()))
        assert {"name", "state", "distribution", "version", "description", "opt_in", "error"} <= set(found)
        assert found["state"] in ("loaded", "blocked", "broken", "duplicate", "incompatible")


# --- exceptions -----------------------------------------------------------------------------------------------------


def every_exception():
    blocked = ls.explain(problem(dtype="float64", device="mps", dropout_p=0.5), backend="sdpa")
    return [
        ls.ArgumentError("scale", "nan", "a finite number", "pass scale=None"),
        ls.UnknownBackend("spda", ["sdpa", "reference"], "from the argument"),
        ls.BackendUnavailable("sdpa does not fit", blocked),
        ls.PolicyError("LONGSPAN_BLOCK=',': ..."),
        ls.PluginError("no hook"),
        ls.DuplicateBackend("twice"),
    ]


@pytest.mark.parametrize("error", every_exception(), ids=lambda error: type(error).__name__)
def test_exceptions_are_of_one_family_and_survive_a_pickle(error):
    """One that does not unpickle breaks a process pool or a data loader, and the message is lost."""
    assert isinstance(error, LongspanError)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again).keys() == vars(error).keys()


def test_exceptions_are_also_of_pythons_kinds():
    assert issubclass(ls.ArgumentError, ValueError)
    assert issubclass(ls.UnknownBackend, LookupError)
    assert issubclass(ls.BackendUnavailable, RuntimeError)
    assert issubclass(ls.DuplicateBackend, ls.PluginError)
    assert issubclass(ls.PluginWarning, UserWarning)
