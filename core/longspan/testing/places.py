"""Where a backend's claims can be put to the test on this machine."""

from __future__ import annotations

import re

import torch

from longspan.errors import ArgumentError
from longspan.registry.explain import present
from longspan.spec.backend import Capabilities
from longspan.spec.device import Device

__all__ = ["absent", "here", "place"]


def here(can: Capabilities) -> tuple[str, ...]:
    """The torch devices of this machine that the backend claims, by kind: `cpu`, `cuda`, ... Initialises no CUDA."""
    kinds = dict.fromkeys(_kind(wanted) for wanted in can.devices)
    return tuple(dict.fromkeys(_torch(kind) for kind in kinds if present(Device(kind))))


def absent(can: Capabilities, devices: tuple[str, ...]) -> tuple[str, ...]:
    """The claimed devices that none of these torch devices is, as they stand in the capabilities."""
    found = [Device.of(torch.device(name)) for name in devices]
    return tuple(wanted for wanted in can.devices if not any(one.matches(wanted) for one in found))


def place(text: str) -> str:
    """A torch device of this machine from what a user typed: `cpu`, `cuda`, `cuda:1`, `mps`, ...

    Raises:
        ArgumentError: the text names no device, or none that this machine has.
    """
    device = Device.parse(text)
    name = _torch(device.type)
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(name, 1)
    if not present(Device(device.type)) or device.arch or (device.index or 0) >= count:
        raise ArgumentError(
            "device", repr(text), "a device of this machine, e.g. cpu or cuda:0", "leave it out to test them all"
        )
    return name if device.index is None else f"{name}:{device.index}"


def _kind(wanted: str) -> str:
    """`cuda` of `cuda>=8.0`."""
    return re.split(r"[<>=]", wanted, maxsplit=1)[0]


def _torch(kind: str) -> str:
    return "cuda" if kind == "rocm" else kind
