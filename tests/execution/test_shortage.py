"""Workspace comes back after every step; where memory runs out, the arena gives back what it keeps, and says so."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

import longspan as ls
from longspan import blockwise
from longspan.memory.arena import buffer_arena
from longspan.planning.attention import forget

MIB = 2**20
CPU = torch.device("cpu")
SHORTAGES = {
    "python": MemoryError(),
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
}


# --- workspace comes back -------------------------------------------------------------------------------------------

BLOCKS = ls.random_blocks(0.3, block_size=16, seed=0)


PATTERNS = (BLOCKS, ls.SlidingWindow(0, 20), ls.Dilated((64, 128), (1, 2)), ls.TopKBlocks(2, block_size=16))


@pytest.mark.parametrize("backend", ["sdpa", "block_sparse_batched", "reference"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.kind)
def test_all_that_was_lent_comes_back(backend, pattern, monkeypatch):
    """Neither a local name of a launch, nor a mask, nor a flipped key keeps it."""
    monkeypatch.setattr("longspan.execution.kernel.LEASED", 1)
    arena, lent = buffer_arena(), 0
    for dtype in (torch.float32, torch.bfloat16):
        for is_causal in (False, True):
            for tokens, kv_heads in ((256, 4), (250, 2)):
                q, k, v = (torch.randn(1, h, tokens, 16).to(dtype).requires_grad_() for h in (4, kv_heads, kv_heads))

                def step(q=q, k=k, v=v, is_causal=is_causal):
                    given = {"is_causal": is_causal, "enable_gqa": True, "backend": backend}
                    ls.attention(q, k, v, pattern, **given).sum().backward()

                with arena.serving_from(1):
                    step()
                    before = arena.stats
                    step()
                    step()
                    after = arena.stats
                lent += after.reused - before.reused
                # Plans that die meanwhile, those of chosen blocks at every call, may take memory with them.
                assert after.withdrawn == before.withdrawn and after.leased == 0
    assert lent > 0


# --- out of memory --------------------------------------------------------------------------------------------------


class Short:
    """A backend whose kernel runs out of memory the first `fails` times that its forward or backward is called."""

    def __init__(self, error, fails=1, where="forward"):
        self.error, self.fails, self.where, self.calls = error, fails, where, 0

    @ls.hookimpl
    def longspan_capabilities(self):
        return ls.Capabilities(
            devices=("cpu",), dtypes=("float32",), patterns=("dense",), causal=True, backward=True, dropout=True
        )

    @ls.hookimpl
    def longspan_kernel(self, problem):
        given = {"is_causal": problem.is_causal, "scale": problem.scale}

        def fail(where):
            if where == self.where:
                self.calls += 1
                if self.calls <= self.fails:
                    raise self.error

        def forward(q, k, v, dropout=None):
            fail("forward")
            return blockwise.forward(q, k, v, dropout=dropout, **given)

        def backward(dout, q, k, v, out, lse, dropout=None):
            fail("backward")
            return blockwise.backward(dout, q, k, v, out, lse, dropout=dropout, **given)

        return ls.Kernel(forward, backward)


@pytest.fixture
def kept():
    """Memory that the arena keeps and nobody uses."""
    forget()  # a plan of an earlier test that has to make room would take what is free with it
    arena = buffer_arena()
    arena.trim()
    with arena.lease(ls.BufferSpec("x", (64 * MIB,), "uint8"), CPU):
        pass
    yield arena
    arena.trim()


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return [torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3)]


def run(tensors, pattern=None, **given):
    out = ls.attention(*tensors, pattern or ls.SlidingWindow(9, 0), backend="short", **given)
    return out, torch.autograd.grad(out.square().sum(), tensors)


@pytest.mark.parametrize("name", SHORTAGES)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_the_arena_keeps_is_given_back_and_the_call_run_again(name, where, register, kept, tensors):
    want = run_by_sdpa(tensors)
    plugin = Short(SHORTAGES[name], where=where)
    register(plugin, "short")
    before = kept.stats
    words = "ran out of memory; .* gave back 64 MiB, and the call was run again. Next: "
    with pytest.warns(UserWarning, match=words) as said:
        found = run(tensors)
    assert len(said) == 1 and said[0].filename == __file__
    for got, right in zip((found[0], *found[1]), (want[0], *want[1]), strict=True):
        torch.testing.assert_close(got, right)
    after = kept.stats
    assert (after.shortages, after.held) == (before.shortages + 1, 0) and before.held == 64 * MIB


def run_by_sdpa(tensors):
    out = ls.attention(*tensors, ls.SlidingWindow(9, 0), backend="sdpa")
    return out, torch.autograd.grad(out.square().sum(), tensors)


def test_a_call_without_gradients_is_run_again_too(register, kept, tensors):
    register(Short(MemoryError()), "short")
    with torch.no_grad(), pytest.warns(UserWarning, match="64 MiB"):
        out = ls.attention(*tensors, backend="short")
    torch.testing.assert_close(out, ls.attention(*tensors, backend="sdpa"))
    plan = ls.plan(ls.Problem.like(*tensors), backend="short")  # one that has run already
    with torch.no_grad():
        out, lse = plan(*tensors)
        plan(*tensors)
    plugin = Short(MemoryError(), where="backward")
    ls.unregister("short")
    ls.register(plugin, name="short")
    plan = ls.plan(ls.Problem.like(*tensors), backend="short")
    with kept.lease(ls.BufferSpec("x", (64 * MIB,), "uint8"), CPU):
        pass
    with pytest.warns(UserWarning, match="64 MiB"):
        assert len(plan.backward(torch.ones_like(out), *tensors, out, lse)) == 3


def test_the_same_pairs_are_dropped(register, kept, tensors):
    register(Short(MemoryError()), "short")
    with pytest.warns(UserWarning, match="64 MiB"):
        again = run(tensors, ls.Dense(), dropout_p=0.5, dropout_seed=3)
    for got, right in zip(again[1], run(tensors, ls.Dense(), dropout_p=0.5, dropout_seed=3)[1], strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_where_it_is_in_vain_the_error_says_what_to_do(where, register, kept, tensors):
    plugin = Short(torch.OutOfMemoryError("CUDA out of memory"), fails=2, where=where)
    register(plugin, "short")
    with pytest.raises(torch.OutOfMemoryError) as failed:
        run(tensors)
    assert plugin.calls == 2
    notes = " ".join(failed.value.__notes__)
    assert re.search("gave back 64 MiB, and the call was run again: in vain. Next: .*longspan.checkpoint", notes)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_where_nothing_is_kept_it_is_not_run_again(where, register, tensors):
    buffer_arena().trim()
    plugin, before = Short(MemoryError(), where=where), buffer_arena().stats.shortages
    register(plugin, "short")
    with pytest.raises(MemoryError) as failed:
        run(tensors)
    assert plugin.calls == 1 and buffer_arena().stats.shortages == before
    assert "no memory that it could give back. Next: fewer batch entries" in " ".join(failed.value.__notes__)


def test_another_error_is_nobodys_business(register, kept, tensors):
    plugin = Short(RuntimeError("shapes do not match"))
    register(plugin, "short")
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="shapes do not match") as failed:
        warnings.simplefilter("error")
        run(tensors)
    assert plugin.calls == 1 and kept.stats.held == 64 * MIB
    assert not any("arena" in note for note in failed.value.__notes__)
