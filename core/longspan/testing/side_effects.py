"""What a backend leaves as it found it: the inputs, bit for bit, and the process's own settings of torch."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from longspan.testing.claims import contract
from longspan.testing.outcome import Breach
from longspan.testing.tensors import Inputs

__all__ = ["only_read", "unchanged"]

STATE = contract("torch's state is left as it was", "draw from generators and change settings nowhere, or undo it")
SILENT = contract("nothing is printed", "print nothing, or use logging")
READ = contract("inputs are only read", "copy a tensor before you write to it")

Setting = tuple[Callable[[], Any], Callable[[Any], object]]


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _autocast(device: str) -> Setting:
    def get() -> tuple[bool, torch.dtype]:
        return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def put(value: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(device, value[0])
        torch.set_autocast_dtype(device, value[1])

    return get, put


_SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "the state of torch's generator": (torch.get_rng_state, torch.set_rng_state),
        "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "torch's default device": (
            torch.get_default_device,
            lambda device: torch.set_default_device(None if device.type == "cpu" else device),
        ),
        "the number of threads": (torch.get_num_threads, torch.set_num_threads),
        "the gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
        "the mode of deterministic algorithms": (
            _deterministic,
            lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
        ),
        "the precision of float32 products": (
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
        ),
    }
)
"""By name, how each is read, and how it is put back."""


@contextmanager
def unchanged(device: torch.device) -> Iterator[None]:
    """What runs inside prints nothing and leaves torch's generators and settings alone; they are put back in any case.

    Raises:
        Breach: names what was changed, unless something else is already wrong.
    """
    settings = dict(_SETTINGS)
    settings["autocast"] = _autocast(device.type)
    if device.type == "cuda":
        settings["the state of the device's generator"] = (
            lambda: torch.cuda.get_rng_state(device),
            lambda state: torch.cuda.set_rng_state(state, device),
        )
    before = {name: get() for name, (get, _) in settings.items()}
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        changed = [name for name, (get, _) in settings.items() if not _same(get(), before[name])]
        for name in changed:
            settings[name][1](before[name])
    if changed:
        raise Breach(f"it changed {' and '.join(changed)}", claim=STATE)
    if text := printed.getvalue().strip():
        raise Breach(f"it printed {text[:40]!r}", claim=SILENT)


@contextmanager
def only_read(inputs: Inputs) -> Iterator[None]:
    """What runs inside leaves every byte of the inputs' memory as it is, the gaps between rows among them.

    Raises:
        Breach: names the tensor that was written to.
    """
    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value, "dout": inputs.dout}
    before = {name: (_memory(x).clone(), x._version) for name, x in tensors.items()}
    yield
    for name, x in tensors.items():
        memory, version = before[name]
        if not torch.equal(_memory(x), memory):
            raise Breach(f"it wrote to {name}", claim=READ)
        if x._version != version:
            raise Breach(f"it wrote to {name}, if only what was there before", claim=READ)


def _memory(x: Tensor) -> Tensor:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)
