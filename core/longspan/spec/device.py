"""`Device`: a kind of device, present on this machine or not; and those of this one, found without starting CUDA."""

from __future__ import annotations

import re

import torch
from attrs import field, frozen

from longspan.errors import ArgumentError

__all__ = ["Device", "device_count", "is_local", "local_device", "torch_type"]

TYPES = ("cpu", "cuda", "mps", "xpu")
"""What torch calls the kinds that `Device.parse` reads."""


@frozen
class Device:
    """A kind of device, present on this machine or not.

    `type` is `cpu`, `cuda`, `rocm`, `mps`, `xpu` or another name that torch knows; `capability` is the CUDA compute
    capability where known; `arch` is what the vendor calls it (`sm_61`, `gfx942`); `index` is the ordinal, if any.
    """

    type: str
    capability: tuple[int, int] | None = None
    arch: str = ""
    index: int | None = field(default=None, eq=False)

    @classmethod
    def parse(cls, text: str) -> Device:
        """Read `cpu`, `cuda`, `cuda:1`, `sm_61`, `sm_90`, `gfx942`, `mps`, `xpu`. Touches no device.

        Raises:
            ArgumentError: the text names no kind of device.
        """
        word = str(text).strip().lower()
        if match := re.fullmatch(r"sm_?(\d+)(\d)[a-z]?", word):
            capability = (int(match[1]), int(match[2]))
            return cls("cuda", capability, f"sm_{match[1]}{match[2]}")
        if re.fullmatch(r"gfx[0-9a-f]{3,5}", word):
            return cls("rocm", None, word)
        if match := re.fullmatch(r"(cpu|cuda|rocm|mps|xpu)(?::(\d+))?", word):
            return cls(match[1], index=int(match[2]) if match[2] else None)
        raise ArgumentError("device", repr(text), "cpu, cuda, mps, xpu, rocm, sm_NN or gfxNNN", "e.g. sm_90")

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """The kind of a torch device. Asks CUDA for the capability only where a CUDA device is given."""
        if device.type != "cuda":
            return cls(device.type, index=device.index)
        if torch.version.hip:
            arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
            return cls("rocm", None, arch, device.index)
        major, minor = torch.cuda.get_device_capability(device)
        return cls("cuda", (major, minor), f"sm_{major}{minor}", device.index)

    def matches(self, wanted: str) -> bool:
        """Whether a capability such as `cpu`, `cuda`, `cuda>=8.0`, `cuda==6.1` or `rocm` covers this device.

        A CUDA device of unknown capability is taken to be recent enough.
        """
        match = re.fullmatch(r"([a-z]+)(?:(>=|<=|==|<|>)(\d+)\.(\d+))?", wanted)
        if match is None or match[1] != self.type:
            return False
        if match[2] is None:
            return True
        if self.capability is None:
            return match[2] in (">=", ">")
        bound = (int(match[3]), int(match[4]))
        have = self.capability
        return {
            ">=": have >= bound,
            "<=": have <= bound,
            "==": have == bound,
            "<": have < bound,
            ">": have > bound,
        }[match[2]]

    @property
    def name(self) -> str:
        """The most telling name: `sm_61`, `gfx942`, `cpu`."""
        return self.arch or self.type

    def __str__(self) -> str:
        return self.name


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
