"""What holds for tensors everywhere in the core: the dtype of sums, the stride kernels rely on, numbers in order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

__all__ = ["counting", "unit_stride", "wide_dtype"]


def counting(*ends: int) -> Tensor:
    """`torch.arange`, int64 and on the CPU, whatever torch's default device is: layouts are computed there."""
    return torch.arange(*ends, dtype=torch.int64, device="cpu")


wide_dtype: Callable[[torch.dtype], torch.dtype] = partial(torch.promote_types, torch.float32)
"""The dtype of the log-sum-exp, and of what is summed, for inputs of a dtype: float32, or float64 for float64."""


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor with a last dimension without gaps, copied only if it has any: kernels may rely on that."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
