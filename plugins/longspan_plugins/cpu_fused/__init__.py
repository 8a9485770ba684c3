"""Fused attention for CPUs: scores, softmax and weighted sums of a tile stay in the caches, forward and backward.

Native kernels, compiled at first use for the processor at hand (AVX-512 with bfloat16 products, AVX2, or whatever the
C compiler's vectors become), run dense, windowed and dilated attention over packed documents in one softmax a row, read
keys and values where they lie, and draw dropout by position. Without a C compiler the operators of `sdpa` serve in
their place, and for few queries, which leave most lanes of a vector empty, with one too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from attrs import evolve

from longspan import refresh
from longspan.plugin import BlockLayout, Capabilities, Kernel, Problem, Reason, hookimpl
from longspan_plugins import sdpa


@hookimpl
def longspan_capabilities() -> Capabilities:
    """Dense, windowed, dilated and block-sparse attention in single and half precision, computed in float32.

    Where native kernels cannot be made, dense attention by the operators of `sdpa`, which is therefore ranked before.
    """
    from longspan_plugins.cpu_fused.library import failure, installing, missing

    native = Capabilities(
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
    if not (why := missing() or failure()):
        return native
    lack = Reason("compiler", "native kernels", want=why, fix=installing())
    dense = evolve(native, patterns=("dense",), documents=False, window=False, query_offset=False)
    return evolve(dense, tier=5, lacks=(lack,))


@hookimpl
def longspan_pattern(problem: Problem, lower: Callable[[], Any]) -> Any:
    """Tiles and segments, where the kernels run the pattern as it is; None leaves it to be lowered."""
    from longspan_plugins.cpu_fused.library import load, missing
    from longspan_plugins.cpu_fused.patterns import program_for

    if missing():
        return None
    if load().handle is None:  # the compiler that was there when backends were listed cannot compile
        refresh(sys.modules[__name__])
        return None
    return program_for(problem, load(), lower().blocks if problem.pattern.kind == "block_sparse" else None)


@hookimpl
def longspan_kernel(problem: Problem, layout: Any) -> Kernel | None:
    """Native kernels over the layout's program; for dense problems without one, the operators of `sdpa`."""
    from longspan_plugins.cpu_fused import native
    from longspan_plugins.cpu_fused.library import load
    from longspan_plugins.cpu_fused.patterns import block_program
    from longspan_plugins.cpu_fused.program import Program

    def for_blocks(other: BlockLayout) -> Kernel:
        return native.kernel(problem, block_program(problem, other.blocks), load())

    if problem.pattern.kind == "dense" and not isinstance(layout, Program):
        layout = longspan_pattern(problem, list)  # lowered from another pattern, with the core's layout
    if isinstance(layout, Program):
        made = native.kernel(problem, layout, load())
        return evolve(made, for_blocks=for_blocks) if problem.pattern.kind == "block_sparse" else made
    shifted = problem.is_causal and (problem.query_offset or problem.q_len != problem.kv_len)
    if problem.pattern.kind != "dense" or problem.documents is not None or shifted:
        return None  # to be lowered
    kernel: Kernel = sdpa.longspan_kernel(problem)
    return evolve(kernel, library=f"{kernel.library} ({why})") if (why := load().refusal) else kernel
