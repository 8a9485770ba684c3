"""The machine: versions, devices and their capabilities, as far as they can be known without initialising CUDA."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pluggy
import torch
from attrs import asdict, frozen

from longspan.spec.device import Device
from longspan.tools.doctor import gpus

__all__ = ["Machine", "Place", "machine"]

OLD_GPUS = "https://download.pytorch.org/whl/cu126"
"""Where torch's wheels for GPUs before Turing are."""


@frozen
class Place:
    """A device of this machine. `why` says why torch cannot use it, and `fix` what to type; both empty where it can."""

    device: Device
    name: str
    capability: str
    why: str = ""
    fix: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "device": self.device.name, "type": self.device.type, "usable": not self.why}


@frozen
class Machine:
    """Versions and devices. `torch_build` is what torch was built with: `CUDA 12.8`, `ROCm 6.4` or `CPU only`."""

    longspan: str
    python: str
    system: str
    torch: str
    torch_build: str
    pluggy: str
    threads: int
    places: tuple[Place, ...]

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices that torch can use, each kind once."""
        return tuple(dict.fromkeys(place.device for place in self.places if not place.why))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self, recurse=False)
        places = values.pop("places")
        return {**values, "devices": [place.to_dict() for place in places]}


def machine() -> Machine:
    """The machine that this process runs on. Initialises no CUDA context."""
    return Machine(
        longspan=version("longspan"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        torch=str(torch.__version__),
        torch_build=_torch_build(),
        pluggy=pluggy.__version__,
        threads=torch.get_num_threads(),
        places=tuple(_places()),
    )


def _torch_build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"


def _places() -> Iterator[Place]:
    yield Place(
        Device("cpu"), _cpu_name(), f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    for gpu in gpus.nvidia():
        capability = ".".join(map(str, gpu.device.capability or ()))
        yield Place(gpu.device, gpu.name, f"compute capability {capability}", *_why_no_cuda(gpu))
    for gpu in gpus.amd():
        yield Place(gpu.device, gpu.name, gpu.device.arch, *_why_no_rocm(gpu))
    for kind, module in (("mps", torch.backends.mps), ("xpu", torch.xpu)):
        if module.is_available():
            yield Place(Device(kind), kind, "")


def _cpu_name() -> str:
    """As the kernel calls it; `platform.processor` knows none on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), "") or platform.processor() or platform.machine()


def _why_no_cuda(gpu: gpus.Gpu) -> tuple[str, str]:
    if not torch.version.cuda:
        return f"torch {torch.__version__} was built without CUDA", "pip install --force-reinstall torch"
    if gpus.is_hidden(gpu, "CUDA_VISIBLE_DEVICES"):
        return "CUDA_VISIBLE_DEVICES hides it", "unset CUDA_VISIBLE_DEVICES"
    built_for = torch.cuda.get_arch_list()
    if not gpus.runs_on(gpu.device, built_for):
        fix = f"pip install --force-reinstall torch --index-url {OLD_GPUS}" if _is_old(gpu.device) else ""
        fix = fix or "pip install --upgrade torch"
        return f"torch {torch.__version__} was built for {', '.join(built_for)} only", fix
    return "", ""


def _is_old(device: Device) -> bool:
    return device.capability is not None and device.capability < (7, 5)


def _why_no_rocm(gpu: gpus.Gpu) -> tuple[str, str]:
    if not torch.version.hip:
        fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/rocm6.4"
        return f"torch {torch.__version__} was built without ROCm", fix
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if gpus.is_hidden(gpu, variable):
            return f"{variable} hides it", f"unset {variable}"
    return "", ""
