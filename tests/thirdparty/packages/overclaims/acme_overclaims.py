"""Right on what it does; claims dropout, which it takes and ignores, and shared key heads, which it mixes up.

Neither raises anything: only a comparison with the truth can tell.
"""

from longspan import Capabilities, blockwise, hookimpl


@hookimpl
def longspan_capabilities():
    return Capabilities(
        devices=("cpu",),
        dtypes=("float32", "float64"),
        patterns=("dense",),
        causal=True,
        dropout=True,
        gqa=True,
    )


@hookimpl
def longspan_kernel(problem):
    def forward(query, key, value, dropout=None):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat(1, group, 1, 1), value.repeat(1, group, 1, 1)  # head h reads h % kv_heads
        return blockwise.forward(query, key, value, is_causal=problem.is_causal, scale=problem.scale)

    return forward
