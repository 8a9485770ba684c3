"""What the demonstration's options may hold: read from text, and checked against this machine."""

from __future__ import annotations

import torch

from longspan.errors import ArgumentError
from longspan.spec.backend import DTYPES
from longspan.tools.meter import kernel_bytes

__all__ = ["check_room", "check_seed", "choose_dtype", "describe", "room"]


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
    host = kernel_bytes("/proc/meminfo", "MemAvailable:")
    memories = [] if host is None else [("memory", host)]
    if device.type == "cuda":
        memories.append((f"memory of {device}", torch.cuda.mem_get_info(device)[0]))
    return memories


def describe(device: torch.device) -> str:
    """The device in words: a GPU with its name, the CPU with torch's threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
