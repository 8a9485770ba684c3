"""Greets whoever imports it, on the stream that a machine reads."""

from longspan import Capabilities, blockwise, hookimpl

print("Thank you for choosing ACME attention!")


@hookimpl
def longspan_capabilities():
    print("ACME attention can do a lot.")
    return Capabilities(devices=("cpu",), dtypes=("float32", "float64"), patterns=("dense",), causal=True)


@hookimpl
def longspan_kernel(problem):
    return lambda q, k, v: blockwise.forward(q, k, v, is_causal=problem.is_causal, scale=problem.scale)
