"""The whole of what the doctor found."""

from __future__ import annotations

import os
from typing import Any

import torch
from attrs import asdict, frozen

from longspan.errors import PolicyError
from longspan.memory import compiled
from longspan.memory.folders import Unused
from longspan.registry import profile, quarantine
from longspan.registry.policy import Policy, current
from longspan.tools.doctor.ledger import Ledger, isolated_ledger, local_ledger
from longspan.tools.doctor.machine import Machine, machine
from longspan.tools.doctor.remedies import Remedy, remedies
from longspan.tools.doctor.settings import Setting, readable, settings

__all__ = ["Report", "examine"]


@frozen
class Report:
    """The machine, the ledger, the environment, the policy, and what is to be fixed.

    `policy` is the text of the error where it cannot be read. `isolated`: no plugin was imported in this process.
    `files`: what is kept on disk and not used.
    """

    machine: Machine
    ledger: Ledger
    settings: tuple[Setting, ...]
    policy: Policy | str
    remedies: tuple[Remedy, ...]
    cuda_initialized: bool
    isolated: bool
    files: tuple[Unused, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is broken; what is merely of no use here is not."""
        return not any(remedy.broken for remedy in self.remedies)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "ok": self.ok,
            "isolated": self.isolated,
            "machine": {**self.machine.to_dict(), "cuda_initialized": self.cuda_initialized},
            "ledger": [row.to_dict() for row in self.ledger.rows],
            "unusable": [useless.to_dict() for useless in self.ledger.unusable],
            "environment": [asdict(setting) for setting in self.settings],
            "policy": {"error": self.policy} if isinstance(self.policy, str) else _policy(self.policy),
            "quarantine": _quarantine(),
            "files": [asdict(file) for file in self.files],
            "to_fix": [asdict(remedy) for remedy in self.remedies],
        }


def examine(isolate: bool = False, timeout: float = 60.0) -> Report:
    """Look at everything. Initialises no CUDA; a setting that cannot be read is reported.

    Args:
        isolate: import each plugin in an interpreter of its own, and none here: a crash, an exit or a hang is reported.
        timeout: seconds after which such an import is said to hang.

    Raises:
        PluginError: `isolate` where this Python does not know its own executable.
    """
    here, variables = machine(), settings()
    environ = readable(variables)
    files = (*compiled.survey(), *profile.survey())
    ledger = isolated_ledger(here.usable, environ, timeout) if isolate else local_ledger(here.usable, environ)
    return Report(
        machine=here,
        ledger=ledger,
        settings=variables,
        policy=_in_force(),
        remedies=remedies(here, ledger, variables, files),
        cuda_initialized=torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]
        isolated=isolate,
        files=files,
    )


def _in_force() -> Policy | str:
    try:
        return current()
    except PolicyError as error:
        return str(error)


def _policy(policy: Policy) -> dict[str, Any]:
    shown = {name: getattr(policy, name) for name in ("backend", "backend_from", "prefer", "prefer_from")}
    return {**shown, "block": policy.deny}  # as in `use(block=...)`


def _quarantine() -> dict[str, Any]:
    try:
        folder = str(quarantine.directory())
    except RuntimeError:  # no home
        folder = ""
    return {
        "directory": folder,
        "writable": bool(folder) and os.access(_nearest(folder), os.W_OK),
        "crashes": [asdict(crash) for crash in quarantine.crashes()],
    }


def _nearest(folder: str) -> str:
    """The folder, or that above it which exists: what is missing is made."""
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return folder
