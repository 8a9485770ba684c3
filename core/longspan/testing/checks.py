"""The checks: what a case's `check` does with a backend. Each returns what it measured, or raises `Breach`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from longspan.errors import BackendUnavailable
from longspan.planning.plan import plan
from longspan.registry.explain import explain
from longspan.testing import tolerance
from longspan.testing.answers import SEED, Answer, Three, answer, sight
from longspan.testing.calls import again, contain, repeat, threads
from longspan.testing.claims import Claim, backward_of, claim_of
from longspan.testing.outcome import Breach, Measure
from longspan.testing.side_effects import only_read
from longspan.testing.workbench import Bench, Measures

__all__ = ["CHECKS", "lost"]

EPS = torch.finfo(torch.float32).eps
"""Of the lse of every dtype that is judged by the mean error."""


def _forward(bench: Bench) -> Measures:
    problem = bench.problem()
    made, inputs = bench.plan(problem), bench.inputs(False)
    with only_read(inputs):
        out, lse = made(*inputs.qkv, dropout_seed=SEED)
    return bench.judged(out, lse, problem, inputs, bench.answer(problem, inputs))


def _gradient(bench: Bench) -> Measures:
    problem = bench.problem()
    made, inputs = bench.plan(problem), bench.inputs(True)
    with only_read(inputs):
        out, lse = made(*inputs.qkv, dropout_seed=SEED)
    right = bench.answer(problem, inputs)
    measures = bench.judged(out, lse, problem, inputs, right)
    with only_read(inputs):
        got = torch.autograd.grad(out, inputs.qkv, inputs.dout)
    return (*measures, *bench.judged_backward(got, inputs, right))


def _sums(bench: Bench) -> Measures:
    """Long rows and columns, as every result is judged, and then by the mean error: rounding grows with their number.

    The usual rule looks at the worst number, against a floor that leaves room for what naive torch is spared. Sums over
    65,536 numbers one after the other stay below it. So what is lost is measured here by the root mean square of got -
    oracle over that of the oracle, and held to what naive torch of the same dtype loses: at most `tolerance.FORWARD`
    times that for out and lse, `tolerance.GRADIENT` times for gradients. Naive torch may be spared what the contract
    asks of everyone else, whose results are rounded to their dtypes, and whose backward is given such rounded ones:
    where exact arithmetic loses more in that way, this counts in place of naive torch's. Few numbers are right by luck:
    no limit is below one eps of the lse's dtype, nor, for gradients, below half an |lse| eps, by which a rounded lse
    may put every weight of a row off. In float64 the usual rule's 1e-12 is all that is promised.
    """
    problem, made = bench.trained(bench.problem())
    inputs = bench.inputs(problem.requires_grad)
    with only_read(inputs):
        out, lse = made(*inputs.qkv, dropout_seed=SEED)
    right = bench.answer(problem, inputs)
    measures = bench.judged(out, lse, problem, inputs, right)
    lossy = bench.can.exact and inputs.query.dtype != torch.float64
    if lossy:
        rounded = right.out.detach().to(out.dtype), right.lse.detach().to(lse.dtype)
        measures += (
            _judge_mean("forward", "out", out, right.out, right.naive_out, rounded[0], EPS, None),
            _judge_mean("lse", "lse", lse, right.lse, right.naive_lse, rounded[1], EPS, None),
        )
    if not problem.requires_grad:
        return measures
    with only_read(inputs):
        got = torch.autograd.grad(out, inputs.qkv, inputs.dout)
    measures += bench.judged_backward(got, inputs, right)
    if not lossy:
        return measures
    claim = backward_of(bench.case.claim) if bench.can.backward else None
    floors = _rounded_gradients(right, inputs.dout, sight(problem), problem.scale)
    least = EPS * max(1.0, 0.5 * float(right.lse[right.lse.isfinite()].abs().max()))
    names, (want, naive) = ("dquery", "dkey", "dvalue"), right.gradients(inputs.dout)
    return measures + tuple(
        _judge_mean("gradient", *given, least, claim) for given in zip(names, got, want, naive, floors, strict=True)
    )


def lost(got: Tensor, want: Tensor) -> float:
    """Root mean square of got - want over that of want, but for rows without keys."""
    got, want = got.detach().cpu().double(), want.detach()
    off, size = (x.masked_fill(want == -math.inf, 0.0).norm() for x in (got - want, want))
    return float(off / size.clamp(min=torch.finfo(want.dtype).tiny))


def _judge_mean(
    what: str, name: str, got: Tensor, want: Tensor, naive: Tensor, rounded: Tensor, least: float, claim: Claim | None
) -> Measure:
    times = tolerance.GRADIENT if what == "gradient" else tolerance.FORWARD
    usual = max(lost(naive, want), lost(rounded, want))
    measure = Measure(what, lost(got, want), tolerance.allowed(naive.dtype, usual, times, least))
    if not measure.error <= measure.allowed:
        off = f"mean error {measure.error:.2g}, allowed {measure.allowed:.2g}"
        raise Breach(f"its {name} loses more than {times:g} times what naive torch does: {off}", measure, claim)
    return measure


def _rounded_gradients(right: Answer, dout: Tensor, counts: Tensor, scale: float) -> Three:
    """What exact arithmetic makes of the out and lse that a backward is given, rounded to the dtype of the inputs."""
    query, key, value = (x.detach() for x in right.inputs)
    dtype, given = dout.dtype, dout.cpu().double()
    out = right.out.detach().to(dtype).double()
    lse = right.lse.detach().float().double()
    seen = lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)
    weights = counts * torch.exp(query @ key.mT * scale - seen)
    slopes = weights * (given @ value.mT - (given * out).sum(-1, keepdim=True)) * scale
    dquery, dkey, dvalue = (x.to(dtype) for x in (slopes @ key, slopes.mT @ query, weights.mT @ given))
    return dquery, dkey, dvalue


def _lse_gradient(bench: Bench) -> Measures:
    problem = bench.problem()
    made, inputs = bench.plan(problem), bench.inputs(True)
    with only_read(inputs):
        out, lse = made(*inputs.qkv)
        dlse = torch.linspace(-1, 1, lse.numel(), dtype=lse.dtype, device=lse.device).view_as(lse)
        got = torch.autograd.grad((out, lse), inputs.qkv, (inputs.dout, dlse))
    return bench.judged_backward(got, inputs, answer(problem, inputs), dlse)


def _joint(bench: Bench) -> Measures:
    """The backward over each part of the keys gets out and lse of all of them; its results are those of all."""
    problem = bench.problem()
    inputs = bench.inputs(True)
    right = bench.answer(problem, inputs)
    query, keys, values = (x.detach() for x in inputs.qkv)
    out, lse = right.out.detach().to(query), right.lse.detach().to(query.device)
    lse = lse if query.dtype == torch.float64 else lse.float()
    dquery = torch.zeros_like(query, dtype=lse.dtype)
    dkeys, dvalues = [], []
    cut = problem.kv_len * 2 // 5
    with only_read(inputs):
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
    with only_read(inputs):
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


def _backward(bench: Bench) -> Measures:
    """A backend that claims a backward brings one with the kernel that it makes."""
    if not bench.plan(bench.problem()).own_backward:
        raise Breach("the Kernel that its longspan_kernel returns has none: the core's runs in its place")
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
        "sums": _sums,
        "lse-gradient": _lse_gradient,
        "joint": _joint,
        "leak": _leak,
        "contain": contain,
        "repeat": repeat,
        "again": again,
        "threads": threads,
        "backward": _backward,
        "refuse": _refuse,
    }
)
