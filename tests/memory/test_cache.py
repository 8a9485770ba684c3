"""The store of layouts: what it keeps, whom it gives what, and what it says about itself."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import signal
import sys
import threading
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import attrs
import pytest
import torch
from fake_device import FakeOffloader

import longspan as ls
from longspan.lowering.dense import lower
from longspan.lowering.layout import Layout
from longspan.memory import cache_file
from longspan.memory.cache import PatternCache, pattern_cache
from longspan.memory.cached_layout import CachedLayout, LayoutKey
from longspan.memory.flatten import nbytes_of
from longspan.memory.workspace import TorchAllocator, Workspace
from longspan.testing import oracle

PATTERN = ls.Dilated((5, 12), (1, 2))


def problem(n=12, pattern=PATTERN):
    return ls.Problem(batch=1, heads=2, q_len=n, head_dim=4, pattern=pattern)


def key(n=12, pattern=PATTERN, origin="longspan 1"):
    return LayoutKey(problem(n, pattern), "sdpa", origin, 1)


@attrs.frozen
class Blocks:
    """As a backend's layout with tensors may look."""

    rows: torch.Tensor
    columns: torch.Tensor
    size: int
    nested: tuple = ()

    @property
    def nbytes(self):
        return self.rows.nbytes + self.columns.nbytes


def blocks(count=100, fill=1):
    return Blocks(torch.full((count,), fill, dtype=torch.int64), torch.full((count,), fill, dtype=torch.int32), 7)


def on_a_device(device_limit=2000, limit=2**20):
    offloader = FakeOffloader()
    return PatternCache(limit, device_limit, offloader_for=lambda _: offloader), offloader


# --- keeping --------------------------------------------------------------------------------------------------------


def test_a_layout_of_numbers_is_found_as_it_is():
    store, layout = PatternCache(), lower(problem())
    assert store.get(key()) is None
    store.put(key(), layout)
    assert store.get(key()) is layout
    assert key() in store and len(store) == 1 and store.keys() == (key(),)


def test_the_least_recently_used_goes_first():
    one = nbytes_of(lower(problem()))
    store = PatternCache(limit=3 * one)
    for n in "abc":
        store.put(n, lower(problem()))
    assert store.get("a") is not None
    store.put("d", lower(problem()))
    assert [n in store for n in "abcd"] == [True, False, True, True]
    assert store.stats.evictions == 1
    assert store.stats.host_bytes == 3 * one


def test_what_is_larger_than_the_limit_is_not_kept():
    store = PatternCache(limit=10)
    store.put("a", lower(problem()))
    assert store.get("a") is None and store.stats.host_bytes == 0


def test_bytes_are_what_a_layout_says():
    store = PatternCache()
    store.put("a", blocks(1000))
    assert 12_000 <= store.stats.host_bytes <= 12_300
    store.put("a", blocks(10))
    assert store.stats.host_bytes <= 400
    store.clear()
    assert store.stats.host_bytes == 0 and len(store) == 0


def test_a_put_under_the_same_key_for_ever_takes_no_more_memory():
    store, before = PatternCache(), cached_layouts()
    for _ in range(1000):
        store.put("a", blocks())
    assert cached_layouts() == before + 1 and store.stats.host_bytes < 2000


def cached_layouts():
    gc.collect()
    return sum(isinstance(one, CachedLayout) for one in gc.get_objects())


def test_pins_outlive_pressure():
    one = nbytes_of(lower(problem()))
    store = PatternCache(limit=2 * one)
    store.put(key(), lower(problem()))
    store.pin(key())
    store.pin(problem())  # all keys of a problem
    for n in range(20):
        store.put(n, lower(problem()))
    assert key() in store and store.stats.pinned == 1
    store.unpin(key())
    store.put("x", lower(problem()))
    assert key() in store
    store.put(key(), lower(problem()))  # kept anew: still pinned
    store.unpin(problem())
    for n in range(20):
        store.put(n, lower(problem()))
    assert key() not in store


@pytest.mark.parametrize("name", ["pin", "unpin"])
def test_a_pin_is_never_ignored(name):
    store = PatternCache()
    with pytest.raises(ls.ArgumentError, match="key"):
        getattr(store, name)(problem())
    store.put(key(), lower(problem()))
    with pytest.raises(ls.ArgumentError, match="pinned"):
        store.unpin(key())


def test_more_pins_than_room():
    one = nbytes_of(lower(problem()))
    store = PatternCache(limit=2 * one)
    for n in range(4):
        store.limit = 10 * one
        store.put(n, lower(problem()))
        store.pin(n)
    store.limit = 2 * one
    store.put("new", lower(problem()))
    assert "new" not in store and all(n in store for n in range(4))
    for n in range(4):
        store.unpin(n)
    assert store.stats.host_bytes <= 2 * one


# --- nobody changes another's ---------------------------------------------------------------------------------------


def test_whoever_puts_or_gets_tensors_has_tensors_of_their_own():
    store, layout = PatternCache(), blocks()
    store.put("a", layout)
    layout.rows.zero_()
    first = store.get("a")
    assert torch.equal(first.rows, torch.ones(100, dtype=torch.int64)) and first.size == 7
    assert first.rows.dtype == torch.int64 and first.columns.dtype == torch.int32
    first.rows.zero_()
    first.columns.add_(5)
    assert torch.equal(store.get("a").rows, torch.ones(100, dtype=torch.int64))
    assert torch.equal(store.get("a").columns, torch.ones(100, dtype=torch.int32))


def test_lists_and_dictionaries_too():
    store = PatternCache()
    store.put("a", {"x": [1, 2], "y": (3, [4])})
    found = store.get("a")
    found["x"].append(9)
    found["y"][1].clear()
    assert store.get("a") == {"x": [1, 2], "y": (3, [4])}


def test_what_two_places_share_is_shared_in_the_copy():
    store, shared = PatternCache(), blocks()
    store.put("a", (shared, shared, Blocks(shared.rows, shared.columns, 1, (shared,))))
    found = store.get("a")
    assert found[0] is found[1] and found[2].rows is found[0].rows and found[2].nested[0] is found[0]


def test_what_an_object_computed_and_kept_is_not_handed_on():
    @attrs.define(slots=False, frozen=True)
    class Lazy:
        rows: torch.Tensor

    layout = Lazy(torch.ones(3))
    layout.__dict__["doubled"] = layout.rows * 2
    layout.__dict__["hash"] = 77
    store = PatternCache()
    store.put("a", layout)
    assert "doubled" not in store.get("a").__dict__ and store.get("a").__dict__["hash"] == 77


def test_tensors_of_many_kinds():
    values = [
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.ones(2, 3, dtype=torch.bool),
        torch.arange(6).view(2, 3).t(),
        torch.ones(3, dtype=torch.complex64),
        torch.eye(3).to_sparse_csr(),
        torch.ones(3, dtype=torch.bfloat16),
    ]
    store = PatternCache()
    store.put("a", tuple(values))
    for found, value in zip(store.get("a"), values, strict=True):
        assert found.dtype == value.dtype and found.layout == value.layout and found.shape == value.shape
        assert torch.equal(found.to_dense(), value.to_dense())


def test_tensors_of_a_plan_made_in_inference_mode_serve_outside_of_it():
    store = PatternCache()
    with torch.inference_mode():
        store.put("a", blocks())
        inside = store.get("a")
    assert not inside.rows.is_inference() and not store.get("a").rows.is_inference()
    store.get("a").rows.add_(1)


# --- devices and the host -------------------------------------------------------------------------------------------


def test_cold_entries_leave_the_device_and_come_back_right():
    store, offloader = on_a_device()
    for n in range(5):
        store.put(n, blocks(fill=n))
    stats = store.stats
    assert stats.demotions == 4 and stats.device_bytes <= 2000 and stats.entries == 5
    for n in range(5):
        found = store.get(n)
        assert torch.equal(found.rows, torch.full((100,), n)) and found.columns.unique().tolist() == [n]
    assert store.stats.promotions >= 4 and store.stats.device_bytes <= 2000
    assert offloader.used, "the stream that reads must be told to the allocator"


def test_a_batch_is_one_transfer():
    store, offloader = on_a_device()
    for n in range(5):
        store.put(n, blocks(fill=n))
    store.device_limit = 10**6
    before = store.stats.transfers
    assert store.prefetch([0, 1, 2, 3, 4, "none"]) == 4
    assert offloader.batches == [4] and store.stats.transfers == before + 1
    assert [int(store.get(n).rows[0]) for n in range(5)] == [0, 1, 2, 3, 4]
    assert offloader.batches == [4]


def test_a_prefetch_does_not_wait_and_a_get_does():
    store, offloader = on_a_device()
    for n in range(3):
        store.put(n, blocks(fill=n))
    store.device_limit = 10**6
    assert store.prefetch([0, 1, 2, "none"]) == 2
    assert offloader.done == 0, "nobody waited yet"
    assert torch.equal(store.get(0).rows, torch.zeros(100, dtype=torch.int64))
    assert offloader.done > 0 and offloader.batches == [2]
    assert store.prefetch([0, 1, 2]) == 0


def test_a_prefetch_of_a_problem():
    store, _ = on_a_device()
    store.put(key(), blocks(fill=3))
    store.put("other", blocks())
    assert store.prefetch([problem()]) == 1
    assert int(store.get(key()).rows[0]) == 3


def test_pinned_entries_stay_on_the_device():
    store, _ = on_a_device()
    store.put("pinned", blocks())
    store.pin("pinned")
    for n in range(5):
        store.put(n, blocks(fill=n))
    promotions = store.stats.promotions
    store.get("pinned")
    assert store.stats.promotions == promotions


def test_the_host_is_bounded_too():
    store, _ = on_a_device(limit=5000)
    for n in range(20):
        store.put(n, blocks(fill=n))
        assert store.stats.host_bytes <= 5000 and store.stats.device_bytes <= 2000
    assert store.stats.evictions > 0


# --- what plans copied to devices -----------------------------------------------------------------------------------

CPU = torch.device("cpu")
SPARSE = ls.random_blocks(0.4, block_size=4, seed=0)
RAGGED, WHOLE = 18, 16
"""Tokens of which `block_sparse_batched`, which knows no masks, has the core run the blocks, or runs them itself."""


def sparse_plan(n, store):
    return ls.plan(problem(n, SPARSE), backend="block_sparse_batched", pattern_cache=store)


def index(count=100, fill=1):
    """As a runner's: objects with tensors, some of them in two places."""
    made = blocks(count, fill)
    return (made, Blocks(made.rows, made.columns, 3)), {(0, 0): torch.full((3, 2), fill % 2, dtype=torch.bool)}


def is_index(found, count=100, fill=1):
    (first, second), masks = found
    want = torch.full((count,), fill)
    assert first.rows.dtype == torch.int64 and torch.equal(first.rows, want) and torch.equal(second.rows, want)
    assert torch.equal(first.columns.long(), want) and (first.size, second.size) == (7, 3)
    return masks[0, 0].dtype == torch.bool and bool((masks[0, 0] == bool(fill % 2)).all())


def kept(store, name):
    layout = lower(problem())
    store.put(name, layout)
    return layout


def test_copies_are_the_layouts_shared_and_counted_and_go_with_it():
    store, offloader = on_a_device()
    layout, other = kept(store, "a"), kept(store, "b")
    before = store.stats
    first = store.device_copy("a", layout, "index", index(), CPU)
    assert first.arriving and offloader.done == 0, "nobody waited yet"
    first.wait()
    assert is_index(first.value) and offloader.batches == [1], "all tensors are one transfer"
    assert first.value[0][0].rows is first.value[0][1].rows
    stats = store.stats
    assert 1200 <= stats.device_bytes < 1700 and stats.host_bytes == before.host_bytes and stats.entries == 2
    assert stats.patterns[""].bytes == stats.device_bytes + stats.host_bytes
    assert store.device_copy("a", layout, "index", index(), CPU) is first and offloader.batches == [1]
    assert store.device_copy("b", other, "index", index(fill=2), CPU) is not first
    assert store.device_copy("a", layout, "more", index(fill=3), CPU) is not first
    store.put("a", lower(problem()))
    assert store.device_copy("a", layout, "index", index(), CPU) is None, "of another layout"
    assert store.device_copy("none", layout, "index", index(), CPU) is None
    store.clear()
    assert store.stats.device_bytes == store.stats.host_bytes == 0 and is_index(first.value)


def test_copies_that_nobody_uses_go_to_the_host_and_come_back_by_one_transfer():
    store, offloader = on_a_device(device_limit=4000)
    layout = kept(store, "a")
    names = ("index", "masks", "more")
    held = [store.device_copy("a", layout, name, index(fill=n), CPU) for n, name in enumerate(names)]
    for one in held:
        one.wait()
    assert store.stats.device_bytes > 4000 and store.stats.demotions == 0, "all of them are in use"
    del held[1:], one
    other = kept(store, "b")
    mine = store.device_copy("b", other, "index", index(fill=9), CPU)
    assert store.stats.demotions == 1 and 2400 <= store.stats.device_bytes <= 4000
    assert is_index(held[0].value, fill=0) and store.device_copy("a", layout, "index", None, CPU) is held[0]
    transfers = len(offloader.batches)
    del mine, held[:]
    assert store.prefetch(["a"]) == 0 and offloader.batches[transfers:] == [], "asked for just now: all of it is up"
    again = [store.device_copy("a", layout, name, None, CPU) for name in names]
    for number, one in enumerate(again):
        one.wait()
        assert is_index(one.value, fill=number)


def test_a_plan_that_is_made_has_copies_brought_back_before_it_is_called():
    store, offloader = on_a_device(device_limit=10_000)
    x = [torch.randn(1, 2, RAGGED, 4) for _ in range(3)]
    want = oracle(*x, SPARSE)
    plan = sparse_plan(RAGGED, store)
    assert store.stats.device_bytes == 0
    torch.testing.assert_close(plan(*x)[0].double(), want, atol=1e-5, rtol=0)
    assert 0 < store.stats.device_bytes <= 10_000 and store.stats.transfers == 1
    once = sparse_plan(RAGGED, store)
    torch.testing.assert_close(once(*x)[0].double(), want, atol=1e-5, rtol=0)
    assert store.stats.transfers == 1, "two plans of a problem share their copies"
    store.device_limit = 0
    store.put("x", lower(problem()))
    assert store.stats.demotions == 0 and store.stats.device_bytes > 0, "plans use them"
    del plan, once
    store.put("y", lower(problem()))
    assert store.stats.demotions == 1 and store.stats.device_bytes == 0
    store.device_limit = 10_000
    done = offloader.done
    plan = sparse_plan(RAGGED, store)
    assert store.stats.device_bytes > 0 and offloader.done == done, "on its way, and nobody waited"
    torch.testing.assert_close(plan(*x)[0].double(), want, atol=1e-5, rtol=0)
    assert store.stats.promotions == 2


def test_plans_are_right_and_warm_calls_ask_nobody_whatever_is_moved(monkeypatch):
    store, _ = on_a_device(device_limit=0)
    for _ in range(3):
        for n in (RAGGED, WHOLE, RAGGED + 4, WHOLE + 4):
            x = [torch.randn(1, 2, n, 4, requires_grad=True) for _ in range(3)]
            plan = sparse_plan(n, store)
            out, _ = plan(*x)
            exact = [t.detach().double().requires_grad_() for t in x]
            want = oracle(*exact, SPARSE)
            torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
            grads = torch.autograd.grad(out.sum(), x)
            for grad, right in zip(grads, torch.autograd.grad(want.sum(), exact), strict=True):
                torch.testing.assert_close(grad.double(), right, atol=1e-4, rtol=0)
            with monkeypatch.context() as patch:
                patch.setattr(PatternCache, "device_copy", None)
                plan(*x)
    assert store.stats.promotions == 12 and store.stats.demotions == 10  # the last two were in use at the last move


def test_a_device_that_bytes_do_not_leave_gets_copies_for_each_plan():
    store = PatternCache()
    layout, meta = kept(store, "a"), torch.device("meta")
    assert store.device_copy("a", layout, "index", index(), meta) is None
    workspace = Workspace((), TorchAllocator(), partial(store.device_copy, "a", layout))
    made = index()
    (first, second), masks = workspace.on_device("index", made, meta)
    assert first.rows.is_meta and first.rows is second.rows and masks[0, 0].shape == (3, 2) and first.size == 7
    assert workspace.on_device("index", made, meta)[0][0] is first
    assert workspace.on_device("index", made, CPU) is made, "there already"


def test_copies_made_in_inference_mode_serve_outside_of_it():
    store, _ = on_a_device()
    layout = kept(store, "a")
    with torch.inference_mode():
        (first, _), masks = store.device_copy("a", layout, "index", index(), CPU).value
    assert not first.rows.is_inference() and not masks[0, 0].is_inference()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_fork_has_the_copies_of_its_plans():
    store, _ = on_a_device()
    plan = sparse_plan(RAGGED, store)
    x = torch.randn(1, 2, RAGGED, 4)
    want = plan(x, x, x)[0]
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        same = torch.equal(plan(x, x, x)[0], want) and torch.equal(sparse_plan(RAGGED, store)(x, x, x)[0], want)
        os._exit(0 if same and store.stats.device_bytes > 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_store_of_somebody_elses_leaves_the_copies_to_the_plan():
    store = Recording()
    plan = sparse_plan(RAGGED, store)
    x = torch.randn(1, 2, RAGGED, 4)
    torch.testing.assert_close(plan(x, x, x)[0].double(), oracle(x, x, x, SPARSE), atol=1e-5, rtol=0)
    assert len(store.kept) == 1


def test_a_plan_whose_layout_was_pushed_out_has_copies_of_its_own():
    store, _ = on_a_device()
    plan = ls.plan(problem(16, SPARSE), backend="sdpa", pattern_cache=store)
    store.clear()
    x = torch.randn(1, 2, 16, 4)
    torch.testing.assert_close(plan(x, x, x)[0].double(), oracle(x, x, x, SPARSE), atol=1e-5, rtol=0)
    assert store.stats.device_bytes == 0


# --- counts ---------------------------------------------------------------------------------------------------------


def test_counts_by_pattern():
    store = PatternCache()
    window = ls.SlidingWindow(3, 0)
    store.get(key())
    store.put(key(), lower(problem()))
    store.put(key(pattern=window), lower(problem(pattern=window)))
    for _ in range(3):
        store.get(key())
    store.get(key(pattern=window))
    stats = store.stats
    assert (stats.hits, stats.misses, stats.hit_rate) == (4, 1, 0.8)
    assert (stats.patterns[PATTERN.spec].hits, stats.patterns[PATTERN.spec].misses) == (3, 1)
    assert stats.patterns[window.spec].hits == 1 and stats.patterns[window.spec].bytes > 0
    store.clear()
    assert store.stats.hits == 4 and store.stats.patterns[PATTERN.spec].bytes == 0


def test_twelve_layers_and_a_hundred_steps_share_one_layout():
    store, x = PatternCache(), torch.randn(1, 2, 12, 4)
    asked = problem()
    for _ in range(100):
        for _ in range(12):
            plan = ls.plan(asked, backend="sdpa", pattern_cache=store)
    assert torch.equal(plan(x, x, x)[0], ls.attention(x, x, x, PATTERN, backend="sdpa"))
    assert store.stats.misses == 1 and store.stats.hit_rate >= 0.99


def shared(asked):
    return any(getattr(key, "problem", None) == asked for key in pattern_cache("cpu").keys())  # noqa: SIM118 - no dictionary


def test_no_more_layouts_than_asked_for():
    cache = PatternCache(most=3)
    for n in range(10, 20):
        cache.put(("key", n), lower(problem(n=n)))
    assert list(cache.keys()) == [("key", n) for n in (17, 18, 19)]
    assert cache.stats.evictions == 7


def test_a_private_cache_is_nobody_elses():
    mine = PatternCache()
    asked = problem(n=77)
    plan = ls.plan(asked, backend="sdpa", pattern_cache=mine)
    assert len(mine) == 1 and not shared(asked)
    assert plan.layout is mine.get(mine.keys()[0])
    ls.plan(asked, backend="sdpa")
    assert len(mine) == 1 and shared(asked)


def test_an_error_of_a_private_cache_is_the_callers():
    class Bad:
        def get(self, key):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ls.plan(problem(), backend="sdpa", pattern_cache=Bad())


# --- on disk --------------------------------------------------------------------------------------------------------


def test_without_safetensors_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for action in (PatternCache().save, PatternCache().load):
        with pytest.raises(ls.LongspanError, match=r"pip install 'safetensors>=0\.4\.3'"):
            action(tmp_path / "x")


def test_saved_and_loaded(tmp_path):
    pytest.importorskip("safetensors")
    store, path = PatternCache(), tmp_path / "layouts.safetensors"
    plan = ls.plan(problem(), backend="sdpa", pattern_cache=store)
    ls.plan(problem(pattern=ls.SlidingWindow(3, 1)), backend="sdpa", pattern_cache=store)
    store.put(key(n=9, origin=""), lower(problem(n=9)))  # made by a plugin of this process
    store.put(key(n=10), object())  # not the core's
    store.put("no layout key", lower(problem()))
    with pytest.warns(UserWarning, match="left out: 2 of sdpa.*Next: leave it"):
        assert store.save(path) == 2
    fresh = PatternCache()
    assert fresh.load(path) == 2
    again = ls.plan(problem(), backend="sdpa", pattern_cache=fresh)
    assert again.layout == plan.layout and isinstance(again.layout, Layout)
    assert (fresh.stats.hits, fresh.stats.misses) == (1, 0)
    assert fresh.get(key(n=9, origin="")) is None


def test_what_a_plugin_of_this_process_made_is_not_saved(tmp_path):
    pytest.importorskip("safetensors")

    class Extension:
        @ls.hookimpl
        def longspan_pattern(self, problem):
            return lower(problem)

    store = PatternCache()
    ls.register(Extension(), name="test-pattern")
    try:
        ls.plan(problem(), backend="sdpa", pattern_cache=store)
    finally:
        ls.unregister("test-pattern")
    with pytest.warns(UserWarning, match="left out: 1 of sdpa"):
        assert len(store) == 1 and store.save(tmp_path / "x") == 0


def test_another_release_starts_anew(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    store = PatternCache()
    ls.plan(problem(), backend="sdpa", pattern_cache=store)
    assert store.save(tmp_path / "x") == 1
    monkeypatch.setattr(cache_file, "_release", lambda: "longspan 99")
    with pytest.warns(UserWarning, match="/x was written by longspan .*, and this is longspan 99.*Next: save it again"):
        assert PatternCache().load(tmp_path / "x") == 0


def test_files_that_are_none_of_ours(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    (tmp_path / "text").write_text("hello")
    safetensors.save_file({"a": torch.ones(3)}, tmp_path / "other")
    release = {"format": "1", "longspan": "0.1.0"}
    safetensors.save_file({"a": torch.ones(3)}, tmp_path / "earlier", metadata={**release, "layouts": "[]"})
    row = b'[["sdpa", "longspan 1", {"class": "os:system", "fields": {"command": "true"}}, null]]'
    (tmp_path / "evil").write_bytes(cache_file._joined(row, safetensors.save({})))
    (tmp_path / "second").write_bytes(cache_file._joined(b"[]", safetensors.save({})).replace(b"3", b"2", 1))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, why in (
        ("missing", "cannot be read: No such file"),
        ("text", "none of longspan's"),
        ("other", "none of longspan's"),
        ("earlier", "was written by an earlier longspan, without a digest"),
        ("second", "was written by an earlier longspan, whose classes stood in other modules"),
        ("evil", "cannot be read: ValueError: os is not the core's"),
        ("folder", "is no file"),
        ("pipe", "is no file"),
    ):
        with pytest.raises(ls.ArgumentError, match=f"path: got {tmp_path / name}, which .*{why}.*Next: "):
            PatternCache().load(tmp_path / name)


def test_what_others_may_have_written_is_not_read(tmp_path, saved, give_away):
    saved.chmod(0o664)
    with pytest.raises(ls.ArgumentError, match=r"may be written to by others \(mode 0664\).*Next: .* cp "):
        PatternCache().load(saved)
    saved.chmod(0o644)
    assert PatternCache().load(saved) == 5
    give_away(saved)
    with pytest.raises(ls.ArgumentError, match="belongs to another user"):
        PatternCache().load(saved)


@pytest.fixture
def saved(tmp_path):
    """A file of several layouts, with and without tensors."""
    pytest.importorskip("safetensors")
    store = PatternCache()
    block_sparse = ls.random_blocks(0.5, block_size=4, seed=0)
    for pattern in (ls.Dense(), ls.SlidingWindow(3, 1), ls.Dilated((8, 16), (1, 2)), block_sparse):
        ls.plan(problem(pattern=pattern), backend="sdpa", pattern_cache=store)
    store.put(key(n=33), (torch.arange(30).view(5, 6), torch.ones(3, dtype=torch.bool), 0.5))
    assert store.save(tmp_path / "saved") == len(store) == 5
    return tmp_path / "saved"


def test_a_file_in_which_anything_changed_is_refused(saved):
    """Bits, digits that stay digits, bytes, pieces cut out, doubled or moved; `FUZZ_CASES` of them by hand."""
    whole, draw = saved.read_bytes(), random.Random(0)
    digits = [at for at, byte in enumerate(whole) if 48 <= byte < 58]
    refused = 0
    for number in range(int(os.environ.get("FUZZ_CASES", 400))):
        data, at = bytearray(whole), draw.randrange(len(whole))
        end = min(len(data), at + draw.randrange(1, 60))
        match number % 6:
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at] = (data[at] + draw.randrange(1, 256)) % 256
            case 2:
                at = draw.choice(digits)
                data[at] = 48 + (data[at] - 48 + draw.randrange(1, 10)) % 10
            case 3:
                del data[at:end]
            case 4:
                data[at:at] = data[at:end]
            case _:
                del data[at:]
        if data == whole:  # a digit doubled, say, among its like
            continue
        saved.write_bytes(data)
        with pytest.raises(ls.ArgumentError, match=f"{saved}, which is damaged"):
            PatternCache().load(saved)
        refused += 1
    saved.write_bytes(whole)
    assert PatternCache().load(saved) == 5 and refused > 300


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing here")
def test_writers_do_not_meet(tmp_path):
    """Three processes that save to one name and read it: each reads what one of them wrote, whole."""
    pytest.importorskip("safetensors")
    path, times = tmp_path / "saved", int(os.environ.get("FUZZ_CASES", 40))

    def work(number):
        store = PatternCache()
        for n in range(2, 3 + 20 * number):
            store.put(key(n), (torch.full((n, 50), n), lower(problem(n))))
        for _ in range(times):
            assert store.save(path) == len(store)
            assert PatternCache().load(path) in (1, 21, 41)

    children = []
    for number in range(3):
        child = os.fork()
        if child == 0:
            try:
                work(number)
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert [one.name for one in tmp_path.iterdir()] == ["saved"]


def test_what_cpu_fused_lays_out_is_left_out_and_said(tmp_path):
    pytest.importorskip("safetensors")
    store = PatternCache()
    made = ls.plan(problem(n=300, pattern=ls.SlidingWindow(9, 0)), backend="cpu_fused", pattern_cache=store)
    if isinstance(made.layout, Layout):
        pytest.skip("no C compiler: the core lays it out")
    with pytest.warns(UserWarning, match=f"{tmp_path}/x holds 0 layouts; left out: 1 of cpu_fused"):
        assert store.save(tmp_path / "x") == 0


def test_a_file_that_cannot_be_written(tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(ls.ArgumentError, match=r"path: got .*/no/x: No such file or directory"):
        PatternCache().save(tmp_path / "no" / "x")


def test_tensors_survive_the_disk(tmp_path):
    pytest.importorskip("safetensors")
    made = {}
    encoded = cache_file._encoded((torch.arange(4), torch.ones(2, dtype=torch.bool), 1.5, None, (1, "a")), made, 0)
    found = cache_file._decoded(encoded, made)
    assert (
        torch.equal(found[0], torch.arange(4)) and found[1].dtype == torch.bool and found[2:] == (1.5, None, (1, "a"))
    )


# --- threads, forks, copies -----------------------------------------------------------------------------------------


def test_many_threads():
    store, offloader = on_a_device(device_limit=3000, limit=40_000)
    go = threading.Barrier(8)
    lock = threading.Lock()
    run_until = offloader.run_until

    def locked(number):  # a real stream orders this by itself
        with lock:
            run_until(number)

    offloader.run_until = locked

    def work(seed):
        go.wait(30)
        for turn in range(300):
            n = (seed * 7 + turn * 5) % 11
            found = store.get(n)
            assert found is None or (int(found.rows[0]) == n and int(found.columns[-1]) == n)
            if found is None:
                store.put(n, blocks(fill=n))
            if turn % 13 == 0:
                store.prefetch(range(11))
            if turn % 17 == 0 and n in store:
                try:
                    store.pin(n)
                    store.unpin(n)
                except ls.ArgumentError:  # another thread's put came first
                    pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    stats = store.stats
    assert stats.host_bytes == sum(one.host_bytes for one in store._entries.values())
    assert stats.device_bytes == sum(one.device_bytes for one in store._entries.values())
    assert stats.hits + stats.misses <= 8 * 300


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_fork_goes_on_though_the_lock_was_taken():
    store = PatternCache()
    store.put("a", blocks())
    held, done = threading.Event(), threading.Event()

    def hold():
        with store._lock:
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
        store.put("b", lower(problem()))
        right = store.get("a") is not None and store.get("b") is not None and store.stats.entries == 2
        os._exit(0 if right else 1)
    status = os.waitpid(child, 0)[1]
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_empty_and_as_large(how):
    store = PatternCache(1000, 2000)
    store.put("a", 1)
    other = how(store)
    assert (other.limit, other.device_limit, len(other)) == (1000, 2000, 0)


# --- by hook --------------------------------------------------------------------------------------------------------


class Recording:
    def __init__(self, fault=""):
        self.kept, self.fault = {}, fault

    def get(self, key):
        if self.fault == "get":
            raise RuntimeError("cache on fire")
        return self.kept.get(key)

    def put(self, key, layout):
        if self.fault == "put":
            raise RuntimeError("cache on fire")
        self.kept[key] = layout


class Extension:
    def __init__(self, store):
        self.store = store

    @ls.hookimpl
    def longspan_cache(self, device):
        if self.store == "raises":
            raise RuntimeError("cache on fire")
        return self.store


@pytest.fixture
def extend():
    def add(store):
        ls.register(Extension(store), name="test-cache")

    yield add
    ls.unregister("test-cache")


def compute(n):
    x = [torch.randn(1, 2, n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    out = ls.attention(*x, PATTERN, is_causal=True, backend="sdpa")
    torch.testing.assert_close(out, oracle(*x, PATTERN, is_causal=True), atol=1e-12, rtol=0)


def test_a_plugins_cache_is_asked(extend):
    store = Recording()
    extend(store)
    compute(31)
    assert [one.problem.q_len for one in store.kept] == [31]
    assert not any(row.name == "test-cache" for row in ls.backends())


@pytest.mark.parametrize("fault", ["get", "put", "raises", None])
def test_a_plugins_cache_that_fails_is_noted_and_does_no_harm(extend, fault):
    extend({"raises": "raises", None: object()}.get(fault, Recording(fault)))
    with pytest.warns(ls.PluginWarning, match="longspan_cache"):
        compute(32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        compute(33)
    row = next(row for row in ls.backends() if row.name == "test-cache")
    assert row.state == "broken" and "longspan_cache" in row.error
    assert ("cache on fire" in row.error) == (fault is not None)


def test_the_row_goes_with_the_plugin():
    ls.register(Extension("raises"), name="test-gone")
    with pytest.warns(ls.PluginWarning):
        compute(34)
    ls.unregister("test-gone")
    assert not any(row.name == "test-gone" for row in ls.backends())


def test_strict_means_strict(extend, monkeypatch):
    extend("raises")
    monkeypatch.setenv("LONGSPAN_STRICT", "1")
    with pytest.raises(ls.PluginError, match="cache on fire"):
        compute(35)
