"""`longspan explain`: who would compute a problem, on any device, and why not the others."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.text import Text

import longspan
from longspan import ArgumentError, Problem, Resolution, Verdict
from longspan.lowering.dense import lower
from longspan.patterns.topk.pattern import stand_in
from longspan.tools.cli import output

__all__ = ["explain"]

EXAMPLE = "e.g. 1,8,8192,64"


def explain(
    shape: Annotated[str, typer.Option(metavar="B,H,N,D", help="Query: batch, heads, length, head_dim.")] = (
        "1,8,8192,64"
    ),
    kv_shape: Annotated[
        str | None, typer.Option(metavar="B,H,N,D", help="Key and value, where they differ from the query.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float16, bfloat16, float32 or float64. Default: float32, on a GPU from 7.0 on half precision."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, sm_61, sm_90, gfx942, mps, ...: need not be on this machine.")
    ] = "cpu",
    pattern: Annotated[
        str,
        typer.Option(
            help="dense, window:512,0, dilated:2048/1,4096/2[:grouped][:block], blocks:128:local:1023,0|global:0 or "
            "topk_blocks:16:128."
        ),
    ] = "dense",
    causal: Annotated[bool, typer.Option("--causal", help="Key position <= query position.")] = False,
    query_offset: Annotated[
        int | None, typer.Option(help="Position of the first query, for fewer or more queries than keys.")
    ] = None,
    grad: Annotated[bool, typer.Option("--grad", help="Gradients are wanted.")] = False,
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="Ask for this backend by name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Say which backend would compute a problem, and why not the others. Exit code 1 where none would."""
    asked = longspan.Device.parse(device)
    used = dtype or _usual_dtype(asked)
    problem = _problem(shape, kv_shape, used, asked, pattern, causal, query_offset, grad)
    with output.quiet_stdout():
        resolution = longspan.explain(problem, backend=backend)
    if as_json:
        print(resolution.to_json())
    else:
        _show(resolution)
        if dtype is None:
            output.say(f"note: in {used}, as {asked.name} is used; --dtype asks for another")
    if resolution.chosen is None:
        raise typer.Exit(1)


def _usual_dtype(device: longspan.Device) -> str:
    """What is mostly computed in on such a device: half precision where its arithmetic is the faster one."""
    if device.type in ("cpu", "mps"):
        return "float32"
    if device.type != "cuda":
        return "bfloat16"
    if device.capability is None:  # any CUDA device: all that are not old have this one
        return "float16"
    return "float32" if device.capability < (7, 0) else "float16" if device.capability < (8, 0) else "bfloat16"


def _problem(
    shape: str,
    kv_shape: str | None,
    dtype: str,
    device: longspan.Device,
    pattern: str,
    causal: bool,
    query_offset: int | None,
    grad: bool,
) -> Problem:
    batch, heads, q_len, head_dim = _numbers("--shape", shape)
    kv_heads, kv_len = heads, q_len
    if kv_shape is not None:
        kv_batch, kv_heads, kv_len, kv_dim = _numbers("--kv-shape", kv_shape)
        if (kv_batch, kv_dim) != (batch, head_dim):
            want = f"the batch and head_dim of --shape, {batch} and {head_dim}"
            raise ArgumentError("--kv-shape", repr(kv_shape), want, f"e.g. {batch},{kv_heads},{kv_len},{head_dim}")
    parsed = longspan.parse_pattern(pattern)
    if q_len != kv_len and query_offset is None and (causal or parsed.positional):
        last = f", --query-offset {kv_len - q_len} the last with the last (bottom right)" if kv_len > q_len else ""
        raise ArgumentError(
            "--query-offset",
            f"none, with {q_len} queries and {kv_len} keys",
            "the position of the first query, for what depends on positions",
            "--query-offset 0 aligns the first query with the first key (top left)" + last,
        )
    return Problem(
        batch=batch,
        heads=heads,
        q_len=q_len,
        head_dim=head_dim,
        kv_heads=kv_heads,
        kv_len=kv_len,
        dtype=dtype,
        device=device,
        pattern=parsed,
        is_causal=causal,
        query_offset=query_offset or 0,
        requires_grad=grad,
    )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(re.fullmatch(r"[0-9]{1,18}", part) for part in parts):
        raise ArgumentError(option, repr(text), "four whole numbers: batch, heads, length, head_dim", EXAMPLE)
    return tuple(int(part) for part in parts)


def _show(resolution: Resolution) -> None:
    output.say(str(resolution.problem), "bold")
    rows = [
        (str(rank), verdict.name, _state(resolution, verdict), "\n".join(map(str, verdict.reasons)))
        for rank, verdict in enumerate(resolution.candidates, 1)
    ]
    output.table([("rank", True), ("backend", False), ("verdict", False), ("reasons", False)], rows)
    output.say(f"decided by {resolution.decided_by}: {resolution.why}")
    for line in resolution.notes:
        output.say(f"note: {line}")
    if resolution.chosen is not None:
        output.say(_work(resolution.problem))


def _state(resolution: Resolution, verdict: Verdict) -> Text:
    """`chosen`, `ok`, `by name only` (it fits, and auto does not take it unasked) or `no`."""
    if verdict.name == resolution.chosen:
        return Text("chosen", "bold green")
    if not verdict.ok:
        return Text("no", "red")
    return Text("by name only", "yellow") if verdict.reasons else Text("ok", "green")


def _work(problem: Problem) -> str:
    """How much there is to compute, which does not depend on the backend."""
    if isinstance(problem.pattern, longspan.TopKBlocks):
        problem = stand_in(problem)  # which blocks will be chosen is known later; how many is known now
    layout = lower(problem)
    dense = lower(problem.replace(pattern=longspan.Dense()))
    share = f", {layout.pairs / dense.pairs:.1%} of dense attention's" if dense.pairs and layout != dense else ""
    return f"work: {layout}{share}"
