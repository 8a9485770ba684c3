"""GPUs as their drivers list them: no CUDA or HIP runtime is asked, so no context is made and a fork stays safe."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from longspan.spec.device import Device

__all__ = ["Gpu", "amd", "is_hidden", "nvidia", "runs_on"]

NVML = "libnvidia-ml.so.1"
KFD = Path("/sys/class/kfd/kfd/topology/nodes")


@frozen
class Gpu:
    """A GPU of this machine: its kind, what its vendor calls it, its place in the driver's list, its UUID if known."""

    device: Device
    name: str
    number: int
    uuid: str = ""


def nvidia(library: str = NVML) -> tuple[Gpu, ...]:
    """NVIDIA's GPUs by its management library; none where that is missing or does not answer."""
    try:
        nvml = ctypes.CDLL(library)
        if nvml.nvmlInit_v2() != 0:
            return ()
    except (OSError, AttributeError):
        return ()
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return ()
        listed = (_nvidia(nvml, number) for number in range(count.value))
        return tuple(gpu for gpu in listed if gpu is not None)
    except AttributeError:  # a driver too old to be asked for a compute capability
        return ()
    finally:
        nvml.nvmlShutdown()


def _nvidia(nvml: ctypes.CDLL, number: int) -> Gpu | None:
    handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    name, uuid = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
    if (
        nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(number), ctypes.byref(handle)) != 0
        or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) != 0
    ):
        return None  # a GPU that fell off the bus
    nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name)))
    nvml.nvmlDeviceGetUUID(handle, uuid, ctypes.c_uint(len(uuid)))
    device = Device.parse(f"sm_{major.value}{minor.value}")
    return Gpu(device, name.value.decode(errors="replace"), number, uuid.value.decode(errors="replace"))


def amd(nodes: Path = KFD) -> tuple[Gpu, ...]:
    """AMD's GPUs by the kernel driver's list of compute nodes; CPUs stand there too, with version 0."""
    listed: list[Gpu] = []
    for path in sorted(nodes.glob("*/properties"), key=lambda path: path.parent.name.zfill(4)):
        try:
            match = re.search(r"^gfx_target_version (\d+)$", path.read_text(encoding="ascii"), re.M)
        except (OSError, ValueError):
            continue
        if match and (version := int(match[1])):  # 90402 is gfx942, 90010 is gfx90a
            arch = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
            listed.append(Gpu(Device("rocm", None, arch), f"AMD {arch}", len(listed)))
    return tuple(listed)


def is_hidden(gpu: Gpu, variable: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `CUDA_VISIBLE_DEVICES`, or AMD's variable of the kind, keeps it from this process.

    Numbers are read in the driver's order; where a form is unknown, nothing is taken to be hidden.
    """
    if (text := environ.get(variable)) is None:
        return False
    for word in (part.strip() for part in text.split(",")):
        if word.isdigit():
            if int(word) == gpu.number:
                return False
        elif word.startswith("MIG-"):
            return False
        elif word.startswith("GPU-"):
            if gpu.uuid.startswith(word) or not gpu.uuid:
                return False
        else:  # CUDA reads no further
            break
    return True


def runs_on(device: Device, built_for: list[str]) -> bool:
    """Whether binaries for these architectures (`sm_80`, `compute_90`) run on a CUDA device; of none, nothing is known.

    A binary runs on its own major version from its minor on, intermediate code on every later device; those with a
    letter (`sm_90a`) on exactly one.
    """
    if device.capability is None or not built_for:
        return True
    for word in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", word)
        if match is None:
            continue
        have = (int(match[2]), int(match[3]))
        same_major = have[0] == device.capability[0] and have[1] <= device.capability[1]
        if have == device.capability or (
            not match[4] and (same_major or (match[1] == "compute" and have <= device.capability))
        ):
            return True
    return False
