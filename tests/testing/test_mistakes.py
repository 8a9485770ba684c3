"""The project's own set of wrong backends, each with one deliberate mistake: the kit's quick cases catch them all."""

from __future__ import annotations

import pytest

from longspan.spec.backend import DTYPES
from longspan.testing import cases_for, run_case, verify
from longspan.testing.claims import backward_of
from mistakes import seeing, slopes, softmax, surroundings
from mistakes.sound import Sound, Whole, says
from mistakes.table import TABLE

assert all((seeing, slopes, softmax, surroundings))  # which enter their mistakes into the table


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_a_mistake_is_caught_and_the_claim_that_it_breaks_is_named(register, entry):
    """The cases of that claim go first: most others have no more to say, and are run only if those pass."""
    name = register(entry.backend(), f"test-{entry.name}")
    blamed = []
    for case in sorted(cases_for(name, quick=not entry.full_only), key=lambda case: not about(entry.claim, case)):
        outcome = run_case(name, case)
        if outcome.status == "failed":
            blamed.append(outcome.message(name))
            if entry.claim in outcome.claim.text:
                return
    pytest.fail(f"{entry.wrong}: {'blamed instead: ' + blamed[0] if blamed else 'called conformant'}")


def about(claim, case):
    """Whether the claim is the case's own, or that of a backend's backward in it."""
    return claim in case.claim.text or claim in backward_of(case.claim).text


def test_the_kernel_that_they_are_made_from_is_right_in_every_dtype(register):
    name = register(type("Every", (Sound,), {"claims": says(dtypes=DTYPES)})(), "test-sound")
    assert verify(name, quick=True).messages() == ()


def test_the_one_that_takes_patterns_whole_is_right_in_all_cases_and_not_the_quick_ones_alone(register):
    name = register(Whole(), "test-whole")
    assert set(cases_for(name, quick=True)) <= set(cases_for(name))
    assert verify(name).messages() == ()


def test_the_table_is_long_and_no_mistake_is_in_it_twice():
    assert len(TABLE) >= 79
    assert len({entry.name for entry in TABLE}) == len({entry.wrong for entry in TABLE}) == len(TABLE)
