"""A backend with one of its cases: its plan, its inputs, and the judgement of what it computes."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from longspan.planning.plan import Plan, plan
from longspan.registry.explain import explain
from longspan.registry.resolve import refusals
from longspan.spec.backend import BackendInfo, Capabilities
from longspan.spec.device import Device
from longspan.spec.problem import Problem
from longspan.spec.resolution import Candidate
from longspan.testing.answers import Answer, known_answer
from longspan.testing.cases import Case
from longspan.testing.claims import backward_of, contract
from longspan.testing.judge import check_shapes, diagnose, judge_forward, judge_gradients
from longspan.testing.outcome import Breach, Declined, Measure
from longspan.testing.tensors import Inputs, make

__all__ = ["OWN", "Bench", "Measures"]

Measures = tuple[Measure, ...]

OWN = contract("a call's results are its own", "allocate the results of every call, and keep nothing of it")


@frozen
class Bench:
    """A backend with one of its cases: what every check needs."""

    info: BackendInfo
    can: Capabilities
    case: Case

    def problem(self) -> Problem:
        """The case's problem on the device that there is."""
        device = Device.of(torch.device(self.case.device))
        if not any(device.matches(wanted) for wanted in self.can.devices):
            raise Declined(f"needs {' or '.join(self.can.devices)}; this machine has {device}")
        return self.case.problem.replace(device=device)

    def plan(self, problem: Problem) -> Plan:
        """A plan, unless the backend declines the problem for a reason that its capabilities do not state."""
        stated = refusals(problem, Candidate(self.info))  # with no reasons of the backend's own
        if stated:
            raise Breach(f"the resolver refuses what is claimed: {'; '.join(map(str, stated))}")
        verdict = explain(problem, backend=self.info.name)[self.info.name]
        if not verdict.ok:
            if not verdict.reasons:
                raise Breach("it is refused without a reason")
            raise Declined("; ".join(map(str, verdict.reasons)))
        return plan(problem, self.info.name)

    def trained(self, problem: Problem) -> tuple[Problem, Plan]:
        """A plan with a backward; without one where none is to be had."""
        try:
            return problem, self.plan(problem)
        except Declined:
            problem = problem.replace(requires_grad=False)
            return problem, self.plan(problem)

    def inputs(self, needs_grad: bool, number: int = 0) -> Inputs:
        """The case's tensors; with a number, others of the same shapes."""
        try:
            inputs = make(self.case, number)
        except TypeError as error:  # a device without this dtype
            raise Declined(str(error)) from error
        for x in inputs.qkv:
            x.requires_grad_(needs_grad)
        return inputs

    def answer(self, problem: Problem, inputs: Inputs, number: int = 0) -> Answer:
        """What is right for the case's tensors of that number."""
        case = self.case
        key = problem.replace(deterministic=False), case.device, case.layout, case.logits, number
        return known_answer(key, problem, inputs)

    def judged_backward(
        self, got: tuple[Tensor, ...], inputs: Inputs, right: Answer, dlse: Tensor | None = None
    ) -> Measures:
        """The gradients' measures; a wrong one is the backward's fault, where the backend brings one."""
        try:
            return judge_gradients(got, inputs.dout, right, self.case.problem.scale, dlse, self.can.exact)
        except Breach as breach:
            if dlse is None and self.can.backward:  # a gradient of the lse is the core's work
                raise Breach(breach.what, breach.measure, backward_of(self.case.claim)) from None
            raise

    def judged(self, out: Tensor, lse: Tensor, problem: Problem, inputs: Inputs, right: Answer) -> Measures:
        """The forward's measures; a wrong result is looked at for what it is instead."""
        check_shapes(out, lse, inputs.query)
        taken = {x.untyped_storage().data_ptr() for x in (*inputs.qkv, inputs.dout) if x.numel()}
        for name, result in (("out", out), ("lse", lse)):
            if result.numel() and result.untyped_storage().data_ptr() in taken:
                raise Breach(f"its {name} lies in the memory of an input", claim=OWN)
        try:
            return judge_forward(out, lse, right, self.can.exact)
        except Breach as breach:
            raise diagnose(breach, problem, inputs, (out.detach(), lse.detach()), right, self.can) from None
