"""Values flattened into a tree and their tensors, and unflattened on other tensors.

Whoever gets an unflattened value has tensors of their own, so that nobody can change what somebody else was given; and
tensors that are packed into one buffer are one transfer. Walked are attrs objects, tuples, lists and dicts; other
objects are shared as they are, and so are those whose class says `is_frozen`, such as a `BlockCSR`: nobody may change
them. `torch.utils._pytree` would not do: it neither tells what may be shared nor keeps one object in two places one.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import attrs
import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "Packing", "nbytes_of", "pack", "to_device"]

ALIGNMENT = 64
"""Bytes that each tensor's offset in its buffer is a multiple of."""
SAMPLE = 64
"""Items of a long sequence whose bytes are counted; the others are taken to be alike."""


@attrs.frozen(eq=False)
class Packing:
    """A value without its tensors, and where those are in buffers of bytes, one for each device that they are on."""

    tree: Any
    slots: tuple[_Slot, ...]

    @property
    def is_shared(self) -> bool:
        """Whether everybody may have the same object: it has no tensor, and nothing that could be changed."""
        return not isinstance(self.tree, _Node)

    def unpack(self, buffers: Mapping[torch.device, Tensor]) -> Any:
        """The value, its tensors being views of these buffers, which may have moved to other devices."""
        with torch.inference_mode(False), torch.no_grad():
            return unflatten(self.tree, [slot.view(buffers) for slot in self.slots])


def pack(value: Any) -> tuple[Packing, dict[torch.device, Tensor]]:
    """How a value is packed, and copies of its tensors, in one buffer for each device."""
    tree, tensors = flatten(value)
    slots: list[_Slot] = []
    sizes: dict[torch.device, int] = {}
    for tensor in tensors:
        start = sizes.get(tensor.device, 0)
        slots.append(_Slot(tensor.device, start, tuple(tensor.shape), tensor.dtype))
        sizes[tensor.device] = start + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    with torch.inference_mode(False), torch.no_grad():
        buffers = {at: torch.empty(size, dtype=torch.uint8, device=at) for at, size in sizes.items()}
        for slot, tensor in zip(slots, tensors, strict=True):
            slot.view(buffers).copy_(tensor)
    return Packing(tree, tuple(slots)), buffers


@attrs.frozen
class _Slot:
    """Where a tensor is in the buffer of its device."""

    device: torch.device
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def view(self, buffers: Mapping[torch.device, Tensor]) -> Tensor:
        stop = self.start + prod(self.shape) * self.dtype.itemsize
        return buffers[self.device][self.start : stop].view(self.dtype).view(self.shape)


def to_device(value: Any, device: torch.device) -> Any:
    """A value with its tensors, which are on the CPU, on a device."""
    if device.type == "cpu":
        return value
    tree, tensors = flatten(value)
    with torch.inference_mode(False):  # it outlives the mode that a call happens to be made in
        return unflatten(tree, [tensor.to(device) for tensor in tensors])


# ---------------------------------------------------------------------------------------------- flatten and unflatten


@attrs.frozen(eq=False)
class _Node:
    """Stands in a tree for what is made anew: `make(part, tensors)`, where `part` unflattens what is below."""

    make: Callable[[Callable[[Any], Any], Sequence[Tensor]], Any]


def flatten(value: Any) -> tuple[Any, list[Tensor]]:
    """A tree, which is the value itself where everybody may have the same object, and the tensors that it lacks."""
    tensors: list[Tensor] = []
    return _flatten(value, tensors, {}), tensors


def unflatten(tree: Any, tensors: Sequence[Tensor]) -> Any:
    """The value on these tensors; an object that it holds in two places is one object in the result too."""
    return _unflatten(tree, tensors, {})


def _flatten(value: Any, tensors: list[Tensor], seen: dict[int, Any]) -> Any:
    if isinstance(value, int | float | str | bytes | None) or getattr(type(value), "is_frozen", False) is True:
        return value
    if id(value) in seen:
        return seen[id(value)][0]
    tree: Any = value
    if isinstance(value, Tensor):
        if type(value) is Tensor and value.layout is torch.strided and not value.is_quantized:
            index = len(tensors)
            tensors.append(value.detach())
            tree = _Node(lambda part, given: given[index])
        else:  # sparse, say: it is not packed and not moved
            kept = value.detach().clone()
            tree = _Node(lambda part, given: kept.clone())
    elif isinstance(value, list | tuple):
        kind, items = type(value), [_flatten(item, tensors, seen) for item in value]
        is_named = hasattr(kind, "_fields")
        if isinstance(value, list) or any(isinstance(item, _Node) for item in items):
            tree = _Node(lambda part, given: kind(*map(part, items)) if is_named else kind(map(part, items)))
    elif type(value) is dict:
        pairs = {key: _flatten(item, tensors, seen) for key, item in value.items()}
        tree = _Node(lambda part, given: {key: part(item) for key, item in pairs.items()})
    elif attrs.has(type(value)):
        names = [field.name for field in attrs.fields(type(value))]
        fields = {name: _flatten(getattr(value, name), tensors, seen) for name in names}
        fields = {name: field for name, field in fields.items() if isinstance(field, _Node)}
        if fields:
            template = _template(value, names, fields)
            tree = _Node(lambda part, given: _filled(template, {name: part(field) for name, field in fields.items()}))
    seen[id(value)] = tree, value  # the value stays alive, so that no other object gets its id meanwhile
    return tree


def _unflatten(tree: Any, tensors: Sequence[Tensor], made: dict[int, Any]) -> Any:
    if not isinstance(tree, _Node):
        return tree
    if id(tree) not in made:
        made[id(tree)] = tree.make(partial(_unflatten, tensors=tensors, made=made), tensors)
    return made[id(tree)]


def _template(value: Any, names: Sequence[str], fields: Mapping[str, Any]) -> Any:
    """A copy without the fields that are put in later, and without what it computed of them and keeps."""
    template = _filled(value, dict.fromkeys(fields))
    for name, kept in list(getattr(template, "__dict__", {}).items()):
        if name not in names and not isinstance(kept, int | float | str | None):
            del template.__dict__[name]
    return template


def _filled(template: Any, fields: Mapping[str, Any]) -> Any:
    """A copy of an attrs object, frozen perhaps, with these fields."""
    filled = copy.copy(template)
    for name, field in fields.items():
        object.__setattr__(filled, name, field)
    return filled


# --------------------------------------------------------------------------------------------------------- how large


def nbytes_of(value: Any) -> int:
    """Bytes that a value takes: what its `nbytes` says, else about what Python and its tensors say."""
    size = getattr(value, "nbytes", None)
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size + 100
    if isinstance(value, list | tuple):
        some = sum(nbytes_of(item) for item in value[:SAMPLE])
        return sys.getsizeof(value) + some * max(1, len(value)) // max(1, min(SAMPLE, len(value)))
    if type(value) is dict:
        return sys.getsizeof(value) + sum(nbytes_of(item) for item in value.values())
    if attrs.has(type(value)):
        return 100 + sum(nbytes_of(getattr(value, field.name)) for field in attrs.fields(type(value)))
    return sys.getsizeof(value, 100)
