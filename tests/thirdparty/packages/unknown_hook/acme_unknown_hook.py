"""A typo in the hook that matters."""

from longspan import Capabilities, blockwise, hookimpl


@hookimpl
def longspan_capabilities():
    return Capabilities(devices=("cpu",), dtypes=("float32",), patterns=("dense",), causal=True)


@hookimpl
def longspan_kernal(problem):
    return lambda q, k, v: blockwise.forward(q, k, v, is_causal=problem.is_causal, scale=problem.scale)
