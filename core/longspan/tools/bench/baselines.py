"""Baselines on the same mask: torch's FlexAttention, Hugging Face's Longformer and BigBird.

In each comparison both sides compute the same thing from the same inputs; whoever runs it compares the results first.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import cycle
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

import longspan
from longspan import BlockCSR, BlockSparse, Problem
from longspan.errors import LongspanError
from longspan.spec.installing import extra_line

__all__ = ["Comparison", "against_bigbird", "against_flex", "against_longformer", "need_transformers"]

HEAD_DIM = 64
MODELS = "transformers.models."


@frozen
class Comparison:
    """Two sides that compute the same: `ours` and `theirs`, each `() -> Tensor`, and what else is to be said."""

    work: str
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    more: dict[str, Any] = field(factory=dict)


# ------------------------------------------------------------------------------------------------------ FlexAttention


def against_flex(backend: str, tokens: int, heads: int, block_size: int = 128) -> Iterator[Comparison]:
    """Compiled FlexAttention, forward, float32, on a random mask of 10 % and on a causal window of 1,024 tokens.

    Masks are made and the kernel is compiled beforehand, afresh; `compile_s` says how long that took.
    """
    drawn = longspan.random_blocks(0.1, block_size)
    kept = _grid(drawn.csr(tokens)[0])
    reach = 1023

    def random(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return kept[q // block_size, k // block_size]

    def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q - k <= reach)

    yield _flex(f"{drawn.spec} N={tokens}", backend, tokens, heads, drawn, False, random)
    local = longspan.local_blocks(reach, 0, block_size)
    yield _flex(f"{local.spec} causal N={tokens}", backend, tokens, heads, local, True, window)


def _flex(
    work: str, backend: str, tokens: int, heads: int, pattern: BlockSparse, is_causal: bool, seen: Callable[..., Tensor]
) -> Comparison:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value = (torch.randn(1, heads, tokens, HEAD_DIM, dtype=torch.float32, device="cpu") for _ in range(3))
    size = pattern.block_size
    mask = create_block_mask(seen, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=size)
    run: Any = torch.compile(flex_attention, dynamic=False)
    with _nothing_compiled():
        start = time.perf_counter()
        run(query, key, value, block_mask=mask)
        took = time.perf_counter() - start
    made = longspan.plan(Problem.like(query, key, value, pattern=pattern, is_causal=is_causal), backend=backend)
    return Comparison(
        f"{work} float32 forward: compiled FlexAttention's time / ours",
        lambda: made(query, key, value)[0],
        lambda: run(query, key, value, block_mask=mask),
        {"density": pattern.density(tokens, is_causal=is_causal), "compile_s": took},
    )


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """An empty folder of compiled code, so that what an earlier run left there is not found."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def _grid(csr: BlockCSR) -> Tensor:
    kept = torch.zeros(csr.rows, csr.columns, dtype=torch.bool, device="cpu")
    kept.view(-1)[csr.keys()] = True
    return kept


# ------------------------------------------------------------------------------------------------------- Hugging Face


def need_transformers(module: str = "transformers") -> Any:
    """A module of transformers.

    Raises:
        LongspanError: transformers is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise LongspanError(
            "Longformer and BigBird come from transformers, which is not installed. Next: "
            f"{extra_line('bench')}, or leave them out with --parts"
        ) from error


def against_longformer(
    backend: str, tokens: int, heads: int, window: int = 512, positions: tuple[int, ...] = ()
) -> Comparison:
    """`LongformerSelfAttention` in evaluation, float32, without padding and dropout.

    Theirs is the module's forward: three projections, the window, and with global `positions` their own three
    projections. Ours has the same projections by the same weights: the pattern's attention, and for the global tokens
    a dense one with their queries, keys and values.
    """
    config = need_transformers().LongformerConfig(
        hidden_size=heads * HEAD_DIM,
        num_attention_heads=heads,
        num_hidden_layers=1,
        attention_window=[window],
        attention_probs_dropout_prob=0.0,
    )
    module = need_transformers(MODELS + "longformer.modeling_longformer").LongformerSelfAttention(config, 0).eval()
    hidden = torch.randn(1, tokens, heads * HEAD_DIM, dtype=torch.float32, device="cpu")
    is_global = torch.zeros(1, tokens, dtype=torch.bool, device="cpu")
    is_global[:, list(positions)] = True
    given = (is_global * 10_000.0, torch.zeros_like(is_global), is_global, bool(positions))
    pattern = longspan.longformer(window, positions)

    def ours() -> Tensor:
        query, key, value = (_projected(layer, hidden, heads) for layer in (module.query, module.key, module.value))
        out = longspan.attention(query, key, value, pattern, backend=backend)
        if positions:
            at = list(positions)
            key, value = (_projected(layer, hidden, heads) for layer in (module.key_global, module.value_global))
            asked = _projected(module.query_global, hidden[:, at], heads)
            out[:, :, at] = longspan.attention(asked, key, value, backend=backend)
        return _joined(out)

    words = f" and {len(positions)} global token{'s' * (len(positions) != 1)}" if positions else ""
    return Comparison(
        f"window of {window}{words} N={tokens} float32 forward, projections included: Longformer's time / ours",
        ours,
        lambda: module(hidden, *given)[0],
        {"density": pattern.density(tokens)},
    )


def against_bigbird(backend: str, tokens: int, heads: int, block_size: int = 64, random: int = 3) -> Comparison:
    """`BigBirdBlockSparseAttention`, float32, with the random blocks that it draws itself in training, by seed 0.

    Theirs is the module's forward: three projections, the attention, and the `(heads, N, N)` weights that it always
    writes out as well. Meant for 4,096 tokens, the length of its paper: at others it may draw one block twice. The
    blocks are drawn beforehand: in evaluation the module draws none, and takes block 0 `random` times more. Ours has
    the same projections by the same weights, and the same blocks for each head.
    """
    config = need_transformers().BigBirdConfig(
        hidden_size=heads * HEAD_DIM,
        num_attention_heads=heads,
        num_hidden_layers=1,
        block_size=block_size,
        num_random_blocks=random,
        max_position_embeddings=tokens,
    )
    theirs, numpy = need_transformers(MODELS + "big_bird.modeling_big_bird"), import_module("numpy")
    module = theirs.BigBirdBlockSparseAttention(config, seed=0).train()
    state = numpy.random.get_state()
    numpy.random.seed(0)
    drawn = [
        module._bigbird_block_rand_mask(tokens, tokens, block_size, block_size, random, 1024) for _ in range(heads)
    ]
    numpy.random.set_state(state)
    module.eval()
    turn = cycle(drawn)  # each forward asks once a head, in order
    module._bigbird_block_rand_mask = lambda *_, **__: next(turn)
    hidden = torch.randn(1, tokens, heads * HEAD_DIM, dtype=torch.float32, device="cpu")
    blocked, band, from_mask, to_mask = theirs.BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(1, tokens, dtype=torch.float32, device="cpu"), block_size
    )
    masks = {"band_mask": band, "from_mask": from_mask, "to_mask": to_mask}
    masks |= {"from_blocked_mask": blocked, "to_blocked_mask": blocked}
    pattern = BlockSparse(block_size, [_bigbird_blocks(tokens, block_size, blocks.tolist()) for blocks in drawn])

    def ours() -> Tensor:
        query, key, value = (_projected(layer, hidden, heads) for layer in (module.query, module.key, module.value))
        return _joined(longspan.attention(query, key, value, pattern, backend=backend))

    return Comparison(
        f"BigBird, blocks of {block_size}, {random} random N={tokens} float32 forward, projections included: "
        "BigBird's time / ours",
        ours,
        lambda: module(hidden, **masks)[0],
        {"density": pattern.density(tokens)},
    )


def _bigbird_blocks(tokens: int, size: int, drawn: list[list[int]]) -> BlockCSR:
    """One head's blocks: the first and the last row and column, a window of three, and what was drawn for the rest."""
    count = tokens // size
    rows = [list(range(count))] * count
    rows[1:-1] = [sorted({0, count - 1, row - 1, row, row + 1, *drawn[row - 1]}) for row in range(1, count - 1)]
    indptr = torch.tensor([0, *map(len, rows)], dtype=torch.int64, device="cpu").cumsum(0)
    return BlockCSR(
        size,
        tokens,
        tokens,
        indptr,
        torch.tensor([column for row in rows for column in row], dtype=torch.int64, device="cpu"),
    )


def _projected(layer: Callable[[Tensor], Tensor], hidden: Tensor, heads: int) -> Tensor:
    """`(batch, heads, seq, head_dim)`, as a view."""
    out = layer(hidden)
    return out.view(*out.shape[:2], heads, HEAD_DIM).transpose(1, 2)


def _joined(out: Tensor) -> Tensor:
    """`(batch, seq, embed)`, contiguous as theirs."""
    return out.transpose(1, 2).flatten(2)
