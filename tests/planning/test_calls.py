"""What a warm call passes: few files, no hook, and for chosen blocks few Python calls."""

from __future__ import annotations

import sys
from pathlib import Path

import pluggy
import pytest
import torch

import longspan as ls
import longspan_plugins

ROOTS = [str(Path(package.__file__).parent) for package in (ls, longspan_plugins)]
FEW = {"batch": 1, "heads": 1, "n": 64, "dim": 8}
MORE = {"batch": 2, "heads": 4, "n": 256, "dim": 32}
CALLS = {
    "dense": (ls.Dense(), 7),
    "causal": (ls.Dense(), 7),
    "dilated": (ls.Dilated((16, 64), (1, 4)), 9),
    "window": (ls.SlidingWindow(16, 0), 9),
    "block-sparse": (ls.local_blocks(1, block_size=16) | ls.random_blocks(0.2, block_size=16), 10),
    "top-k": (ls.TopKBlocks(3, 16), 12),
}


def traced(call):
    """The files of longspan and its backends that a call passes, how many Python calls it makes, and its hook lanes."""
    files, calls, lanes = set(), [], []

    def note(frame, event, _):
        if event != "call":
            return
        code = frame.f_code
        calls.append(code.co_name)
        if code.co_filename.startswith(tuple(ROOTS)):
            files.add(code.co_filename)
        if code is pluggy.HookCaller.__call__.__code__:
            lanes.append(frame.f_locals["self"].name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files, len(calls), lanes


def warm(name, backend, batch, heads, n, dim):
    pattern, _ = CALLS[name]
    tensors = [torch.randn(batch, heads, n, dim) for _ in range(3)]

    def call():
        return ls.attention(*tensors, pattern, is_causal=name == "causal", backend=backend)

    call()
    call()
    return call


@pytest.mark.parametrize("name", CALLS)
def test_a_warm_call_passes_few_files(name):
    files, _, _ = traced(warm(name, "sdpa", **(MORE if name in ("block-sparse", "top-k") else FEW)))
    passed = sorted(Path(file).name for file in files)
    assert {"attention.py", "plan.py"} <= set(passed)
    assert len(passed) <= CALLS[name][1], passed


@pytest.mark.parametrize("name", CALLS)
def test_more_of_it_passes_the_arena_beside(name):
    """What asks for memory asks the arena; no other file comes with the size."""
    files, _, _ = traced(warm(name, "sdpa", **MORE))
    passed = {Path(file).name for file in files} - {"arena.py"}
    assert len(passed) <= CALLS[name][1], passed


@pytest.mark.parametrize("backend", [row.name for row in ls.backends() if row.state == "loaded"])
@pytest.mark.parametrize("name", CALLS)
def test_a_warm_call_runs_no_hook(name, backend):
    problem = ls.Problem(batch=2, heads=4, q_len=256, head_dim=32, pattern=CALLS[name][0], is_causal=name == "causal")
    if not ls.explain(problem, backend=backend)[backend].ok:
        pytest.skip("refused")
    _, _, lanes = traced(warm(name, backend, **MORE))
    assert lanes == []


class Bound:
    """A backend whose block-sparse kernel is bound to the blocks that it was made for; `does`: what it runs itself."""

    def __init__(self, *does):
        self.does = does

    @ls.hookimpl
    def longspan_capabilities(self):
        return ls.Capabilities(devices=("cpu",), dtypes=("float32",), patterns=self.does, causal=True)

    @ls.hookimpl
    def longspan_kernel(self, problem):
        if problem.pattern.kind == "dense":
            return lambda q, k, v: ls.blockwise.forward(q, k, v, is_causal=problem.is_causal, scale=problem.scale)
        return ls.plan(problem, "reference")


@pytest.mark.parametrize(
    ("does", "kind", "hooks"), [(("dense", "block_sparse"), "blocks", False), (("block_sparse",), "native", True)]
)
def test_chosen_blocks_run_no_hook_of_a_kernel_that_cannot_change_its_blocks(does, kind, hooks):
    """Where it takes dense problems too; else its hooks at every call are all there is."""
    ls.register(Bound(*does), name="test-bound")
    try:
        problem = ls.Problem(batch=2, heads=4, q_len=256, head_dim=32, pattern=CALLS["top-k"][0])
        assert ls.plan(problem, "test-bound").resolution.route.kind == kind
        _, _, lanes = traced(warm("top-k", "test-bound", **MORE))
        assert bool(lanes) is hooks, lanes
    finally:
        ls.unregister("test-bound")


def test_a_hook_would_be_seen():
    problem = ls.Problem(batch=1, heads=1, q_len=8, head_dim=8)
    _, _, lanes = traced(lambda: ls.plan(problem, "sdpa"))
    assert "longspan_kernel" in lanes


@pytest.mark.parametrize(("backend", "most"), [("sdpa", 980), ("cpu_fused", 713)])
def test_chosen_blocks_take_half_the_calls_that_they_took(backend, most):
    """1,960 and 1,427 Python calls, four of them hook lanes, when every call posed a problem of its own."""
    _, calls, _ = traced(warm("top-k", backend, **MORE))
    assert calls <= most
