"""One decision: what a resolution says of how a problem runs is what the plan holds, and it is made once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import longspan as ls
from longspan import Capabilities, hookimpl
from longspan.execution.blocks import BlockRunner
from longspan.execution.chosen import ChosenRunner
from longspan.execution.direct import DirectRunner
from longspan.execution.strided import LoweredRunner
from longspan.execution.topk import ChoosingRunner
from longspan.lowering import cost, dense
from longspan.lowering.blocks import BlockLayout
from longspan.lowering.masked import MaskedLayout
from longspan.lowering.route import route
from longspan.patterns.topk.choice import choose

PATTERNS = {
    "dense": ls.Dense(),
    "dilated": ls.Dilated((16, 32), (1, 2)),
    "window": ls.SlidingWindow(8, 0),
    "blocks": ls.local_blocks(20, block_size=8),
    "kept whole": ls.local_blocks(64, block_size=8),
    "ragged": ls.global_blocks(1, block_size=24) | ls.local_blocks(24, block_size=24),
    "top-k": ls.TopKBlocks(2, 8),
}
DEVICES = ("cpu", "sm_61", "sm_75", "sm_80", "sm_90", "gfx942", "mps", "xpu")
WAYS = {"native", "dense calls", "blocks", "mask"}


def problem(pattern, **given):
    return ls.Problem(**{"batch": 1, "heads": 2, "q_len": 64, "head_dim": 16, "pattern": pattern, **given})


def held(plan):
    """What a plan holds, by the class of what it runs and by its layout."""
    runner = plan._runner
    if isinstance(runner, ChoosingRunner):  # what runs the blocks that it chooses
        drawn = (torch.randn(shape, dtype=plan._dtype) for shape in (plan._query_shape, plan._key_shape))
        parts = choose(2, None, runner._scorings, *drawn)
        if not parts:
            return "dense calls"
        longest = max(parts, key=lambda part: part.scoring.kv_len)
        runner = runner._made(longest, longest.chosen)
    if isinstance(runner, ChosenRunner):
        return "blocks"
    if isinstance(runner, DirectRunner):
        return "native"
    if isinstance(runner, BlockRunner):
        assert isinstance(runner.layout, BlockLayout)
        return "blocks"
    assert isinstance(runner, LoweredRunner)
    return "mask" if isinstance(runner.layout, MaskedLayout) else "dense calls"


def disagreements(names):
    """Where a resolution says one thing and the plan holds another, over patterns, arguments, dtypes and backends."""
    found, seen = [], set()
    for name in names:
        for label, pattern in PATTERNS.items():
            for dtype in ("float32", "float16", "bfloat16"):
                for given in ({}, {"is_causal": True}, {"kv_heads": 1}, {"documents": (0, 24, 64)}, {"q_len": 0}):
                    asked = problem(pattern, dtype=dtype, **{"kv_len": given.get("q_len", 64), **given})
                    if not ls.explain(asked, backend=name)[name].ok:
                        continue
                    plan = ls.plan(asked, name)
                    said, holds = plan.resolution, held(plan)
                    seen.add(said.route.kind)
                    words = "natively" in said.why
                    if said.route.kind != holds or words != (holds == "native"):
                        found.append([name, label, dtype, str(given), said.why, holds])
    return found, sorted(seen)


BACKENDS = [row.name for row in ls.backends() if row.state == "loaded"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_plan_says_it_holds(backend):
    found, _ = disagreements([backend])
    assert not found


def test_every_way_is_taken_by_some_plan():
    _, seen = disagreements(["sdpa"])
    assert set(seen) == WAYS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_said_of_a_device_is_the_route_by_the_backends_capabilities(backend, pattern, device):
    asked = problem(PATTERNS[pattern], dtype="float16", device=device)
    said = ls.explain(asked, backend=backend)
    if said.chosen is None:
        assert said.route is None and "natively" not in said.why
        return
    can = next(row.capabilities for row in ls.backends() if row.name == backend)
    assert said.route.kind == route(asked, can).kind
    assert said.to_dict()["route"] == said.route.kind
    assert ("natively" in said.why) == (said.route.kind == "native")
    if said.route.kind == "native":
        assert can.runs(said.route.problem.pattern.kind)
    if device != "cpu":
        assert said.route.kind != "mask"  # what a mask costs is known of CPUs alone


WITHOUT = """
import json, sys
sys.path[:0] = sys.argv[1:]
import longspan as ls
from test_route import disagreements
before = disagreements(["cpu_fused"])  # while it is found out that nothing compiles
print(json.dumps([before, disagreements([row.name for row in ls.backends() if row.state == "loaded"])]))
"""


@pytest.mark.parametrize("compiler", ["", "/bin/false"])
def test_without_native_kernels_too(tmp_path, compiler):
    given = {key: value for key, value in os.environ.items() if key != "CC" and not key.startswith("LONGSPAN_")}
    given |= {"PATH": str(tmp_path), "LONGSPAN_CACHE": str(tmp_path), **({"CC": compiler} if compiler else {})}
    folders = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    call = [sys.executable, "-W", "ignore", "-c", WITHOUT, *folders]
    done = subprocess.run(call, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (before, ways), (after, _) = json.loads(done.stdout)
    assert not before and not after
    assert "native" in ways and "dense calls" in ways


class Declines:
    """Says that it takes dilated attention, and gives no kernel for it."""

    @hookimpl
    def longspan_capabilities(self):
        return Capabilities(devices=("cpu",), dtypes=("float32",), patterns=("dense", "dilated"))

    @hookimpl
    def longspan_kernel(self, problem):
        return None if problem.pattern.kind == "dilated" else (lambda q, k, v: ls.blockwise.forward(q, k, v, scale=1.0))


def test_a_kernel_that_is_declined_is_not_claimed():
    ls.register(Declines(), "test-declines")
    try:
        asked = problem(PATTERNS["dilated"])
        assert ls.explain(asked, backend="test-declines").route.kind == "native"
        plan = ls.plan(asked, "test-declines")
        assert plan.resolution.route.kind == "dense calls" and "natively" not in plan.resolution.why
    finally:
        ls.unregister("test-declines")


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_a_cold_plan_is_laid_out_once_and_its_costs_are_modelled_once(backend, monkeypatch):
    laid, modelled = [], []

    def counting(owner, name, calls):
        before = getattr(owner, name)

        def called(*given, **more):
            result = before(*given, **more)
            calls.append(result)
            return result

        monkeypatch.setattr(owner, name, called)

    counting(ls.BlockSparse, "csr", laid)
    counting(cost, "Costs", modelled)
    counting(dense, "BlockLayout", laid)
    ls.plan(problem(ls.random_blocks(0.3, block_size=8, seed=7), heads=3), backend)
    assert len(laid) == 2, "the blocks, and the layout of them"
    assert len(modelled) == 1
    ls.attention(*(torch.randn(1, 3, 64, 16) for _ in range(3)), ls.random_blocks(0.4, block_size=8), backend=backend)
    assert len(laid) == 4 and len(modelled) == 2
