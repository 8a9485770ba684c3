"""FlexAttention's `BlockMask`, there and back, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import longspan as ls

DOCUMENT = torch.arange(100) // 17
MODS = {
    "causal": lambda b, h, q, k: q >= k,
    "documents": lambda b, h, q, k: (DOCUMENT[q] == DOCUMENT[k]) & (q >= k),
    "heads": lambda b, h, q, k: (q - k).abs() <= h * 9 + 3,
    "everything": lambda b, h, q, k: b.new_ones((), dtype=torch.bool),
    "scattered": lambda b, h, q, k: (q * 7 + k * 13) % 11 == 0,
}
TENSORS = [name for name in BlockMask._TENSOR_ATTRS if not name.startswith("dq_")]


def assert_same_bits(a, b):
    assert a.seq_lengths == b.seq_lengths
    assert a.BLOCK_SIZE == b.BLOCK_SIZE
    for name in TENSORS:
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and x.device == y.device
        assert torch.equal(x, y), name


def dense(mod, heads, q_len, kv_len):
    one = torch.vmap(mod, (None, None, None, 0))
    every = torch.vmap(torch.vmap(one, (None, None, 0, None)), (None, 0, None, None))
    return every(torch.tensor(0), torch.arange(heads), torch.arange(q_len), torch.arange(kv_len))


@pytest.mark.parametrize("lengths", [(96, 96), (100, 77), (33, 100)], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("name", MODS)
def test_there_and_back(name, heads, lengths):
    mask = create_block_mask(MODS[name], 1, heads, *lengths, device="cpu", BLOCK_SIZE=16)
    pattern = ls.from_block_mask(mask)
    want = dense(MODS[name], heads, *lengths)
    assert torch.equal(pattern.to_dense(*lengths), want)
    found = pattern.csr(*lengths, heads=heads)
    assert torch.equal(torch.stack([found[head].to_dense() for head in range(heads)]), want)
    again = ls.to_block_mask(pattern, *lengths)
    assert_same_bits(again, mask)
    assert torch.equal(dense(again.mask_mod, heads, *lengths), want)
    assert ls.layout_from(again) == pattern


RULES = {
    "local": ls.local_blocks(20, 3, 16),
    "bigbird": ls.bigbird(block_size=16),
    "longformer": ls.longformer(10, (0, 40), 16),
    "complement": ~ls.dilated_blocks(1, 2, 16),
    "per head": ls.per_head([ls.local_blocks(5, 5, 16), ls.strided_blocks(2, 16)]),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_rules_become_the_mask_that_torch_would_make(name, causal):
    pattern = RULES[name]
    seen = pattern.to_dense(100, 90, is_causal=causal)
    want = create_block_mask(lambda b, h, q, k: seen[h, q, k], 1, len(seen), 100, 90, device="cpu", BLOCK_SIZE=16)
    found = ls.to_block_mask(pattern, 100, 90, is_causal=causal)
    assert_same_bits(found, want)
    assert torch.equal(dense(found.mask_mod, len(seen), 100, 90), seen)
    back = ls.from_block_mask(found)
    heads = len(seen)
    assert back.csr(100, 90, heads=heads) == pattern.csr(100, 90, is_causal=causal, heads=heads)


def test_a_mask_of_one_head_serves_any_number():
    found = ls.to_block_mask(ls.local_blocks(5, 0, 16), 64)
    seen = dense(found.mask_mod, 4, 64, 64)
    assert torch.equal(seen, ls.local_blocks(5, 0, 16).to_dense(64, heads=4))


def test_queries_that_start_later():
    pattern = ls.local_blocks(20, 0, 16)
    found = ls.to_block_mask(pattern, 40, 90, query_offset=48)
    assert torch.equal(dense(found.mask_mod, 1, 40, 90), pattern.to_dense(40, 90, query_offset=48))
    with pytest.raises(ls.ArgumentError, match="query_offset: got 50; want a multiple of the block size, 16"):
        ls.to_block_mask(pattern, 40, 90, query_offset=50)


@pytest.mark.parametrize("sizes", [(32, 16), (16, 48)], ids=str)
def test_oblong_blocks_are_cut_into_squares(sizes):
    mask = create_block_mask(MODS["documents"], 1, 1, 100, 90, device="cpu", BLOCK_SIZE=sizes)
    pattern = ls.from_block_mask(mask)
    assert pattern.block_size == 16
    assert torch.equal(pattern.csr(100, 90)[0].to_dense(), dense(MODS["documents"], 1, 100, 90)[0])


def test_partial_blocks_that_keep_everything_become_full():
    mask = create_block_mask(MODS["causal"], 1, 1, 64, 64, device="cpu", BLOCK_SIZE=16, separate_full_blocks=False)
    assert mask.full_kv_num_blocks is None
    assert ls.from_block_mask(mask).csr(64)[0] == ls.BlockSparse(16, "causal").csr(64)[0]


def bad_masks():
    counts, indices = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    yield "list", "block_mask: got list", []
    yield (
        "sizes",
        r"block_mask: got BLOCK_SIZE=\(16, 24\)",
        BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=(16, 24)),
    )
    yield (
        "twice",
        "block_mask: got a block that is listed twice",
        BlockMask.from_kv_blocks(counts, indices, counts, indices, BLOCK_SIZE=16),
    )
    yield (
        "batch",
        "block_mask: got 2 batch entries that differ",
        create_block_mask(lambda b, h, q, k: q >= k + b, 2, 1, 32, 32, device="cpu", BLOCK_SIZE=16),
    )
    yield (
        "empty",
        "layout: got an empty layout",
        create_block_mask(lambda b, h, q, k: q < 0, 1, 1, 32, 32, device="cpu", BLOCK_SIZE=16),
    )
    yield (
        "shape",
        "block_mask: got indices of shape",
        BlockMask.from_kv_blocks(counts[0, 0], indices[0, 0], BLOCK_SIZE=16, compute_q_blocks=False),
    )


@pytest.mark.parametrize(("words", "mask"), [pytest.param(*rest, id=name) for name, *rest in bad_masks()])
def test_masks_that_no_pattern_can_hold_are_refused(words, mask):
    with pytest.raises(ls.ArgumentError, match=rf"^{words}.*Next: ."):
        ls.from_block_mask(mask)


def test_equal_batch_entries_are_one_pattern():
    mask = create_block_mask(MODS["heads"], 2, 2, 32, 32, device="cpu", BLOCK_SIZE=16)
    assert torch.equal(ls.from_block_mask(mask).to_dense(32), dense(MODS["heads"], 2, 32, 32))
