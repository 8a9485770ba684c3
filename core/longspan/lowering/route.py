"""Which way a problem runs with a backend: natively, as dense calls, as blocks or under a mask. Decided here alone.

The resolution holds the answer, `explain` checks the dense problems that it poses, and a plan runs it. Whether a kernel
that could take a problem natively does so is for its hook to say when the plan is made: a plan whose kernel declined
holds the next way, and its resolution says so.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from attrs import evolve, field, frozen

from longspan.lowering import cost
from longspan.lowering.blocks import BlockLayout
from longspan.lowering.dense import as_dense, dense_problem, lay_blocks, lower
from longspan.lowering.layout import Layout
from longspan.lowering.masked import masked_layout
from longspan.lowering.schedule import Job, dense_parts, schedule
from longspan.patterns.blocks.sparse import BlockSparse
from longspan.patterns.topk.pattern import TopKBlocks, stand_in
from longspan.spec.backend import Capabilities
from longspan.spec.problem import Problem
from longspan.spec.resolution import native_refusals

__all__ = ["Blocks", "DenseCalls", "Lowering", "Masked", "Native", "Route", "is_native", "lowered", "route"]


@frozen(eq=False)
class Native:
    """The backend's kernel takes the problem as it is, with a layout of its own."""

    kind: ClassVar[str] = "native"
    problem: Problem
    parts: tuple[Problem, ...] = ()

    def __str__(self) -> str:
        return "natively"


@frozen(eq=False)
class DenseCalls:
    """Dense calls over strided views; `calls` are the problems that they pose, one for each, `parts` the distinct."""

    kind: ClassVar[str] = "dense calls"
    problem: Problem
    layout: Layout = field(repr=False)
    calls: tuple[Problem, ...] = field(repr=False)

    @property
    def parts(self) -> tuple[Problem, ...]:
        """The distinct dense problems."""
        return tuple(dict.fromkeys(self.calls))

    def __str__(self) -> str:
        return "lowered to dense calls"


@frozen(eq=False)
class Masked(DenseCalls):
    """Dense calls under masks, which cost less than the blocks would."""

    kind: ClassVar[str] = "mask"
    costs: cost.Costs

    def __str__(self) -> str:
        return "as dense attention under a mask"


@frozen(eq=False)
class Blocks:
    """Blocks in batches: `jobs` are what is run, `shapes` the dense problems that full blocks pose by their lengths."""

    kind: ClassVar[str] = "blocks"
    problem: Problem
    layout: BlockLayout = field(repr=False)
    jobs: tuple[Job, ...] = field(repr=False)
    shapes: dict[tuple[int, int], Problem] = field(repr=False)
    costs: cost.Costs | None

    @property
    def parts(self) -> tuple[Problem, ...]:
        """The distinct dense problems."""
        return tuple(self.shapes.values())

    def __str__(self) -> str:
        return "as blocks"


Route = Native | DenseCalls | Blocks


class Lowering:
    """The routes of one problem: what is laid out for one backend serves the others too.

    Args:
        problem: what is to be computed. With `TopKBlocks`, whose blocks are chosen at every call, a block-sparse
            problem that costs as much stands in, and no mask is considered: later tokens would decide how earlier run.
        may_mask: a block-sparse pattern may run as dense attention under a mask where that costs less.
    """

    def __init__(self, problem: Problem, *, may_mask: bool = True) -> None:
        self.asked = problem
        self._may_mask = may_mask and not isinstance(problem.pattern, TopKBlocks)
        self.problem = stand_in(problem) if isinstance(problem.pattern, TopKBlocks) else problem
        self._dense: dict[bool, Lowering] = {}
        self._routes: dict[tuple[bool, bool], DenseCalls | Blocks] = {}

    @cached_property
    def layout(self) -> Layout | BlockLayout:
        """Dense calls, or the blocks of a block-sparse pattern, those that keep everything among them."""
        return lay_blocks(self.problem) if isinstance(self.problem.pattern, BlockSparse) else lower(self.problem)

    def of(self, can: Capabilities) -> Lowering:
        """That of the dense problem which keeps the same pairs, where there is one that such a backend takes."""
        if not can.runs("dense") or not isinstance(self.problem.pattern, BlockSparse):
            return self
        if can.causal not in self._dense:
            assert isinstance(self.layout, BlockLayout)
            dense = as_dense(self.problem, self.layout, may_be_causal=can.causal)
            self._dense[can.causal] = self if dense is None else Lowering(dense)
        return self._dense[can.causal]

    def route(self, can: Capabilities) -> Route:
        """The way with a backend that can do this."""
        mine = self.of(can)
        return Native(mine.problem) if is_native(mine.problem, can) else mine.lowered(can)

    def means(self, can: Capabilities) -> Capabilities:
        """What it can do, without what is not considered here."""
        return can if self._may_mask else evolve(can, mask=False)

    def lowered(self, can: Capabilities) -> DenseCalls | Blocks:
        """The way where the kernel takes only dense problems."""
        can = self.means(can)
        means = can.gqa, can.mask
        if means not in self._routes:
            self._routes[means] = lowered(self.problem, self.layout, can)
        return self._routes[means]


def route(problem: Problem, can: Capabilities) -> Route:
    """The way of one problem with a backend that can do this."""
    return Lowering(problem).route(can)


def is_native(problem: Problem, can: Capabilities) -> bool:
    """Whether the backend's kernel takes the problem as it is, so that the core need not lower it."""
    some = 0 not in (problem.batch, problem.heads, problem.q_len, problem.kv_len)
    return some and can.runs(problem.pattern.kind) and not native_refusals(problem, can)


def lowered(problem: Problem, layout: Layout | BlockLayout, can: Capabilities) -> DenseCalls | Blocks:
    """The way of a problem that is laid out already: as blocks, under a mask where that costs less, or dense calls."""
    if isinstance(layout, Layout):
        return DenseCalls(problem, layout, _calls(problem, layout, can))
    costs = cost.model(problem, layout, can)
    if costs is not None and costs.is_masked:
        masked = masked_layout(problem, layout)
        return Masked(problem, masked, _calls(problem, masked, can), costs)
    jobs = schedule(problem, layout)
    return Blocks(problem, layout, jobs, dense_parts(problem, jobs), costs)


def _calls(problem: Problem, layout: Layout, can: Capabilities) -> tuple[Problem, ...]:
    known: dict[Any, Problem] = {}  # a problem is checked when it is made, and many calls pose the same
    found = []
    for call in layout.calls:
        shape = call.heads.count, call.kv_heads.count, call.queries.count, call.queries.length, call.keys.length
        if (shape, call.is_causal) not in known:
            known[shape, call.is_causal] = dense_problem(problem, call, can.gqa)
        found.append(known[shape, call.is_causal])
    return tuple(found)
