"""Layouts on disk: tensors in safetensors, everything else as JSON beside them. Nothing is pickled, no code is run.

Only the core's own values are written: numbers, texts, tuples, and attrs objects of classes of this package. Reading
makes them by their constructors, whose checks a damaged file does not pass.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from longspan.block_sparse import BlockSparse
from longspan.cache_entry import LayoutKey
from longspan.errors import ArgumentError, LongspanError
from longspan.patterns import parse_pattern

__all__ = ["load", "save"]

FORMAT = "1"
PACKAGE = "longspan."


class _Foreign(Exception):
    """A value that is not the core's own."""


def save(path: str | Path, layouts: Iterable[tuple[LayoutKey, Any]]) -> int:
    """Write layouts with their keys; how many could be written. Takes the place of the file in one step."""
    tools = _safetensors()
    tensors: dict[str, Tensor] = {}
    rows = []
    for key, layout in layouts:
        mine: dict[str, Tensor] = {}
        try:
            row = [_encoded(one, mine, len(tensors)) for one in (key.problem, layout)]
        except _Foreign:
            continue
        tensors |= mine
        rows.append([key.backend, key.origin, *row])
    target = Path(path)
    fresh = target.with_name(target.name + ".new")
    tools.save_file(tensors, fresh, metadata={**_release(), "layouts": json.dumps(rows)})
    fresh.replace(target)
    return len(rows)


def load(path: str | Path) -> list[tuple[LayoutKey, Any]]:
    """Read layouts with their keys; none where another release wrote them.

    Raises:
        ArgumentError: the file cannot be read, or `save` did not write it.
    """
    tools = _safetensors()
    try:
        with tools.safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if "layouts" not in about:
            raise ValueError("it holds no layouts")
        if {name: about.get(name) for name in _release()} != _release():
            return []
        return [
            (LayoutKey(_decoded(problem, tensors), backend, origin), _decoded(layout, tensors))
            for backend, origin, problem, layout in json.loads(about["layouts"])
        ]
    except Exception as error:  # the reader has exceptions of its own, and a damaged file has others
        got = f"{path}: {type(error).__name__}: {error}"
        raise ArgumentError("path", got, "a file that PatternCache.save wrote", "save it again") from error


def _release() -> dict[str, str]:
    from importlib.metadata import version

    return {"format": FORMAT, "longspan": version("longspan")}


def _safetensors() -> Any:
    try:
        tools = import_module("safetensors.torch")
        tools.safe_open = import_module("safetensors").safe_open  # type: ignore[attr-defined]
    except ImportError as error:
        raise LongspanError(
            "layouts on disk need safetensors, which is not installed. Next: pip install 'longspan[cache]'"
        ) from error
    return tools


def _encoded(value: Any, tensors: dict[str, Tensor], first: int) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return {"float": value.hex()}
    if type(value) is tuple:
        return [_encoded(one, tensors, first) for one in value]
    if type(value) is Tensor and value.layout is torch.strided:
        name = str(first + len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name, "device": str(value.device)}
    if isinstance(value, BlockSparse):  # its rules are written as text; a layout that was given has none
        if "csr:" in value.spec:
            raise _Foreign
        return {"pattern": value.spec}
    kind = type(value)
    if not attrs.has(kind) or not kind.__module__.startswith(PACKAGE):
        raise _Foreign
    fields = {one.alias or one.name: one for one in attrs.fields(kind) if not one.name.startswith("_")}
    return {
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "fields": {name: _encoded(getattr(value, one.name), tensors, first) for name, one in fields.items()},
    }


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(one, tensors) for one in value)
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float.fromhex(value["float"])
    if "tensor" in value:
        return tensors[value["tensor"]].to(value["device"])
    if "pattern" in value:
        return parse_pattern(value["pattern"])
    module, _, name = value["class"].partition(":")
    if not module.startswith(PACKAGE):
        raise ValueError(f"{module} is not the core's")
    kind = getattr(sys.modules.get(module) or import_module(module), name)
    if not (isinstance(kind, type) and attrs.has(kind) and kind.__module__ == module):
        raise ValueError(f"{value['class']} is no class of values")
    return kind(**{field: _decoded(one, tensors) for field, one in value["fields"].items()})
