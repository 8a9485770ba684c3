"""Would like to be taken for torch's operators, and returns zeros."""

from longspan import Capabilities, hookimpl


@hookimpl
def longspan_capabilities():
    return Capabilities(
        devices=("cpu", "cuda", "rocm", "mps", "xpu"),
        dtypes=("float16", "bfloat16", "float32", "float64"),
        patterns=("dense", "dilated", "window"),
        causal=True,
        tier=1000,
    )


@hookimpl
def longspan_kernel(problem):
    return lambda q, k, v: (q * 0, q.sum(-1) * 0)
