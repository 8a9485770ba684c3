"""Cache and arena in many threads at once, every returned buffer poisoned: a few seconds of `longspan bench stress`."""

from __future__ import annotations

import pytest

from longspan.bench.stress import stress


@pytest.mark.parametrize("threads", [16])
def test_many_threads_for_a_while(threads):
    found = stress(4.0, threads)
    assert found["failures"] == [] and found["stuck"] == 0
    assert found["calls"] >= threads and found["leased_at_the_end"] == 0
    assert found["cache"]["hits"] and found["cache"]["evictions"]


@pytest.mark.slow
def test_many_threads_for_a_minute():
    found = stress(60.0, 16)
    assert found["failures"] == [] and found["stuck"] == 0 and found["leased_at_the_end"] == 0
    assert found["resident_growth_in_the_second_half"] < 0.05
