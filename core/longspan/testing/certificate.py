"""The kit outside pytest: run all cases of a backend, and put what was found on one sheet."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from attrs import field, frozen

from longspan.spec.backend import BackendInfo
from longspan.spec.device import Device, local_device
from longspan.testing.kit import absent_devices, backend_info, cases_for, claimed_devices, run_case
from longspan.testing.outcome import Measure, Outcome

__all__ = ["Certificate", "Worst", "verify"]

OnCase = Callable[[str, int, int], None]
"""Told before each case: its id, its number from 0, how many there are."""


@frozen
class Worst:
    """The measure that used up most of its allowance, with its case."""

    measure: Measure
    case: str


@frozen(slots=False)
class Certificate:
    """What the kit found out about a backend on this machine; `conformant` where every claim that ran holds.

    `devices` were tested; `absent` are claimed and not on this machine. `seconds` is how long it took.
    """

    info: BackendInfo
    devices: tuple[str, ...]
    absent: tuple[str, ...]
    quick: bool
    seconds: float
    outcomes: tuple[Outcome, ...] = field(repr=False)

    def of(self, status: str) -> tuple[Outcome, ...]:
        """The outcomes that are passed, refused, declined or failed."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == status)

    @property
    def conformant(self) -> bool:
        """No case failed, and at least one was computed."""
        return not self.of("failed") and self.computed > 0

    @property
    def computed(self) -> int:
        """How many cases ran a kernel, with whatever result."""
        ran = [outcome for outcome in self.outcomes if outcome.status in ("passed", "failed")]
        return sum(outcome.case.check not in ("loaded", "refuse") for outcome in ran)

    @property
    def unproven(self) -> tuple[str, ...]:
        """The claims of which every case was declined."""
        proven = {outcome.case.claim.text for outcome in self.outcomes if outcome.status != "declined"}
        return tuple(dict.fromkeys(x.case.claim.text for x in self.of("declined") if x.case.claim.text not in proven))

    @cached_property
    def worst(self) -> dict[tuple[str, str], dict[str, Worst]]:
        """By (device, dtype), then by forward, lse and gradient: the error that came closest to its limit."""
        worst: dict[tuple[str, str], dict[str, Worst]] = {}
        for outcome in self.outcomes:
            row = worst.setdefault((outcome.case.device, outcome.case.problem.dtype), {}) if outcome.measures else {}
            for measure in outcome.measures:
                if measure.what not in row or measure.share > row[measure.what].measure.share:
                    row[measure.what] = Worst(measure, outcome.case.id)
        return worst

    def messages(self) -> tuple[str, ...]:
        """Why it is not conformant: for each claim that fails, its first case and how many more there are."""
        failed: dict[str, list[Outcome]] = {}
        for outcome in self.of("failed"):
            failed.setdefault(outcome.claim.text, []).append(outcome)
        lines = []
        for first, *others in failed.values():
            more = f" ({len(others)} more cases of this claim fail, e.g. {others[-1].case.id})" if others else ""
            lines.append(first.message(self.info.name) + more)
        if not lines and not self.computed:
            reasons = list(dict.fromkeys(outcome.reason for outcome in self.of("declined")))
            why = "; ".join(reasons) or f"none of {', '.join(self.absent)} is on this machine"
            lines.append(f"nothing of {self.info.name} could be run here: {why}")
        return tuple(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is infinite or NaN stands as text."""
        return {
            "backend": self.info.name,
            "distribution": self.info.distribution,
            "version": self.info.version,
            "conformant": self.conformant,
            "cases": {
                "run": self.computed,
                "refused": len(self.of("refused")),
                "declined": len(self.of("declined")),
                "failed": len(self.of("failed")),
            },
            "quick": self.quick,
            "devices": [{"device": name, "is": str(Device.of(torch.device(name)))} for name in self.devices],
            "not_on_this_machine": list(self.absent),
            "worst": [
                {"device": device, "dtype": dtype, **{what: _plain(worst) for what, worst in row.items()}}
                for (device, dtype), row in self.worst.items()
            ],
            "failures": [
                {"case": x.case.id, "claim": x.claim.text, "message": x.message(self.info.name)}
                for x in self.of("failed")
            ],
            "declined": [{"case": x.case.id, "reason": x.reason} for x in self.of("declined")],
            "unproven": list(self.unproven),
            "versions": {
                "longspan": version("longspan"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "seconds": round(self.seconds, 3),
        }


def verify(
    backend: str, device: str | None = None, *, quick: bool = False, on_case: OnCase | None = None
) -> Certificate:
    """Run the conformance kit on a backend.

    Args:
        backend: its name.
        device: only this device of this machine, such as `cpu` or `cuda:1`; all that it claims unless given.
        quick: the fewest cases that touch every claim.
        on_case: told before each case.

    Raises:
        UnknownBackend: a name nobody registered.
        ArgumentError: a device that this machine does not have.
    """
    start = time.perf_counter()
    info = backend_info(backend)
    can = info.capabilities
    devices = (str(local_device(device)),) if device is not None else () if can is None else claimed_devices(can)
    cases = cases_for(backend, devices, quick=quick)
    outcomes = []
    for number, case in enumerate(cases):
        if on_case is not None:
            on_case(case.id, number, len(cases))
        outcomes.append(run_case(backend, case))
    missing = () if can is None else absent_devices(can, devices)
    return Certificate(info, devices, missing, quick, time.perf_counter() - start, tuple(outcomes))


def _plain(worst: Worst) -> dict[str, Any]:
    return {"error": _number(worst.measure.error), "allowed": _number(worst.measure.allowed), "case": worst.case}


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
