"""The checks: what a case's `check` does with a backend. Each returns what it measured, or raises `Breach`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from attrs import frozen
from torch import Tensor

from longspan.errors import BackendUnavailable
from longspan.explain import explain
from longspan.plan import Plan, plan
from longspan.resolve import refusals
from longspan.spec import BackendInfo, Candidate, Capabilities, Device, Problem
from longspan.testing import tolerance
from longspan.testing.answers import SEED, Answer, answer, sight
from longspan.testing.cases import Case
from longspan.testing.claims import backward_of, claim_of, contract
from longspan.testing.containment import breach_of_containment
from longspan.testing.diagnosis import diagnose
from longspan.testing.judge import check_shapes, judge_forward, judge_gradients
from longspan.testing.outcome import Breach, Declined, Measure
from longspan.testing.tensors import Inputs, make

__all__ = ["CHECKS", "Bench"]

Measures = tuple[Measure, ...]


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

    def inputs(self, needs_grad: bool) -> Inputs:
        """The case's tensors."""
        try:
            inputs = make(self.case)
        except TypeError as error:  # a device without this dtype
            raise Declined(str(error)) from error
        for x in inputs.qkv:
            x.requires_grad_(needs_grad)
        return inputs

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
        try:
            return judge_forward(out, lse, right, self.can.exact)
        except Breach as breach:
            raise diagnose(breach, problem, inputs, (out.detach(), lse.detach()), right, self.can) from None


@contextmanager
def _only_read(inputs: Inputs) -> Iterator[None]:
    """What runs inside must leave the inputs as they are."""
    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value, "dout": inputs.dout}
    before = {name: x.detach().clone() for name, x in tensors.items()}
    yield
    for name, x in tensors.items():
        if not torch.equal(x, before[name]):
            raise Breach(f"it wrote to {name}", claim=contract("inputs are only read"))


def _forward(bench: Bench) -> Measures:
    problem = bench.problem()
    made, inputs = bench.plan(problem), bench.inputs(False)
    with _only_read(inputs):
        out, lse = made(*inputs.qkv, dropout_seed=SEED)
    return bench.judged(out, lse, problem, inputs, answer(problem, inputs))


def _gradient(bench: Bench) -> Measures:
    problem = bench.problem()
    made, inputs = bench.plan(problem), bench.inputs(True)
    out, lse = made(*inputs.qkv, dropout_seed=SEED)
    right = answer(problem, inputs)
    measures = bench.judged(out, lse, problem, inputs, right)
    with _only_read(inputs):
        got = torch.autograd.grad(out, inputs.qkv, inputs.dout)
    return (*measures, *bench.judged_backward(got, inputs, right))


def _lse_gradient(bench: Bench) -> Measures:
    problem = bench.problem()
    made, inputs = bench.plan(problem), bench.inputs(True)
    out, lse = made(*inputs.qkv)
    dlse = torch.linspace(-1, 1, lse.numel(), dtype=lse.dtype, device=lse.device).view_as(lse)
    got = torch.autograd.grad((out, lse), inputs.qkv, (inputs.dout, dlse))
    return bench.judged_backward(got, inputs, answer(problem, inputs), dlse)


def _joint(bench: Bench) -> Measures:
    """The backward over each part of the keys gets out and lse of all of them; its results are those of all."""
    problem = bench.problem()
    inputs = bench.inputs(True)
    right = answer(problem, inputs)
    query, keys, values = (x.detach() for x in inputs.qkv)
    out, lse = right.out.detach().to(query), right.lse.detach().to(query.device)
    lse = lse if query.dtype == torch.float64 else lse.float()
    dquery = torch.zeros_like(query, dtype=lse.dtype)
    dkeys, dvalues = [], []
    cut = problem.kv_len * 2 // 5
    for part in (slice(0, cut), slice(cut, None)):
        key, value = keys[:, :, part], values[:, :, part]
        made = bench.plan(problem.replace(kv_len=key.shape[2]))
        dq, dk, dv = made.backward(inputs.dout, query, key, value, out, lse)
        dquery += dq
        dkeys.append(dk)
        dvalues.append(dv)
    got = dquery, torch.cat(dkeys, 2), torch.cat(dvalues, 2)
    return bench.judged_backward(got, inputs, right)


def _leak(bench: Bench) -> Measures:
    """Other numbers, then NaN, in a key and in a value: the rows that may not see it keep every bit."""
    problem = bench.problem()
    made, inputs = bench.plan(problem), bench.inputs(False)
    query, key, value = inputs.qkv
    out, lse = made(query, key, value)
    slack = 0.0
    if not all(torch.equal(x, y) for x, y in zip((out, lse), made(query, key, value), strict=True)):
        if bench.can.deterministic:
            raise Breach("two runs differ in their bits", claim=claim_of("deterministic", problem, bench.can))
        slack = tolerance.floor(query.dtype, lse)  # it has no bits to keep
    counts = sight(problem)
    for token in (problem.kv_len // 3, problem.kv_len // 2 + 1, problem.kv_len - 1):
        blind = (counts[:, :, token] == 0).to(out.device).expand(problem.batch, -1, -1)
        for name, words, new_key, new_value in _edits(key, value, token):
            new_out, new_lse = made(query, new_key, new_value)
            for result, got, want in (("out", new_out, out), ("lse", new_lse, lse)):
                if tolerance.error(got[blind], want[blind]) > slack:
                    rows = int((got != want).view(*lse.shape, -1).any(-1)[blind].sum())
                    raise Breach(f"{words} in {name} {token} changes the {result} of {rows} rows that may not see it")
    return ()


def _edits(key: Tensor, value: Tensor, token: int) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Where, what, and the tensors with it."""
    for words, number in (("another number", -3e4), ("NaN", math.nan)):
        for name, source in (("key", key), ("value", value)):
            copy = source.clone()
            copy[:, :, token] = number
            yield (name, words, copy, value) if name == "key" else (name, words, key, copy)


def _contain(bench: Bench) -> Measures:
    """What is not finite, or huge, reaches nothing that may not see it, forward and backward."""
    problem = bench.problem()
    made, inputs = bench.plan(problem), bench.inputs(False)
    breach_of_containment(problem, made, inputs)
    return ()


def _repeat(bench: Bench) -> Measures:
    """The same inputs, the same bits, forward and backward; forward alone where no backward is to be had."""
    problem = bench.problem()
    try:
        made = bench.plan(problem)
    except Declined:
        problem = problem.replace(requires_grad=False)
        made = bench.plan(problem)
    inputs = bench.inputs(problem.requires_grad)
    first: tuple[Tensor, ...] = ()
    for _ in range(3):
        found: tuple[Tensor, ...] = made(*inputs.qkv)
        if problem.requires_grad:
            found = (*found, *torch.autograd.grad(found[0], inputs.qkv, inputs.dout))
        first = first or found
        for name, got, want in zip(("out", "lse", "dquery", "dkey", "dvalue"), found, first, strict=False):
            if not torch.equal(got, want):
                raise Breach(f"two runs differ in {int((got != want).sum())} of {got.numel()} numbers of {name}")
    return ()


def _refuse(bench: Bench) -> Measures:
    """`explain` says no and names the argument; `plan` raises, and names it too. Nothing runs, on any device."""
    case, name = bench.case, bench.info.name
    verdict = explain(case.problem, backend=name)[name]
    if verdict.ok:
        raise Breach("longspan.explain says that it fits")
    named = [reason.field for reason in verdict.reasons]
    if case.argument not in named:
        raise Breach(f"longspan.explain refuses it for {', '.join(named) or 'nothing'}, not for {case.argument}")
    try:
        plan(case.problem, name)
    except BackendUnavailable as refusal:
        if case.argument not in str(refusal):
            raise Breach(f"the error does not name {case.argument}: {refusal}") from refusal
        return ()
    raise Breach("longspan.plan makes a plan for it")


CHECKS: Mapping[str, Callable[[Bench], Measures]] = MappingProxyType(
    {
        "forward": _forward,
        "gradient": _gradient,
        "lse-gradient": _lse_gradient,
        "joint": _joint,
        "leak": _leak,
        "contain": _contain,
        "repeat": _repeat,
        "refuse": _refuse,
    }
)
