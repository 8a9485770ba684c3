"""Says itself that it is taken by name only, and would be auto's first choice for everything otherwise."""

from longspan import Capabilities, blockwise, hookimpl


@hookimpl
def longspan_capabilities():
    return Capabilities(
        devices=("cpu", "cuda", "rocm", "mps", "xpu"),
        dtypes=("float16", "bfloat16", "float32", "float64"),
        patterns=("dense",),
        causal=True,
        opt_in=True,
        tier=1000,
    )


@hookimpl
def longspan_kernel(problem):
    return lambda q, k, v: blockwise.forward(q, k, v, is_causal=problem.is_causal, scale=problem.scale)
