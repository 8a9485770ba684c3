"""Fused attention for CPUs: scores, softmax and weighted sums of a tile stay in the caches, forward and backward.

Native kernels, compiled at first use for the processor at hand (AVX-512 with bfloat16 products, AVX2, or whatever the
C compiler's vectors become), run dense, windowed and dilated attention over packed documents in one softmax a row, read
keys and values where they lie, and draw dropout by position. Without a C compiler the same backend composes its tiles
from torch's operators.
"""

from __future__ import annotations

import sys
from typing import Any

from attrs import evolve

from longspan import refresh
from longspan.plugin import Capabilities, Kernel, Problem, Reason, hookimpl


@hookimpl
def longspan_capabilities() -> Capabilities:
    """Dense, windowed, dilated and block-sparse attention in single and half precision, computed in float32.

    Where native kernels cannot be made, what torch's operators do in their place: dense attention, at no better speed
    than `sdpa`, which is therefore ranked before it.
    """
    from longspan_plugins.cpu_fused.library import failure, installing, missing

    if why := missing() or failure():
        lack = Reason("compiler", "native kernels", want=why, fix=installing())
        return Capabilities(
            devices=("cpu",),
            dtypes=("float16", "bfloat16", "float32"),
            patterns=("dense",),
            causal=True,
            gqa=True,
            dropout=True,
            backward=True,
            deterministic=True,
            tier=5,
            lacks=(lack,),
        )
    return Capabilities(
        devices=("cpu",),
        dtypes=("float16", "bfloat16", "float32"),
        patterns=("dense", "window", "dilated", "block_sparse"),
        causal=True,
        gqa=True,
        dropout=True,
        documents=True,
        window=True,
        query_offset=True,
        backward=True,
        deterministic=True,
        contains_nonfinite=("cpu",),
        tier=35,
    )


@hookimpl
def longspan_pattern(problem: Problem) -> Any:
    """Tiles and segments, where the kernels run the pattern as it is; None leaves it to be lowered."""
    from longspan_plugins.cpu_fused.library import load, missing
    from longspan_plugins.cpu_fused.program import program_for

    if missing():
        return None
    if load().handle is None:  # the compiler that was there when backends were listed cannot compile
        refresh(sys.modules[__name__])
        return None
    return program_for(problem, load())


@hookimpl
def longspan_kernel(problem: Problem, layout: Any) -> Kernel | None:
    """Native kernels over the layout's program; composed tiles for dense problems where there are none."""
    from longspan_plugins.cpu_fused import composed
    from longspan_plugins.cpu_fused.library import load

    if native := program_kernel(problem, layout):
        return native
    made, why = composed.kernel(problem), load().refusal
    return made if made is None or not why else evolve(made, library=f"{made.library} ({why})")


def program_kernel(problem: Problem, layout: Any) -> Kernel | None:
    """The native kernel of a problem that is dense or whose layout is a program; None for any other."""
    from longspan_plugins.cpu_fused import native
    from longspan_plugins.cpu_fused.library import load
    from longspan_plugins.cpu_fused.program import Program

    if problem.pattern.kind == "dense" and problem.device.type == "cpu" and not isinstance(layout, Program):
        layout = longspan_pattern(problem)  # lowered from another pattern, with the core's layout
    return native.kernel(problem, layout, load()) if isinstance(layout, Program) else None
