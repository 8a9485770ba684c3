"""The kit as a pytest class. Only a run imports pytest: this module needs none."""

from __future__ import annotations

from typing import Any, ClassVar

from longspan.errors import UnknownBackend
from longspan.testing.cases import Case
from longspan.testing.kit import LOADED, cases_for, run_case

__all__ = ["BackendConformance", "assert_conforms"]


def assert_conforms(backend: str, case: Case) -> None:
    """Run one case as a pytest test.

    A case that the backend declines for a reason of its own, or because of this machine, is skipped with that reason.

    Raises:
        AssertionError: names the claim that does not hold, what happened instead, and what to do next.
    """
    __tracebackhide__ = True  # the message says it all
    try:
        outcome = run_case(backend, case)
    except UnknownBackend as error:
        raise AssertionError(str(error)) from None
    if outcome.status == "declined":
        import pytest

        pytest.skip(f"{backend} declines: {outcome.reason}")
    if outcome.status == "failed":
        raise AssertionError(outcome.message(backend))


class BackendConformance:
    """Every claim of a backend, and everything that it does not claim, as pytest cases.

    ```python
    import longspan.testing

    class TestMine(longspan.testing.BackendConformance):
        backend = "mine"
    ```

    `pytest -k float32-causal` picks cases by their names, which are those of `longspan verify`.

    Args:
        backend: the name; an opt-in or experimental backend is tested as any other.
        devices: torch devices, such as `("cuda:1",)`; all that this machine has and the backend claims unless given.
        quick: the fewest cases that touch every claim.
    """

    backend: ClassVar[str] = ""
    devices: ClassVar[tuple[str, ...] | None] = None
    quick: ClassVar[bool] = False

    @classmethod
    def cases(cls) -> tuple[Case, ...]:
        """The cases; extend them in a subclass with cases of your own.

        Raises:
            UnknownBackend: a name nobody registered.
        """
        return cases_for(cls.backend, cls.devices, quick=cls.quick)

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """pytest's hook: one test for each case."""
        if "case" in metafunc.fixturenames:
            try:
                cases = self.cases()
            except UnknownBackend:  # a test that fails; an error here would stop every other file's tests too
                cases = (LOADED,)
            metafunc.parametrize("case", cases, ids=str)

    def test_case(self, case: Case) -> None:
        """One claim holds, or one thing that is not claimed is refused by name."""
        __tracebackhide__ = True
        assert_conforms(self.backend, case)
