"""Running the kit: which cases a backend has, what becomes of one, and all as a pytest class.

Only a run of that class imports pytest: this module needs none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from longspan.errors import UnknownBackend
from longspan.registry.discovery import registry
from longspan.spec.backend import BackendInfo, Capabilities
from longspan.spec.device import Device, is_local, torch_type
from longspan.spec.problem import Problem
from longspan.testing.cases import Case, cases_of
from longspan.testing.checks import CHECKS
from longspan.testing.claims import Claim
from longspan.testing.outcome import Breach, Declined, Outcome
from longspan.testing.side_effects import unchanged
from longspan.testing.workbench import Bench

__all__ = [
    "LOADED",
    "BackendConformance",
    "absent_devices",
    "assert_conforms",
    "backend_info",
    "cases_for",
    "claimed_devices",
    "one_thread",
    "run_case",
]

LOADED = Case(
    id="loaded",
    check="loaded",
    claim=Claim("state", "to be a backend of longspan", "`longspan backends` says what is wrong with it"),
    problem=Problem(batch=1, heads=1, q_len=1, head_dim=16),
)
"""Whether the backend is loaded and claims anything at all."""


def backend_info(name: str) -> BackendInfo:
    """The ledger's row of a backend.

    Raises:
        UnknownBackend: a name nobody registered.
    """
    rows = registry.backends()
    for row in sorted(rows, key=lambda row: row.state == "blocked"):
        if row.name == name:
            return row
    raise UnknownBackend(name, {row.name for row in rows}, "to be tested")


def claimed_devices(can: Capabilities) -> tuple[str, ...]:
    """The torch devices of this machine that the backend claims, by kind: `cpu`, `cuda`, ... Initialises no CUDA."""
    kinds = dict.fromkeys(re.split(r"[<>=]", wanted, maxsplit=1)[0] for wanted in can.devices)  # cuda of cuda>=8.0
    return tuple(dict.fromkeys(torch_type(kind) for kind in kinds if is_local(Device(kind))))


def absent_devices(can: Capabilities, devices: tuple[str, ...]) -> tuple[str, ...]:
    """The claimed devices that none of these torch devices is, as they stand in the capabilities."""
    tested = [Device.of(torch.device(name)) for name in devices]
    return tuple(wanted for wanted in can.devices if not any(device.matches(wanted) for device in tested))


def cases_for(name: str, devices: Sequence[str] | None = None, *, quick: bool = False) -> tuple[Case, ...]:
    """All cases of a backend: what it claims, on the devices of this machine, and what it does not claim.

    The first is `LOADED`; it is the only one for a backend that is not.

    Args:
        name: the backend.
        devices: torch devices; all that this machine has and the backend claims unless given.
        quick: the fewest cases that touch every claim.

    Raises:
        UnknownBackend: a name nobody registered.
    """
    can = backend_info(name).capabilities
    if can is None:
        return (LOADED,)
    return (LOADED, *cases_of(can, claimed_devices(can) if devices is None else devices, quick=quick))


def run_case(name: str, case: Case) -> Outcome:
    """Put one claim of a backend to the test, on one thread. Whatever its kernel raises is a failed case."""
    info = backend_info(name)
    with one_thread(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            if case.check == "loaded" or info.capabilities is None:
                _check_loaded(info)
                return Outcome(case, "passed", case.claim)
            with unchanged(torch.device(case.device)):
                measures = CHECKS[case.check](Bench(info, info.capabilities, case))
        except Declined as reason:
            return Outcome(case, "declined", case.claim, str(reason))
        except Breach as breach:
            measured = () if breach.measure is None else (breach.measure,)
            return Outcome(case, "failed", breach.claim or case.claim, breach.what, measured)
        except Exception as error:  # noqa: BLE001 - a kernel may raise anything, and the next case is to run
            words = " ".join(str(error).split())
            return Outcome(case, "failed", case.claim, f"it raised {type(error).__name__}: {words}")
    return Outcome(case, "refused" if case.check == "refuse" else "passed", case.claim, "", measures)


def _check_loaded(info: BackendInfo) -> None:
    can = info.capabilities
    if info.state != "loaded" or can is None:
        raise Breach(f"it is {info.state}: {info.error}")
    for field in ("devices", "dtypes", "patterns"):
        if not getattr(can, field):
            raise Breach(f"Capabilities.{field} is empty, so that it fits no problem")


@contextmanager
def one_thread() -> Iterator[None]:
    """Small tensors: threads that wait for one another cost more than they bring, and results depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
