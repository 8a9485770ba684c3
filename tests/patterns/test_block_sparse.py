"""Block-sparse patterns: the blocks that they list are those that the plain predicate keeps, for every composition,
and they are values that text, pickle and torch.compile carry."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import longspan as ls
from drawn import patterns, seeds, single
from longspan.patterns.text import decode

MODERATE = settings(deadline=None, max_examples=150)


@st.composite
def shapes(draw):
    return draw(st.integers(0, 40)), draw(st.integers(0, 40)), draw(st.integers(0, 25)), draw(st.booleans())


# --- what is kept -----------------------------------------------------------------------------------------------------


@MODERATE
@given(pattern=patterns, shape=shapes())
@example(pattern=ls.local_blocks(1000, 0, 8), shape=(33, 33, 0, False))
@example(pattern=~ls.local_blocks(3, 2, 4), shape=(1, 30, 29, True))
@example(pattern=ls.random_blocks(0.5, 8) | ls.random_blocks(0.5, 4), shape=(9, 30, 21, True))
def test_listed_blocks_are_those_of_the_plain_predicate(pattern, shape):
    q_len, kv_len, offset, causal = shape
    want = pattern.to_dense(q_len, kv_len, heads=3, is_causal=causal, query_offset=offset)
    found = pattern.csr(q_len, kv_len, is_causal=causal, query_offset=offset, heads=3)
    assert torch.equal(torch.stack([found[head].to_dense() for head in range(3)]), want)
    assert len(set(found.layouts)) == len(found.layouts) <= 3
    for layout in found.layouts:
        assert_true_form(layout)


def assert_true_form(layout):
    """What kernels may rely on."""
    assert (layout.indptr.dtype, layout.indices.dtype, layout.mask_ids.dtype) == (torch.int64, torch.int32, torch.int32)
    assert layout.masks.dtype == torch.bool and layout.masks.is_contiguous()
    dense = layout.to_dense()
    assert layout.pairs == int(dense.sum())
    assert layout.density == int(dense.sum()) / max(1, dense.numel())
    flat = {mask.flatten().numpy().tobytes() for mask in layout.masks}
    assert len(flat) == len(layout.masks), "a mask is stored twice"
    used = [int(number) for number in layout.mask_ids if number]
    assert list(dict.fromkeys(used)) == list(range(1, len(layout.masks) + 1)), "masks not in order of first use"
    size, start = layout.block_size, layout.query_offset - layout.first_row * layout.block_size
    rows = torch.repeat_interleave(torch.arange(layout.rows), layout.indptr.diff()).tolist()
    for row, column, mask_id in zip(rows, layout.indices.tolist(), layout.mask_ids.tolist(), strict=True):
        top = row * size - start
        block = dense[max(0, top) : top + size, column * size : (column + 1) * size]
        assert block.any(), "an empty block is stored"
        assert (mask_id == 0) == bool(block.all()), "full blocks have mask id 0, and only they"
    again = ls.BlockCSR(
        size, *dense.shape, layout.indptr, layout.indices, layout.mask_ids, layout.masks, layout.query_offset
    )
    assert again == layout and hash(again) == hash(layout)


@MODERATE
@given(a=single, b=single, shape=shapes())
def test_equal_pairs_are_equal_layouts_however_they_were_composed(a, b, shape):
    q_len, kv_len, offset, causal = shape

    def kept(pattern):
        return pattern.csr(q_len, kv_len, is_causal=causal, query_offset=offset)[0]

    assert kept(~(a | b)) == kept(~a & ~b)
    assert kept(a & ~b) == kept(~(~a | b))
    assert kept(a | b) == kept(b | a)
    assert kept(~~a) == kept(a)
    assert kept(a & a) == kept(a) == kept(a | a)


@pytest.mark.parametrize("size", [1, 16, 100, 128, 1000, 4096])
def test_a_window_is_exact_to_the_token_whatever_the_block_size(size):
    kept = ls.local_blocks(1000, 3, size).csr(2500)[0].to_dense()
    query, key = torch.arange(2500)[:, None], torch.arange(2500)[None]
    assert torch.equal(kept, (key >= query - 1000) & (key <= query + 3))


def test_named_patterns_keep_what_their_papers_say():
    big = ls.bigbird(block_size=4, random=0).to_dense(24)[0][::4, ::4]
    assert big.int().tolist() == [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 1],
        [1, 1, 1, 1, 0, 1],
        [1, 0, 1, 1, 1, 1],
        [1, 0, 0, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]
    long = ls.longformer(2, (2,), 4).to_dense(5)[0]
    assert long.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    far = ls.hierarchical_blocks(2, 1).to_dense(17)[0][16].nonzero().flatten()
    assert (16 - far).flip(0).tolist() == [0, 1, 2, 4, 8, 16]
    near = ls.hierarchical_blocks(4, 1).to_dense(17)[0][16].nonzero().flatten()
    assert (16 - near).flip(0).tolist() == [0, 1, 2, 3, 4, 6, 8, 12, 16]
    gaps = ls.dilated_blocks(2, 3, 1).to_dense(17)[0][8].nonzero().flatten()
    assert gaps.tolist() == [2, 5, 8, 11, 14]
    assert ls.strided_blocks(5, 1).to_dense(17)[0][8].nonzero().flatten().tolist() == [3, 8, 13]


# --- random blocks ----------------------------------------------------------------------------------------------------


@MODERATE
@given(density=st.floats(0.001, 1), columns=st.integers(1, 60), rows=st.integers(1, 9), seed=seeds)
def test_random_blocks_are_as_many_as_asked_in_every_row(density, columns, rows, seed):
    layout = ls.random_blocks(density, 2, seed).csr(rows * 2, columns * 2)[0]
    assert layout.indptr.diff().tolist() == [max(1, round(density * columns))] * rows


def test_random_blocks_of_a_row_depend_on_nothing_but_its_number():
    pattern = ls.random_blocks(0.2, 16, seed=3)
    whole = pattern.csr(1600)[0]
    part = pattern.csr(160, 1600, query_offset=480)[0]
    start, end = int(whole.indptr[30]), int(whole.indptr[40])
    assert torch.equal(part.indices, whole.indices[start:end])
    assert pattern.csr(1600)[0] == whole
    assert ls.random_blocks(0.2, 16, seed=4).csr(1600)[0] != whole
    assert len({tuple(row.tolist()) for row in whole.indices.view(100, 20)}) == 100


def test_random_blocks_are_the_same_on_every_platform():
    assert ls.random_blocks(0.2, 1, seed=7).csr(3, 20)[0].indices.view(3, 4).tolist() == PINNED


PINNED = [[1, 6, 8, 13], [7, 9, 14, 19], [6, 11, 13, 16]]


def test_random_blocks_fall_everywhere_alike():
    counts = torch.zeros(50)
    for seed in range(20):
        counts += torch.bincount(ls.random_blocks(0.1, 1, seed).csr(1000, 50)[0].indices, minlength=50)
    expected = 20 * 1000 * 5 / 50  # 2,000; a fair draw stays within five standard deviations of 42
    assert (counts - expected).abs().max() < 5 * (expected * 0.9) ** 0.5


# --- as long as it gets -----------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor):
                self.bytes = max(self.bytes, one.untyped_storage().nbytes())
        return result


MILLION = 2**20
LONG = {
    "window": ls.local_blocks(1024),
    "window in odd blocks": ls.local_blocks(1000, 24, 120),
    "longformer": ls.longformer(1024, (0, 5, -1)),
    "bigbird": ls.bigbird(block_size=128),
    "composed": (ls.local_blocks(1024) | ls.global_blocks(2) | ls.random_blocks(0.002)) & ~ls.dilated_blocks(3, 2),
    "one without another": ls.hierarchical_blocks(2) & ~ls.local_blocks(3000, 3000),
    "two sizes": ls.local_blocks(700, 0, 64) | ls.random_blocks(0.001, 256),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LONG)
def test_nothing_larger_than_what_is_kept_is_made_for_a_million_tokens(name, causal):
    pattern = LONG[name]
    with Largest() as seen:
        layout = pattern.csr(MILLION, is_causal=causal)[0]
    grid = layout.rows * layout.columns
    most = 8 * 4 * pattern.csr(MILLION)[0].nnz  # causal filters what the pattern lists
    assert seen.bytes <= max(most, 2**21) < grid, f"{seen.bytes:,} bytes for {layout}"
    assert len(layout.masks) <= 40
    assert layout.nbytes < 10_000_000


def test_the_window_of_a_million_tokens_counts_its_pairs_exactly():
    layout = ls.local_blocks(1000).csr(MILLION)[0]
    assert layout.pairs == MILLION * 1001 - 1000 * 1001 // 2
    assert len(layout.masks) == 3


def test_too_many_blocks_are_refused_before_they_are_made():
    with pytest.raises(ls.ArgumentError, match=r"pattern: got .* blocks; want at most .*Next: use Dense"):
        (~ls.local_blocks(8, 8, 1)).csr(2**20)
    with pytest.raises(ls.ArgumentError, match="at most"):
        ls.random_blocks(0.9, 1).csr(2**20)
    with pytest.raises(ls.ArgumentError, match="at most"):
        ls.BlockSparse(1, "causal").csr(2**20)
    with pytest.raises(ls.ArgumentError, match="at most"):
        ls.strided_blocks(2, 1).csr(2**20)
    with pytest.raises(ls.ArgumentError, match="at most"):
        ls.global_tokens(tuple(range(0, 2**20, 2)), 1).csr(2**20)


@pytest.mark.parametrize("name", LONG)
def test_layouts_are_made_on_the_cpu_whatever_the_default_device_is(name):
    want = LONG[name].csr(1000)[0]
    dense = LONG[name].to_dense(300)
    with torch.device("meta"):
        made = LONG[name].csr(1000)[0]
        assert made == want and made.pairs == want.pairs
        assert torch.equal(made.to_dense(), want.to_dense())
        assert torch.equal(LONG[name].to_dense(300), dense)
        given = (want.block_size, 1000, 1000, want.indptr, want.indices, want.mask_ids, want.masks)
        assert ls.BlockCSR(*given) == want


# --- as values --------------------------------------------------------------------------------------------------------


@MODERATE
@given(pattern=patterns)
def test_text_code_pickle_and_repr_give_the_same_pattern_back(pattern):
    for again in (
        ls.parse_pattern(pattern.spec),
        decode(*pattern.code),
        pickle.loads(pickle.dumps(pattern)),
        copy.deepcopy(pattern),
        eval(repr(pattern), {"BlockSparse": ls.BlockSparse}),
    ):
        assert again == pattern
        assert hash(again) == hash(pattern)
        assert again.spec == pattern.spec


def test_text_has_precedences_brackets_and_spaces():
    assert ls.parse_pattern("blocks:128:local:1000,0|global:0,5|random:0.1,7") == (
        ls.local_blocks(1000) | ls.global_blocks((0, 5)) | ls.random_blocks(0.1, seed=7)
    )
    a, b, c = ls.local_blocks(9), ls.global_tokens((0,)), ls.strided_blocks(4)
    assert ls.parse_pattern("blocks:128: local:9,0 | tokens:0 & ~ strided:4 ") == a | (b & ~c)
    assert ls.parse_pattern("blocks:128:(local:9,0|tokens:0)&~(strided:4|causal)") == (a | b) & ~(
        c | ls.BlockSparse(128, "causal")
    )
    assert ls.parse_pattern("blocks:64:strided:4@128|local:9,0") == c | ls.local_blocks(9, 0, 64)
    assert ls.parse_pattern("blocks:128:heads(local:9,0;tokens:0)") == ls.per_head([a, b])


@pytest.mark.parametrize(
    "text",
    ["blocks", "blocks:", "blocks:128", "blocks:128:", "blocks:x:all", "blocks:0:all", "blocks:128:nothing",
     "blocks:128:local:5", "blocks:128:local:-5,0", "blocks:128:all|", "blocks:128:(all", "blocks:128:all)",
     "blocks:128:all all", "blocks:128:~", "blocks:128:heads()", "blocks:128:heads(all;)", "blocks:128:strided:0",
     "blocks:128:random:0,1", "blocks:128:random:1.5,1", "blocks:128:random:0.5", "blocks:128:dilated:1,0",
     "blocks:128:hierarchical:0", "blocks:128:strided:4@100", "blocks:128:strided:4@0", "blocks:128:local:1,1@64",
     "blocks:128:csr:0123", "blocks:128:global:", "blocks:128:heads(heads(all))", "blocks:128:al\u00e9"],
)  # fmt: skip
def test_text_that_is_no_pattern_is_refused(text):
    with pytest.raises(ls.ArgumentError, match="Next: "):
        ls.parse_pattern(text)


def test_patterns_differ_where_anything_differs():
    every = [
        ls.local_blocks(8), ls.local_blocks(9), ls.local_blocks(8, 1), ls.local_blocks(8, 0, 64), ls.global_blocks(1),
        ls.global_tokens((0,)), ls.random_blocks(0.1), ls.random_blocks(0.1, seed=1), ls.random_blocks(0.2),
        ls.strided_blocks(2), ls.dilated_blocks(2, 1), ls.dilated_blocks(1, 2), ls.hierarchical_blocks(2),
        ~ls.local_blocks(8), ls.local_blocks(8).causal(), ls.per_head([ls.local_blocks(8)]),
    ]  # fmt: skip
    assert len(set(every)) == len(every)
    assert all((a == b) == (a is b) for a in every for b in every)
    assert ls.local_blocks(8) != ls.SlidingWindow(8, 0)


def test_windows_and_dense_compose_from_either_side():
    window = ls.SlidingWindow(9, 2)
    assert window | ls.global_blocks(1, 16) == ls.local_blocks(9, 2, 16) | ls.global_blocks(1, 16)
    assert window & ls.global_blocks(1, 16) == ls.local_blocks(9, 2, 16) & ls.global_blocks(1, 16)
    assert ls.global_blocks(1, 16) | window == ls.global_blocks(1, 16) | ls.local_blocks(9, 2, 16)
    assert ls.Dense() & ls.global_blocks(1, 16) == ls.BlockSparse(16, "all") & ls.global_blocks(1, 16)
    assert (ls.local_blocks(3, 0, 32) | ls.local_blocks(5, 0, 8)).block_size == 8


def test_equal_heads_share_a_layout():
    near, far = ls.local_blocks(9, 0, 8), ls.strided_blocks(3, 8)
    found = ls.per_head([near, far, near, ls.SlidingWindow(9, 0), near | near]).csr(100, heads=5)
    assert found.of_head == (0, 1, 0, 0, 0)
    assert len(found.layouts) == 2
    assert found.nbytes == sum(layout.nbytes for layout in found.layouts)
    assert found.density == pytest.approx((4 * found[0].density + found[1].density) / 5)
    assert near.csr(100, heads=64).of_head == (0,) * 64


def test_density_counts_pairs():
    pattern = ls.local_blocks(9, 2, 8) | ls.global_tokens((0,), 8)
    assert pattern.density(50) == float(pattern.to_dense(50).double().mean())
    assert pattern.density(50, 30, is_causal=True) == float(pattern.to_dense(50, 30, is_causal=True).double().mean())


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "block_size": lambda: ls.local_blocks(8, 0, 0),
    "block_size ": lambda: ls.local_blocks(8, 0, 1.5),
    "left": lambda: ls.local_blocks(-1),
    "right": lambda: ls.local_blocks(1, True),
    "blocks": lambda: ls.global_blocks(0),
    "blocks ": lambda: ls.global_blocks(()),
    "blocks  ": lambda: ls.global_blocks((0, 1.0)),
    "positions": lambda: ls.global_tokens("0"),
    "stride": lambda: ls.strided_blocks(0),
    "rate": lambda: ls.dilated_blocks(2, 0),
    "reach": lambda: ls.dilated_blocks(-1, 1),
    "near": lambda: ls.hierarchical_blocks(0),
    "density": lambda: ls.random_blocks(0),
    "density ": lambda: ls.random_blocks(1.01),
    "density  ": lambda: ls.random_blocks(float("nan")),
    "seed": lambda: ls.random_blocks(0.1, seed=0.5),
    "window": lambda: ls.bigbird(2),
    "window ": lambda: ls.longformer(511),
    "random": lambda: ls.bigbird(random=-1),
    "block_size  ": lambda: ls.local_blocks(8, 0, 48) | ls.local_blocks(8, 0, 64),
    "block_size   ": lambda: ls.BlockSparse(48, ls.strided_blocks(2, 64).layout),
    "pattern": lambda: ls.local_blocks(8) | ls.Dilated((8,), (1,)),
    "pattern ": lambda: ls.local_blocks(8) & 3,
    "patterns": lambda: ls.per_head([]),
    "patterns ": lambda: ls.per_head([ls.Dense()]),
    "layout": lambda: ls.per_head([ls.per_head([ls.local_blocks(8)])]),
    "layout ": lambda: ls.per_head([ls.local_blocks(8)]) | ls.per_head([ls.local_blocks(8)] * 2),
    "layout  ": lambda: ls.BlockSparse(8, 3),
    "q_len": lambda: ls.local_blocks(8).csr(-1),
    "kv_len": lambda: ls.local_blocks(8).csr(8, 2.0),
    "query_offset": lambda: ls.local_blocks(8).csr(8, query_offset=-1),
    "heads": lambda: ls.local_blocks(8).csr(8, heads=0),
    "pattern  ": lambda: ls.per_head([ls.local_blocks(8)] * 2).csr(8, heads=3),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    with pytest.raises(ls.ArgumentError, match=rf"^{name.strip()}: got .*; want .*\. Next: ."):
        BAD[name]()


def test_a_problem_needs_as_many_heads_as_the_pattern_has_layouts():
    pattern = ls.per_head([ls.local_blocks(8), ls.global_blocks(1)])
    ls.Problem(batch=1, heads=2, q_len=8, head_dim=4, pattern=pattern)
    with pytest.raises(ls.ArgumentError, match="layouts for 2 heads, with 3 heads"):
        ls.Problem(batch=1, heads=3, q_len=8, head_dim=4, pattern=pattern)


def test_unequal_lengths_need_a_query_offset():
    query, key = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 6, 8)
    with pytest.raises(ls.ArgumentError, match="query_offset"):
        ls.Problem.like(query, key, key, ls.local_blocks(8))


# --- torch.compile ----------------------------------------------------------------------------------------------------


def test_patterns_are_built_and_composed_inside_a_compiled_function():
    given_layout = ls.BlockSparse(4, ls.local_blocks(3, 3, 4).csr(16).layouts[0])

    def build(x):
        near = ls.local_blocks(7, 2, block_size=4) | ls.global_blocks((0, -1), 4) | ls.random_blocks(0.25, 4, seed=3)
        pattern = (near & ls.strided_blocks(3, 4).complement()) | ls.SlidingWindow(1, 0)
        every = ls.per_head([pattern.causal(), ls.bigbird(block_size=4), ls.longformer(8, block_size=4), given_layout])
        return x + 1, (every & given_layout).code[0]

    torch._dynamo.reset()
    out, words = torch.compile(build, fullgraph=True, backend="eager")(torch.ones(3))
    assert words == build(torch.ones(3))[1]
    assert torch.equal(out, torch.full((3,), 2.0))
    assert decode(words, []) == ls.parse_pattern(words)
