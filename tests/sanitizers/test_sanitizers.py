"""A part of the fuzz of `fuzz.py`; `tox -e sanitizers` draws ten thousand cases."""

from __future__ import annotations

import pytest
from fuzz import build, preloaded, start


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    try:
        preloaded()
    except LookupError as missing:
        pytest.skip(f"AddressSanitizer: {missing}")
    return build(tmp_path_factory.mktemp("sanitizers"))


def test_drawn_cases_have_no_report(library):
    done = start(library, "--cases", "120", "--seed", "0")
    assert done.returncode == 0 and "no report, 0 wrong" in done.stdout, done.stdout[-6000:]


def test_a_planted_overflow_is_found(library):
    done = start(library, "--cases", "9", "--seed", "0", "--planted")
    assert done.returncode == 99, done.stdout[-6000:]
    assert "ERROR: AddressSanitizer" in done.stdout and "WRITE of size" in done.stdout, done.stdout[-6000:]
