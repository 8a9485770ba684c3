"""Training: the oracle's loss curve, step by step, on a real text; memory that grows no faster than the sequence."""

from __future__ import annotations

import argparse
import os
import shutil
import textwrap
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import longspan as ls
from longspan.testing.oracle import oracle

STEPS = 200
WIDTH, HEADS, LENGTH, BATCH = 64, 4, 96, 2
HAS_COMPILER = any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "c++", "clang++"))
TEXT = b"".join(Path(module.__file__).read_bytes() for module in (textwrap, argparse))


# --- a small transformer on the bytes of a real text ---------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.before, self.after = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.into, self.back = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.into(self.before(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.back(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.after(x))))


class Model(torch.nn.Module):
    """Byte-level, two layers, learned positions."""

    def __init__(self, attend, dtype=torch.float64):
        super().__init__()
        self.token, self.position = torch.nn.Embedding(256, WIDTH), torch.nn.Embedding(LENGTH, WIDTH)
        self.blocks = torch.nn.Sequential(Block(attend), Block(attend))
        self.norm, self.head = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, 256)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
                elif name.endswith("bias"):
                    parameter.zero_()
        self.to(dtype)

    def forward(self, tokens):
        x = self.token(tokens[:, :-1]) + self.position.weight
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batches(steps):
    """The same slices of the text every time."""
    text = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - LENGTH - 1, (BATCH,), generator=generator)
        yield torch.stack([text[start : start + LENGTH + 1] for start in starts])


def curve(attend, steps=STEPS, compiled=None, dtype=torch.float64):
    model = Model(attend, dtype)
    step = model if compiled is None else torch.compile(model, fullgraph=True, backend=compiled)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for tokens in batches(steps):
        loss = step(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def distance(losses, wanted):
    return ((losses - wanted).abs() / wanted).max().item()


PATTERN = ls.Dilated((16, 48, 96), (1, 2, 3))


@pytest.fixture(scope="module")
def oracles_curve():
    return curve(lambda q, k, v: oracle(q, k, v, PATTERN, is_causal=True))


def test_the_text_is_learned(oracles_curve):
    assert oracles_curve[0] > 5.0 and oracles_curve[-20:].mean() < 3.2, oracles_curve[::20]


def test_a_compiled_model_follows_the_oracles_loss_curve(oracles_curve, record_property):
    """To the fourth digit at every step, forward, backward and optimizer, in float64."""
    compiled = "inductor" if HAS_COMPILER else "aot_eager"
    losses = curve(lambda q, k, v: ls.attention(q, k, v, PATTERN, is_causal=True), compiled=compiled)
    apart = distance(losses, oracles_curve)
    record_property("largest relative distance of the loss curves", apart)
    assert len(losses) == STEPS
    assert apart <= 1e-4, f"the loss curves are {apart:.3g} apart, relative, under {compiled}"
    assert apart <= 1e-9, f"the fourth digit holds, but float64 should agree better than {apart:.3g}"


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_so_does_each_backend_uncompiled(oracles_curve, backend):
    losses = curve(lambda q, k, v: ls.attention(q, k, v, PATTERN, is_causal=True, backend=backend), steps=40)
    apart = distance(losses, oracles_curve[:40])
    assert apart <= 1e-10, f"{apart:.3g}"


def test_a_wrong_gradient_would_show(oracles_curve):
    """One part in ten thousand too much of one gradient parts the curves."""

    def attend(q, k, v):
        k = k + (k - k.detach()) * 1e-4
        return ls.attention(q, k, v, PATTERN, is_causal=True)

    assert distance(curve(attend, steps=40), oracles_curve[:40]) > 1e-9


BOUNDS = (0, 20, 20, 57, LENGTH)
KINDS = {
    "window": (ls.SlidingWindow(12, 0), {"is_causal": True}),
    "documents": (ls.Dense(), {"is_causal": True, "cu_seqlens": BOUNDS}),
    "window in documents": (ls.SlidingWindow(12, 4), {"is_causal": True, "cu_seqlens": BOUNDS}),
    "dilated in documents": (PATTERN, {"is_causal": True, "cu_seqlens": BOUNDS}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_windows_and_packed_documents_train_on_a_cpu(kind):
    """Forward and backward, where FlexAttention has no CPU backward."""
    pattern, given = KINDS[kind]
    losses = curve(lambda q, k, v: ls.attention(q, k, v, pattern, **given), steps=30)
    wanted = curve(lambda q, k, v: oracle(q, k, v, pattern, **given), steps=30)
    assert distance(losses, wanted) <= 1e-10
    assert losses[-5:].mean() < losses[:5].mean() - 1.0


@pytest.mark.parametrize("kind", ["window", "dilated in documents"])
def test_they_train_in_bfloat16_autocast_and_with_dropout(kind):
    pattern, given = KINDS[kind]
    torch.manual_seed(0)

    def attend(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ls.attention(q, k, v, pattern, dropout_p=0.1, **given).float()

    losses = curve(attend, steps=30, dtype=torch.float32)
    assert losses.isfinite().all() and losses[-5:].mean() < losses[:5].mean() - 1.0


# --- memory -------------------------------------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """Bytes of the tensors alive, now and at their peak, of those that operators made while it was on."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                self._count(x.untyped_storage())
        return result

    def _count(self, storage):
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size):
        self.now -= size


DILATED = ls.Dilated((64, 128, 256, 512), (1, 2, 4, 8))


def measured(tokens, pattern=DILATED, **given):
    """(what the forward leaves behind, peak of forward and backward), in bytes beyond the inputs."""
    inputs = [torch.randn(1, 8, tokens, 32, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    dout = torch.randn(1, 8, tokens, 32, dtype=torch.bfloat16)
    with Meter() as meter:
        out = ls.attention(*inputs, pattern, is_causal=True, backend="sdpa", **given)
        kept = meter.now
        out.backward(dout)
    return kept, meter.peak


def test_the_meter_measures():
    with Meter() as meter:
        x = torch.zeros(1000, dtype=torch.uint8)
        y = x + 1
        y[:10].view(-1).mul_(2)
        del x
        z = y.clone()
    assert (meter.now, meter.peak) == (2000, 2000) and len(z) == 1000


def test_the_forward_keeps_its_results_alone():
    """Out and lse, of which the backward makes everything else: no weights, no copies of keys, no partial results."""
    tokens = 2048
    kept, _ = measured(tokens)
    assert kept == tokens * 8 * (32 * 2 + 4)


@pytest.mark.parametrize(
    "pattern, limit",
    [
        (DILATED, 2.0),
        (ls.SlidingWindow(128, 0), 2.1),  # the first tile has fewer keys than the others, and weighs less
    ],
    ids=repr,
)
def test_twice_the_tokens_take_at_most_twice_the_memory(pattern, limit):
    """What operators allocate inside themselves is not seen here; tests/benchmarks/memory.py sees the whole process."""
    peaks = [measured(tokens, pattern)[1] for tokens in (1024, 2048, 4096, 8192)]
    for small, large in pairwise(peaks):
        assert large <= limit * small, peaks
    assert peaks[-1] < 8192**2, "less than one byte for each pair of tokens, of one head of eight"
