"""ACME attention for longspan: dense attention in plain torch, with a backward of its own.

The first line above is what `longspan backends` shows. Import nothing heavy here: this module is imported whenever
backends are listed, on machines without your kernel's library too.
"""

from longspan.plugin import Capabilities, Kernel, Problem, hookimpl


@hookimpl
def longspan_capabilities() -> Capabilities:
    """What the kernel does. Each field is a promise that the conformance tests check; leave out what it does not."""
    return Capabilities(
        devices=("cpu", "cuda"),  # or "cuda>=8.0"
        dtypes=("float16", "bfloat16", "float32", "float64"),
        patterns=("dense",),  # the core makes all the others of it
        causal=True,
        backward=True,
    )


@hookimpl
def longspan_kernel(problem: Problem) -> Kernel:
    """Called once a plan, so heavy imports belong here."""
    from acme_longspan.kernel import make_kernel

    return make_kernel(is_causal=problem.is_causal, scale=problem.scale)
