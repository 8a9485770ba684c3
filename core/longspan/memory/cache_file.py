"""Layouts on disk: tensors in safetensors, everything else as JSON before them. Nothing is pickled, no code is run.

A file is four lines of text (the form, the release, a digest, the number of bytes of JSON), the JSON and the tensors.
The digest (SHA-256) is of all the rest of the file, so that one in which a byte changed is refused: a layout with a
wrong number computes wrong attention, and no check of its own can know. It is no protection against who may write the
file, as they can write its digest too: it is read only where it is the user's own (`longspan.memory.folders`). Only the
core's own values are written: numbers, texts, tuples, and attrs objects of classes of this package, which are made by
their constructors.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from longspan.errors import ArgumentError, LongspanError, warn_caller
from longspan.memory.cached_layout import LayoutKey
from longspan.memory.folders import NotOwn, read_own, why_unread, write_whole
from longspan.patterns.blocks.sparse import BlockSparse
from longspan.patterns.text import parse_pattern
from longspan.spec.installing import extra_line

__all__ = ["load", "save"]

FORM = b"longspan layouts 3"
SECOND = b"longspan layouts 2"
EARLIER = b'{"__metadata__":{'
"""How a file of the first form begins, after the eight bytes of its header's length."""
PACKAGE = "longspan."


class _Foreign(Exception):
    """A value that is not the core's own."""


def save(path: str | Path, layouts: Iterable[tuple[LayoutKey, Any]]) -> tuple[int, tuple[LayoutKey, ...]]:
    """Write layouts with their keys; how many could be written, and the keys of those that could not.

    Takes the place of the file in one step; writers do not meet.

    Raises:
        ArgumentError: the file cannot be written.
        LongspanError: safetensors is not installed.
    """
    tools = _safetensors()
    tensors: dict[str, Tensor] = {}
    rows, left_out = [], []
    for key, layout in layouts:
        mine: dict[str, Tensor] = {}
        try:
            row = [_encoded(value, mine, len(tensors)) for value in (key.problem, layout)]
        except _Foreign:
            left_out.append(key)
            continue
        tensors |= mine
        rows.append([key.backend, key.origin, *row])
    try:
        write_whole(Path(path), _joined(json.dumps(rows).encode(), tools.save(tensors)))
    except OSError as error:
        got = f"{path}: {error.strerror or error}"
        raise ArgumentError("path", got, "a file that can be written", "choose another") from error
    return len(rows), tuple(left_out)


def load(path: str | Path) -> list[tuple[LayoutKey, Any]]:
    """Read layouts with their keys; none, with a warning, where another release wrote them.

    Raises:
        ArgumentError: the file cannot be read, is not the user's own, is damaged, or `save` did not write it.
    """
    tools = _safetensors()
    try:
        data = read_own(path)
    except OSError as error:
        fix = "save one first"
        if isinstance(error, NotOwn):
            fix = f"where you trust it, make a copy of your own: cp {shlex.quote(str(path))} COPY"
        raise ArgumentError("path", f"{path}, which {why_unread(error)}", "a file of your own", fix) from error
    try:
        release, rows, tensors = _parted(data)
        if release != _release():
            text = f"{path} was written by {release}, and this is {_release()}: no layout is taken from it"
            warn_caller(f"{text}. Next: save it again", UserWarning)
            return []
        flats = tools.load(tensors)
        return [
            (LayoutKey(_decoded(problem, flats), backend, origin), _decoded(layout, flats))
            for backend, origin, problem, layout in json.loads(rows)
        ]
    except Exception as error:  # the reader has exceptions of its own, and so has what another wrote
        why = str(error) if isinstance(error, _Damaged) else f"cannot be read: {type(error).__name__}: {error}"
        raise ArgumentError(
            "path", f"{path}, which {why}", "a file that PatternCache.save wrote", "delete it, and save it again"
        ) from error


class _Damaged(ValueError):
    """Not what was written: why, as the end of a sentence about the file."""


def _joined(rows: bytes, tensors: bytes) -> bytes:
    """The bytes of a file."""
    release = _release().encode()
    digest = _digest(release, rows, tensors)
    return b"\n".join((FORM, release, digest, str(len(rows)).encode(), rows + tensors))


def _parted(data: bytes) -> tuple[str, bytes, bytes]:
    """The release that wrote a file, its JSON and its tensors.

    Raises:
        _Damaged: it is none, of an earlier form, or some of its bytes changed.
    """
    form, *lines = data.split(b"\n", 4)
    if form == SECOND:
        raise _Damaged("was written by an earlier longspan, whose classes stood in other modules")
    if form != FORM:
        if data[8:].startswith(EARLIER) and b'"layouts":' in data:
            raise _Damaged("was written by an earlier longspan, without a digest")
        raise _Damaged("is damaged, or none of longspan's")
    if len(lines) != 4:
        raise _Damaged("is damaged: it ends too early")
    release, digest, count, rest = lines
    size = int(count) if count.isdigit() and len(count) < 19 else -1
    rows, tensors = rest[: max(0, size)], rest[max(0, size) :]
    if str(size).encode() != count or digest != _digest(release, rows, tensors):
        raise _Damaged("is damaged: its content has another digest")
    return release.decode(), rows, tensors


def _digest(release: bytes, rows: bytes, tensors: bytes) -> bytes:
    """Of the parts, each behind its length, so that no byte can go from one to another."""
    digest = sha256()
    for part in (release, rows, tensors):
        digest.update(b"%d\n" % len(part))
        digest.update(part)
    return digest.hexdigest().encode()


def _release() -> str:
    from importlib.metadata import version

    return f"longspan {version('longspan')}"


def _safetensors() -> Any:
    try:
        return import_module("safetensors.torch")
    except ImportError as error:
        raise LongspanError(
            f"layouts on disk need safetensors, which is not installed. Next: {extra_line('cache')}"
        ) from error


def _encoded(value: Any, tensors: dict[str, Tensor], first: int) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return {"float": value.hex()}
    if type(value) is tuple:
        return [_encoded(item, tensors, first) for item in value]
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
    names = {field.alias or field.name: field.name for field in attrs.fields(kind) if not field.name.startswith("_")}
    return {
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "fields": {alias: _encoded(getattr(value, name), tensors, first) for alias, name in names.items()},
    }


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(item, tensors) for item in value)
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
    return kind(**{name: _decoded(field, tensors) for name, field in value["fields"].items()})
