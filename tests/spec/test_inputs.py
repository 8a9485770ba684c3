"""What a user may hand in, and what is refused: by the library's own exceptions, which name the argument, what was
given and what would do, and end with what to do next."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
import torch

import longspan as ls
from longspan.errors import LongspanError

BACKENDS = ("sdpa", "reference")
VARIABLES = ("LONGSPAN_BACKEND", "LONGSPAN_PREFER", "LONGSPAN_BLOCK", "LONGSPAN_PLUGINS", "LONGSPAN_STRICT")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def qkv(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*(shape or (2, 4, 9, 8)), dtype=torch.float64, generator=generator).to(dtype) for _ in range(3)]


def short(value):
    return repr(value)[:20]


def refused(argument, *said, error=ls.ArgumentError, call=ls.attention, **keywords):
    """Call, and check that the refusal says everything that it must."""

    def check(*tensors, **more):
        with pytest.raises(LongspanError) as caught:
            call(*tensors, **keywords, **more)
        text = str(caught.value)
        assert type(caught.value) is error, f"{type(caught.value).__name__}: {text}"
        assert re.search(argument, text), f"does not name {argument}: {text}"
        for word in said:
            assert re.search(word, text), f"does not say {word}: {text}"
        last = text.splitlines()[-1]
        assert "Next:" in last, f"does not end with what to do next: {text}"
        assert len(last.split("Next:")[-1].strip()) > 5, text
        return caught.value

    return check


# --- the tensors ----------------------------------------------------------------------------------------------------

NOT_FLOATS = [torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex128]
NOT_FLOATS += [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", NOT_FLOATS, ids=str)
@pytest.mark.parametrize("place", ["query", "key", "value", "all"])
def test_dtypes_that_are_no_floats(dtype, place):
    tensors = dict(zip(("query", "key", "value"), qkv(), strict=True))
    for name in tensors:
        if place in (name, "all"):
            tensors[name] = tensors[name].abs().to(dtype)
    at_fault = "query" if place == "all" else place
    refused(rf"^{at_fault}:", re.escape(str(dtype)), "float32")(**tensors)


@pytest.mark.parametrize(
    "bad", [None, 3, "query", [[1.0]], (1, 2), pytest.param(object(), id="object()"), torch.float32], ids=repr
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_tensors(bad, place):
    tensors = qkv()
    tensors[place] = bad
    name = ("query", "key", "value")[place]
    refused(rf"^{name}:", type(bad).__name__, "torch.Tensor")(*tensors)


def test_an_array_of_numpy_is_no_tensor():
    numpy = pytest.importorskip("numpy")
    q, k, v = qkv()
    refused("^key:", "ndarray", "torch.as_tensor")(q, numpy.asarray(k), v)


@pytest.mark.parametrize("shape", [(), (9,), (9, 8), (4, 9, 8), (1, 2, 4, 9, 8)], ids=repr)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_other_than_four_dimensions(shape, place):
    tensors = qkv()
    tensors[place] = torch.randn(shape, dtype=torch.float64)
    name = ("query", "key", "value")[place]
    refused(rf"^{name}:", re.escape(str(shape)), r"\(batch, heads, seq, head_dim\)")(*tensors)


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mismatched_dtypes(place, dtype):
    tensors = qkv()
    tensors[place] = tensors[place].to(dtype)
    name = ("query", "key", "value")[place]
    refused(rf"^{name}:", re.escape(str(dtype)), r"torch\.float64")(*tensors)


@pytest.mark.parametrize("place", [1, 2])
def test_mismatched_devices(place):
    tensors = qkv()
    tensors[place] = tensors[place].to("meta")
    name = ("query", "key", "value")[place]
    refused(rf"^{name}:", "meta", "cpu")(*tensors)


def test_query_alone_elsewhere():
    q, k, v = qkv()
    refused(r"^(query|key):", "meta", "cpu")(q.to("meta"), k, v)


def test_a_device_that_no_backend_serves():
    error = refused("device", "meta", "cpu", error=ls.BackendUnavailable)(*(x.to("meta") for x in qkv()))
    assert error.resolution.chosen is None


MISMATCHES = {
    "key batch": ("key", (3, 4, 9, 8), (3, 4, 9, 8), r"\(3, 4, 9, 8\)"),
    "key head_dim": ("key", (2, 4, 9, 7), (2, 4, 9, 7), r"\(2, 4, 9, 7\)"),
    "value length": ("value", (2, 4, 9, 8), (2, 4, 10, 8), r"\(2, 4, 10, 8\)"),
    "value head_dim": ("value", (2, 4, 9, 8), (2, 4, 9, 16), r"\(2, 4, 9, 16\)"),
    "value heads": ("value", (2, 4, 9, 8), (2, 2, 9, 8), r"\(2, 2, 9, 8\)"),
    "value batch of one": ("value", (2, 4, 9, 8), (1, 4, 9, 8), r"\(1, 4, 9, 8\)"),
    "key batch of one": ("key", (1, 4, 9, 8), (1, 4, 9, 8), r"\(1, 4, 9, 8\)"),
    "heads and sequence swapped": ("key", (2, 9, 4, 8), (2, 9, 4, 8), "9 heads"),
}


@pytest.mark.parametrize("case", MISMATCHES, ids=str)
def test_mismatched_shapes(case):
    name, key_shape, value_shape, said = MISMATCHES[case]
    q = qkv()[0]
    k, v = torch.randn(key_shape, dtype=torch.float64), torch.randn(value_shape, dtype=torch.float64)
    refused(rf"^{name}:", said)(q, k, v)


def test_fewer_key_heads_are_a_mistake_unless_asked_for():
    q, k, v = qkv(2, 4, 9, 8)
    refused("^key:", "2 heads", "4 heads", "enable_gqa=True")(q, k[:, :2], v[:, :2])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 3), (4, 8), (4, 0), (6, 4), (1, 2)])
def test_head_counts_that_do_not_divide(heads, kv_heads):
    q = torch.randn(2, heads, 9, 8)
    k = torch.randn(2, kv_heads, 9, 8)
    refused("key", f"{kv_heads} heads for {heads}", "divisor", enable_gqa=True)(q, k, k)


def test_more_branches_than_heads():
    pattern = ls.Dilated((4, 8, 16), (1, 1, 1), heads="grouped")
    refused("pattern", "3 branches", "2 heads", "at least 3")(*qkv(1, 2, 9, 8), pattern=pattern)


def test_a_head_dim_of_zero():
    refused("head_dim", "0", "at least 1")(*(x[..., :0] for x in qkv()))


def nested(layout):
    parts = [torch.randn(4, 9, 8), torch.randn(4, 7, 8)]
    if layout is torch.jagged:
        parts = [part.transpose(0, 1) for part in parts]
    return torch.nested.nested_tensor(parts, layout=layout)


STRANGE = {
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x[0, 0].to_sparse_csr(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": lambda x: nested(torch.strided),
    "jagged": lambda x: nested(torch.jagged),
}


@pytest.mark.filterwarnings("ignore")  # torch calls nested and CSR tensors a prototype
@pytest.mark.parametrize("kind", STRANGE, ids=str)
@pytest.mark.parametrize("place", ["query", "key", "value", "all"])
def test_tensors_without_strides(kind, place):
    """They have a shape, or claim to, but no strided memory: refused by name before anything is launched."""
    tensors = dict(zip(("query", "key", "value"), qkv(dtype=torch.float32), strict=True))
    made = STRANGE[kind](qkv()[0])
    for name in tensors:
        if place in (name, "all"):
            tensors[name] = made
    with pytest.raises(ls.ArgumentError) as caught:
        ls.attention(**tensors)
    assert str(caught.value).startswith("query" if place == "all" else place)


# --- sequences of different lengths ---------------------------------------------------------------------------------


@pytest.mark.parametrize("q_len, kv_len", [(5, 9), (9, 5), (1, 9)])
@pytest.mark.parametrize(
    ("pattern", "causal"), [(ls.Dense(), True), (ls.Dilated((4,), (2,)), False), (ls.Dilated((4,), (2,)), True)]
)
def test_other_lengths_need_a_query_offset(pattern, causal, q_len, kv_len):
    q, k, v = qkv(2, 4, 9, 8)
    error = refused("^query_offset:", f"{q_len} queries and {kv_len} keys", "top left", "bottom right")(
        q[:, :, :q_len], k[:, :, :kv_len], v[:, :, :kv_len], pattern=pattern, is_causal=causal
    )
    for offset in {0, max(kv_len - q_len, 0)}:
        assert f"query_offset={offset}" in str(error), "both conventions, with their numbers"


@pytest.mark.parametrize(("q_len", "kv_len"), [(9, 5), (9, 1)])
def test_the_offsets_that_the_message_offers_can_be_passed(q_len, kv_len):
    """With more queries than keys the last-with-last convention would start at a negative position."""
    q, k, v = qkv(2, 4, 9, 8)
    arguments = (q[:, :, :q_len], k[:, :, :kv_len], v[:, :, :kv_len])
    with pytest.raises(ls.ArgumentError) as caught:
        ls.attention(*arguments, is_causal=True)
    for offset in re.findall(r"query_offset=(-?\d+)", str(caught.value)):
        ls.attention(*arguments, is_causal=True, query_offset=int(offset))


def test_dense_attention_to_everything_needs_no_offset():
    q, k, v = qkv(2, 4, 9, 8)
    assert ls.attention(q[:, :, :5], k, v).shape == (2, 4, 5, 8)


@pytest.mark.parametrize("bad", [-1, -9, 1.0, 0.5, "0", True, False, (0,), math.nan], ids=repr)
def test_query_offsets_that_are_no_positions(bad):
    refused("^query_offset:", re.escape(repr(bad)), is_causal=True, query_offset=bad)(*qkv())


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "1", True, [1.0], torch.ones(()), 1j], ids=repr)
def test_scales_that_are_no_numbers(bad):
    refused("^scale:", "finite number", scale=bad)(*qkv())


@pytest.mark.parametrize("bad", [-0.1, 1.0, 1.5, math.nan, math.inf, "0.1", True, None], ids=repr)
def test_dropout_that_is_no_probability(bad):
    refused("^dropout_p:", dropout_p=bad)(*qkv())


@pytest.mark.parametrize(
    ("bad", "good"), [({"scale": True}, {"scale": 1}), ({"query_offset": True}, {"query_offset": 1})], ids=repr
)
def test_a_refusal_does_not_depend_on_what_was_called_before(bad, good):
    """1 == True, and a kept plan that is found by equality would let through what the checks refuse."""
    ls.attention(*qkv(), is_causal=True, **good)
    with pytest.raises(ls.ArgumentError):
        ls.attention(*qkv(), is_causal=True, **bad)


@pytest.mark.parametrize("bad", ["false", "no", "", 0.5, [], torch.ones(9, 9, dtype=torch.bool)], ids=short)
@pytest.mark.parametrize("name", ["is_causal", "enable_gqa"])
def test_switches_are_true_or_false(name, bad):
    """`is_causal="false"` would mean True, and a mask passed by mistake would mean anything."""
    with pytest.raises(ls.ArgumentError, match=name):
        ls.attention(*qkv(), **{name: bad})


@pytest.mark.parametrize("bad", ["dense", "dilated:4/1", ls.Dense, 5, torch.ones(9, 9), (4, 1)], ids=short)
def test_patterns_that_are_none(bad):
    """A mask is what comes fourth in torch's function."""
    refused("^pattern:")(*qkv(), bad)


def test_none_is_the_dense_pattern():
    q, k, v = qkv()
    assert torch.equal(ls.attention(q, k, v, None), ls.attention(q, k, v))


@pytest.mark.parametrize("argument", ["attn_mask", "dropout", "causal", "window"])
def test_an_argument_that_does_not_exist_is_never_swallowed(argument):
    with pytest.raises(TypeError, match=argument):
        ls.attention(*qkv(), **{argument: None})


# --- packed documents -----------------------------------------------------------------------------------------------

BAD_DOCUMENTS = {
    "empty": ((), "0"),
    "no start": ((1, 9), "first boundary of 0"),
    "negative start": ((-1, 9), "first boundary of 0"),
    "falls": ((0, 5, 4, 9), "never fall"),
    "negative": ((0, -5), "never fall"),
    "beyond": ((0, 5, 10), "9"),
    "floats": ((0, 4.5, 9), "integer"),
    "whole floats": ((0, 4.0, 9), "integer"),
    "booleans": ((False, True), "integer"),
    "text": ("09", "integer"),
    "a number": (9, "integer"),
    "none in it": ((0, None), "integer"),
    "a dictionary": ({0: 9}, "integer"),
    "a float tensor": (torch.tensor([0.0, 9.0]), "integer"),
    "a boolean tensor": (torch.tensor([False, True]), "integer"),
    "two dimensions": (torch.tensor([[0, 9]]), "dimension"),
    "no dimension": (torch.tensor(0), "dimension"),
    "an empty tensor": (torch.tensor([], dtype=torch.int64), "0"),
    "a tensor that falls": (torch.tensor([0, 5, 4], dtype=torch.int32), "never fall"),
    "a tensor beyond": (torch.tensor([0, 99]), "9"),
    "elsewhere": (torch.tensor([0, 9], device="meta"), "meta"),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS, ids=str)
def test_boundaries_that_are_none(case):
    bad, said = BAD_DOCUMENTS[case]
    refused("^cu_seqlens:", said, cu_seqlens=bad)(*qkv())


def test_boundaries_need_as_many_queries_as_keys():
    q, k, v = qkv()
    refused("^cu_seqlens:", "5 queries", "9 keys", cu_seqlens=(0, 5))(q[:, :, :5], k, v)


@pytest.mark.parametrize("make", [tuple, list, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
@pytest.mark.parametrize("bounds", [(0,), (0, 9), (0, 0, 3, 3, 9), (0, 4), (0, 0)])
def test_boundaries_in_every_form(make, bounds):
    q, k, v = qkv()
    out = ls.attention(q, k, v, is_causal=True, cu_seqlens=make(list(bounds)))
    for start, stop in pairwise(bounds):
        alone = [x[:, :, start:stop] for x in (q, k, v)]
        assert torch.allclose(out[:, :, start:stop], ls.attention(*alone, is_causal=True), atol=1e-14)
    assert not out[:, :, bounds[-1] :].any()


def test_boundaries_that_change_in_place_are_read_again():
    q, k, v = qkv()
    bounds = torch.tensor([0, 4, 9])
    before = ls.attention(q, k, v, cu_seqlens=bounds)
    bounds[1] = 6
    after = ls.attention(q, k, v, cu_seqlens=bounds)
    assert not torch.equal(before, after)
    assert torch.equal(after, ls.attention(q, k, v, cu_seqlens=(0, 6, 9)))


@pytest.mark.parametrize("pattern", [ls.Dense(), ls.Dilated((3,), (2,))], ids=repr)
def test_documents_and_an_offset_are_not_both_dropped(pattern):
    """Honoured or refused. Positions in a packed batch start at each document, so an offset has no meaning there."""
    q, k, v = qkv()
    plain = ls.attention(q, k, v, pattern, is_causal=True, cu_seqlens=(0, 4, 9))
    try:
        both = ls.attention(q, k, v, pattern, is_causal=True, cu_seqlens=(0, 4, 9), query_offset=2)
    except ls.ArgumentError as refusal:
        assert "query_offset" in str(refusal) and "cu_seqlens" in str(refusal)
        return
    assert not torch.equal(both, plain), "the offset was accepted and dropped"


# --- nothing to do --------------------------------------------------------------------------------------------------

EMPTY = {
    "no batch": ((0, 4, 9, 8), (0, 4, 9, 8)),
    "no heads": ((2, 0, 9, 8), (2, 0, 9, 8)),
    "no tokens": ((2, 4, 0, 8), (2, 4, 0, 8)),
    "no queries": ((2, 4, 0, 8), (2, 4, 9, 8)),
    "no keys": ((2, 4, 9, 8), (2, 4, 0, 8)),
    "nothing at all": ((0, 0, 0, 8), (0, 0, 0, 8)),
}


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("case", EMPTY, ids=str)
@pytest.mark.parametrize(
    "pattern", [ls.Dense(), ls.Dilated((4, 8), (2, 3)), ls.Dilated((4, 8), (2, 3), offset="block")]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_empty_inputs_give_empty_results_and_gradients(backend, case, pattern, dtype):
    query_shape, key_shape = EMPTY[case]
    q = torch.randn(query_shape, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(key_shape, dtype=dtype, requires_grad=True) for _ in range(2))
    out, lse = ls.attention(q, k, v, pattern, is_causal=True, query_offset=0, backend=backend, return_lse=True)
    assert out.shape == q.shape and out.dtype == dtype
    assert lse.shape == q.shape[:3] and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not out.any()
    assert (lse == -math.inf).all()
    for gradient, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert gradient.shape == x.shape and gradient.dtype == x.dtype
        assert not gradient.any()


def test_fewer_key_heads_of_an_empty_sequence():
    q, k = torch.randn(2, 4, 0, 8), torch.randn(2, 2, 0, 8)
    assert ls.attention(q, k, k, enable_gqa=True).shape == q.shape


# --- backends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "near"), [("spda", "sdpa"), ("Sdpa", "sdpa"), ("referense", "reference")])
def test_an_unknown_backend_gets_the_nearest_match_and_the_list(name, near):
    error = refused("backend", repr(name), f"Did you mean {near!r}", error=ls.UnknownBackend, backend=name)(*qkv())
    for known in BACKENDS:
        assert known in str(error)


def test_an_unknown_backend_far_from_every_name():
    error = refused("backend", "'zzzzzz'", error=ls.UnknownBackend, backend="zzzzzz")(*qkv())
    assert "Did you mean" not in str(error)
    assert all(known in str(error) for known in BACKENDS)


def test_an_unknown_backend_says_where_it_was_named(monkeypatch):
    with pytest.raises(ls.UnknownBackend, match="argument"):
        ls.attention(*qkv(), backend="nobody")
    with ls.use(backend="nobody"), pytest.raises(ls.UnknownBackend, match="context"):
        ls.attention(*qkv())
    with ls.use(prefer=("nobody",)), pytest.raises(ls.UnknownBackend, match="context"):
        ls.attention(*qkv())
    monkeypatch.setenv("LONGSPAN_BACKEND", "nobody")
    with pytest.raises(ls.UnknownBackend, match="environment"):
        ls.attention(*qkv())


@pytest.mark.parametrize("bad", ["", 5, ["sdpa"], b"sdpa", True, ("sdpa", "reference")], ids=repr)
def test_backends_that_are_no_names(bad):
    refused("backend", error=ls.PolicyError, backend=bad)(*qkv())


class Narrow:
    """Takes next to nothing."""

    @ls.hookimpl
    def longspan_capabilities(self):
        return ls.Capabilities(
            devices=("cuda>=8.0",), dtypes=("float16",), patterns=("dense",), head_dim_max=4, head_dim_multiple=16
        )

    @ls.hookimpl
    def longspan_unsupported(self, problem):
        raise AssertionError("not asked where the capabilities refuse")

    @ls.hookimpl
    def longspan_kernel(self, problem):
        raise AssertionError("not asked for what it does not fit")


@pytest.fixture
def narrow():
    ls.register(Narrow(), name="test-narrow")
    yield "test-narrow"
    ls.unregister("test-narrow")


def test_a_backend_that_does_not_fit_says_every_reason(narrow):
    error = refused(
        narrow, "cuda>=8.0", "float64", "float16", "head_dim", "at most 4", "multiple of 16", "is_causal",
        error=ls.BackendUnavailable, backend=narrow,
    )(*qkv(), is_causal=True)  # fmt: skip
    verdict = error.resolution[narrow]
    assert not verdict.ok
    assert error.resolution.asked == narrow
    assert error.resolution.chosen is None
    assert all(str(reason) in str(error) for reason in verdict.reasons)
    assert {reason.field for reason in verdict.reasons} == {"device", "dtype", "head_dim", "is_causal"}


def test_a_backend_that_does_not_fit_is_never_replaced_and_those_that_fit_are_named(narrow):
    error = refused("sdpa", error=ls.BackendUnavailable, backend=narrow)(*qkv())
    assert "backend='" in str(error).splitlines()[-1]
    with ls.use(backend=narrow), pytest.raises(ls.BackendUnavailable, match=narrow):
        ls.attention(*qkv())


def test_a_preferred_backend_that_does_not_fit_is_passed_over_and_the_resolution_says_so(narrow):
    with ls.use(prefer=(narrow, "reference")):
        resolution = ls.plan(ls.Problem.like(*qkv())).resolution
    assert resolution.chosen == "reference"
    assert narrow in resolution.why
    assert not resolution[narrow].ok


# --- the environment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["LONGSPAN_BACKEND", "LONGSPAN_PREFER", "LONGSPAN_BLOCK"])
@pytest.mark.parametrize("bad", ["sd pa", "sdpa,,reference", ",", "sdpa;reference", "sdpa,", "ünïcode", "$HOME", "a/b"])
def test_unreadable_lists_of_names(monkeypatch, variable, bad):
    monkeypatch.setenv(variable, bad)
    refused(variable, re.escape(bad), error=ls.PolicyError)(*qkv())


def test_two_names_where_one_is_wanted(monkeypatch):
    monkeypatch.setenv("LONGSPAN_BACKEND", "sdpa,reference")
    refused("LONGSPAN_BACKEND", "sdpa,reference", "LONGSPAN_PREFER", error=ls.PolicyError)(*qkv())


@pytest.mark.parametrize("variable", ["LONGSPAN_BACKEND", "LONGSPAN_PREFER", "LONGSPAN_BLOCK"])
@pytest.mark.parametrize("blank", ["", " ", "\t"])
def test_a_blank_variable_is_an_unset_one(monkeypatch, variable, blank):
    monkeypatch.setenv(variable, blank)
    assert ls.attention(*qkv()).shape == (2, 4, 9, 8)


def test_a_refusal_leaves_nothing_behind(monkeypatch):
    monkeypatch.setenv("LONGSPAN_BACKEND", "sd pa")
    with pytest.raises(ls.PolicyError):
        ls.attention(*qkv())
    monkeypatch.delenv("LONGSPAN_BACKEND")
    q, k, v = qkv()
    with pytest.raises(ls.ArgumentError):
        ls.attention(q, k, v, scale=math.nan)
    torch.testing.assert_close(
        ls.attention(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("bad", [5, [5], ("sdpa", None), ("",), {"sdpa": 1, 2: 3}], ids=repr)
@pytest.mark.parametrize("argument", ["prefer", "block"])
def test_use_refuses_what_is_no_name(argument, bad):
    with pytest.raises(ls.PolicyError) as caught, ls.use(**{argument: bad}):
        pass
    assert argument in str(caught.value)
    assert "Next:" in str(caught.value)
