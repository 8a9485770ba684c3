"""Dense attention in plain torch, ten lines; longspan makes dilated, windowed and packed attention of it."""

from longspan import Capabilities, hookimpl
from longspan.numerics.blockwise import taint


@hookimpl
def longspan_capabilities():
    return Capabilities(devices=("cpu", "cuda"), dtypes=("float32", "float64"), patterns=("dense",), causal=True)


@hookimpl
def longspan_kernel(problem):
    def forward(query, key, value):
        scores = query @ key.transpose(-1, -2) * problem.scale
        if not problem.is_causal:
            return scores.softmax(-1) @ value, scores.logsumexp(-1)
        scores = scores.masked_fill(scores.new_ones(scores.shape[-2:]).triu(1).bool(), -float("inf"))
        finite = value.where(value.isfinite(), 0)  # a hidden weight of 0 times NaN would be NaN
        return scores.softmax(-1) @ finite + taint(value), scores.logsumexp(-1)

    return forward
