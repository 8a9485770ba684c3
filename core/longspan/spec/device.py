"""`Device`: a kind of device, present on this machine or not."""

from __future__ import annotations

import re

import torch
from attrs import field, frozen

from longspan.errors import ArgumentError

__all__ = ["Device"]


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
