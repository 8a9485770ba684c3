"""Half precision stored, single precision computed: for the GPUs whose half arithmetic is many times slower.

On sm_60 to sm_62 float16 runs at a fraction of float32's rate (1/64 on sm_61) and bfloat16 not at all. Query, key and
value are widened a tile at a time, so that no float32 copy of a whole sequence ever exists. That half is slow here is
a matter of the resolution, not of a class: no subclass can lose it.
"""

from __future__ import annotations

from longspan.plugin import Capabilities, Kernel, Problem, hookimpl
from longspan_plugins import sdpa


@hookimpl
def longspan_capabilities() -> Capabilities:
    """Dense attention on half-precision tensors, with a native backward."""
    return Capabilities(
        devices=("cuda==6.0", "cuda==6.1", "cuda==6.2"),
        dtypes=("float16", "bfloat16"),
        patterns=("dense",),
        causal=True,
        gqa=True,
        backward=True,
        deterministic=True,
        tier=40,
    )


@hookimpl
def longspan_kernel(problem: Problem) -> Kernel:
    """sdpa's float32 operators over widened tiles."""
    return sdpa.widened(problem)
