"""The arena: page faults and time of a call with it and without, and memory over many steps of changing shapes."""

from __future__ import annotations

import gc
import random
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longspan.memory.arena import BufferArena, buffer_arena
from longspan.memory.cache import PatternCache
from longspan.patterns.dilated import Dilated
from longspan.patterns.window import SlidingWindow
from longspan.planning.attention import attention, forget
from longspan.planning.plan import Plan, plan
from longspan.spec.backend import BufferSpec
from longspan.spec.pattern import Pattern
from longspan.spec.problem import Problem
from longspan.tools.bench.contract import OnStep, Step, count, perform, positive, silent
from longspan.tools.bench.sidebyside import ratio
from longspan.tools.meter import faults, resident, return_freed_memory, timed

__all__ = ["HELP", "NAME", "add_arguments", "run", "threshold"]

NAME = "buffers"
HELP = "What the workspace arena saves: page faults, time, memory."
OFF = 2**62
"""A threshold that nothing reaches."""
PATTERNS: dict[str, Pattern] = {
    "window": SlidingWindow(256, 0),
    "longnet": Dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)),
}
SHAPES = (128, 1024, 8192, 32768)
PAGE = 4096
Three = tuple[Tensor, Tensor, Tensor]


def add_arguments(parser: ArgumentParser) -> None:
    """How long, and how large."""
    parser.add_argument("--rounds", type=positive, default=7, help="of each measurement")
    parser.add_argument("--tokens", type=positive, default=65_536, help="of the calls whose faults are counted")
    parser.add_argument("--steps", type=count, default=1000, help="of changing shapes, forward and backward; 0: none")
    parser.add_argument("--backward", action="store_true", help="measure training steps too")


def run(args: Namespace, on_step: OnStep = silent) -> dict[str, Any]:
    """Faults and time of calls; resident memory over steps; where the arena begins to pay."""
    calls: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    pays: dict[str, Any] = {}
    grown: dict[str, Any] = {}
    steps: list[Step] = []

    def add(where: dict[str, Any], name: str, words: str, call: Callable[[], Any]) -> None:
        steps.append((words, lambda: where.update({name: call()})))

    for name, pattern in PATTERNS.items():
        for dtype in (torch.bfloat16, torch.float32):
            for training in (False, True) if args.backward else (False,):
                what = f"{name} {str(dtype).removeprefix('torch.')}{' training' if training else ''}"
                add(calls, what, what, partial(_call, pattern, dtype, args.tokens, args.rounds, training))
    for tokens in SHAPES:
        if tokens <= args.tokens:
            add(shapes, f"N={tokens}", f"{tokens:,} tokens", partial(_shape, tokens, args.rounds))
    if args.tokens >= SHAPES[-1]:
        add(pays, "threshold", "from which size on the arena pays", partial(threshold, args.rounds))
    for backend in (None, "sdpa") if args.steps else ():
        name = backend or "auto"
        add(grown, name, f"{args.steps:,} training steps, {name}", partial(_steps, args.steps, backend))
    complete = perform(steps, on_step)
    return {
        "tokens": args.tokens,
        "calls": calls,
        "shapes": shapes,
        "threshold": pays.get("threshold"),
        "steps": grown or None,
        "limits": {"faults_off_over_on": 10, "time_on_over_off": 1.0, "resident_growth": 0.01, "held_after": 0},
        "complete": complete,
    }


def _inputs(tokens: int, dtype: torch.dtype, heads: int = 8, training: bool = False) -> Three:
    query, key, value = (
        torch.randn(1, heads, tokens, 64, dtype=torch.float32, device="cpu").to(dtype).requires_grad_(training)
        for _ in range(3)
    )
    return query, key, value


def _once(made: Plan, tensors: Three, dout: Tensor | None) -> tuple[float, int]:
    """Seconds, and page faults beyond those of the results."""
    before, start = faults(), time.perf_counter()
    out, lse = made(*tensors)
    results = out.nbytes + lse.nbytes
    if dout is not None:
        torch.autograd.backward(out, dout)
        results += sum(x.nbytes for x in tensors)
    seconds = time.perf_counter() - start
    more = faults() - before - results // PAGE
    for tensor in tensors:
        tensor.grad = None
    return seconds, max(0, more)


def _call(pattern: Pattern, dtype: torch.dtype, tokens: int, rounds: int, training: bool) -> dict[str, Any]:
    tensors = _inputs(tokens, dtype, training=training)
    dout = torch.randn(tensors[0].shape, dtype=torch.float32, device="cpu").to(dtype) if training else None
    made = plan(Problem.like(*tensors, pattern, is_causal=True), backend="sdpa", pattern_cache=PatternCache())
    return _on_and_off(lambda: _once(made, tensors, dout), rounds)


def _on_and_off(once: Any, rounds: int, calls: int = 1) -> dict[str, Any]:
    """The same with the arena and without, in turn."""
    arena = buffer_arena()
    sides = {"on": arena.threshold_on("cpu"), "off": OFF}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    counted: dict[str, list[int]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in sorted(sides, reverse=bool(number % 2)):
            with arena.serving_from(sides[name]):
                once()  # the other side left the heap in another state
                results = [once() for _ in range(calls)]
            if number:  # the first round fills the arena
                seconds[name].append(statistics.mean(result[0] for result in results))
                counted[name].append(round(statistics.mean(result[1] for result in results)))
    medians = {name: statistics.median(rounds_of_side) for name, rounds_of_side in counted.items()}
    return {
        "faults": medians,
        "faults_of_rounds": counted,
        "faults_off_over_on": medians["off"] / max(1, medians["on"]),
        "ms": {name: 1e3 * statistics.median(rounds_of_side) for name, rounds_of_side in seconds.items()},
        "time_on_over_off": ratio(seconds["on"], seconds["off"]),
    }


def _shape(tokens: int, rounds: int) -> dict[str, Any]:
    """A shape that may be too small for the arena to do anything: it must not cost anything either."""
    tensors = _inputs(tokens, torch.bfloat16)
    made = plan(Problem.like(*tensors, PATTERNS["window"], is_causal=True), backend="sdpa")
    calls = max(1, 65_536 // tokens // 4)
    measured = _on_and_off(lambda: _once(made, tensors, None), 2 * rounds + 1, calls)
    return {"ms": measured["ms"], "time_on_over_off": measured["time_on_over_off"]}


def threshold(rounds: int, device: torch.device = torch.device("cpu")) -> dict[str, Any]:  # noqa: B008 - a value
    """Getting memory and writing to it, from torch and from an arena, by size, and from which size on the arena pays.

    Args:
        rounds: of each measurement.
        device: where.
    """
    arena, ratios = BufferArena(), {}
    pays = None
    for mib in (1, 2, 4, 8, 16, 32, 64, 128):
        spec = BufferSpec("x", (mib * 2**18,), "float32")

        def from_torch(shape: tuple[int, ...] = spec.shape) -> None:
            torch.empty(shape, device=device, dtype=torch.float32).fill_(1.0)

        def from_arena(spec: BufferSpec = spec) -> None:
            with arena.lease(spec, device, always=True) as tensor:
                tensor.fill_(1.0)

        seconds: dict[str, list[float]] = {"torch": [], "arena": []}
        for number in range(rounds + 1):
            for name, side in (("torch", from_torch), ("arena", from_arena)):
                _, ms = timed(partial(_five_times, side), device)
                if number:
                    seconds[name].append(1e-3 * ms / 5)
        ratios[f"{mib} MiB"] = ratio(seconds["arena"], seconds["torch"])["median"]
        if pays is None and ratios[f"{mib} MiB"] < 0.95:
            pays = mib
    return {"arena_over_torch": ratios, "pays_from_mib": pays}


def _five_times(call: Callable[[], None]) -> None:
    for _ in range(5):
        call()


def _steps(steps: int, backend: str | None) -> dict[str, Any]:
    """Training steps of shapes drawn anew each time: memory must not grow, and must go with the plans.

    In float32: for bfloat16 torch's own attention grows, with code that oneDNN keeps for each shape.
    """
    draw, arena = random.Random(0), buffer_arena()
    after: dict[int, int] = {}
    as_found: dict[int, int] = {}
    with arena.serving_from(2**18):  # small shapes, so that a thousand take minutes and not hours
        for step in range(1, steps + 1):
            heads, tokens = draw.choice((2, 4)), draw.randrange(256, 2049)
            tensors = _inputs(tokens, torch.float32, heads, training=True)
            window = SlidingWindow(draw.choice((32, 64, 128)), 0)
            out = attention(*tensors, window, is_causal=True, backend=backend)
            torch.autograd.backward(out, torch.ones_like(out))
            if step in (steps // 10, steps):
                del tensors, out
                gc.collect()
                as_found[step] = resident()
                return_freed_memory()  # how much of it the heap holds back at one moment is chance, some 10 %
                after[step] = resident()
        held = arena.stats.held
        forget()
        gc.collect()
        first, last = after[steps // 10], after[steps]
        return {
            "steps": steps,
            "resident_mib": {str(step): size / 2**20 for step, size in after.items()},
            "resident_mib_with_freed_heap": {str(step): size / 2**20 for step, size in as_found.items()},
            "resident_growth": last / first - 1,
            "held_mib_at_the_end": held / 2**20,
            "held_after_the_plans_are_dropped": arena.stats.held,
        }
