"""`Resolution`: who was chosen for a problem, and what was held against each of the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from attrs import asdict, field, frozen

from longspan.spec.backend import BackendInfo, Capabilities, Reason
from longspan.spec.problem import Problem

__all__ = ["Candidate", "Resolution", "Verdict", "native_refusals"]


def _no_reasons(problem: Problem) -> Iterable[Reason]:
    return ()


@frozen
class Candidate:
    """What the resolver knows of one backend."""

    info: BackendInfo
    unsupported: Callable[[Problem], Iterable[Reason]] = field(default=_no_reasons, repr=False, eq=False)

    @property
    def name(self) -> str:
        """The backend's name, under which it is registered."""
        return self.info.name


@frozen
class Verdict:
    """What became of one candidate: `ok` says that it can serve the problem; `reasons` why not, or why not by auto."""

    name: str
    ok: bool
    reasons: tuple[Reason, ...] = ()


@frozen
class Resolution:
    """Who was chosen for a problem, who decided, and what was held against each of the others.

    `chosen` is None where nothing fits, or where the backend that was `asked` for by name does not. `decided_by` is
    argument, context, environment or auto; `choice` says why; `candidates` are in auto's order, those that fit first.
    `route` is the way that the problem runs with the backend chosen: `route.kind` is one of native, dense calls, blocks
    (in batches) and mask (dense attention under one). That of a plan is what the plan holds.
    """

    problem: Problem
    chosen: str | None
    decided_by: str
    choice: str
    candidates: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()
    asked: str | None = None
    route: Any = field(default=None, eq=False, repr=False)

    @property
    def why(self) -> str:
        """Why this backend, and which way the problem runs with it."""
        if self.chosen is None:
            return self.choice
        how = "" if self.route is None else f" runs {self.route}"
        problem = self.problem if self.route is None else self.route.problem
        return f"{self.choice}; {problem.pattern.kind}{how} on {problem.device.name}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values: chosen, decided_by, why, route, problem, notes and candidates with their reasons."""
        return {
            "chosen": self.chosen,
            "decided_by": self.decided_by,
            "why": self.why,
            "route": None if self.route is None else self.route.kind,
            "problem": str(self.problem),
            "notes": list(self.notes),
            "candidates": [asdict(candidate) for candidate in self.candidates],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text, on one line."""
        return json.dumps(self.to_dict())

    def __getitem__(self, name: str) -> Verdict:
        """The verdict on one backend."""
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise KeyError(name)

    def __str__(self) -> str:
        width = max([len(verdict.name) for verdict in self.candidates], default=0)
        lines = [str(self.problem)]
        for verdict in self.candidates:
            word = "chosen" if verdict.name == self.chosen else "ok" if verdict.ok else "no"
            lines.append(f"  {verdict.name:<{width}}  {word:<6}  {'; '.join(map(str, verdict.reasons))}".rstrip())
        lines.append(f"decided by {self.decided_by}: {self.why}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def native_refusals(problem: Problem, can: Capabilities) -> list[Reason]:
    """Why a kernel that runs the pattern natively does not take the problem as it is."""
    fix = "choose another backend"
    found = []
    if problem.documents is not None and not can.documents:
        found.append(Reason("documents", "cu_seqlens", "packed documents", "one document", fix))
    if problem.kv_heads != problem.heads and not can.gqa:
        heads = f"{problem.kv_heads} for {problem.heads} query heads"
        found.append(Reason("gqa", "kv_heads", heads, "as many as query heads", fix))
    shifted = problem.query_offset or problem.q_len != problem.kv_len
    if shifted and (problem.is_causal or problem.pattern.positional) and not can.query_offset:
        found.append(Reason("query_offset", "query_offset", str(problem.query_offset), "as many queries as keys", fix))
    if problem.dropout_p:
        found.append(Reason("dropout", "dropout_p", str(problem.dropout_p), "0.0", "pass dropout_p=0.0"))
    return found
