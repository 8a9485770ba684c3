"""The checks of what one call of a plan is to another: the same again, kept apart, at once, and after an edit."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from threading import Barrier

import torch
from torch import Tensor

from longspan.planning.plan import Plan
from longspan.testing import tolerance
from longspan.testing.answers import sight
from longspan.testing.outcome import Breach
from longspan.testing.side_effects import only_read
from longspan.testing.tensors import Inputs
from longspan.testing.workbench import OWN, Bench, Measures

__all__ = ["RESULTS", "again", "changed", "contain", "felt", "gradients_too", "repeat", "threads"]

RESULTS = ("out", "lse", "dquery", "dkey", "dvalue")
"""What is compared, in order."""
THREADS = 4
ROUNDS = 3
"""How often each thread calls the plan."""

Results = tuple[Tensor, ...]
Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def repeat(bench: Bench) -> Measures:
    """The same inputs, the same bits, forward and backward; forward alone where no backward is to be had."""
    problem, made = bench.trained(bench.problem())
    inputs = bench.inputs(problem.requires_grad)
    first = _results(made, inputs)
    for _ in range(2):
        for name, got, want in zip(RESULTS, _results(made, inputs), first, strict=False):
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
    _check_kept(forwards, copies, RESULTS[:2])
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
        _check_kept(backwards, copies, RESULTS[2:])
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
            for name, x, y in zip(RESULTS, results, want, strict=False):
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


def contain(bench: Bench) -> Measures:
    """NaN, inf and huge numbers in a row of keys, values, queries or dout reach nothing that may not see it."""
    problem = bench.problem()
    run, inputs = bench.plan(problem), bench.inputs(False)
    given = {"query": inputs.query, "key": inputs.key, "value": inputs.value, "dout": inputs.dout}
    before, repeated = gradients_too(run, given), gradients_too(run, given)
    if any(changed(old, new) for old, new in zip(before, repeated, strict=True)):
        raise Breach("two runs differ in their bits")
    seen = (sight(problem) > 0).to(inputs.query.device).expand(problem.batch, -1, -1, -1)
    for name, source in given.items():
        token = source.shape[2] * 2 // 3
        marked = torch.zeros(source.shape[:3], dtype=torch.bool, device=source.device)
        marked[:, :, token] = True
        blind = [~rows for rows in felt(seen, marked, name, problem.kv_heads)]
        for number in (math.nan, math.inf, torch.finfo(source.dtype).max):
            edited = source.clone()
            edited[:, :, token] = number
            after = gradients_too(run, {**given, name: edited})
            for result, old, new, where in zip(RESULTS, before, after, blind, strict=True):
                if count := changed(old[where], new[where]):
                    words = f"{number:.3g} in {name} {token} changes {count} numbers of {result}"
                    raise Breach(f"{words} in rows that may not feel it")
    return ()


def felt(seen: Tensor, marked: Tensor, name: str, kv_heads: int) -> tuple[Tensor, ...]:
    """Which rows of each result, in the order of `RESULTS`, an edit may change: `(batch, heads, tokens)` bool.

    A row may change that is edited or sees what is, and so may the gradient of a key that such a row sees.

    Args:
        seen: which query sees which key, `(batch, heads, q_len, kv_len)` bool.
        marked: the edited rows of the tensor, of its shape without the last dimension, bool.
        name: the tensor: query, key, value or dout.
        kv_heads: how many key heads there are.
    """
    group = max(1, seen.shape[1] // max(1, kv_heads))
    of_keys = name in ("key", "value")
    rows = (seen & marked.repeat_interleave(group, 1).unsqueeze(2)).any(-1) if of_keys else marked
    results = torch.zeros_like(rows) if name == "dout" else rows
    keys = torch.unflatten((seen & rows.unsqueeze(-1)).any(2), 1, (kv_heads, group)).any(2)
    keys = keys | marked if of_keys else keys
    return results, results, rows, keys, keys


def gradients_too(run: Run, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The results, in the order of `RESULTS`, for query, key, value and dout."""
    query, key, value = (given[name].detach().requires_grad_() for name in ("query", "key", "value"))
    out, lse = run(query, key, value)
    return (out.detach(), lse.detach(), *torch.autograd.grad(out, (query, key, value), given["dout"]))


def changed(old: Tensor, new: Tensor) -> int:
    """How many numbers have other bits; NaN is NaN."""
    return int(((_bits(old) != _bits(new)) & ~(old.isnan() & new.isnan())).sum())


def _bits(tensor: Tensor) -> Tensor:
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])
