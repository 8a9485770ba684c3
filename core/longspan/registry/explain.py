"""Why a backend would be chosen, for any device, present or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Never

import torch
from attrs import evolve

from longspan.errors import ArgumentError, brief
from longspan.lowering import cost
from longspan.lowering.blocks import BlockLayout
from longspan.lowering.dense import dense_problem, lower
from longspan.lowering.schedule import dense_parts, schedule
from longspan.patterns.blocks.sparse import BlockSparse
from longspan.patterns.topk.pattern import TopKBlocks, stand_in
from longspan.registry.discovery import registry
from longspan.registry.policy import current
from longspan.registry.profile import current_profile
from longspan.registry.resolve import is_native, refusals, resolve
from longspan.spec.backend import Capabilities, Reason
from longspan.spec.device import Device
from longspan.spec.foreign import unknown_argument
from longspan.spec.local import is_local
from longspan.spec.problem import Problem
from longspan.spec.resolution import Candidate, Resolution

__all__ = ["check_problem", "explain"]


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
    if isinstance(problem.pattern, TopKBlocks):
        found = _weighed(stand_in(problem), backend, may_mask=False)
        return evolve(found, problem=problem, notes=(_approximation(problem.pattern), *found.notes))
    return _weighed(problem, backend)


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


def _weighed(problem: Problem, backend: str | None, may_mask: bool = True) -> Resolution:
    """`may_mask`: blocks may run as dense attention under a mask, where that costs less."""
    candidates, policy = registry.candidates(), current(backend)
    if not may_mask:
        candidates = tuple(_without_mask(one) for one in candidates)
    profile = current_profile(problem.device.name) if is_local(problem.device) else None
    measured = profile.seconds(problem) if profile else {}
    resolution = resolve(problem, candidates, policy, measured=measured)
    fitting = [candidate for candidate in candidates if resolution[candidate.name].ok]
    if refused := _refused_parts(problem, fitting):
        resolution = resolve(problem, candidates, policy, refused, measured)
    notes = [*_lacks(resolution, candidates), *_block_notes(problem, resolution, candidates)]
    if not is_local(problem.device):
        notes.append(
            f"this machine has no {problem.device.name}: the answer assumes a torch build for it, and the plugins "
            "installed here"
        )
    return evolve(resolution, notes=(*resolution.notes, *notes))


def _lacks(resolution: Resolution, candidates: Sequence[Candidate]) -> list[str]:
    """What those that fit would do better with, and the line that brings it."""
    fitting = [one for one in candidates if resolution[one.name].ok]
    return [f"{one.name} works, and would be faster with {lack}" for one in fitting for lack in one.info.lacks]


def _without_mask(candidate: Candidate) -> Candidate:
    can = candidate.info.capabilities
    return (
        candidate
        if can is None
        else evolve(candidate, info=evolve(candidate.info, capabilities=evolve(can, mask=False)))
    )


def _approximation(pattern: TopKBlocks) -> str:
    return (
        f"{pattern!r} approximates dense attention: it keeps {pattern.k} blocks of keys for each block of queries, "
        "chosen from content at every call, and then runs as the block-sparse pattern weighed here; "
        "`pattern.mass(query, key)` says how much softmax mass it keeps"
    )


def _refused_parts(problem: Problem, candidates: Sequence[Candidate]) -> dict[str, tuple[Reason, ...]]:
    """What backends hold against the dense problems that this problem lowers to; of one kind, the first."""
    lowered: dict[tuple[bool, bool, bool], list[Problem]] = {}
    refused = {}
    for candidate in candidates:
        can = candidate.info.capabilities
        if can is None or is_native(problem, can):
            continue
        means = can.gqa, can.causal, can.mask
        if means not in lowered:
            lowered[means] = _dense_problems(problem, can)
        found: dict[tuple[str, str], Reason] = {}
        for part in lowered[means]:
            for reason in refusals(part, candidate):
                found.setdefault((reason.code, reason.field), reason)
        if found:
            refused[candidate.name] = tuple(found.values())
    return refused


def _dense_problems(problem: Problem, can: Capabilities) -> list[Problem]:
    layout = lower(problem, may_be_causal=can.causal)
    if isinstance(layout, BlockLayout):
        layout = cost.settle(problem, layout, can)
    if isinstance(layout, BlockLayout):
        return list(dense_parts(problem, schedule(problem, layout)).values())
    return list(dict.fromkeys(dense_problem(problem, call, can.gqa) for call in layout.calls))


def _block_notes(problem: Problem, resolution: Resolution, candidates: Sequence[Candidate]) -> list[str]:
    """What becomes of a block-sparse pattern: who runs which blocks, or why none are run."""
    if not isinstance(problem.pattern, BlockSparse):
        return []
    chosen = next((one.info.capabilities for one in candidates if one.name == resolution.chosen), None)
    layout = lower(problem, may_be_causal=chosen is None or chosen.causal)
    if not isinstance(layout, BlockLayout):
        return ["the pattern keeps every pair that there is here: it runs as dense attention, which no blocks beat"]
    if chosen is None or is_native(problem, chosen):
        return []
    costs = cost.model(problem, layout, chosen)
    modelled = "" if costs is None else f"; modelled: {costs}"
    if costs is not None and costs.is_masked:
        return [f"{resolution.chosen} runs dense attention under a mask{modelled}"]
    full, partial = layout.count()
    size = problem.pattern.block_size
    who = f"{resolution.chosen} runs {full:,} full blocks of {size}"
    who += f", the core {partial:,} partial ones under their masks" if partial else ""
    return [f"{who}: {layout.products:.1%} of dense attention's products{modelled}"]
