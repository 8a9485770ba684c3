"""pascal_fp32, held to its capabilities on a CPU: there is no other test of it without a GPU of 2016."""

from __future__ import annotations

import pytest

import longspan as ls
from longspan.testing import cases_for
from longspan.testing.kit import assert_conforms
from small import PascalOnCpu

NAME = "pascal_on_cpu"


@pytest.fixture(scope="module")
def registered():
    ls.register(PascalOnCpu(), name=NAME)
    yield
    ls.unregister(NAME)


def _cases():
    ls.register(PascalOnCpu(), name=NAME)
    try:
        return cases_for(NAME)
    finally:
        ls.unregister(NAME)


@pytest.mark.parametrize("case", _cases(), ids=lambda case: case.id)
def test_case(registered, case):
    __tracebackhide__ = True
    assert_conforms(NAME, case)
