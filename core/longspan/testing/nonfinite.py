"""The check of `Capabilities.contains_nonfinite`: who may feel an edit, and whether anybody else did, to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from longspan.spec.problem import Problem
from longspan.testing.answers import sight
from longspan.testing.outcome import Breach
from longspan.testing.tensors import Inputs

__all__ = ["RESULTS", "breach_of_containment", "changed", "felt", "gradients_too"]

RESULTS = ("out", "lse", "dquery", "dkey", "dvalue")
"""What is compared, in order."""

Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def breach_of_containment(problem: Problem, run: Run, inputs: Inputs) -> None:
    """Put NaN, inf and huge numbers into a row of keys, values, queries and dout, and look at all results.

    Raises:
        Breach: something changed that may not feel the edit, or two runs differ anyway.
    """
    given = {"query": inputs.query, "key": inputs.key, "value": inputs.value, "dout": inputs.dout}
    before, again = gradients_too(run, given), gradients_too(run, given)
    if any(changed(old, new) for old, new in zip(before, again, strict=True)):
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
