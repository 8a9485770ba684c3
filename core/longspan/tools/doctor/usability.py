"""Which backends are installed and of no use here, and why: the resolver's own reasons, for small problems."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from attrs import asdict, frozen

from longspan.patterns.dilated import Dilated
from longspan.patterns.window import SlidingWindow
from longspan.registry.resolve import refusals
from longspan.spec.backend import Capabilities, Reason
from longspan.spec.device import Device
from longspan.spec.pattern import Dense, Pattern
from longspan.spec.problem import Problem
from longspan.spec.resolution import Candidate

__all__ = ["Unusable", "unusable"]

PATTERNS: tuple[Pattern, ...] = (Dense(), SlidingWindow(8, 0), Dilated((32,), (2,)))
LENGTH, HEADS, HEAD_DIM = 128, 2, 64


@frozen
class Unusable:
    """A backend that serves no problem here: what it holds against each device, by the device's name.

    `elsewhere`: the device is none of this machine's, but one that it is made for.
    """

    backend: str
    reasons: tuple[tuple[str, Reason], ...]
    elsewhere: tuple[tuple[str, Reason], ...] = ()

    @property
    def fixes(self) -> tuple[str, ...]:
        """Lines of which one makes it of use here; none where it is not made for this machine's devices."""
        hopeless = {device for device, reason in self.reasons if reason.code in ("device", "claims")}
        return tuple(
            dict.fromkeys(reason.fix for device, reason in self.reasons if device not in hopeless and reason.fix)
        )

    @property
    def texts(self) -> tuple[str, ...]:
        """The reasons as sentences."""
        return (
            *(str(reason) for _, reason in self.reasons),
            *(f"on {device}: {reason}" for device, reason in self.elsewhere),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        groups = ((True, self.reasons), (False, self.elsewhere))
        listed = [
            {"device": device, "here": here, **asdict(reason)} for here, group in groups for device, reason in group
        ]
        return {"backend": self.backend, "reasons": listed, "fixes": list(self.fixes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Unusable:
        """What `to_dict` gave."""
        groups: dict[bool, list[tuple[str, Reason]]] = {True: [], False: []}
        for listed in values["reasons"]:
            fields = {name: value for name, value in listed.items() if name not in ("device", "here")}
            groups[listed["here"]].append((listed["device"], Reason(**fields)))
        return cls(values["backend"], tuple(groups[True]), tuple(groups[False]))


def unusable(candidate: Candidate, devices: Iterable[Device]) -> Unusable | None:
    """None where the backend serves some problem on one of the devices, or cannot be asked. Touches no device.

    Its own reasons are asked for with `longspan_unsupported`, which may import its package.
    """
    can = candidate.info.capabilities
    if can is None:
        return None
    missing = [name for name in ("devices", "dtypes", "patterns") if not getattr(can, name)]
    if missing:
        claims = [Reason("claims", name, "empty", "what the backend can do", "fix the plugin") for name in missing]
        return Unusable(candidate.name, tuple(("any", reason) for reason in claims))
    patterns = [pattern for pattern in PATTERNS if can.runs(pattern.kind)]
    if not patterns:  # all its patterns are unknown to this list
        return None
    against: list[tuple[str, Reason]] = []
    for device in devices:
        if not (least := _least(candidate, can, device, patterns)):
            return None
        against += [(device.name, reason) for reason in least]
    elsewhere: list[tuple[str, Reason]] = []
    if all(reason.code == "device" for _, reason in against):
        made_for = _example(can.devices[0])
        reasons = _least(candidate, can, made_for, patterns)
        elsewhere += [(made_for.name, reason) for reason in reasons if reason.code != "device"]
    return Unusable(candidate.name, tuple(against), tuple(elsewhere))


def _least(candidate: Candidate, can: Capabilities, device: Device, patterns: list[Pattern]) -> tuple[Reason, ...]:
    """The reasons against the problem on this device that has the fewest; none where one is served."""
    return min((refusals(problem, candidate) for problem in _problems(can, device, patterns)), key=len)


def _problems(can: Capabilities, device: Device, patterns: list[Pattern]) -> Iterator[Problem]:
    for dtype in can.dtypes:
        for pattern in patterns[:1] if patterns[0].kind == "dense" else patterns:  # the others are lowered to dense
            for is_causal in (False, True) if can.causal else (False,):
                yield Problem(
                    batch=1,
                    heads=HEADS,
                    q_len=LENGTH,
                    head_dim=_head_dim(can),
                    dtype=dtype,
                    device=device,
                    pattern=pattern,
                    is_causal=is_causal,
                )


def _head_dim(can: Capabilities) -> int:
    """The usual one, or the nearest that the backend takes."""
    step = can.head_dim_multiple
    wanted = -(-max(can.head_dim_min, HEAD_DIM) // step) * step
    if can.head_dim_max is not None and wanted > can.head_dim_max:
        wanted = can.head_dim_max // step * step
    return max(1, wanted)


def _example(wanted: str) -> Device:
    """A device that a capability such as `cuda>=8.0` covers."""
    if match := re.fullmatch(r"cuda(?:>=|==|<=)(\d+)\.(\d)", wanted):
        return Device.parse(f"sm_{match[1]}{match[2]}")
    return Device(re.split(r"[<>=]", wanted, maxsplit=1)[0])
