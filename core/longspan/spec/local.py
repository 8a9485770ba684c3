"""The devices of this machine that torch can run on. Nothing here initialises CUDA."""

from __future__ import annotations

import torch

from longspan.errors import ArgumentError
from longspan.spec.device import Device

__all__ = ["device_count", "is_local", "local_device", "torch_type"]

TYPES = ("cpu", "cuda", "mps", "xpu")
"""What torch calls the kinds that `Device.parse` reads."""


def torch_type(kind: str) -> str:
    """What torch calls a kind of device: an AMD GPU is `cuda` there too."""
    return "cuda" if kind == "rocm" else kind


def device_count(kind: str) -> int:
    """How many devices of a kind, as torch calls it, it can run on here."""
    if kind == "cpu":
        return 1
    module = getattr(torch, kind, None)
    return int(module.device_count()) if module is not None and module.is_available() else 0


def is_local(device: Device) -> bool:
    """Whether this machine has the device; where only CUDA could tell its compute capability, it is said to have none.

    A build of torch for CUDA has no `rocm` devices, and the other way round.
    """
    kind = torch_type(device.type)
    if kind == "cuda" and (torch.version.hip is not None) != (device.type == "rocm"):
        return False
    count = device_count(kind)
    if not device.arch or not count:
        return count > 0
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return any(device.arch == Device.of(torch.device("cuda", number)).arch for number in range(count))


def local_device(text: str, argument: str = "device") -> torch.device:
    """A device of this machine from what a user typed: `auto` (CUDA where there is one, else the CPU), `cpu`, `cuda:1`.

    Raises:
        ArgumentError: the text names no device, or none that this machine has; it names the `argument`.
    """
    if text == "auto":
        return torch.device("cuda" if device_count("cuda") else "cpu")
    device = Device.parse(text)
    kind = torch_type(device.type)
    if device.arch or (device.index or 0) >= device_count(kind):
        here = " or ".join(filter(device_count, TYPES))
        fix = f"leave it out, or ask `longspan explain --device {device.name}`, which needs no such device"
        raise ArgumentError(argument, repr(text), f"auto, or a device of this machine: {here}", fix)
    return torch.device(kind) if device.index is None else torch.device(kind, device.index)
