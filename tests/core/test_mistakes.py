"""The project's own set of wrong backends, each with one deliberate mistake: the kit's quick cases catch them all."""

from __future__ import annotations

import pytest

from longspan.spec import DTYPES
from longspan.testing import cases_for, run_case, verify
from mistakes import seeing, slopes, softmax, surroundings
from mistakes.sound import Sound, Whole, says
from mistakes.table import TABLE

assert all((seeing, slopes, softmax, surroundings))  # which enter their mistakes into the table


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_a_mistake_is_caught_and_the_claim_that_it_breaks_is_named(register, entry):
    name = register(entry.backend(), f"test-{entry.name}")
    blamed = []
    for case in cases_for(name, quick=not entry.full_only):
        outcome = run_case(name, case)
        if outcome.status == "failed":
            blamed.append(outcome.message(name))
            if entry.claim in outcome.claim.text:
                return
    pytest.fail(f"{entry.wrong}: {'blamed instead: ' + blamed[0] if blamed else 'called conformant'}")


@pytest.mark.parametrize("base", [Sound, Whole])
def test_the_kernel_that_they_are_made_from_is_right(register, base):
    claims = says(**{**base.claims, "dtypes": DTYPES})
    name = register(type("Every", (base,), {"claims": claims})(), f"test-{base.__name__}")
    assert verify(name, quick=True).messages() == ()


def test_it_is_right_in_all_cases_too(register):
    assert verify(register(Whole(), "test-whole")).messages() == ()


def test_the_table_is_long_and_no_mistake_is_in_it_twice():
    assert len(TABLE) >= 79
    assert len({entry.name for entry in TABLE}) == len({entry.wrong for entry in TABLE}) == len(TABLE)
