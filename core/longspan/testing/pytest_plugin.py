"""A pytest plugin: `--longspan-backend NAME` reruns tests on one backend, and `backend_name` runs them on all.

Put `pytest_plugins = ["longspan.testing.pytest_plugin"]` into the top `conftest.py`, or run
`pytest -p longspan.testing.pytest_plugin`. It is no entry point: every pytest run on the machine would import torch.

With the option, `longspan.attention` without a backend uses the one named, a test parametrised over `backend` with the
names of backends runs on that one alone, and a test that asks it for what it does not claim is skipped with its reason.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from longspan.errors import BackendUnavailable, LongspanError
from longspan.registry.discovery import registry
from longspan.registry.policy import use
from longspan.spec.resolution import Resolution
from longspan.testing.kit import backend_info

__all__ = ["chosen_backend"]

OPTION = "--longspan-backend"


def chosen_backend(config: pytest.Config) -> str | None:
    """The backend that was named on the command line, if any."""
    name: str | None = config.getoption(OPTION, default=None)
    return name


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    group = parser.getgroup("longspan")
    group.addoption(OPTION, metavar="NAME", default=None, help="Run the tests of attention on this backend.")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a backend that cannot be used, before anything is collected."""
    if name := chosen_backend(config):
        try:
            info = backend_info(name)
        except LongspanError as error:
            raise pytest.UsageError(f"{OPTION}: {error}") from error
        if info.state != "loaded":
            raise pytest.UsageError(f"{OPTION}: {name} is {info.state}: {info.error}")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say which backend it is."""
    if not (name := chosen_backend(config)):
        return None
    info = backend_info(name)
    return f"longspan backend: {name} ({info.distribution or 'of this process'} {info.version})".replace(" )", ")")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `backend_name`, and narrow what is parametrised over `backend` to the one that was named."""
    name = chosen_backend(metafunc.config)
    if "backend_name" in metafunc.fixturenames:
        loaded = [row.name for row in registry.backends() if row.state == "loaded"]
        metafunc.parametrize("backend_name", [name] if name else loaded)
    if name:
        marks = metafunc.definition.own_markers
        known = {row.name for row in registry.backends()}
        marks[:] = [_narrowed(mark, name, known) for mark in marks]


def _narrowed(mark: pytest.Mark, name: str, known: set[str]) -> pytest.Mark:
    if mark.name != "parametrize" or len(mark.args) < 2 or mark.args[0] != "backend":
        return mark
    values = list(mark.args[1])
    if not values or not all(isinstance(value, str) and value in known for value in values):
        return mark
    return pytest.mark.parametrize("backend", (name,)).mark


@pytest.fixture(autouse=True)
def _longspan_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """The policy that the option asks for."""
    name = chosen_backend(request.config)
    if name is None:
        yield
        return
    with use(backend=name):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Skip a test that the named backend refuses; every other refusal is an error as ever."""
    try:
        return (yield)
    except BackendUnavailable as refusal:
        name, resolution = chosen_backend(pyfuncitem.config), refusal.resolution
        if name is None or not isinstance(resolution, Resolution) or resolution.asked != name:
            raise
        pytest.skip(f"{name} refuses: {'; '.join(map(str, resolution[name].reasons))}")
