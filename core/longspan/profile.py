"""What was measured on this machine: `longspan bench --profile` stores it, and the resolver prefers it to tiers.

One file a device kind in the cache folder. A profile of another processor, torch or longspan is not used.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, frozen

from longspan.errors import LongspanError
from longspan.folders import cache_folder
from longspan.spec import Problem

__all__ = ["Measure", "Profile", "current_profile", "forget_profiles", "machine_name", "profile_path"]

VERSION = 1


@frozen
class Measure:
    """Seconds that one backend took for one problem: `forward` alone, and `backward` alone."""

    backend: str
    pattern: str
    dtype: str
    tokens: int
    forward: float
    backward: float


@frozen
class Profile:
    """The measurements of one device.

    `peaks` are the rates of matrix products by dtype, in GFLOP/s; `bandwidth` that of copies in memory, in GB/s.
    `workspace_threshold` is the size, in bytes, from which on the arena's memory is faster than torch's allocator's.
    """

    device: str
    machine: str
    torch: str
    threads: int
    peaks: dict[str, float]
    bandwidth: float
    measures: tuple[Measure, ...]
    workspace_threshold: int | None = None

    def seconds(self, problem: Problem) -> dict[str, float]:
        """Each measured backend's time for the most similar problem: same pattern kind and dtype, nearest length.

        Forward and backward where the problem asks for gradients.
        """
        same = [m for m in self.measures if (m.pattern, m.dtype) == (problem.pattern.kind, problem.dtype)]
        if not same:
            return {}
        tokens = min((m.tokens for m in same), key=lambda n: abs(math.log(n / max(1, problem.kv_len))))
        return {
            m.backend: m.forward + (m.backward if problem.requires_grad else 0.0) for m in same if m.tokens == tokens
        }

    def save(self) -> Path:
        """Store it where `current_profile` finds it; returns the file.

        Raises:
            LongspanError: the folder cannot be written.
        """
        path = profile_path(self.device)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".part")
            scratch.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=1))
            scratch.replace(path)
        except OSError as error:
            raise LongspanError(f"{path}: {error}. Next: set LONGSPAN_CACHE to a folder that can be written") from error
        forget_profiles()
        return path


def profile_path(device: str) -> Path:
    """Where the profile of a device kind (`cpu`, `sm_90`) is kept."""
    return cache_folder("profile") / f"{device}.json"


def machine_name() -> str:
    """The processor, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.machine()


_kept: dict[str, Profile | None] = {}


def current_profile(device: str) -> Profile | None:
    """The profile of this machine's device, read once a process; None where there is none that fits."""
    if device not in _kept:
        _kept[device] = _read(profile_path(device))
    return _kept[device]


def forget_profiles(devices: Iterable[str] | None = None) -> None:
    """Read the files again when they are next asked for."""
    for device in list(_kept) if devices is None else devices:
        _kept.pop(device, None)


def _read(path: Path) -> Profile | None:
    try:
        held: dict[str, Any] = json.loads(path.read_text())
        if held.pop("version") != VERSION:
            return None
        measures = tuple(Measure(**one) for one in held.pop("measures"))
        found = Profile(measures=measures, **held)
        here = (machine_name(), torch.__version__)
        return found if (found.machine, found.torch) == here else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not one of ours: the table serves
        return None
