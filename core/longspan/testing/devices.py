"""Where a backend's claims can be put to the test on this machine."""

from __future__ import annotations

import re

import torch

from longspan.spec.backend import Capabilities
from longspan.spec.device import Device
from longspan.spec.local import is_local, torch_type

__all__ = ["absent_devices", "claimed_devices"]


def claimed_devices(can: Capabilities) -> tuple[str, ...]:
    """The torch devices of this machine that the backend claims, by kind: `cpu`, `cuda`, ... Initialises no CUDA."""
    kinds = dict.fromkeys(re.split(r"[<>=]", wanted, maxsplit=1)[0] for wanted in can.devices)  # cuda of cuda>=8.0
    return tuple(dict.fromkeys(torch_type(kind) for kind in kinds if is_local(Device(kind))))


def absent_devices(can: Capabilities, devices: tuple[str, ...]) -> tuple[str, ...]:
    """The claimed devices that none of these torch devices is, as they stand in the capabilities."""
    tested = [Device.of(torch.device(name)) for name in devices]
    return tuple(wanted for wanted in can.devices if not any(device.matches(wanted) for device in tested))
