"""Plain torch, block by block: any dtype, any device; slow and exact. What other backends are measured against."""

from __future__ import annotations

from functools import partial
from typing import Any

from longspan.plugin import Capabilities, Kernel, Problem, blockwise, hookimpl


@hookimpl
def longspan_capabilities() -> Capabilities:
    """Dense attention for everything; by name only."""
    return Capabilities(
        devices=("cpu", "cuda", "rocm", "mps", "xpu"),
        dtypes=("float16", "bfloat16", "float32", "float64"),
        patterns=("dense",),
        causal=True,
        gqa=True,
        dropout=True,
        backward=True,
        deterministic=True,
        contains_nonfinite=("cpu",),
        opt_in=True,
        tier=-10,
    )


@hookimpl
def longspan_kernel(problem: Problem) -> Kernel:
    """The core's blockwise forward and backward."""
    given: dict[str, Any] = {"is_causal": problem.is_causal, "scale": problem.scale}
    return Kernel(partial(blockwise.forward, **given), partial(blockwise.backward, **given), ("aten::amax",))
