"""The arena: memory that is reused, never while anything uses it, and gone when nobody needs it."""

from __future__ import annotations

import copy
import gc
import math
import os
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import longspan as ls
from longspan.memory.arena import BufferArena, buffer_arena
from longspan.memory.extent import GRANULE, Extent
from longspan.memory.workspace import Scratch, TorchAllocator, Workspace
from longspan.testing import oracle

CPU = torch.device("cpu")
MIB = 2**20


def spec(mib=4.0, dtype="float32", name="x"):
    return ls.BufferSpec(name, (int(mib * MIB) // getattr(torch, dtype).itemsize,), dtype)


def arena(**given):
    return BufferArena(**{"threshold": MIB, "poison": True, **given})


def address(tensor):
    return tensor.untyped_storage().data_ptr()


# --- leases ---------------------------------------------------------------------------------------------------------


def test_memory_is_used_again():
    pool = arena()
    with pool.lease(spec(), CPU) as first:
        assert first.shape == (MIB,) and first.dtype == torch.float32
        where = address(first)
        assert pool.stats.leased == pool.stats.held == 4 * MIB
    with pool.lease(spec(3), CPU) as second:  # a smaller one too
        assert address(second) == where
    stats = pool.stats
    assert (stats.fresh, stats.reused, stats.leased, stats.extents) == (1, 1, 0, 1)


def test_two_at_once_are_two():
    pool = arena()
    with pool.lease(spec(), CPU) as one, pool.lease(spec(), CPU) as two:
        one.fill_(1)
        two.fill_(2)
        assert address(one) != address(two) and one.unique().tolist() == [1]


def test_what_is_too_small_makes_room_for_what_is_large_enough():
    pool = arena()
    for size in (2, 4, 6, 8, 7, 3):
        with pool.lease(spec(size), CPU):
            pass
    assert pool.stats.held == 8 * MIB and pool.stats.extents == 1


def test_the_tensor_of_a_lease_is_empty_after_it():
    pool = arena()
    with pool.lease(spec(), CPU) as tensor:
        pass
    assert tensor.numel() == 0


def test_an_exception_gives_back():
    pool = arena()
    with pytest.raises(ZeroDivisionError), pool.lease(spec(), CPU):
        raise ZeroDivisionError
    assert pool.stats.leased == 0 and pool.stats.extents == 1


def test_a_view_that_outlives_its_lease_keeps_the_memory():
    pool = arena()
    with pool.lease(spec(), CPU) as tensor:
        tensor.fill_(7)
        view = tensor[5:100].view(5, 19)
    assert pool.stats.withdrawn == 1 and pool.stats.held == 0
    with pool.lease(spec(), CPU) as other:
        other.fill_(1)
        assert address(other) != address(view)
    assert view.unique().tolist() == [7]


@pytest.mark.parametrize("keep", [lambda t: t.numpy(), lambda t: t.detach(), lambda t: t.data, copy.copy])
def test_however_it_is_kept(keep):
    pool = arena()
    with pool.lease(spec(), CPU) as tensor:
        tensor.fill_(7)
        kept = keep(tensor[1:])
    with pool.lease(spec(), CPU) as other:
        other.fill_(1)
    assert kept[0] == 7 and kept[-1] == 7


@pytest.mark.parametrize("saved", [lambda t: t, lambda t: t[:], lambda t: t.view(2, -1)], ids=["it", "slice", "view"])
def test_a_lease_saved_for_a_backward_is_an_error_and_no_wrong_gradient(saved):
    """A lease ends with its block; whoever wants to save it for a backward uses `take`."""
    pool = arena()
    weight = torch.ones(2, MIB // 2, requires_grad=True)
    with pool.lease(spec(), CPU) as tensor:
        tensor.fill_(3)
        product = weight.view_as(saved(tensor)) * saved(tensor)
    with pool.lease(spec(), CPU) as other:
        other.fill_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        product.sum().backward()


def test_nothing_saved_for_a_backward_is_recycled():
    pool = arena()
    weight = torch.ones(MIB, requires_grad=True)

    def product():
        return weight * pool.allocate(spec(), CPU).fill_(3)

    found = product()
    pool.allocate(spec(), CPU).fill_(1)
    found.sum().backward()
    assert weight.grad.unique().tolist() == [3]
    assert pool.stats.fresh == 2


def test_inference_mode_leaves_no_trace():
    pool = arena()
    with torch.inference_mode(), pool.lease(spec(), CPU) as tensor:
        where = address(tensor)
    with pool.lease(spec(), CPU) as tensor:
        assert address(tensor) == where and not tensor.is_inference()
        tensor.fill_(1)


# --- allocate -------------------------------------------------------------------------------------------------------


def test_what_was_allocated_comes_back_when_the_last_reference_goes():
    pool = arena()
    tensor = pool.allocate(spec(), CPU)
    view = tensor[3:]
    where = address(tensor)
    del tensor
    other = pool.allocate(spec(), CPU)
    assert address(other) != where
    del view
    assert address(pool.allocate(spec(), CPU)) == where


def test_what_is_releaseed_never_comes_back():
    pool = arena()
    tensor = pool.allocate(spec(), CPU)
    pool.release(tensor[7:])
    assert pool.stats.extents == 0
    del tensor
    assert pool.stats.extents == 0


def test_below_the_threshold_torch_serves():
    pool = arena(threshold=8 * MIB)
    with pool.lease(spec(4), CPU), pool.lease(spec(8), CPU), pool.lease(spec(2), CPU, always=True):
        stats = pool.stats
    assert (stats.passed, stats.fresh) == (1, 2)
    assert pool.allocate(ls.BufferSpec("none", (0, 3)), CPU).shape == (0, 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int64", "bool", "uint8"])
def test_shapes_and_dtypes(dtype):
    pool = arena(threshold=0)
    with pool.lease(ls.BufferSpec("x", (3, 5, 7), dtype), CPU) as tensor:
        assert tensor.shape == (3, 5, 7) and tensor.is_contiguous() and tensor.dtype == getattr(torch, dtype)
    assert pool.allocate(ls.BufferSpec("x", (), dtype), CPU).shape == ()


def test_meta_tensors_are_torchs():
    pool = arena()
    assert pool.allocate(spec(), torch.device("meta")).is_meta and pool.stats.extents == 0


# --- bounds ---------------------------------------------------------------------------------------------------------


def test_the_limit_holds_and_nobody_waits():
    pool = arena(limit=10 * MIB)
    kept = [pool.allocate(spec(4), CPU) for _ in range(200)]
    assert pool.stats.held <= 10 * MIB and pool.stats.passed == 198
    assert len({address(tensor) for tensor in kept}) == 200
    kept.clear()
    with pool.lease(spec(9), CPU):  # the free ones make room
        assert pool.stats.held == 10 * MIB
    assert pool.stats.peak <= 10 * MIB


def test_trim_gives_back_what_is_free():
    pool = arena()
    kept = pool.allocate(spec(4), CPU)
    with pool.lease(spec(6), CPU):
        pass
    assert pool.trim() == 6 * MIB and pool.stats.held == 4 * MIB
    del kept
    assert pool.trim() == 4 * MIB and pool.stats.held == 0


def test_memory_goes_with_the_last_reservation_that_needs_it():
    pool = arena()
    small, large = pool.reserve(), pool.reserve()
    with small.lease(spec(4), CPU):
        pass
    with large.lease(spec(16), CPU), large.lease(spec(16), CPU):
        pass
    assert pool.stats.held == 32 * MIB
    del large
    assert pool.stats.held <= 4 * MIB
    with small.lease(spec(4), CPU):
        assert pool.stats.held == 4 * MIB
    del small
    assert pool.stats.held == 0 and not pool._needs


def test_a_reservation_that_dies_within_a_lease():
    pool = arena()
    reservation = pool.reserve()
    with reservation.lease(spec(4), CPU) as tensor:
        tensor.fill_(1)
        del reservation
        gc.collect()
        assert tensor.unique().tolist() == [1]
    assert pool.stats.held == 0


def test_a_reservation_may_die_while_its_thread_holds_the_lock():
    """A garbage collection may run anywhere, and find a plan there."""
    pool = arena()
    reservation = pool.reserve()
    with reservation.lease(spec(4), CPU):
        pass
    with pool._lock:
        del reservation
        assert pool._ended
    assert len(pool._extents) == 1  # nobody came after the lock yet
    assert pool.stats.extents == 0 and pool.stats.held == 0


def test_an_extent_is_allocated_once_its_room_is_made(monkeypatch):
    pool = arena()

    def full(self):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Extent, "allocate", full)
    with pytest.raises(torch.OutOfMemoryError), pool.lease(spec(), CPU):
        raise AssertionError("there is no memory")
    assert pool.stats.held == 0 and pool.stats.extents == 0


# --- threads and forks ----------------------------------------------------------------------------------------------


def test_threads_never_share():
    pool = arena(limit=64 * MIB)
    go = threading.Barrier(8)

    def work(number):
        go.wait(30)
        for turn in range(60):
            with pool.lease(spec(1 + (number + turn) % 5), CPU) as one:
                one.fill_(number)
                two = pool.allocate(spec(1 + turn % 3), CPU)
                two.fill_(-number)
                assert bool((one == number).all()) and bool((two == -number).all())

    with ThreadPoolExecutor(8) as workers:
        list(workers.map(work, range(1, 9)))
    gc.collect()
    stats = pool.stats
    assert stats.leased == 0 and stats.peak <= 64 * MIB and stats.held == sum(extent.size for extent in pool._extents)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_fork_starts_empty():
    pool = arena()
    held, done = threading.Event(), threading.Event()

    def hold():
        with pool.lease(spec(), CPU), pool._lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads is the point
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        with pool.lease(spec(1), CPU, always=True) as tensor:
            right = pool.stats.extents == 1 and tensor.numel() == MIB // 4
        os._exit(0 if right else 1)
    status = os.waitpid(child, 0)[1]
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


# --- workspaces -----------------------------------------------------------------------------------------------------


def test_a_workspace_leases_what_was_declared():
    pool = arena()
    workspace = Workspace([spec(4, name="a")], pool.reserve())
    with workspace.lease("a", CPU) as tensor:
        assert tensor.numel() == MIB and pool.stats.leased == 4 * MIB
    with pytest.raises(ls.PluginError, match="'b'"):
        workspace.lease("b", CPU)


def test_a_pair_changes_places_and_is_reused_from_step_to_step():
    pool = arena(threshold=64 * MIB)
    workspace = Workspace([spec(4, name="keys")], pool.reserve())
    seen = set()
    for _ in range(5):
        with workspace.pair("keys", CPU) as pair:
            for hop in range(4):
                pair.back.fill_(hop)
                pair.swap()
                assert pair.front.unique().tolist() == [hop]
                seen |= {address(pair.front), address(pair.back)}
    assert len(seen) == 2 and pool.stats.fresh == 2


def test_scratch_takes_one_memory_for_all_launches():
    pool = arena(threshold=4 * MIB)
    workspace = Workspace((), pool.reserve())
    x = torch.randn(1, 1, 4096, 64, dtype=torch.float64)
    with Scratch(workspace, x, x.nbytes * 10) as scratch:
        for rows in (4096, 100, 4000):
            part = x[:, :, :rows]
            assert torch.equal(scratch.flip("q", part), part.flip(2))
            assert torch.equal(scratch.widen("w", part.float(), torch.float64), part.float().double())
        assert pool.stats.fresh == 2
    assert pool.stats.leased == 0
    with Scratch(workspace, x, 100) as scratch:
        assert torch.equal(scratch.flip("q", x), x.flip(2))
    assert pool.stats.fresh == 2


def test_torchs_own_allocator_keeps_nothing():
    workspace = Workspace([spec(4, name="a")], TorchAllocator())
    with workspace.lease("a", CPU) as tensor:
        assert tensor.numel() == MIB
    workspace.release([tensor])


# --- through the public API -----------------------------------------------------------------------------------------

PATTERNS = [ls.Dilated((64, 256), (1, 3)), ls.SlidingWindow(40, 0), ls.SlidingWindow(9, 17), ls.Dense()]


@pytest.fixture
def small_threshold(monkeypatch):
    """The core's arena serves everything, and poisons it."""
    pool = buffer_arena()
    pool.trim()
    monkeypatch.setattr(pool, "threshold", 0)
    monkeypatch.setattr(pool, "poison", True)
    return pool


def inputs(dtype, n=300, grad=False):
    made = [torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    return [x.requires_grad_(grad) for x in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_results_are_right_and_never_the_arenas(small_threshold, pattern, dtype):
    def run():
        x = inputs(dtype, grad=True)
        out = ls.attention(*x, pattern, is_causal=True, backend="sdpa")
        out.backward(torch.ones_like(out))
        return [out.detach(), *(one.grad for one in x)]

    first = run()
    kept = [one.clone() for one in first]
    second = run()  # reuses, and poisons, whatever the first gave back
    tolerance = {"atol": {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2), "rtol": 0}
    torch.testing.assert_close(kept[0], oracle(*inputs(dtype), pattern, is_causal=True).to(dtype), **tolerance)
    for one, other, same in zip(first, kept, second, strict=True):
        assert torch.equal(one, other) and torch.equal(one, same) and not one.isnan().any()
    extents = {extent.address for extent in small_threshold._extents}
    assert not extents & {address(one) for one in (*first, *second)}


def test_a_lowered_pattern_uses_it_and_gives_it_back(small_threshold):
    before = small_threshold.stats
    plan = ls.plan(ls.Problem.like(*inputs(torch.bfloat16), PATTERNS[0]), backend="sdpa")
    plan(*inputs(torch.bfloat16))
    assert small_threshold.stats.fresh + small_threshold.stats.reused > before.fresh + before.reused
    assert small_threshold.stats.leased == 0
    del plan
    gc.collect()
    assert small_threshold.stats.held == 0 or small_threshold._needs


def test_arena_bytes_return_to_zero_when_the_plans_are_dropped(monkeypatch):
    pool = BufferArena(threshold=0)
    plans = []

    class Extension:
        @ls.hookimpl
        def longspan_allocator(self, device):
            return pool

    ls.register(Extension(), name="test-pool")
    try:
        for n in (100, 200, 300):
            x = inputs(torch.bfloat16, n=n)
            plans.append(ls.plan(ls.Problem.like(*x, PATTERNS[0]), backend="sdpa"))
            plans[-1](*x)
    finally:
        ls.unregister("test-pool")
    assert pool.stats.held >= GRANULE
    plans.pop()
    assert pool.stats.held >= GRANULE
    plans.clear()
    assert pool.stats.held == 0


class Greedy:
    """A kernel that returns its workspace, and one that keeps it from call to call."""

    def __init__(self):
        self.kept = []

    @ls.hookimpl
    def longspan_capabilities(self):
        return ls.Capabilities(devices=("cpu",), dtypes=("float32",), patterns=("dense",))

    @ls.hookimpl
    def longspan_buffers(self, problem):
        shape = (problem.batch, problem.heads, problem.q_len, problem.head_dim)
        return [ls.BufferSpec("out", shape), ls.BufferSpec("kept", shape)]

    @ls.hookimpl
    def longspan_kernel(self, problem, buffers):
        def forward(q, k, v):
            out, kept = buffers.take("out", q.device), buffers.take("kept", q.device)
            scores = q @ k.mT * problem.scale
            torch.matmul(scores.softmax(-1), v, out=out)
            self.kept.append((kept.fill_(len(self.kept)), len(self.kept)))
            return out, scores.logsumexp(-1)

        return forward


def test_a_kernel_that_returns_or_keeps_its_workspace_harms_nobody(small_threshold):
    plugin = Greedy()
    ls.register(plugin, name="test-greedy")
    try:
        x = inputs(torch.float32)
        outs = [ls.attention(x[0] * (1 + i), x[1], x[2], backend="test-greedy") for i in range(4)]
        for i, out in enumerate(outs):
            torch.testing.assert_close(out, oracle(x[0] * (1 + i), x[1], x[2]).float())
        assert all(bool((tensor == number).all()) for tensor, number in plugin.kept)
        assert len({address(out) for out in outs}) == 4
        assert not {extent.address for extent in small_threshold._extents} & {address(out) for out in outs}
    finally:
        ls.unregister("test-greedy")
        plugin.kept.clear()  # the plans that are kept hold the plugin, and it would hold the arena's memory


class Pool:
    def __init__(self, fault=""):
        self.given, self.fault = 0, fault

    def allocate(self, spec, device):
        self.given += 1
        if self.fault == "raises" or (self.fault == "later" and self.given > 1):
            raise RuntimeError("out of everything")
        if self.fault == "shape":
            return torch.empty(3)
        if self.fault == "none":
            return None
        return torch.full(spec.shape, math.nan, dtype=getattr(torch, spec.dtype), device=device)


class Allocating:
    def __init__(self, pool):
        self.pool = pool

    @ls.hookimpl
    def longspan_allocator(self, device):
        if self.pool == "raises":
            raise RuntimeError("out of everything")
        return self.pool


@pytest.mark.parametrize("fault", ["", "raises", "later", "shape", "none", "hook", "no method"])
def test_a_plugins_allocator_serves_and_one_that_fails_is_noted(fault):
    pool = {"hook": "raises", "no method": object()}.get(fault, Pool(fault))
    x = inputs(torch.bfloat16, n=64)
    want = ls.attention(*x, PATTERNS[0], backend="sdpa")
    ls.register(Allocating(pool), name="test-pool")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            got = [ls.attention(*x, PATTERNS[0], backend="sdpa") for _ in range(3)]
        rows = [row for row in ls.backends() if row.name == "test-pool"]
    finally:
        ls.unregister("test-pool")
    assert all(torch.equal(one, want) for one in got)
    if not fault:
        assert pool.given >= 3 and not rows and not said
    else:
        assert [one.category for one in said] == [ls.PluginWarning]
        assert rows[0].state == "broken" and "longspan_allocator" in rows[0].error
        assert not isinstance(pool, Pool) or pool.given <= 2, "asked again after it failed"
