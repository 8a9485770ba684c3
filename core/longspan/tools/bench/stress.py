"""Many threads, random shapes, dtypes and pins, every buffer poisoned when it comes back: results equal the oracle."""

from __future__ import annotations

import random
import threading
import time
from argparse import ArgumentParser, Namespace
from collections import deque
from typing import Any

import torch

from longspan.errors import ArgumentError
from longspan.memory.arena import BufferArena, buffer_arena
from longspan.memory.cache import PatternCache
from longspan.patterns.dilated import Dilated
from longspan.patterns.window import SlidingWindow
from longspan.planning.plan import Plan, plan
from longspan.spec.backend import BufferSpec
from longspan.spec.pattern import Pattern
from longspan.spec.problem import Problem
from longspan.testing.answers import answer
from longspan.testing.judge import judge_forward, judge_gradients
from longspan.testing.outcome import Breach
from longspan.testing.tensors import Inputs
from longspan.tools.bench.contract import OnStep, duration, perform, positive, silent
from longspan.tools.meter import resident

__all__ = ["HELP", "NAME", "add_arguments", "run", "stress"]

NAME = "stress"
HELP = "Cache and arena under many threads, every result judged."
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def add_arguments(parser: ArgumentParser) -> None:
    """How long, and how many."""
    parser.add_argument("--seconds", type=duration, default=60.0, help="how long (default: 60)")
    parser.add_argument("--threads", type=positive, default=16, help="how many (default: 16)")


def run(args: Namespace, on_step: OnStep = silent) -> dict[str, Any]:
    """Stress, and say what went on."""
    result: dict[str, Any] = {}
    words = f"{args.threads} threads, {args.seconds:g} s"
    complete = perform([(words, lambda: result.update(stress(args.seconds, args.threads)))], on_step)
    return {**result, "complete": complete}


def stress(seconds: float, threads: int) -> dict[str, Any]:
    """Compute in many threads for a while.

    Returns:
        calls, and what went wrong: texts of `failures`, threads that never came back (`stuck`).
    """
    with buffer_arena().serving_from(0):
        return _stress(seconds, threads)


def _stress(seconds: float, threads: int) -> dict[str, Any]:
    arena, cache = buffer_arena(), PatternCache(limit=100_000)
    before = arena.poison, torch.get_num_threads()
    torch.set_num_threads(1)
    arena.poison = True
    failures: list[str] = []
    counts = [0] * threads
    sizes: list[int] = []
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        draw = random.Random(number)
        recent: deque[Plan] = deque(maxlen=4)  # plans die while others live
        try:
            while time.monotonic() < end and not failures:
                recent.append(_checked_call(draw, cache, arena))
                counts[number] += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
            failures.append(f"thread {number}, call {counts[number]}: {type(error).__name__}: {error}")

    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(threads)]
    try:
        for worker in workers:
            worker.start()
        while time.monotonic() < end and not failures:
            time.sleep(min(1.0, seconds / 10))
            sizes.append(resident())
        for worker in workers:
            worker.join(60)
        stats = arena.stats
    finally:
        arena.poison = before[0]
        torch.set_num_threads(before[1])
    half = sizes[len(sizes) // 2 :]
    return {
        "seconds": seconds,
        "threads": threads,
        "calls": sum(counts),
        "failures": failures,
        "stuck": sum(worker.is_alive() for worker in workers),
        "leased_at_the_end": stats.leased,
        "held_mib_at_the_end": stats.held / 2**20,
        "resident_mib": [size / 2**20 for size in sizes[:: max(1, len(sizes) // 12)]],
        "resident_growth_in_the_second_half": half[-1] / half[0] - 1 if half else 0.0,
        "cache": {"hits": cache.stats.hits, "misses": cache.stats.misses, "evictions": cache.stats.evictions},
    }


def _checked_call(draw: random.Random, cache: PatternCache, arena: BufferArena) -> Plan:
    """A forward and a backward, a pin, a lease of its own; all of it checked."""
    patterns: list[Pattern] = [Dilated((16, 64), (1, 3)), SlidingWindow(draw.choice((1, 9, 30)), 0)]
    dtype = draw.choice(DTYPES)
    shape = (draw.randrange(1, 3), 2, draw.choice((2, 17, 64, 100, 130, 199)), 8)
    tensors = [torch.randn(shape, dtype=torch.float32, device="cpu").to(dtype) for _ in range(3)]
    leaves = [x.clone().requires_grad_() for x in tensors]
    pattern = draw.choice(patterns)
    problem = Problem.like(leaves[0], leaves[1], leaves[2], pattern, is_causal=True)
    made = plan(problem, backend="sdpa", pattern_cache=cache)
    if draw.random() < 0.3:
        try:
            cache.pin(problem)
            cache.unpin(problem)
        except ArgumentError:  # another thread's put pushed it out in between
            pass
    tag = draw.randrange(256)
    with arena.lease(BufferSpec("tag", (draw.randrange(1, 2**16),), "uint8"), torch.device("cpu")) as mine:
        mine.fill_(tag)
        out, lse = made(*leaves)
        inputs = Inputs(tensors[0], tensors[1], tensors[2], torch.ones_like(out))
        gradients = torch.autograd.grad(out, leaves, inputs.dout)
        if not bool((mine == tag).all()):
            raise AssertionError("a lease was written to by somebody else")
    right = answer(problem, inputs)
    try:
        judge_forward(out, lse, right)
        judge_gradients(gradients, inputs.dout, right, problem.scale)
    except Breach as breach:
        raise AssertionError(f"{problem}: {breach}") from None
    return made
