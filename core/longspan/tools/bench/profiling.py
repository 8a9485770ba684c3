"""`longspan bench --profile`: every backend that auto may take, timed here, so that auto takes the fastest."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

import longspan
from longspan import Dense, Dilated, Pattern, Problem, SlidingWindow
from longspan.errors import LongspanError
from longspan.registry.profile import Measure, Profile, machine_name
from longspan.spec.device import Device
from longspan.tools.bench.buffers import threshold
from longspan.tools.bench.contract import OnStep, silent
from longspan.tools.bench.peaks import bandwidth, product_peak
from longspan.tools.meter import timed

__all__ = ["make_profile"]

DTYPES = ("float32", "bfloat16", "float16")
HEADS, HEAD_DIM = 4, 64
ENOUGH = 0.5
"""Seconds after which a measurement is not repeated."""


def make_profile(
    device: torch.device, quick: bool = False, on_step: OnStep = silent, on_failure: Callable[[str], object] = str
) -> Profile:
    """Measure every backend that auto may take, at a few shapes, forward and backward.

    Args:
        device: where to measure.
        quick: short sequences only.
        on_step: called when a measurement begins, with its description, how many are done, and of how many.
        on_failure: called with a line for each backend that could not be measured; it is left out of the profile.
    """
    kind = Device.of(device)
    pairs = [
        (problem, verdict.name)
        for problem in _problems(kind, quick)
        for verdict in longspan.explain(problem).candidates
        if verdict.ok and not verdict.reasons  # auto may take it
    ]
    total = len(pairs) + 2
    measures = []
    for done, (problem, name) in enumerate(pairs):
        on_step(f"{name}, {problem}", done, total)
        try:
            forward, backward = _times(problem, name, device)
        except (LongspanError, RuntimeError) as error:  # one that cannot is not to stop the others
            on_failure(f"{name} on {problem}: {error}")
            continue
        measures.append(Measure(name, problem.pattern.kind, problem.dtype, problem.kv_len, forward, backward))
    on_step("the machine's peaks", total - 2, total)
    peaks = {dtype: product_peak(getattr(torch, dtype), device, 3) for dtype in DTYPES}
    copies = bandwidth(device, 3)
    on_step("from which size on the arena pays", total - 1, total)
    pays = threshold(3 if quick else 7, device)["pays_from_mib"]
    return Profile(
        device=kind.name,
        machine=machine_name(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        peaks=peaks,
        bandwidth=copies,
        measures=tuple(measures),
        workspace_threshold=None if pays is None else pays * 2**20,
    )


def _problems(device: Device, quick: bool) -> Iterator[Problem]:
    for dtype in DTYPES:
        for tokens in (512,) if quick else (256, 2048):
            patterns: list[Pattern] = [Dense(), SlidingWindow(tokens // 8, 0)]
            patterns.append(Dilated((tokens // 4, tokens // 2), (1, 2)))
            for pattern in patterns:
                yield Problem(
                    batch=1, heads=HEADS, q_len=tokens, head_dim=HEAD_DIM, dtype=dtype, device=device, pattern=pattern,
                    is_causal=True,
                )  # fmt: skip


def _times(problem: Problem, name: str, device: torch.device) -> tuple[float, float]:
    shape = (problem.batch, problem.heads, problem.q_len, problem.head_dim)
    query, key, value, dout = (
        torch.randn(shape, device=device, dtype=torch.float32).to(getattr(torch, problem.dtype)) for _ in range(4)
    )
    made = longspan.plan(problem, backend=name)
    with torch.no_grad():
        out, lse = made(query, key, value)
        forward = _median(lambda: made(query, key, value), device)
        return forward, _median(lambda: made.backward(dout, query, key, value, out, lse), device)


def _median(call: Callable[[], Any], device: torch.device) -> float:
    call()
    times: list[float] = []
    while len(times) < 3 or (len(times) < 15 and sum(times) < ENOUGH):
        times.append(1e-3 * timed(call, device)[1])
    return statistics.median(times)
