"""The profiler's proof of which operators really ran."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import asdict, frozen

__all__ = ["Verification", "observe"]


@frozen
class Verification:
    """What a backend says that it runs, and what the profiler saw.

    `claimed` are the operators that the kernels declare, `ran` those that the profiler counted, `unclaimed` fused
    attention operators that ran without being claimed. `ok` is None where nothing was claimed.
    """

    backend: str
    claimed: tuple[str, ...]
    ran: dict[str, int]
    missing: tuple[str, ...]
    unclaimed: tuple[str, ...]

    @property
    def ok(self) -> bool | None:
        """Whether all that was claimed ran, and no other attention operator did."""
        return not (self.missing or self.unclaimed) if self.claimed else None

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        if not self.claimed:
            return f"{self.backend} claims no operator; ran {', '.join(self.ran)}"
        counts = ", ".join(f"{name} x {self.ran[name]}" for name in self.claimed if name in self.ran)
        text = f"{self.backend} ran {counts or 'none of what it claims'}"
        text += f"; claimed but not seen: {', '.join(self.missing)}" if self.missing else ""
        return text + (f"; seen but not claimed: {', '.join(self.unclaimed)}" if self.unclaimed else "")


def observe(backend: str, claimed: tuple[str, ...], run: Callable[[], object]) -> Verification:
    """Run under the profiler and compare with the claim.

    Args:
        backend: whose claim it is.
        claimed: operator names as the profiler prints them, e.g. `aten::bmm`.
        run: what to run.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    ran = {event.key: event.count for event in profiler.key_averages() if "::" in event.key}
    fused = tuple(name for name in ran if "attention" in name and name not in claimed and _is_kernel(name, claimed))
    return Verification(backend, claimed, ran, tuple(name for name in claimed if name not in ran), fused)


def _is_kernel(name: str, claimed: tuple[str, ...]) -> bool:
    """Whether a name is an operator of its own, not the inner or outer layer of a claimed one."""
    stem = name.removeprefix("aten::").strip("_")
    return not any(stem in one or one.removeprefix("aten::").strip("_") in stem for one in claimed)
