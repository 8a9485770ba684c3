"""What attention computes while torch's defaults are somebody's: to be bit for bit what it computes without.

`python defaults.py BACKEND ...` plans everything cold under other defaults first, and compares with a plain run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import longspan as ls
from small import assert_same, qkv, randn

DEFAULTS = [
    (torch.float64, None),
    (torch.bfloat16, None),
    (torch.float16, "meta"),
    (torch.float32, "meta"),
]
PATTERNS = {
    "dense": (ls.Dense(), {}),
    "window": (ls.SlidingWindow(20, 3), {}),
    "causal": (ls.Dense(), {"is_causal": True}),
    "dilated": (ls.Dilated((48, 96), (1, 2)), {"is_causal": True}),
    "grouped": (ls.Dilated((48, 96), (1, 3), heads="grouped"), {}),
    "random": (ls.random_blocks(0.4, block_size=16, seed=5) | ls.local_blocks(20, 0, block_size=16), {}),
    "global": (ls.longformer(24, (0, 40), block_size=16) & ~ls.dilated_blocks(3, 4, block_size=16), {}),
    "heads": (ls.per_head([ls.local_blocks(40, 0, block_size=32), ls.global_blocks(1, block_size=32)]), {}),
    "top-k": (ls.TopKBlocks(2, block_size=16), {"is_causal": True}),
    "documents": (ls.Dense(), {"is_causal": True, "cu_seqlens": (0, 40, 41, 100)}),
    "dropout": (ls.Dense(), {"dropout_p": 0.3, "dropout_seed": 7}),
}


@contextmanager
def defaults(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if device is None:
            yield
        else:
            with torch.device(device):
                yield
    finally:
        torch.set_default_dtype(before)


def inputs_for(dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key, value and a gradient; made under plain defaults."""
    return [*qkv(1, 2, 110, 16, dtype=dtype), randn(1, 2, 110, 16, seed=9, dtype=dtype)]


def results(backend: str, name: str, tensors: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """`(out, lse)` and gradients of a plan that nothing kept; None where the backend refuses the problem."""
    pattern, given = PATTERNS[name]
    seed = given.get("dropout_seed")
    more = {key: value for key, value in given.items() if key != "dropout_seed"}
    problem = ls.Problem.like(*tensors[:3], pattern=pattern, **more)
    ls.pattern_cache().clear()
    if backend not in {one.name for one in ls.explain(problem).candidates}:
        raise LookupError(backend)
    try:
        plan = ls.plan(problem, backend=backend)
    except ls.BackendUnavailable:
        return None
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out, lse = plan(*leaves, dropout_seed=seed)
    grads = torch.autograd.grad(out, leaves, tensors[3], retain_graph=True)  # by the backend's own backward, if any
    both = torch.autograd.grad([out, lse], leaves, [tensors[3], torch.ones_like(lse) / 7])  # by the core's
    with torch.no_grad():
        assert_same(plan(*tensors[:3], dropout_seed=seed), (out, lse))
    return [out, lse, *grads, *both]


def check(backend: str, dtype: torch.dtype, device: str | None) -> int:
    """How many patterns it served, the same under these defaults and without; `backend` may name a dtype after it."""
    backend, _, precision = backend.partition(" ")
    tensors, served = inputs_for(getattr(torch, precision or "float32")), 0
    for name in list(PATTERNS)[:2] if backend == "flex" else PATTERNS:  # uncompiled it takes seconds for the others
        with defaults(dtype, device):
            found = results(backend, name, tensors)
        want = results(backend, name, tensors)
        assert (found is None) == (want is None), f"{backend}, {name}: served under one default and not the other"
        if found is not None and want is not None:
            assert_same(found, want)
            served += 1
    return served


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        for one in DEFAULTS[-2:]:
            print(chosen, *one, check(chosen, *one), flush=True)
