"""Autocast for attention: the dtypes that torch's own `scaled_dot_product_attention` would see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["follow_autocast"]


def follow_autocast(query: Any, key: Any, value: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Cast to autocast's dtype where it is enabled for query's device; float64 stays, as everywhere under autocast."""
    if not all(isinstance(tensor, Tensor) for tensor in (query, key, value)):
        return query, key, value  # to be refused by whoever checks
    kind = query.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype is not torch.float64
        return tensor.to(dtype) if eligible else tensor

    return cast(query), cast(key), cast(value)
