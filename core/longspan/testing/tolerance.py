"""How far off a result may be: the one rule, by the error that naive torch of the same dtype makes.

The error of a result is the largest |got - oracle| / max(1, |oracle|) over its elements. Allowed are, in float64,
1e-12; in lower precision, `FORWARD` times naive torch's error on the same inputs for out and lse, `GRADIENT` times for
gradients. Naive torch may be right by luck where there are few numbers, so a floor holds in every dtype. It is what the
contract itself makes anyone lose, in roundings that naive torch never takes:

- the result is rounded to its dtype: one eps, which the exact answer would not survive either;
- scores and lse are rounded, and every weight of a merge or a backward is exp(score - lse): |lse| eps in the lse's
  dtype, `ROUNDINGS` times, for a score and an lse in each of two partial results;
- a backward's slopes are P (dout . v - dout . out). It gets out in the inputs' dtype, and both products are summed in
  the lse's: together about |dout * out| (2-norm, for roundings are independent) times one eps of the former and
  `ROUNDINGS` of the latter, which reaches dquery and dkey times scale and the largest key or query.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["FLOAT64", "FORWARD", "GRADIENT", "ROUNDINGS", "allowed", "error", "floor", "gradient_floor", "wide"]

FLOAT64 = 1e-12
FORWARD = 2.0
GRADIENT = 3.0
ROUNDINGS = 4.0


def error(got: Tensor, want: Tensor) -> float:
    """The error of a result; inf where it is NaN, or infinite where the oracle is not."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    off = ((got - want).abs() / want.abs().clamp(min=1.0)).masked_fill(got == want, 0.0)
    return float(off.nan_to_num(math.inf, math.inf).max()) if off.numel() else 0.0


def allowed(dtype: torch.dtype, naive: float, times: float, least: float) -> float:
    """The largest error that passes: `times` naive torch's error, and never less than the floor."""
    return max(times * naive, least, FLOAT64 if dtype == torch.float64 else 0.0)


def floor(dtype: torch.dtype, lse: Tensor) -> float:
    """What anyone may lose in `out` and `lse`, given the oracle's lse."""
    size = max(1.0, _largest(lse[lse.isfinite()]))
    return torch.finfo(dtype).eps + ROUNDINGS * size * torch.finfo(wide(dtype)).eps


def gradient_floor(
    dtype: torch.dtype, lse: Tensor, out: Tensor, dout: Tensor, query: Tensor, key: Tensor, scale: float
) -> float:
    """What anyone may lose in a gradient, given the oracle's lse and out and the inputs."""
    product = _largest((dout.cpu().double() * out).norm(dim=-1))
    reach = abs(scale) * max(_largest(query), _largest(key))
    eps = torch.finfo(dtype).eps + ROUNDINGS * torch.finfo(wide(dtype)).eps
    return floor(dtype, lse) + eps * product * reach


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the log-sum-exp for inputs of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0
