"""A few of the drawn cases of `tests/stress/bits.py`: what a row may not see changes no bit of it."""

from __future__ import annotations

import pytest

from stress.bits import BACKENDS, changes, draw

CASES = {"flex": 8}
"""Where they are not 32; `python tests/stress/bits.py --cases 20000` has the others."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_row_may_not_see_changes_no_bit_of_it(backend):
    ran, cases = 0, CASES.get(backend, 32)
    for seed in range(cases):
        case = draw(seed, (backend,))
        found = changes(case)
        assert not found, f"{case}: {'; '.join(found)}"
        ran += found is not None
    assert ran > cases // 2, "most drawn problems are refused: the test sees little"
