"""The checks of what one call of a plan is to another: the same again, kept apart, and at the same time."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from threading import Barrier

import torch
from torch import Tensor

from longspan.planning.plan import Plan
from longspan.testing import tolerance
from longspan.testing.outcome import Breach
from longspan.testing.side_effects import only_read
from longspan.testing.tensors import Inputs
from longspan.testing.workbench import OWN, Bench, Measures

__all__ = ["again", "repeat", "threads"]

NAMES = ("out", "lse", "dquery", "dkey", "dvalue")
THREADS = 4
ROUNDS = 3
"""How often each thread calls the plan."""

Results = tuple[Tensor, ...]


def repeat(bench: Bench) -> Measures:
    """The same inputs, the same bits, forward and backward; forward alone where no backward is to be had."""
    problem, made = bench.trained(bench.problem())
    inputs = bench.inputs(problem.requires_grad)
    first = _results(made, inputs)
    for _ in range(2):
        for name, got, want in zip(NAMES, _results(made, inputs), first, strict=False):
            if not torch.equal(got, want):
                raise Breach(f"two runs differ in {int((got != want).sum())} of {got.numel()} numbers of {name}")
    return ()


def again(bench: Bench) -> Measures:
    """Two calls, then the backward of each: each is right for its own inputs, and stays as it was returned."""
    problem, made = bench.trained(bench.problem())
    given = [bench.inputs(problem.requires_grad, number) for number in range(2)]
    rights = [bench.answer(problem, inputs, number) for number, inputs in enumerate(given)]
    forwards, copies = [], []
    for inputs in given:
        with only_read(inputs):
            forwards.append(made(*inputs.qkv))
        copies.append(_copied(forwards[-1]))
    _check_kept(forwards, copies, NAMES[:2])
    measures = [
        bench.judged(out, lse, problem, inputs, right)
        for (out, lse), inputs, right in zip(forwards, given, rights, strict=True)
    ]
    if problem.requires_grad:
        backwards, copies = [], []
        for (out, _), inputs in zip(forwards, given, strict=True):
            with only_read(inputs):
                backwards.append(torch.autograd.grad(out, inputs.qkv, inputs.dout))
            copies.append(_copied(backwards[-1]))
        _check_kept(backwards, copies, NAMES[2:])
        measures += [
            bench.judged_backward(gradients, inputs, right)
            for gradients, inputs, right in zip(backwards, given, rights, strict=True)
        ]
    return tuple(chain.from_iterable(measures))


def threads(bench: Bench) -> Measures:
    """One plan called from several threads at once, each with inputs of its own: the results are those of one alone."""
    problem, made = bench.trained(bench.problem())
    given = [bench.inputs(problem.requires_grad, number) for number in range(THREADS)]
    alone = [_results(made, inputs) for inputs in given]
    slack = 0.0
    if not all(map(torch.equal, _results(made, given[0]), alone[0])):  # it has no bits to keep
        slack = tolerance.floor(given[0].query.dtype, alone[0][1])
    start = Barrier(THREADS)

    def run(number: int) -> list[Results]:
        torch.set_num_threads(1)
        start.wait()
        sys.setprofile(_give_way)
        try:
            return [_results(made, given[number]) for _ in range(ROUNDS)]
        finally:
            sys.setprofile(None)

    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(run, range(THREADS)))
    for want, rounds in zip(alone, together, strict=True):
        for results in rounds:
            for name, x, y in zip(NAMES, results, want, strict=False):
                if tolerance.error(x, y) > slack:
                    raise Breach(f"with {THREADS} threads at once its {name} is another than that of one alone")
    return ()


def _results(made: Plan, inputs: Inputs) -> Results:
    """`out, lse`, and the gradients where the inputs have some."""
    out, lse = made(*inputs.qkv)
    if not inputs.query.requires_grad:
        return out, lse
    return out, lse, *torch.autograd.grad(out, inputs.qkv, inputs.dout)


def _copied(results: Results) -> Results:
    return tuple(x.detach().clone() for x in results)


def _check_kept(results: Sequence[Results], copies: Sequence[Results], names: Sequence[str]) -> None:
    """No later call wrote to what an earlier one had returned."""
    for returned, copy in zip(results, copies, strict=True):
        for name, x, y in zip(names, returned, copy, strict=True):
            if not torch.equal(x, y):
                raise Breach(f"a second call changed the {name} that the first had returned", claim=OWN)


def _give_way(*_: object) -> None:
    """Called at every call of a Python function: another thread may go on here, where it seldom would by itself."""
    time.sleep(0)
