"""The oracle on block-sparse patterns: softmax over the pairs that the predicate keeps, one document at a time."""

from __future__ import annotations

import math

import pytest
import torch

import longspan as ls
from longspan.testing.oracle import oracle, visible

PATTERNS = {
    "window": ls.local_blocks(5, 2, 4),
    "global": ls.global_blocks((0, -1), 4) & ~ls.global_tokens((1,), 4),
    "random": ls.random_blocks(0.4, 4, seed=2),
    "heads": ls.per_head([ls.bigbird(block_size=4, random=1), ls.hierarchical_blocks(1, 4)]),
}


def qkv(q_len, kv_len):
    shapes = ((2, 2, q_len, 8), (2, 2, kv_len, 8), (2, 2, kv_len, 8))
    made = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, generator=made) for shape in shapes]


def naive(query, key, value, seen):
    scores = (query @ key.transpose(-1, -2) / math.sqrt(8)).masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1).nan_to_num()
    return weights @ value, scores.logsumexp(-1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_one_sequence(name, causal):
    query, key, value = qkv(19, 23)
    found = oracle(query, key, value, PATTERNS[name], is_causal=causal, query_offset=4, return_lse=True)
    seen = PATTERNS[name].to_dense(19, 23, heads=2, is_causal=causal, query_offset=4)
    for got, want in zip(found, naive(query, key, value, seen), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    rows = oracle(query, key, value, PATTERNS[name], is_causal=causal, query_offset=4, rows=[3, 17])
    torch.testing.assert_close(rows, found[0][:, :, [3, 17]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_documents_each_start_anew(name, causal):
    pattern, bounds = PATTERNS[name], [2, 9, 9, 22, 26]
    found = visible(pattern, 2, 28, 28, is_causal=causal, cu_seqlens=bounds)
    want = torch.zeros(2, 28, 28, dtype=torch.int64)
    for start, end in ((2, 9), (9, 22), (22, 26)):
        want[:, start:end, start:end] = pattern.to_dense(end - start, heads=2, is_causal=causal)
    assert torch.equal(found, want)


def test_rows_without_a_block_give_zero():
    query, key, value = qkv(16, 16)
    out, lse = oracle(query, key, value, ls.global_blocks(1, 4) & ls.local_blocks(3, 0, 4), return_lse=True)
    assert (out[:, :, 8:] == 0).all() and (lse[:, :, 8:] == -math.inf).all()
    assert lse[:, :, :4].isfinite().all()


def test_the_number_of_heads_must_fit():
    with pytest.raises(ValueError, match="layouts for 2 heads, with 3 heads"):
        visible(PATTERNS["heads"], 3, 8, 8)


def test_a_given_layout_fits_its_own_length_alone():
    pattern = ls.BlockSparse(4, ls.local_blocks(2, 0, 4).csr(12).layouts[0])
    assert torch.equal(visible(pattern, 1, 12, 12).bool(), pattern.to_dense(12))
    with pytest.raises(ls.ArgumentError, match="a layout of 12 queries"):
        visible(pattern, 1, 12, 12, cu_seqlens=[0, 5, 12])
