"""Block-sparse patterns as hypothesis draws them: every builder, and compositions of them."""

from __future__ import annotations

from hypothesis import strategies as st

import longspan as ls

__all__ = ["patterns", "seeds", "single"]

SIZES = (4, 8)

tokens = st.integers(0, 20)
blocks = st.integers(1, 4)
numbers = st.lists(st.integers(-3, 6), min_size=1, max_size=3)
units = st.sampled_from(SIZES)
seeds = st.integers(-(2**70), 2**70)

leaves = st.one_of(
    st.builds(ls.local_blocks, tokens, tokens, units),
    st.builds(ls.SlidingWindow, tokens, tokens),
    st.builds(ls.global_blocks, blocks, units),
    st.builds(ls.global_blocks, numbers, units),
    st.builds(ls.global_tokens, st.lists(st.integers(-9, 20), min_size=1, max_size=4), units),
    st.builds(ls.strided_blocks, blocks, units),
    st.builds(ls.dilated_blocks, st.integers(0, 3), blocks, units),
    st.builds(ls.hierarchical_blocks, blocks, units),
    st.builds(ls.random_blocks, st.floats(0.01, 1), units, seeds),
    st.builds(
        ls.bigbird, st.sampled_from((1, 3)), st.integers(0, 3), st.lists(st.integers(-2, 2), max_size=2), units, seeds
    ),
    st.builds(ls.longformer, st.sampled_from((0, 2, 10)), st.lists(st.integers(-2, 2), max_size=2), units),
    st.builds(lambda size: ls.BlockSparse(size, "all"), units),
    st.builds(lambda size: ls.BlockSparse(size, "causal"), units),
)


def as_blocks(pattern):
    return pattern if isinstance(pattern, ls.BlockSparse) else pattern | ls.BlockSparse(8, "local:0,0") & pattern


@st.composite
def composed(draw, depth=3):
    word = draw(st.sampled_from(("leaf", "or", "and", "without", "not", "causal"))) if depth else "leaf"
    if word == "leaf":
        return as_blocks(draw(leaves))
    a = draw(composed(depth - 1))
    if word in ("not", "causal"):
        return ~a if word == "not" else a.causal()
    b = draw(composed(depth - 1))
    return a | b if word == "or" else a & b if word == "and" else a & ~b


single = composed()
headed = st.builds(ls.per_head, st.lists(single, min_size=3, max_size=3))
patterns = st.one_of(single, headed, st.builds(lambda a, b: a & ~b, headed, single))
