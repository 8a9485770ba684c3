"""What was measured on this machine: `longspan bench --profile` stores it, and the resolver prefers it to tiers.

One file a device kind in the cache folder. A profile of another processor, torch or longspan is not used, nor one that
is damaged or that others may have written; which and why is said in a warning, and by `longspan doctor`.
"""

from __future__ import annotations

import json
import math
import platform
import shlex
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, frozen

from longspan.errors import LongspanError, warn_caller
from longspan.memory.folders import Unused, cache_folder, make_folder, read_own, why_unread, write_whole
from longspan.spec.problem import Problem

__all__ = ["Measure", "Profile", "current_profile", "forget_profiles", "machine_name", "profile_path", "survey"]

VERSION = 2
MOST = 2**22
"""Bytes that a profile may have; those of `longspan bench --profile` take some ten thousand."""
AGAIN = "longspan bench --profile"


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
        try:
            path = profile_path(self.device)
            make_folder(path.parent)
            held = {"version": VERSION, **asdict(self)}
            write_whole(path, json.dumps({**held, "digest": _digest(held)}, indent=1).encode())
        except (OSError, RuntimeError) as error:
            what = f"the profile of {self.device}: {error}"
            raise LongspanError(f"{what}. Next: set LONGSPAN_CACHE to a folder that can be written") from error
        forget_profiles()
        return path


def profile_path(device: str) -> Path:
    """Where the profile of a device kind (`cpu`, `sm_90`) is kept."""
    return cache_folder("profile") / f"{device}.json"


def machine_name() -> str:
    """The processor, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.machine()


_kept: dict[str, Profile | None] = {}


def current_profile(device: str) -> Profile | None:
    """The profile of this machine's device, read once a process; None where there is none that fits."""
    if device not in _kept:
        _kept[device] = _found(device)
    return _kept[device]


def _found(device: str) -> Profile | None:
    try:
        path = profile_path(device)
        return _read(path, device)
    except (FileNotFoundError, RuntimeError):  # none, and no home directory either
        return None
    except (OSError, _Refused) as error:
        again = AGAIN if device == "cpu" else f"{AGAIN} --device cuda"
        warn_caller(f"{path} {_why(error)}: it is not used. Next: {again}, or delete the file", UserWarning)
        return None


def forget_profiles(devices: Iterable[str] | None = None) -> None:
    """Read the files again when they are next asked for."""
    for device in list(_kept) if devices is None else devices:
        _kept.pop(device, None)


def survey() -> tuple[Unused, ...]:
    """The profiles that are not used, for the doctor."""
    unused = []
    with suppress(OSError, RuntimeError):
        for path in sorted(cache_folder("profile").glob("*.json")):
            try:
                _read(path, path.stem)
            except FileNotFoundError:
                continue
            except (OSError, _Refused) as error:
                lines = f"rm {shlex.quote(str(path))}"
                broken = not isinstance(error, _Foreign)
                unused.append(Unused(str(path), f"{_why(error)}: it is not used", lines, broken))
    return tuple(unused)


# ----------------------------------------------------------------------------------------------------------- reading


class _Refused(Exception):
    """Not a profile that may be used: why, as the end of a sentence about the file."""


class _Foreign(_Refused):
    """A sound one, of another machine or release."""


def _why(error: Exception) -> str:
    return why_unread(error) if isinstance(error, OSError) else str(error)


def _read(path: Path, device: str) -> Profile:
    """The profile in a file.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read, or is not the user's own.
        _Refused: it is damaged, or measured elsewhere.
    """
    try:
        held = json.loads(read_own(path, MOST))
    except (ValueError, RecursionError) as error:
        raise _Refused(f"is damaged ({type(error).__name__}: {str(error)[:200]})") from error
    if not isinstance(held, dict) or type(held.get("version")) is not int:
        raise _Refused("is damaged, or no profile")
    if held["version"] != VERSION:
        raise _Foreign(f"is in form {held['version']}, and this longspan reads form {VERSION}")
    try:
        if held.pop("digest", None) != _digest(held):
            raise _Refused("is damaged, or was changed: its content has another digest")
        profile = _profile(held)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _Refused(f"is damaged ({type(error).__name__}: {str(error)[:200]})") from error
    for what, got, want in (
        ("device", profile.device, device),
        ("machine", profile.machine, machine_name()),
        ("torch", profile.torch, str(torch.__version__)),
    ):
        if got != want:
            raise _Foreign(f"was measured with another {what} ({got!r}; here is {want!r})")
    return profile


def _digest(held: dict[str, Any]) -> str:
    return sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def _profile(held: dict[str, Any]) -> Profile:
    """A profile of these values, each of which is what it has to be.

    Raises:
        KeyError, TypeError, ValueError: one is not.
    """
    measures, peaks, threshold = held.pop("measures"), held.pop("peaks"), held.pop("workspace_threshold")
    del held["version"]
    return Profile(
        measures=tuple(_measure(dict(_of(dict, row))) for row in _of(list, measures)),
        peaks={_of(str, name): _number(rate) for name, rate in _of(dict, peaks).items()},
        workspace_threshold=None if threshold is None else _count(threshold),
        bandwidth=_number(held.pop("bandwidth")),
        threads=_count(held.pop("threads")),
        **{name: _of(str, value) for name, value in held.items()},
    )


def _measure(held: dict[str, Any]) -> Measure:
    tokens, forward, backward = _count(held.pop("tokens")), _number(held.pop("forward")), _number(held.pop("backward"))
    texts = {name: _of(str, value) for name, value in held.items()}
    return Measure(**texts, tokens=tokens, forward=forward, backward=backward)


def _of(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:50]!r} is no {kind.__name__}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e300:
        raise ValueError(f"{str(value)[:50]!r} is no number from 0 on")
    return float(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**63:
        raise ValueError(f"{str(value)[:50]!r} is no count")
    return value
