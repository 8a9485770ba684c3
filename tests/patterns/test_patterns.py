"""Patterns are values: checked when made, frozen, hashable, printable as text that reads back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from attrs.exceptions import FrozenInstanceError
from hypothesis import given, settings
from hypothesis import strategies as st

import longspan as ls

positive = st.integers(1, 10**9)


@st.composite
def dilated(draw):
    branches = draw(st.integers(1, 6))
    return ls.Dilated(
        tuple(draw(positive) for _ in range(branches)),
        tuple(draw(positive) for _ in range(branches)),
        heads=draw(st.sampled_from(["all", "grouped"])),
        offset=draw(st.sampled_from(["modulo", "block"])),
    )


patterns = st.one_of(st.just(ls.Dense()), dilated())


# --- values ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(pattern=patterns)
def test_text_and_pickle_give_the_same_pattern_back(pattern):
    again = ls.parse_pattern(pattern.spec)
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert again.spec == pattern.spec
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert copy.deepcopy(pattern) == pattern


@settings(deadline=None)
@given(pattern=patterns)
def test_repr_can_be_typed_in(pattern):
    assert eval(repr(pattern), {"Dense": ls.Dense, "Dilated": ls.Dilated}) == pattern


def test_dense_patterns_are_one_value_and_differ_from_dilated_ones():
    assert ls.Dense() == ls.Dense()
    assert hash(ls.Dense()) == hash(ls.Dense())
    assert ls.Dense() != ls.Dilated((8,), (1,))
    assert len({ls.Dense(), ls.Dense(), ls.Dilated((8,), (1,)), ls.Dilated((8,), (1,))}) == 2


@pytest.mark.parametrize(
    "other",
    [
        ls.Dilated((8, 17), (1, 2)),
        ls.Dilated((8, 16), (1, 3)),
        ls.Dilated((16, 8), (2, 1)),
        ls.Dilated((8, 16), (1, 2), heads="grouped"),
        ls.Dilated((8, 16), (1, 2), offset="block"),
        ls.Dilated((8,), (1,)),
    ],
    ids=repr,
)
def test_every_field_tells_dilated_patterns_apart(other):
    assert ls.Dilated((8, 16), (1, 2)) != other


@pytest.mark.parametrize("pattern", [ls.Dense(), ls.Dilated((8,), (1,))], ids=repr)
def test_patterns_are_frozen(pattern):
    with pytest.raises((FrozenInstanceError, AttributeError)):
        pattern.segment_lengths = (4,)
    with pytest.raises((FrozenInstanceError, AttributeError)):
        pattern.anything = 1


def test_a_list_and_an_integer_become_tuples():
    pattern = ls.Dilated([8, 16], [1, 2])
    assert pattern == ls.Dilated((8, 16), (1, 2))
    assert hash(pattern) == hash(ls.Dilated((8, 16), (1, 2)))
    assert ls.Dilated(8, 2) == ls.Dilated((8,), (2,))


def test_a_list_given_to_a_pattern_is_not_shared_with_it():
    lengths = [8, 16]
    pattern = ls.Dilated(lengths, (1, 2))
    lengths[0] = 99
    assert pattern.segment_lengths == (8, 16)


def test_kinds_are_the_words_of_capabilities():
    assert ls.Dense().kind == "dense"
    assert ls.Dilated((8,), (1,)).kind == "dilated"
    assert isinstance(ls.Dense(), ls.Pattern)
    assert isinstance(ls.Dilated((8,), (1,)), ls.Pattern)


def test_dense_alone_does_not_depend_on_positions():
    assert ls.Dense().positional is False
    assert ls.Dilated((8,), (1,)).positional is True


# --- what is refused ------------------------------------------------------------------------------------------------

NOT_LENGTHS = [
    (), [], 0, -1, (0,), (-4,), (8, 0), (8, -1), (8.0,), (8.5,), ("8",), "8", "8,16", None, (None,), True, (True,),
    {8, 16}, {8: 1}, torch.tensor([8, 16]), 8.0, pytest.param(object(), id="object()"),
]  # fmt: skip


@pytest.mark.parametrize("bad", NOT_LENGTHS, ids=repr)
@pytest.mark.parametrize("argument", ["segment_lengths", "dilation_rates"])
def test_lengths_and_rates_are_positive_integers(argument, bad):
    given_arguments = {"segment_lengths": (8,), "dilation_rates": (1,), argument: bad}
    with pytest.raises(ls.ArgumentError) as caught:
        ls.Dilated(**given_arguments)
    assert argument in str(caught.value)
    assert "positive integers" in str(caught.value)
    assert caught.value.argument == argument


def test_a_refusal_points_at_the_bad_entry():
    with pytest.raises(ls.ArgumentError, match="replace -16"):
        ls.Dilated((8, -16, 32), (1, 2, 4))


@pytest.mark.parametrize(("lengths", "rates"), [((8,), (1, 2)), ((8, 16), (1,)), ((8, 16, 32), (1, 2))])
def test_tuples_of_different_lengths_are_refused(lengths, rates):
    with pytest.raises(ls.ArgumentError) as caught:
        ls.Dilated(lengths, rates)
    text = str(caught.value)
    assert "dilation_rates" in text
    assert f"{len(rates)} rates for {len(lengths)} segment lengths" in text
    assert "Next:" in text


@pytest.mark.parametrize("argument", ["heads", "offset"])
@pytest.mark.parametrize("bad", ["", "ALL", "group", None, 1, True, ["all"], ("all",)], ids=repr)
def test_unknown_words_are_refused_with_those_that_would_do(argument, bad):
    with pytest.raises(ls.ArgumentError) as caught:
        ls.Dilated((8,), (1,), **{argument: bad})
    words = {"heads": ("all", "grouped"), "offset": ("modulo", "block")}[argument]
    text = str(caught.value)
    assert argument in text
    assert repr(bad) in text
    assert all(repr(word) in text for word in words)


@pytest.mark.parametrize("heads", [0, 1, 2])
def test_grouped_needs_a_head_for_every_branch(heads):
    with pytest.raises(ls.ArgumentError, match="3 branches") as caught:
        ls.Dilated((4, 8, 16), (1, 2, 4), heads="grouped").check(heads)
    assert f"{heads} heads" in str(caught.value)


@pytest.mark.parametrize("heads", [3, 4, 12])
def test_grouped_takes_any_head_count_from_the_number_of_branches_on(heads):
    ls.Dilated((4, 8, 16), (1, 2, 4), heads="grouped").check(heads)


@pytest.mark.parametrize("heads", [0, 1, 7])
def test_every_head_count_does_for_all(heads):
    ls.Dilated((4, 8, 16), (1, 2, 4)).check(heads)
    ls.Dense().check(heads)


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("dense", ls.Dense()),
        (" dense ", ls.Dense()),
        ("dilated:64/1", ls.Dilated((64,), (1,))),
        ("dilated:2048/1,4096/2", ls.Dilated((2048, 4096), (1, 2))),
        ("dilated:64/1,128/2:grouped:block", ls.Dilated((64, 128), (1, 2), heads="grouped", offset="block")),
        ("dilated:64/1:block", ls.Dilated((64,), (1,), offset="block")),
        ("dilated:64/1:all:modulo", ls.Dilated((64,), (1,))),
    ],
)
def test_parse(text, want):
    assert ls.parse_pattern(text) == want


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ":", "dens", "dense:8", "dense:grouped", "dilated", "dilated:", "dilated:64", "dilated:64/",
        "dilated:/1", "dilated:64/1,", "dilated:64/1/2", "dilated:64/x", "dilated:6.4/1", "dilated:64/1;128/2",
        "dilated:64/1:", "dilated:64/1:group", "dilated:0/1", "dilated:64/0", "dilated:-64/1", "tree:4", "64/1",
        "dilated:64/1,128", "dilated:grouped:64/1",
    ],
)  # fmt: skip
def test_parse_refuses(text):
    with pytest.raises(ls.ArgumentError):
        ls.parse_pattern(text)


@pytest.mark.parametrize("text", ["dilated:64/1:all:grouped", "dilated:64/1:grouped:all", "dilated:64/1:modulo:block"])
def test_parse_refuses_words_that_contradict_each_other(text):
    """One of the two would have to be dropped in silence."""
    with pytest.raises(ls.ArgumentError):
        ls.parse_pattern(text)


def test_parse_shows_a_text_that_would_do():
    with pytest.raises(ls.ArgumentError, match=r"pattern: got 'dilatd:64/1'") as caught:
        ls.parse_pattern("dilatd:64/1")
    shown = str(caught.value).rstrip(".").split("e.g. ")[-1]
    assert isinstance(ls.parse_pattern(shown), ls.Dilated)
