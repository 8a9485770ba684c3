"""Measurements in a process of their own: peak memory of one call, and a window over a very long sequence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from attrs import asdict, frozen

from longspan.errors import LongspanError

__all__ = ["LongWindow", "measure_window", "peak_bytes"]

_START = """
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
import json, sys, time, torch, longspan
from longspan.tools.meter import PeakMemory
given = json.loads(sys.argv[1])
torch.set_num_threads(given["threads"])
"""

_CALL = """
side, shape, dtype, gradients = given["call"]
def run(shape):
    x = [torch.randn(shape).to(getattr(torch, dtype)).requires_grad_(gradients) for _ in range(3)]
    def call():
        if side == "SDPA":
            out = torch.nn.functional.scaled_dot_product_attention(*x)
        else:
            out = longspan.attention(*x, backend=side)
        return (out, *torch.autograd.grad(out, x, out)) if gradients else (out,)
    return call
run([1, 2, 256, shape[3]])()
call = run(shape)
with PeakMemory(torch.device("cpu")) as meter:
    results = call()
print(int(meter.mib * 2**20) - sum(x.nbytes for x in results))
"""

_WINDOW = """
pattern = longspan.local_blocks(given["reach"], 0, block_size=given["block_size"])
def say(stage, seconds, **more):
    print(json.dumps({"stage": stage, "seconds": seconds, **more}), flush=True)
def measured(stage, call):
    with PeakMemory(torch.device("cpu")) as meter:
        start = time.perf_counter()
        results = call()
        seconds = time.perf_counter() - start
    own = sum(x.nbytes for x in results)
    say(stage, seconds, beyond=None if meter.mib is None else int(meter.mib * 2**20) - own)
    return results
def made(tokens):
    x = [torch.randn(1, given["heads"], tokens, given["head_dim"]) for _ in range(3)]
    problem = longspan.Problem.like(*x, pattern=pattern, is_causal=True)
    return x, longspan.plan(problem, backend=given["backend"])
with torch.inference_mode():
    x, plan = made(min(2048, given["tokens"]))
    out, lse = plan(*x)
    plan.backward(out, *x, out, lse)
    pattern.csr(2048, is_causal=True)
    start = time.perf_counter()
    csr = pattern.csr(given["tokens"], is_causal=True)
    say("index", time.perf_counter() - start, nbytes=csr.nbytes, pairs=csr.layouts[0].pairs)
    start = time.perf_counter()
    x, plan = made(given["tokens"])
    say("plan", time.perf_counter() - start, nbytes=plan.layout.nbytes)
    for _ in range(given["calls"]):
        out = lse = None
        out, lse = measured("forward", lambda: plan(*x))
    measured("backward", lambda: plan.backward(out, *x, out, lse))
"""


def peak_bytes(side: str, shape: tuple[int, ...], dtype: str, gradients: bool) -> int:
    """Bytes beyond inputs and results (out, with `gradients` the three gradients too) at a call's peak.

    Args:
        side: a backend's name, or `SDPA` for torch's own.
        shape: `(batch, heads, seq, head_dim)`.
        dtype: a torch dtype's name.
        gradients: forward and backward.
    """
    given = json.dumps({"call": [side, shape, dtype, gradients], "threads": torch.get_num_threads()})
    done = subprocess.run([sys.executable, "-c", _START + _CALL, given], capture_output=True, text=True, check=True)
    return int(done.stdout)


@frozen
class LongWindow:
    """What is measured: causal attention over `tokens`, each query with the `reach` keys before it, float32."""

    backend: str
    tokens: int
    reach: int
    threads: int
    calls: int = 3
    heads: int = 1
    head_dim: int = 64
    block_size: int = 128


def measure_window(what: LongWindow, on_stage: Callable[[str], object] = str) -> list[dict[str, Any]]:
    """Measure, in stages: `index`, `plan`, `calls` times `forward`, `backward`.

    Args:
        what: the work.
        on_stage: called with a few words when a stage begins.

    Returns:
        for each stage `stage` and `seconds`; of `index` and `plan` also `nbytes`, of the CSR and of what the backend
        runs; of the others `beyond`, the bytes at the peak beyond inputs and results (None where the system does not
        say).

    Raises:
        LongspanError: the process failed; what it said is on stderr.
    """
    measured: list[dict[str, Any]] = []
    stages = ["index", "plan", *["forward"] * what.calls, "backward"]
    on_stage(_words(what, stages, 0))
    command = [sys.executable, "-c", _START + _WINDOW, json.dumps(asdict(what))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                measured.append(json.loads(line))
                on_stage(_words(what, stages, len(measured)))
        except BaseException:
            process.kill()
            raise
    if process.returncode or len(measured) != len(stages):
        raise LongspanError(
            f"the process that measures {what.tokens:,} tokens ended with {process.returncode} after "
            f"{len(measured)} of {len(stages)} stages. Next: read its error above, or leave it out with --parts"
        )
    return measured


def _words(what: LongWindow, stages: list[str], done: int) -> str:
    return f"N={what.tokens:,}, window of {what.reach}: {stages[min(done, len(stages) - 1)]}"
