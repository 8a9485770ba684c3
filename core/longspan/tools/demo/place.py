"""Where the demonstration runs and in what dtype, read from text and checked against this machine."""

from __future__ import annotations

from pathlib import Path

import torch

from longspan.errors import ArgumentError
from longspan.spec.backend import DTYPES
from longspan.spec.device import Device

__all__ = ["check_room", "check_seed", "choose_device", "choose_dtype", "describe", "room"]


def choose_device(text: str) -> torch.device:
    """`auto` (CUDA where there is one, else the CPU), or a device of this machine such as `cpu` or `cuda:1`.

    Raises:
        ArgumentError: the text names no device, or none that this machine has.
    """
    here = _here()
    if text == "auto":
        return torch.device("cuda" if "cuda" in here else "cpu")
    device = Device.parse(text)
    kind = "cuda" if device.type == "rocm" else device.type  # torch calls both cuda
    if device.arch or (device.index or 0) >= here.get(kind, 0):
        listed = " or ".join(here)
        fix = f"leave --device out, or ask `longspan explain --device {device.name}`, which needs no such device"
        raise ArgumentError("--device", repr(text), f"auto, or a device of this machine: {listed}", fix)
    return torch.device(kind) if device.index is None else torch.device(kind, device.index)


def _here() -> dict[str, int]:
    """The kinds of device that this machine has, and how many of each."""
    counts = {"cpu": 1, "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    counts["mps"] = int(torch.backends.mps.is_available())
    counts["xpu"] = torch.xpu.device_count() if torch.xpu.is_available() else 0
    return {kind: count for kind, count in counts.items() if count}


def choose_dtype(text: str) -> torch.dtype:
    """`float16`, `bfloat16`, `float32` or `float64`.

    Raises:
        ArgumentError: the text is none of these.
    """
    name = text.strip().lower().removeprefix("torch.")
    if name not in DTYPES:
        raise ArgumentError("--dtype", repr(text), " or ".join(DTYPES), "e.g. --dtype float32")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_seed(seed: int) -> None:
    """Refuse what torch's generators do not take.

    Raises:
        ArgumentError: a number below 0 or of 64 bits and more.
    """
    if not 0 <= seed < 2**63:
        raise ArgumentError("--seed", str(seed), "a whole number from 0 to 2**63 - 1", "e.g. --seed 0")


def check_room(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse more tokens than memory holds, where the system says how much is free: to try would kill the process.

    Counted are query, key and value, and the float64 copies of key and value by which the oracle checks them, which is
    more than a backend's result takes.

    Raises:
        ArgumentError: too many tokens; the message says how many would fit.
    """
    line = _bytes_of_a_token(width, dtype)
    for name, size in _free(device):
        if tokens * line > size:
            got = (
                f"{tokens:,} tokens, which need {tokens * line / 2**30:,.1f} GiB of {size / 2**30:,.1f} GiB free {name}"
            )
            raise ArgumentError("--tokens", got, f"at most {size // line:,} tokens", "ask for fewer, or free memory")


def room(width: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """How many tokens `check_room` lets pass; None where the system does not say how much memory is free."""
    return min((size // _bytes_of_a_token(width, dtype) for _, size in _free(device)), default=None)


def _bytes_of_a_token(width: int, dtype: torch.dtype) -> int:
    return width * (3 * dtype.itemsize + 2 * 8) + 1024


def _free(device: torch.device) -> list[tuple[str, int]]:
    """The memories that are needed, and the bytes that are free in each, as far as the system says."""
    host = _free_bytes()
    found = [] if host is None else [("memory", host)]
    if device.type == "cuda":
        found.append((f"memory of {device}", torch.cuda.mem_get_info(device)[0]))
    return found


def _free_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(sizes[0]) * 1024 if sizes else None


def describe(device: torch.device) -> str:
    """The device in words: a GPU with its name, the CPU with torch's threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
