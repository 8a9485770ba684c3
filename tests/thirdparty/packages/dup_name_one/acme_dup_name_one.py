"""Fit for work, but for its name."""

from longspan import Capabilities, blockwise, hookimpl


@hookimpl
def longspan_capabilities():
    return Capabilities(devices=("cpu",), dtypes=("float32", "float64"), patterns=("dense",), causal=True)


@hookimpl
def longspan_kernel(problem):
    return lambda q, k, v: blockwise.forward(q, k, v, is_causal=problem.is_causal, scale=problem.scale)
