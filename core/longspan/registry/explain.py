"""Why a backend would be chosen, for any device, present or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Never

import torch
from attrs import evolve

from longspan.errors import ArgumentError, brief
from longspan.lowering.route import Blocks, Lowering, Masked, Route, is_native
from longspan.patterns.blocks.sparse import BlockSparse
from longspan.patterns.topk.pattern import TopKBlocks
from longspan.registry.discovery import registry
from longspan.registry.policy import current
from longspan.registry.profile import current_profile
from longspan.registry.resolve import refusals, resolve
from longspan.spec.backend import Reason
from longspan.spec.device import Device, is_local
from longspan.spec.foreign import unknown_argument
from longspan.spec.pattern import Dense
from longspan.spec.problem import Problem
from longspan.spec.resolution import Candidate, Resolution

__all__ = ["check_problem", "explain", "rerouted", "resolution_for"]


def explain(
    problem: Problem, device: Device | str | None = None, *rest: Never, backend: str | None = None, **foreign: Never
) -> Resolution:
    """The resolution of a problem, without making a plan.

    Args:
        problem: what is to be computed.
        device: another device than the problem's: a `Device` or text such as `sm_61`. Need not be on this machine.
        rest: nothing; more than two arguments are refused.
        backend: ask for this one, as `attention(backend=...)` would.
        foreign: nothing; other arguments are refused, with where longspan has them.

    Raises:
        UnknownBackend: a name nobody registered.
        ArgumentError: text that names no device; tensors in place of a problem.
    """
    check_problem("explain", problem, rest, foreign, ("device", "backend"))
    if device is not None:
        problem = problem.replace(device=device)
    return resolution_for(Lowering(problem), backend)


def check_problem(
    function: str, problem: object, rest: tuple[object, ...], foreign: dict[str, Any], own: tuple[str, ...]
) -> None:
    """What `explain` and `plan` say to those who hand them what `attention` takes.

    Raises:
        ArgumentError: no problem but tensors, say; more arguments than there are, or others.
    """
    if not isinstance(problem, Problem):
        got = f"a tensor of shape {tuple(problem.shape)}" if isinstance(problem, torch.Tensor) else brief(problem)
        fix = f"longspan.{function}(longspan.Problem.like(query, key, value, pattern, is_causal=...))"
        raise ArgumentError("problem", got, "a longspan.Problem", fix)
    if foreign:
        raise unknown_argument(f"{function}()", foreign, own)
    if rest:
        want = f"the problem and, by name, {' or '.join(own)}"
        raise ArgumentError(f"{function}()", f"{len(rest)} arguments too many", want, "name them")


def resolution_for(lowering: Lowering, backend: str | None) -> Resolution:
    """The resolution of a problem, with the way that it runs with the backend chosen.

    Args:
        lowering: the problem's. What is laid out here is not laid out again for the plan.
        backend: as `explain` has it.
    """
    problem = lowering.problem
    candidates, policy = registry.candidates(), current(backend)
    profile = current_profile(problem.device.name) if is_local(problem.device) else None
    measured = profile.seconds(problem) if profile else {}
    resolution = resolve(problem, candidates, policy, measured=measured)
    fitting = [candidate for candidate in candidates if resolution[candidate.name].ok]
    if refused := _refused_parts(lowering, fitting):
        resolution = resolve(problem, candidates, policy, refused, measured)
    notes = [*resolution.notes, *_lacks(resolution, candidates)]
    if isinstance(lowering.asked.pattern, TopKBlocks):
        notes.insert(0, _approximation(lowering.asked.pattern))
    if not is_local(problem.device):
        notes.append(
            f"this machine has no {problem.device.name}: the answer assumes a torch build for it, and the plugins "
            "installed here"
        )
    resolution = evolve(resolution, problem=lowering.asked, notes=tuple(notes))
    chosen = next((one.info.capabilities for one in candidates if one.name == resolution.chosen), None)
    return resolution if chosen is None else rerouted(resolution, lowering.route(chosen))


def rerouted(resolution: Resolution, route: Route) -> Resolution:
    """The same with this way, and what there is to say of it."""
    before = () if resolution.route is None else _block_notes(resolution, resolution.route)
    notes = [note for note in resolution.notes if note not in before]
    return evolve(resolution, notes=(*notes, *_block_notes(resolution, route)), route=route)


def _lacks(resolution: Resolution, candidates: Sequence[Candidate]) -> list[str]:
    """What those that fit would do better with, and the line that brings it."""
    fitting = [one for one in candidates if resolution[one.name].ok]
    return [f"{one.name} works, and would be faster with {lack}" for one in fitting for lack in one.info.lacks]


def _approximation(pattern: TopKBlocks) -> str:
    return (
        f"{pattern!r} approximates dense attention: it keeps {pattern.k} blocks of keys for each block of queries, "
        "chosen from content at every call, and then runs as the block-sparse pattern considered here; "
        "`pattern.mass(query, key)` says how much softmax mass it keeps"
    )


def _refused_parts(lowering: Lowering, candidates: Sequence[Candidate]) -> dict[str, tuple[Reason, ...]]:
    """What backends hold against the dense problems that this problem lowers to; of one kind, the first."""
    refused = {}
    for candidate in candidates:
        can = candidate.info.capabilities
        if can is None or is_native(lowering.problem, can):
            continue
        found: dict[tuple[str, str], Reason] = {}
        for part in lowering.of(can).lowered(can).parts:
            for reason in refusals(part, candidate):
                found.setdefault((reason.code, reason.field), reason)
        if found:
            refused[candidate.name] = tuple(found.values())
    return refused


def _block_notes(resolution: Resolution, route: Any) -> tuple[str, ...]:
    """What becomes of a block-sparse pattern: who runs which blocks, or why none are run."""
    if isinstance(route, Blocks | Masked):
        modelled = "" if route.costs is None else f"; modelled: {route.costs}"
        if isinstance(route, Masked):
            return (f"{resolution.chosen} runs dense attention under a mask{modelled}",)
        layout = route.layout
        full, partial = layout.count()
        who = f"{resolution.chosen} runs {full:,} full blocks of {layout.block_size}"
        who += f", the core {partial:,} partial ones under their masks" if partial else ""
        return (f"{who}: {layout.products:.1%} of dense attention's products{modelled}",)
    if isinstance(resolution.problem.pattern, BlockSparse | TopKBlocks) and isinstance(route.problem.pattern, Dense):
        return ("the pattern keeps every pair that there is here: it runs as dense attention, which no blocks beat",)
    return ()
