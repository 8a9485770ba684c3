"""Attention over `torch.distributed.tensor.DTensor`: each rank attends with the batch entries or heads that it holds.

Query decides: where it is sharded along the batch or the heads (tensor parallelism), key and value are taken in the
same way, and so is the result. No forward communicates. What a rank could not compute alone is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from longspan.errors import ArgumentError
from longspan.patterns.blocks.sparse import BlockSparse
from longspan.patterns.dilated import Dilated
from longspan.patterns.text import decode

__all__ = ["serve"]

NAMES = ("query", "key", "value")
BATCH, HEADS = 0, 1


def serve() -> None:
    """Register how the operators treat DTensors."""
    torch.library.register_torch_dispatch("longspan::attention", DTensor, _forward)
    torch.library.register_torch_dispatch("longspan::attention_backward", DTensor, _backward)


def _forward(_: Any, operator: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[Tensor, Tensor]:
    (query, key, value), (boundaries, *rest) = args[:3], args[3:]
    with torch.no_grad():
        _check(query, key, value, *rest)
        mesh, placements = query.device_mesh, query.placements
        out, lse = operator(*(_local(x, mesh, placements) for x in (query, key, value)), _whole(boundaries), *rest)
        shapes = query.shape, query.shape[:3]
        given = zip((out, lse), shapes, strict=True)
        first, second = (_distributed(x, mesh, placements, shape) for x, shape in given)
        return first, second


def _backward(_: Any, operator: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[Tensor, ...]:
    (dout, dlse, query, key, value, out, lse), (boundaries, *rest) = args[:7], args[7:]
    with torch.no_grad():
        _check(query, key, value, *rest)
        mesh, placements = query.device_mesh, query.placements
        tensors = (
            None if x is None else _local(x, mesh, placements) for x in (dout, dlse, query, key, value, out, lse)
        )
        grads = operator(*tensors, _whole(boundaries), *rest)
        found = zip(grads, (query, key, value), strict=True)
        return tuple(
            _distributed(x, mesh, placements, like.shape).redistribute(mesh, like.placements) for x, like in found
        )


def _local(tensor: Any, mesh: Any, placements: Any) -> Tensor:
    """What this rank holds of a tensor under these placements."""
    local: Tensor = tensor.redistribute(mesh, placements).to_local()
    return local


def _whole(boundaries: Any) -> Tensor | None:
    """Documents as every rank needs them; plain boundaries are the same on every rank."""
    return boundaries.full_tensor() if isinstance(boundaries, DTensor) else boundaries


def _distributed(local: Tensor, mesh: Any, placements: Any, shape: torch.Size) -> Any:
    stride = torch.empty(shape, device="meta", dtype=local.dtype).stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def _check(
    query: Any,
    key: Any,
    value: Any,
    seed: Tensor | None,
    words: str,
    numbers: list[int],
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    *_: Any,
) -> None:
    """Refuse what a rank could not compute from what it holds.

    Raises:
        ArgumentError: names the argument, and the placement that would do.
    """
    for name, tensor in zip(NAMES, (query, key, value), strict=True):
        if not isinstance(tensor, DTensor):
            got, fix = (
                "a plain tensor beside a DTensor",
                f"torch.distributed.tensor.distribute_tensor({name}, mesh, ...)",
            )
            raise ArgumentError(name, got, "three DTensors or none", fix)
        if tensor.device_mesh != query.device_mesh:
            raise ArgumentError(name, f"on {tensor.device_mesh}", f"on query's mesh, {query.device_mesh}")
        for mine, its in zip(query.placements, tensor.placements, strict=True):
            if its not in (Replicate(), Shard(BATCH), Shard(HEADS)):
                want = "batch or heads sharded (Shard(0), Shard(1)), or replicated"
                raise ArgumentError(
                    name, f"a DTensor with {its!r}", want, f"{name}.redistribute(placements=[Shard(1)])"
                )
            if its not in (mine, Replicate()):
                want = f"query's, {mine!r}, or replicated"
                raise ArgumentError(name, f"a DTensor with {its!r}", want, f"{name}.redistribute(placements=...)")
    if dropout_p:
        want = "0.0 with DTensors: a mask is numbered by batch entry and head, which no rank knows"
        raise ArgumentError("dropout_p", dropout_p, want, "drop nothing, or call attention with local tensors")
    shards = 1
    for size, placement in zip(query.device_mesh.shape, query.placements, strict=True):
        shards *= size if placement == Shard(HEADS) else 1
    if shards == 1:
        return
    for name, tensor in (("query", query), ("key", key)):
        if tensor.shape[1] % shards:
            got, fix = f"{tensor.shape[1]} heads over {shards} ranks", "replicate it, or shard the batch"
            raise ArgumentError(name, got, "as many heads for every rank", fix)
    _check_pattern(words, numbers, query.shape[1], shards)


def _check_pattern(words: str, numbers: list[int], heads: int, shards: int) -> None:
    """Refuse a pattern by which a head's keys depend on the number that it has among all."""
    pattern = decode(words, numbers)
    alike = not isinstance(pattern, BlockSparse) or pattern.heads is None
    if isinstance(pattern, Dilated):
        even = pattern.offset == "modulo"  # then a rank's first head is one that begins a round of offsets
        each = (rate == 1 or (even and heads // shards % rate == 0) for rate in pattern.dilation_rates)
        alike = pattern.heads == "all" and all(each)
    if not alike:
        got, want = (
            f"{pattern.spec} with {heads} heads sharded over {shards} ranks",
            "a pattern that treats all heads alike",
        )
        raise ArgumentError("pattern", got, want, "shard the batch, or replicate query, key and value")
