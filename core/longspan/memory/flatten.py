"""A layout taken apart: its tensors packed into one flat buffer a device, and how to put it together again.

Who puts a layout together gets tensors of their own, so that nobody can change what somebody else was given; and one
buffer is one transfer. Walked are attrs objects, tuples, lists and dicts; other objects are shared as they are, and so
are those whose class says `is_frozen`, such as a `BlockCSR`: nobody may change them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "Parcel", "weigh"]

ALIGNMENT = 64
"""Bytes that each tensor's offset in its buffer is a multiple of."""
SAMPLE = 64
"""Items of a long sequence that are weighed; the others are taken to be alike."""


class Parcel:
    """A value, its tensors packed.

    `flats` holds a buffer of bytes for each device that the value has tensors on. `is_plain`: no tensor and nothing
    that could be changed is in the value, so that everybody may have the same object.
    """

    def __init__(self, value: Any) -> None:
        self.weight = weigh(value)
        self._places: list[_Place] = []
        self.flats: dict[torch.device, Tensor] = {}
        self._node: Any = value
        tensors: list[Tensor] = []
        self._node = _apart(value, tensors, {})
        sizes: dict[torch.device, int] = {}
        for tensor in tensors:
            start = sizes.get(tensor.device, 0)
            self._places.append(_Place(tensor.device, start, tuple(tensor.shape), tensor.dtype))
            sizes[tensor.device] = start + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        with torch.inference_mode(False), torch.no_grad():
            for device, size in sizes.items():
                self.flats[device] = torch.empty(size, dtype=torch.uint8, device=device)
            for place, tensor in zip(self._places, tensors, strict=True):
                place.of(self.flats).copy_(tensor)

    @property
    def is_plain(self) -> bool:
        """Whether everybody may have the same object."""
        return not isinstance(self._node, _Node)

    def value(self, flats: Mapping[torch.device, Tensor] | None = None) -> Any:
        """The value, with tensors on copies of these buffers (its own unless given)."""
        if self.is_plain:
            return self._node
        with torch.inference_mode(False), torch.no_grad():
            mine = {device: flat.clone() for device, flat in (self.flats if flats is None else flats).items()}
            return _together(self._node, [place.of(mine) for place in self._places], {})


@attrs.frozen
class _Place:
    """Where a tensor is in the buffer of its device."""

    device: torch.device
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, flats: Mapping[torch.device, Tensor]) -> Tensor:
        size = self.dtype.itemsize
        for one in self.shape:
            size *= one
        return flats[self.device][self.start : self.start + size].view(self.dtype).view(self.shape)


# ------------------------------------------------------------------------------------------- apart and together again


class _Node:
    """Stands for what everybody gets a copy of."""


@attrs.define(eq=False)
class _Packed(_Node):
    index: int


@attrs.define(eq=False)
class _Cloned(_Node):
    """A tensor that is no plain strided one: sparse, say. It is not packed and not moved."""

    tensor: Tensor


@attrs.define(eq=False)
class _Items(_Node):
    kind: Any
    items: list[Any]


@attrs.define(eq=False)
class _Pairs(_Node):
    items: dict[Any, Any]


@attrs.define(eq=False)
class _Record(_Node):
    """An attrs object: a copy of it, and the fields that are put into each further copy."""

    template: Any
    fields: dict[str, Any]


def _apart(value: Any, tensors: list[Tensor], seen: dict[int, Any]) -> Any:
    """The value itself where it may be shared, else a node."""
    if isinstance(value, int | float | str | bytes | None) or getattr(type(value), "is_frozen", False) is True:
        return value
    if id(value) in seen:
        return seen[id(value)][0]
    node: Any = value
    if isinstance(value, Tensor):
        if type(value) is Tensor and value.layout is torch.strided and not value.is_quantized:
            node = _Packed(len(tensors))
            tensors.append(value.detach())
        else:
            node = _Cloned(value.detach().clone())
    elif isinstance(value, list | tuple):
        items = [_apart(one, tensors, seen) for one in value]
        if isinstance(value, list) or any(isinstance(one, _Node) for one in items):
            node = _Items(type(value), items)
    elif type(value) is dict:
        node = _Pairs({key: _apart(one, tensors, seen) for key, one in value.items()})
    elif attrs.has(type(value)):
        fields = {one.name: _apart(getattr(value, one.name), tensors, seen) for one in attrs.fields(type(value))}
        fields = {name: one for name, one in fields.items() if isinstance(one, _Node)}
        if fields:
            node = _Record(_template(value, fields), fields)
    seen[id(value)] = node, value  # the value stays alive, so that no other object gets its id meanwhile
    return node


def _template(value: Any, fields: Mapping[str, Any]) -> Any:
    """A copy without the fields that are put in later, and without what it computed of them and keeps."""
    template = copy.copy(value)
    for name in fields:
        object.__setattr__(template, name, None)
    names = {one.name for one in attrs.fields(type(value))}
    for name, kept in list(getattr(template, "__dict__", {}).items()):
        if name not in names and not isinstance(kept, int | float | str | None):
            del template.__dict__[name]
    return template


def _together(node: Any, tensors: Sequence[Tensor], made: dict[int, Any]) -> Any:
    if not isinstance(node, _Node):
        return node
    if id(node) in made:
        return made[id(node)]
    value: Any
    if isinstance(node, _Packed):
        value = tensors[node.index]
    elif isinstance(node, _Cloned):
        value = node.tensor.clone()
    elif isinstance(node, _Items):
        items = [_together(one, tensors, made) for one in node.items]
        value = node.kind(*items) if hasattr(node.kind, "_fields") else node.kind(items)
    elif isinstance(node, _Pairs):
        value = {key: _together(one, tensors, made) for key, one in node.items.items()}
    else:
        assert isinstance(node, _Record)
        value = copy.copy(node.template)
        for name, one in node.fields.items():
            object.__setattr__(value, name, _together(one, tensors, made))
    made[id(node)] = value
    return value


# --------------------------------------------------------------------------------------------------------- how large


def weigh(value: Any) -> int:
    """Bytes that a value takes: what its `nbytes` says, else about what Python and its tensors say."""
    size = getattr(value, "nbytes", None)
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size + 100
    if isinstance(value, list | tuple):
        some = sum(weigh(one) for one in value[:SAMPLE])
        return sys.getsizeof(value) + some * max(1, len(value)) // max(1, min(SAMPLE, len(value)))
    if type(value) is dict:
        return sys.getsizeof(value) + sum(weigh(one) for one in value.values())
    if attrs.has(type(value)):
        return 100 + sum(weigh(getattr(value, one.name)) for one in attrs.fields(type(value)))
    return sys.getsizeof(value, 100)
