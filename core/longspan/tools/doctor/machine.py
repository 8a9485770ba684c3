"""The machine: versions, devices and their capabilities, as far as they can be known without initialising CUDA."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pluggy
import torch
from attrs import asdict, frozen

from longspan.registry.profile import machine_name
from longspan.spec.device import Device, device_count
from longspan.tools.doctor import gpus

__all__ = ["LocalDevice", "Machine", "machine"]

OLD_GPUS = "https://download.pytorch.org/whl/cu126"
"""Where torch's wheels for GPUs before Turing are."""


@frozen
class LocalDevice:
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
    devices: tuple[LocalDevice, ...]

    @property
    def usable(self) -> tuple[Device, ...]:
        """The devices that torch can use, each kind once."""
        return tuple(dict.fromkeys(local.device for local in self.devices if not local.why))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self, recurse=False), "devices": [local.to_dict() for local in self.devices]}


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
        devices=tuple(_devices()),
    )


def _torch_build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"


def _devices() -> Iterator[LocalDevice]:
    yield LocalDevice(
        Device("cpu"), machine_name(), f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    for gpu in gpus.nvidia():
        capability = ".".join(map(str, gpu.device.capability or ()))
        yield LocalDevice(gpu.device, gpu.name, f"compute capability {capability}", *_why_no_cuda(gpu))
    for gpu in gpus.amd():
        yield LocalDevice(gpu.device, gpu.name, gpu.device.arch, *_why_no_rocm(gpu))
    yield from (LocalDevice(Device(kind), kind, "") for kind in ("mps", "xpu") if device_count(kind))


def _why_no_cuda(gpu: gpus.Gpu) -> tuple[str, str]:
    if not torch.version.cuda:
        return f"torch {torch.__version__} was built without CUDA", "pip install --force-reinstall torch"
    if gpus.is_hidden(gpu, "CUDA_VISIBLE_DEVICES"):
        return "CUDA_VISIBLE_DEVICES hides it", "unset CUDA_VISIBLE_DEVICES"
    built_for = torch.cuda.get_arch_list()
    if not gpus.runs_on(gpu.device, built_for):
        is_old = gpu.device.capability is not None and gpu.device.capability < (7, 5)
        fix = f"pip install --force-reinstall torch --index-url {OLD_GPUS}" if is_old else "pip install --upgrade torch"
        return f"torch {torch.__version__} was built for {', '.join(built_for)} only", fix
    return "", ""


def _why_no_rocm(gpu: gpus.Gpu) -> tuple[str, str]:
    if not torch.version.hip:
        fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/rocm6.4"
        return f"torch {torch.__version__} was built without ROCm", fix
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if gpus.is_hidden(gpu, variable):
            return f"{variable} hides it", f"unset {variable}"
    return "", ""
