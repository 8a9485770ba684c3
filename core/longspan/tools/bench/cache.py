"""The store of layouts: what a hit costs, how often it hits, and whether it ever slows anything down."""

from __future__ import annotations

import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch

from longspan.lowering.dense import lower
from longspan.memory.cache import PatternCache
from longspan.memory.cached_layout import LayoutKey
from longspan.patterns.dilated import Dilated
from longspan.patterns.window import SlidingWindow
from longspan.planning.attention import plan_for
from longspan.planning.plan import plan
from longspan.spec.inputs import Arguments
from longspan.spec.pattern import Dense, Pattern
from longspan.spec.problem import Problem
from longspan.tools.bench.contract import OnStep, Step, perform, positive, silent
from longspan.tools.bench.sidebyside import interleave, ratio, summary

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "cache"
HELP = "What the cache of layouts costs and saves."
LONGNET = Dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
PATTERNS: dict[str, Pattern] = {"dense": Dense(), "longnet": LONGNET, "window": SlidingWindow(256, 0)}


class _Nothing:
    """A store that keeps nothing: the cache, off."""

    def get(self, key: Hashable) -> None:
        return None

    def put(self, key: Hashable, layout: Any) -> None:
        pass


def add_arguments(parser: ArgumentParser) -> None:
    """How long, and how far."""
    parser.add_argument("--rounds", type=positive, default=31, help="of each measurement")
    parser.add_argument("--longest", type=positive, default=131_072, help="tokens of the longest sequence planned")


def run(args: Namespace, on_step: OnStep = silent) -> dict[str, Any]:
    """Hit cost, hit rate, plans with and without, and the time to lay out a million tokens."""
    result: dict[str, Any] = {}
    plans: dict[str, Any] = {}
    steps: list[Step] = [
        ("a hit", lambda: result.update(hit=_hit(args.rounds))),
        ("a model of twelve layers", lambda: result.update(model=_model())),
    ]
    for name in PATTERNS:
        steps.append((f"plans, {name}", partial(_plans, name, args.rounds, args.longest, plans)))
    words = "layouts of 1,048,576 tokens"
    steps.append((words, lambda: result.update(layout_of_1048576_tokens_ms=_layouts(args.rounds))))
    complete = perform(steps, on_step)
    return {
        **result,
        "plans_on_over_off": plans,
        "limits": {"hit_added_us": 0.35, "hit_rate": 0.99, "plans_on_over_off": 1.02, "layout_ms": 5},
        "complete": complete,
    }


def _problem(tokens: int, pattern: Pattern) -> Problem:
    return Problem(batch=1, heads=8, q_len=tokens, head_dim=64, pattern=pattern, is_causal=True)


def _hit(rounds: int) -> dict[str, Any]:
    key = LayoutKey(_problem(65536, LONGNET), "sdpa", "longspan", 1)
    store = PatternCache()
    store.put(key, lower(key.problem))
    table = {key: store.get(key)}
    sides = {"dict": lambda: table.get(key), "cache": lambda: store.get(key)}
    seconds = interleave(sides, rounds=max(rounds, 31), calls=20_000, warm=1000)
    summaries = {name: summary(rounds_of_side) for name, rounds_of_side in seconds.items()}
    added = [1e6 * (a - b) for a, b in zip(seconds["cache"], seconds["dict"], strict=True)]
    return {"sides": summaries, "added_us": statistics.median(added)}


def _model(layers: int = 12, steps: int = 100) -> dict[str, Any]:
    """A model whose layers each ask for their plan at every step, and one that calls `attention`."""
    store, problem = PatternCache(), _problem(4096, LONGNET)
    for _ in range(steps * layers):
        plan(problem, backend="sdpa", pattern_cache=store)
    x = torch.zeros(1, 2, 40, 8, dtype=torch.float32, device="cpu")
    given = Arguments(Dilated((7, 40), (1, 2)), is_causal=True)
    made = {id(plan_for(x, x, x, given, "sdpa")) for _ in range(steps * layers)}
    stats = store.stats
    return {
        "layers": layers,
        "steps": steps,
        "hits": stats.hits,
        "misses": stats.misses,
        "hit_rate": stats.hit_rate,
        "plans_made_by_attention": len(made),
    }


def _plans(name: str, rounds: int, longest: int, plans: dict[str, Any]) -> None:
    """Making a plan, with the cache and without: calling it is the same either way."""
    tokens = 128
    while tokens <= longest:
        store, problem = PatternCache(), _problem(tokens, PATTERNS[name])
        sides = {
            "on": partial(plan, problem, "sdpa", pattern_cache=store),
            "off": partial(plan, problem, "sdpa", pattern_cache=_Nothing()),
        }
        seconds = interleave(sides, rounds=rounds, calls=5, warm=3)
        plans[f"{name} N={tokens}"] = {
            "on_us": 1e6 * statistics.median(seconds["on"]),
            "off_us": 1e6 * statistics.median(seconds["off"]),
            **ratio(seconds["on"], seconds["off"]),
        }
        tokens *= 4 if tokens < 32768 else 2


def _layouts(rounds: int) -> dict[str, float]:
    milliseconds = {}
    for name, pattern in PATTERNS.items():
        problem = _problem(2**20, pattern)
        seconds = interleave({name: partial(lower, problem)}, rounds=rounds)
        milliseconds[name] = 1e3 * statistics.median(seconds[name])
    return milliseconds
