"""Block-sparse attention on this CPU: time against density, against baselines on the same mask, and a million tokens.

Every ratio is of interleaved rounds in one run, on as many threads as `--threads` says.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import longspan
from longspan.errors import ArgumentError, LongspanError
from longspan.execution.runner import Saved
from longspan.lowering.route import Lowering
from longspan.patterns.blocks.builders import random_blocks
from longspan.planning.build import build
from longspan.spec.pattern import Dense, Pattern
from longspan.spec.problem import Problem
from longspan.tools.bench.apart import LongWindow, measure_window
from longspan.tools.bench.baselines import (
    Comparison,
    against_bigbird,
    against_flex,
    against_longformer,
    need_transformers,
)
from longspan.tools.bench.contract import OnStep, Step, perform, positive, silent
from longspan.tools.bench.sidebyside import Rows, interleave, ratio

__all__ = ["HELP", "NAME", "add_arguments", "compare_baselines", "densities", "million", "run", "tiles"]

NAME = "block-sparse"
HELP = "Block-sparse attention on this CPU: time against density, against baselines, and a million tokens."

LIMITS = {0.1: 1.25, 0.5: 1.15, 0.9: 1.15, 1.0: 1.05}
"""Density, and what its time over the dense time may be, in densities. 90 % is where blocks are to be no slower."""
PARTS = ("density", "flex", "transformers", "million", "lowered", "tiles")
HEADS, HEAD_DIM, BLOCK = 8, 64, 128
INDEX_MB, PEAK_MB = 10.0, 300.0
Sides = dict[str, Callable[[], object]]


def add_arguments(parser: ArgumentParser) -> None:
    """Which backend, which parts, and how thoroughly."""
    parser.add_argument("--backend", default="cpu_fused", help="whose kernels (default: cpu_fused)")
    parser.add_argument("--parts", help=f"which of {','.join(PARTS)} (default: all that can run here)")
    parser.add_argument("--threads", type=positive, default=2, help="of torch (default: 2)")
    parser.add_argument("--rounds", type=positive, default=7, help="of each comparison (default: 7)")
    parser.add_argument("--quick", action="store_true", help="three rounds of shorter sequences: a look, not a claim")


def run(args: Namespace, on_step: OnStep = silent) -> dict[str, Any]:
    """`rows` (work, figure, limit, holds, ...), `rounds` (the seconds of every round), `notes` (what is missing)."""
    parts = _parts(args.parts or ",".join(PARTS))
    notes = []
    if "transformers" in parts:
        try:
            need_transformers()  # rather now than after minutes of measuring
        except LongspanError as error:
            if args.parts is not None:  # asked for by name
                raise
            notes.append(str(error))
            parts = tuple(part for part in parts if part != "transformers")
    rounds = 3 if args.quick else args.rounds
    tokens, long = (2048, 2**17) if args.quick else (8192, 2**20)
    rows = Rows()
    steps: list[Step] = []
    work: Callable[[], object]
    for dtype in ("float32", "bfloat16") if "density" in parts else ():
        work = partial(densities, rows, args.backend, tokens, dtype, rounds, LIMITS)
        steps.append((f"{dtype}, time against density", work))
    if "flex" in parts:
        flex = against_flex(args.backend, tokens, HEADS)
        steps.append(("against compiled FlexAttention", partial(compare_baselines, rows, flex, rounds)))
    if "transformers" in parts:
        models = _hugging_face(args.backend, 4096)
        steps.append(("against Longformer and BigBird", partial(compare_baselines, rows, models, rounds)))
    if "million" in parts:
        place, window = len(steps), LongWindow(args.backend, long, 1024, args.threads)
        work = partial(million, rows, window, lambda words: on_step(words, place, len(steps)))
        steps.append((f"a window over {long:,} tokens", work))
    if "lowered" in parts and not ("density" in parts and args.backend == "sdpa"):  # those rows are there already
        for dtype in ("float32", "bfloat16"):
            work = partial(densities, rows, "sdpa", tokens, dtype, min(rounds, 3))
            steps.append((f"sdpa {dtype}, time against density", work))
    if "tiles" in parts:
        for dtype in ("float32", "bfloat16"):
            work = partial(tiles, rows, "sdpa", tokens // 4, dtype, min(rounds, 3))
            steps.append((f"sdpa {dtype}, by block size", work))
    with _threads(args.threads):
        complete = perform(steps, on_step)
    return {
        "backend": args.backend,
        "threads": args.threads,
        "tokens": tokens,
        "rows": rows.rows,
        "rounds": rows.rounds,
        "notes": notes,
        "complete": complete,
    }


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    for part in parts:
        if part not in PARTS:
            raise ArgumentError(
                "--parts", repr(part), f"some of {','.join(PARTS)}", f"e.g. --parts {','.join(PARTS[:2])}"
            )
    return parts


@contextmanager
def _threads(count: int) -> Iterator[None]:
    if count < 1:
        raise ArgumentError("--threads", count, "at least one thread", "e.g. --threads 2")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------ by density


def densities(
    rows: Rows,
    backend: str,
    tokens: int,
    dtype: str,
    rounds: int,
    limits: dict[float, float] | None = None,
    heads: int = HEADS,
    block_size: int = BLOCK,
) -> None:
    """Random layouts against dense attention by the same backend: its share of dense's time, over its share of pairs.

    Args:
        rows: where to add a row for each density and each of forward, backward and (float32) both end to end.
        backend: whose kernels.
        tokens: of the sequence.
        dtype: a torch dtype's name.
        rounds: of each comparison, in which all densities and dense take part.
        limits: by density; without, rows have no limit.
        heads: of `HEAD_DIM` each.
        block_size: of the layouts.
    """
    query, key, value = (
        torch.randn(1, heads, tokens, HEAD_DIM, dtype=torch.float32, device="cpu").to(getattr(torch, dtype))
        for _ in range(3)
    )
    drawn = {f"{share:.0%}": random_blocks(share, block_size) for share in LIMITS}
    patterns: dict[str, Pattern] = {"dense": Dense(), **drawn}
    directions: dict[str, Sides] = {"forward": {}, "backward": {}}
    dout = torch.randn(query.shape, dtype=torch.float32, device="cpu").to(query.dtype)
    with torch.inference_mode():
        for name, pattern in patterns.items():
            made = longspan.plan(Problem.like(query, key, value, pattern), backend=backend)
            results = made(query, key, value)
            directions["forward"][name] = partial(made, query, key, value)
            directions["backward"][name] = partial(made.backward, dout, query, key, value, *results)
    if dtype == "float32":
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        directions["attention and autograd"] = {
            name: partial(_end_to_end, leaves, pattern, backend, dout) for name, pattern in patterns.items()
        }
    for direction, sides in directions.items():
        work = f"{backend} {dtype} N={tokens} {direction}"
        with torch.inference_mode(direction in ("forward", "backward")):
            seconds = interleave(sides, rounds=rounds)
        rows.keep_rounds(work, seconds)
        for limit, (name, layout) in zip((limits or LIMITS).values(), drawn.items(), strict=True):
            density = layout.density(tokens)
            words = f"{work}, blocks of {block_size}, {name}: time / dense time / density"
            held: dict[str, Any] = {"sign": "<=", "limit": limit} if limits else {}
            held |= {"density": density, "over_dense": ratio(seconds[name], seconds["dense"])["median"]}
            rows.compare(words, seconds[name], seconds["dense"], unit=density, **held)


def tiles(rows: Rows, backend: str, tokens: int, dtype: str, rounds: int) -> None:
    """What short query tiles cost a backend that gets blocks as dense calls: what `block_cost` is fitted to.

    Args:
        rows: where to add a row for each block size and direction, at a density of 50 %.
        backend: whose kernels.
        tokens: of the sequence.
        dtype: a torch dtype's name.
        rounds: of each comparison.
    """
    query, key, value, dout = (
        torch.randn(1, HEADS, tokens, HEAD_DIM, dtype=torch.float32, device="cpu").to(getattr(torch, dtype))
        for _ in range(4)
    )
    drawn = {str(size): random_blocks(0.5, size) for size in (8, 16, 32, 64, 128, 256)}
    patterns: dict[str, Pattern] = {"dense": Dense(), **drawn}
    directions: dict[str, Sides] = {"forward": {}, "backward": {}}
    with torch.inference_mode():
        for name, pattern in patterns.items():
            runner, _ = build(Lowering(Problem.like(query, key, value, pattern), may_mask=False), backend)
            out, lse = runner.forward(query, key, value, None)
            saved = Saved(query, key, value, out, lse)
            directions["forward"][name] = partial(runner.forward, query, key, value, None)
            directions["backward"][name] = partial(runner.backward, saved, dout, None, None)
        for direction, sides in directions.items():
            seconds = interleave(sides, rounds=rounds)
            rows.keep_rounds(f"{backend} {dtype} N={tokens} {direction} as blocks", seconds)
            for size, layout in drawn.items():
                words = (
                    f"{backend} {dtype} N={tokens} {direction} as blocks of {size}, 50%: time / dense time / density"
                )
                density = layout.density(tokens)
                rows.compare(words, seconds[size], seconds["dense"], unit=density, density=density)


def _end_to_end(leaves: Sequence[Tensor], pattern: Pattern, backend: str, dout: Tensor) -> object:
    out = longspan.attention(leaves[0], leaves[1], leaves[2], pattern, backend=backend)
    return torch.autograd.grad(out, leaves, dout)


# --------------------------------------------------------------------------------------------------- against baselines


def _hugging_face(backend: str, tokens: int) -> Iterator[Comparison]:
    yield against_longformer(backend, tokens, HEADS)
    yield against_longformer(backend, tokens, HEADS, positions=(0,))
    yield against_bigbird(backend, tokens, HEADS)


def compare_baselines(rows: Rows, comparisons: Iterator[Comparison], rounds: int) -> None:
    """The baselines' time over ours, where both compute the same.

    Raises:
        AssertionError: they do not.
    """
    with torch.inference_mode():
        for comparison in comparisons:
            mine, other = comparison.ours(), comparison.theirs()
            torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)
            seconds = interleave({"ours": comparison.ours, "theirs": comparison.theirs}, rounds=rounds)
            rows.keep_rounds(comparison.work, seconds)
            apart = float((mine - other).abs().max())
            more = {"ms": 1e3 * median(seconds["ours"]), "their_ms": 1e3 * median(seconds["theirs"]), "apart": apart}
            rows.compare(comparison.work, seconds["theirs"], seconds["ours"], ">=", 1.0, **more, **comparison.more)


# --------------------------------------------------------------------------------------------------- a million tokens


def million(rows: Rows, what: LongWindow, on_stage: Callable[[str], object] = str) -> None:
    """Index, peak memory and time of a window over a very long sequence; megabytes are 10^6 bytes."""
    measured = measure_window(what, on_stage)
    work = f"window of {what.reach} tokens before each, N={what.tokens:,}, {what.heads} head of {what.head_dim}, causal"
    stages = {stage["stage"]: stage for stage in measured}  # the last of those that came often
    rows.add(f"{work}: MB of the index", 1e-6 * stages["index"]["nbytes"], "<=", INDEX_MB)
    rows.add(f"{work}: MB of {what.backend}'s program", 1e-6 * stages["plan"]["nbytes"], "<=", INDEX_MB)
    beyond = [stage["beyond"] for stage in measured if stage["stage"] == "forward"]
    if None not in beyond:
        rows.add(f"{work}: peak MB of the forward beyond inputs and results", 1e-6 * max(beyond), "<=", PEAK_MB)
        backward = 1e-6 * stages["backward"]["beyond"]
        rows.add(f"{work}: peak MB of the backward beyond inputs and results", backward, "<=", PEAK_MB)
    rows.add(f"{work}: seconds for the index", stages["index"]["seconds"])
    took = [stage["seconds"] for stage in measured if stage["stage"] == "forward"]
    rows.keep_rounds(work, {"forward": took, "backward": [stages["backward"]["seconds"]]})
    rows.add(f"{work}: seconds of the forward, median of {len(took)}", sorted(took)[len(took) // 2])
    rows.add(f"{work}: seconds of the backward", stages["backward"]["seconds"])
