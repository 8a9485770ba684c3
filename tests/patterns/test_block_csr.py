"""`BlockCSR`: what the constructor refuses, what it puts in order, and layouts that are given instead of rules."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch

import longspan as ls
from longspan.patterns.blocks.masks import MaskTable

DIAGONAL = torch.ones(4, 4, dtype=torch.bool).tril()
OUTSIDE = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()
"""Keeps nothing of the last block below, which has two queries and two keys."""


def layout(**changes):
    """10 queries and 6 keys in blocks of 4: rows of 2, 0 and 1 blocks, one of them partial."""
    fields = {
        "block_size": 4,
        "q_len": 10,
        "kv_len": 6,
        "indptr": torch.tensor([0, 2, 2, 3]),
        "indices": torch.tensor([0, 1, 1], dtype=torch.int32),
        "mask_ids": torch.tensor([1, 0, 0], dtype=torch.int32),
        "masks": DIAGONAL[None],
    }
    return ls.BlockCSR(**(fields | changes))


def test_a_layout_says_what_it_holds():
    made = layout()
    want = torch.zeros(10, 6, dtype=torch.bool)
    want[:4, :4] = DIAGONAL
    want[:4, 4:] = True
    want[8:, 4:] = True
    assert torch.equal(made.to_dense(), want)
    assert (made.rows, made.columns, made.nnz, made.pairs) == (3, 2, 3, 10 + 8 + 4)
    assert made.density == 22 / 60
    assert made.nbytes == 4 * 8 + 3 * 4 + 3 * 4 + 16
    text = repr(made)
    assert all(
        word in text for word in ("10 x 6", "3 of 6 blocks", "2 full", "1 partial", "1 masks", "36.667%", "72 b")
    )


REFUSED = {
    "indptr: got 3 numbers; want 4": {"indptr": torch.tensor([0, 2, 3])},
    r"indptr: got \[1, 2, 2, 3\]": {"indptr": torch.tensor([1, 2, 2, 3])},
    r"indptr: got \[0, 2, 1, 3\]": {"indptr": torch.tensor([0, 2, 1, 3])},
    r"indptr: got \[0, 2, 2, 4\] for 3": {"indptr": torch.tensor([0, 2, 2, 4])},
    "indptr: got torch.float32": {"indptr": torch.tensor([0.0, 2, 2, 3])},
    r"indptr: got shape \(1, 4\)": {"indptr": torch.tensor([[0, 2, 2, 3]])},
    "indptr: got list": {"indptr": [0, 2, 2, 3]},
    "indices: got column 0 after 1 in block row 0": {"indices": torch.tensor([1, 0, 1])},
    "indices: got column 1 twice in block row 0": {"indices": torch.tensor([1, 1, 1])},
    "indices: got 2; want block columns from 0 to 1": {"indices": torch.tensor([0, 2, 1])},
    "indices: got -1": {"indices": torch.tensor([-1, 1, 1])},
    "mask_ids: got 2 numbers": {"mask_ids": torch.tensor([1, 0])},
    "mask_ids: got 2; want 0 for a full block or 1 to 1": {"mask_ids": torch.tensor([1, 0, 2])},
    "mask_ids: got -1": {"mask_ids": torch.tensor([1, 0, -1])},
    "mask_ids: got torch.bool": {"mask_ids": torch.tensor([True, False, False])},
    "masks: got torch.float32": {"masks": DIAGONAL[None].float()},
    "masks: got list": {"masks": [[True]]},
    r"masks: got shape \(4, 4\)": {"masks": DIAGONAL},
    r"masks: got shape \(1, 4, 5\)": {"masks": torch.ones(1, 4, 5, dtype=torch.bool)},
    r"masks: got block \(0, 0\), which keeps no pair": {"masks": torch.zeros(1, 4, 4, dtype=torch.bool)},
    r"masks: got block \(2, 1\), which keeps no pair": {
        "mask_ids": torch.tensor([0, 0, 1]),
        "masks": OUTSIDE[None],
    },
    "q_len: got -1": {"q_len": -1},
    "kv_len: got 6.0": {"kv_len": 6.0},
    "block_size: got 0": {"block_size": 0},
    "query_offset: got None": {"query_offset": None},
    "indptr: got 4 numbers; want 5 numbers": {"query_offset": 3},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_no_layout_is_refused_by_name(words):
    with pytest.raises(ls.ArgumentError, match=rf"^{words}.*Next: .") as caught:
        layout(**REFUSED[words])
    assert "; want " in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).argument == words.split(":")[0]


def test_one_true_form_whatever_was_given():
    """Masks given twice, unused or true where nothing is; full blocks with a mask: all put right."""
    every = torch.ones(4, 4, dtype=torch.bool)
    edge = torch.zeros(4, 4, dtype=torch.bool)
    edge[:2, :2] = True
    given = layout(mask_ids=torch.tensor([4, 2, 3]), masks=torch.stack([~DIAGONAL, every, edge, DIAGONAL, DIAGONAL]))
    assert given == layout() and hash(given) == hash(layout())
    assert given.mask_ids.tolist() == [1, 0, 0]
    outside = DIAGONAL.clone()
    outside[:2, :2] = torch.tensor([[True, False], [True, True]])
    ragged = layout(mask_ids=torch.tensor([0, 0, 1]), masks=outside[None])
    cut = torch.zeros(4, 4, dtype=torch.bool)
    cut[:2, :2] = outside[:2, :2]
    assert torch.equal(ragged.masks, cut[None])


def test_layouts_are_values():
    made = layout()
    for again in (layout(), pickle.loads(pickle.dumps(made)), copy.copy(made), copy.deepcopy(made)):
        assert again == made
        assert hash(again) == hash(made)
        assert again.digest == made.digest
    others = [
        layout(kv_len=7),
        layout(q_len=11),
        layout(q_len=8, query_offset=2),
        layout(mask_ids=torch.tensor([0, 0, 0])),
        layout(masks=~DIAGONAL[None]),
        layout(indices=torch.tensor([0, 1, 0])),
        layout(indptr=torch.tensor([0, 2, 3, 3])),
    ]
    assert len({made, *others}) == 8
    assert made != "a layout"
    with pytest.raises(AttributeError):
        made.block_size = 8


def test_what_was_given_may_change_afterwards():
    given = {"indptr": torch.tensor([0, 2, 2, 3]), "indices": torch.tensor([0, 1, 1]), "masks": DIAGONAL[None].clone()}
    made = layout(**given)
    for tensor in given.values():
        tensor.zero_()
    assert made == layout()
    assert torch.equal(made.to_dense(), layout().to_dense())


def test_no_rows_no_columns():
    for q_len, kv_len in ((0, 6), (10, 0), (0, 0)):
        rows = -(-q_len // 4)
        made = ls.BlockCSR(
            4, q_len, kv_len, torch.zeros(rows + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        )
        assert made.to_dense().shape == (q_len, kv_len)
        assert (made.pairs, made.density, made.nnz) == (0, 0.0, 0)


# --- many masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 8])
def test_masks_are_kept_once_however_many_are_added(size, monkeypatch):
    torch.manual_seed(0)
    distinct = torch.rand(50, size, size) < 0.5
    masks = distinct[torch.randint(50, (400,))]
    for weights in (None, 0):  # and again where every sum collides, so that the digests must tell them apart
        table = MaskTable(size)
        if weights is not None:
            monkeypatch.setattr(table, "_weights", torch.zeros(-(-size * size // 8), dtype=torch.int64))
        states = table.add(masks)
        assert table.count == len({mask.flatten().numpy().tobytes() for mask in masks})
        assert torch.equal(table.expand(states), masks)
        assert torch.equal(table.add(masks.flip(0)), states.flip(0))


def test_operations_on_states_are_those_on_masks():
    torch.manual_seed(1)
    table = MaskTable(2)
    masks = (torch.arange(16)[:, None] >> torch.arange(4) & 1).bool().view(16, 2, 2)
    states = table.add(masks)
    a, b = states.repeat_interleave(16), states.repeat(16)
    x, y = masks.repeat_interleave(16, 0), masks.repeat(16, 1, 1)
    masks = torch.cat([torch.zeros(1, 2, 2, dtype=torch.bool), torch.ones(1, 2, 2, dtype=torch.bool), table.masks])
    assert torch.equal(masks[table.meet(a, b) + 1], x & y)
    assert torch.equal(masks[table.join(a, b) + 1], x | y)
    assert torch.equal(masks[table.without(a, b) + 1], x & ~y)
    assert table.count == 14


# --- as a pattern -----------------------------------------------------------------------------------------------------


def test_a_given_layout_is_a_pattern_for_its_lengths():
    made = layout()
    pattern = ls.BlockSparse(4, made)
    assert pattern.csr(10, 6).layouts == (made,)
    assert torch.equal(pattern.to_dense(10, 6)[0], made.to_dense())
    assert torch.equal(pattern.csr(10, 6, is_causal=True)[0].to_dense(), made.to_dense().tril())
    assert torch.equal((~pattern).csr(10, 6)[0].to_dense(), ~made.to_dense())
    both = pattern | ls.local_blocks(1, 0, 2)
    assert both.block_size == 2
    assert torch.equal(both.csr(10, 6)[0].to_dense(), both.to_dense(10, 6)[0])
    for q_len, kv_len, offset in ((9, 6, 0), (10, 7, 0), (10, 6, 4)):
        with pytest.raises(ls.ArgumentError, match=r"^pattern: got a layout of 10 queries .*Next: make it for"):
            pattern.csr(q_len, kv_len, query_offset=offset)
    with pytest.raises(ls.ArgumentError, match="a layout of 10 queries"):
        both.csr(20)
    assert pattern.csr(0)[0].nnz == 0, "an empty document has no use for any layout"


def test_a_layout_with_a_query_offset():
    made = ls.local_blocks(3, 1, 4).csr(7, 20, query_offset=9)[0]
    pattern = ls.BlockSparse(4, made)
    assert torch.equal(pattern.to_dense(7, 20, query_offset=9)[0], made.to_dense())
    assert pattern.csr(7, 20, query_offset=9)[0] is made


def test_layouts_for_each_head():
    a, b = layout(), layout(mask_ids=torch.tensor([0, 0, 0]))
    pattern = ls.BlockSparse(4, (a, b, layout()))
    found = pattern.csr(10, 6, heads=3)
    assert found.layouts == (a, b) and found.of_head == (0, 1, 0)
    assert torch.equal(pattern.to_dense(10, 6)[1], b.to_dense())
    assert "3 heads" in repr(pattern)
    assert pickle.loads(pickle.dumps(pattern)) == pattern


@pytest.mark.parametrize(
    "given",
    [
        (),
        layout(indptr=torch.tensor([0, 0, 0, 0]), indices=torch.empty(0, dtype=torch.int64), mask_ids=None),
        (layout(), layout(kv_len=7)),
        (layout(), "local:1,0"),
    ],
    ids=["no layout", "no block", "two lengths", "not a layout"],
)
def test_what_is_no_layout_of_a_pattern_is_refused(given):
    with pytest.raises(ls.ArgumentError, match=r"^layout: got .*Next: ."):
        ls.BlockSparse(4, given)


def test_the_text_of_a_layout_is_good_for_as_long_as_somebody_holds_it():
    made = layout(q_len=12)
    pattern = ls.BlockSparse(4, made) & ls.local_blocks(100, 0, 4)
    spec = pattern.spec
    assert f"csr:{made.digest}" in spec
    assert ls.parse_pattern(spec) == pattern
    del made, pattern
    gc.collect()
    with pytest.raises(ls.ArgumentError, match=r"a layout that this process still holds.*Next: keep the BlockSparse"):
        ls.parse_pattern(spec)
