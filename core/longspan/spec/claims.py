"""Checks on what a backend claims of itself: a word that nothing understands would claim nothing, in silence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch

from longspan.errors import ArgumentError, brief
from longspan.spec.pattern import Pattern

__all__ = ["DTYPES", "check_claims"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
DEVICES = ("cpu", "cuda", "rocm", "mps", "xpu")
ELSEWHERE = ("hpu", "mlu", "musa", "npu", "xla")
"""Devices that torch knows once a package of their maker's is imported."""

MEANT = {
    "devices": {
        "amd": "rocm",
        "apple": "mps",
        "gpu": "cuda",
        "hip": "rocm",
        "intel": "xpu",
        "metal": "mps",
        "nvidia": "cuda",
    },
    "dtypes": {"bf16": "bfloat16", "double": "float64", "float": "float32", "fp16": "float16", "fp32": "float32",
               "fp64": "float64", "half": "float16"},
    "patterns": {"blocks": "block_sparse", "full": "dense", "local": "window", "sliding": "window",
                 "sliding_window": "window", "sparse": "block_sparse"},
}  # fmt: skip
"""Words that are not ours, and ours."""


def check_claims(claims: Mapping[str, Any], switches: Iterable[str]) -> None:
    """Refuse words and values that a field of `Capabilities` cannot have.

    Args:
        claims: the fields, by name.
        switches: the names of those that are True or False.

    Raises:
        ArgumentError: names the field, what it was given and the nearest thing that would do.
    """
    for name in switches:
        if not isinstance(claims[name], bool):
            fix = f"{name}={bool(claims[name])}"
            raise ArgumentError(f"Capabilities.{name}", brief(claims[name]), "True or False", fix)
    for dtype in claims["dtypes"]:
        if dtype not in DTYPES:
            raise _unknown("dtypes", dtype, DTYPES)
    kinds = tuple(sorted(kind for kind in _kinds(Pattern) if kind))
    for pattern in claims["patterns"]:
        if pattern == "causal":
            raise ArgumentError("Capabilities.patterns", "'causal'", f"names out of {', '.join(kinds)}", "causal=True")
        if pattern not in kinds:
            raise _unknown("patterns", pattern, kinds)
    for name in ("devices", "contains_nonfinite"):
        for device in claims[name]:
            _check_device(name, device)


def _kinds(kind: type[Pattern]) -> set[str]:
    """The kinds of all patterns that there are, those of other packages too."""
    return {kind.kind}.union(*[_kinds(one) for one in kind.__subclasses__()])


def _check_device(name: str, device: object) -> None:
    text = str(device)
    match = re.fullmatch(r"([a-z]+)(?:(?:>=|<=|==|<|>)\d+\.\d+)?", text)
    if match is None:
        fix = f"e.g. {name}=('cpu', 'cuda>=8.0')"
        if arch := re.fullmatch(r"sm_?(\d+)(\d)", text):
            fix = f"write 'cuda>={arch[1]}.{arch[2]}', or == for this one alone"
        elif spaced := re.fullmatch(r"([a-z]+)\s*(>=|<=|==|<|>)\s*(\d+)(\.\d+)?", text):
            fix = f"write {spaced[1] + spaced[2] + spaced[3] + (spaced[4] or '.0')!r}"
        elif plain := re.fullmatch(r"([a-z]+):\d+", text):
            fix = f"write {plain[1]!r}, whatever its number"
        raise ArgumentError(f"Capabilities.{name}", brief(device), "a form such as cpu, cuda or cuda>=8.0", fix)
    word = match[1]
    if word not in (*DEVICES, *ELSEWHERE) and not _torch_knows(word):
        raise _unknown(name, device, DEVICES)


def _torch_knows(device: str) -> bool:
    """Whether torch has such devices, here or elsewhere: what a maker's package renamed, for example."""
    try:
        torch.device(device)
    except RuntimeError:
        return False
    return True


def _unknown(field: str, word: object, known: tuple[str, ...]) -> ArgumentError:
    text = str(word).removeprefix("torch.").lower()
    near = MEANT["devices" if field == "contains_nonfinite" else field].get(text) or next(
        iter(get_close_matches(text, known, n=1, cutoff=0.5)), ""
    )
    near = text if text in known else near
    fix = f"write {near!r}" if near else f"e.g. {field}=({known[0]!r},)"
    return ArgumentError(f"Capabilities.{field}", brief(word), f"names out of {', '.join(known)}", fix)
