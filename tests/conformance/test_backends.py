"""Every backend that is installed here, held to its own capabilities by the kit that third parties use."""

from __future__ import annotations

import pytest

import longspan as ls
from longspan.testing import Case, cases_for
from longspan.testing.kit import assert_conforms


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    only = metafunc.config.getoption("--longspan-backend")
    names = [only] if only else [row.name for row in ls.backends() if row.state == "loaded"]
    pairs = [(name, case) for name in names for case in cases_for(name)]
    pairs.sort(key=lambda pair: pair[1].id)  # what is right is then worked out once for all backends
    metafunc.parametrize(("backend", "case"), pairs, ids=[f"{name}-{case}" for name, case in pairs])


def test_case(backend: str, case: Case):
    __tracebackhide__ = True
    assert_conforms(backend, case)


def test_every_loaded_backend_has_cases(backend_name):
    checks = {case.check for case in cases_for(backend_name)}
    assert "refuse" in checks or checks >= {"forward", "gradient", "leak"}


@pytest.mark.parametrize("quick", [True, False])
def test_ids_are_unique(backend_name, quick):
    ids = [case.id for case in cases_for(backend_name, quick=quick)]
    assert len(ids) == len(set(ids))
