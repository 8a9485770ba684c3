"""What a row may not see changes no bit of it: drawn problems, drawn edits, all five results compared bit for bit.

    python tests/stress/bits.py --cases 20000 --threads 1
    python tests/stress/bits.py --replay 1234

A case is its seed: backend, pattern, dtype, shape and layout in memory are drawn from it, then what is edited (keys,
values, queries or rows of dout; a row, some rows, the future, one head; a number of a row or all) and with what (NaN,
inf, -inf, 1e30, the dtype's largest, other random numbers). Who sees the edit is the oracle's word (`visible`), or the
choice's for `TopKBlocks`; the lowering is not asked. A row that sees the edit may change, and so may the gradients of
keys that such a row sees. Everything else must be equal: out, lse, dquery, dkey, dvalue. `CC=/bin/false` with a fresh
LONGSPAN_CACHE tests what runs without a C compiler.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import warnings
from collections import Counter
from functools import lru_cache
from itertools import pairwise

import torch
from attrs import frozen
from torch import Tensor

import longspan as ls
from longspan.errors import LongspanError
from longspan.testing.calls import RESULTS, changed, felt, gradients_too
from longspan.testing.oracle import visible

__all__ = ["BACKENDS", "Case", "changes", "draw"]

BACKENDS = ("cpu_fused", "sdpa", "reference", "block_sparse_batched", "torch_sparse", "flex")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "fused")
EDITS_EACH = 8
"""Seeds in a row that share a problem and its numbers, and so one plan and one run before the edit."""
EDITS = ("nan", "inf", "-inf", "1e30", "largest", "random")


@frozen
class Case:
    """One problem with one edit.

    Args:
        seed: draws the numbers.
        backend: by name.
        problem: what is computed.
        layouts: of query, key, value and dout in memory.
        target: query, key, value or dout.
        edit: one of `EDITS`.
        rows: `(batch entry or None for all, head or None for all, first token, token after the last)`.
        column: the number of a row that is edited; None: all.
    """

    seed: int
    backend: str
    problem: ls.Problem
    layouts: tuple[str, ...]
    target: str
    edit: str
    rows: tuple[int | None, int | None, int, int]
    column: int | None

    def __str__(self) -> str:
        p = self.problem
        more = f" documents={p.documents}" if p.documents else ""
        more += f" query_offset={p.query_offset}" if p.query_offset else ""
        where = f"{self.rows}{'' if self.column is None else f' column {self.column}'}"
        return f"[{self.seed}] {self.backend}: {p}{more} {self.layouts}, {self.edit} in {self.target} {where}"


def draw(seed: int, backends: tuple[str, ...] = BACKENDS) -> Case:
    """The case of a seed."""
    r = random.Random(seed // EDITS_EACH)
    backend = r.choices(backends, [1 if one == "flex" else 8 for one in backends])[0]  # its masks take long to make
    names = {"torch_sparse": ("float32", "float64")}
    halves = ("float16", "bfloat16", "float32")
    dtype = r.choice(names.get(backend, halves if backend in ("cpu_fused", "flex") else tuple(DTYPES)))
    long = r.random() < 0.04 and backend not in ("torch_sparse", "flex")
    n = r.choice((512, 515, 600, 1030)) if long else r.choice((1, 2, 5, 8, 13, 16, 31, 33, 48, 64, 65, 100, 130))
    kv_heads = 1 if long else r.choice((1, 1, 2, 3))
    heads = kv_heads * (1 if long else r.choice((1, 1, 1, 2, 4)))
    dim = r.choice((16, 32, 48, 64)) if backend == "flex" else r.choice((1, 3, 4, 8, 8, 16, 17, 24, 32, 40, 64, 80))
    batch = 1 if long else r.choice((1, 1, 2, 3))
    pattern, is_causal = _pattern(r, n, heads)
    documents, offset, q_len = None, 0, n
    if r.random() < 0.2 and n > 4:
        bounds = sorted(r.randrange(n + 1) for _ in range(r.choice((1, 2, 3))))
        documents = (0, *bounds, n) if r.random() < 0.7 or not bounds[-1] else (0, *bounds)
    elif r.random() < 0.2 and n > 2 and pattern.kind != "topk_blocks":
        q_len = r.randrange(1, n)
        offset = r.choice((n - q_len, r.randrange(n)))
    problem = ls.Problem(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=n,
        head_dim=dim,
        dtype=dtype,
        device="cpu",
        pattern=pattern,
        is_causal=is_causal,
        documents=documents,
        query_offset=offset,
        scale=r.choice((dim**-0.5, dim**-0.5, 0.3)),
        requires_grad=True,
    )
    layouts = tuple(r.choice(LAYOUTS) if r.random() < 0.6 else "contiguous" for _ in range(4))
    r = random.Random(seed + 1)
    target = r.choice(("key", "key", "value", "value", "query", "dout"))
    edit = r.choice(EDITS)
    if pattern.kind == "topk_blocks" and target in ("key", "query"):
        edit = "random"  # a choice among scores that are not finite is refused
    length, of_heads = (q_len, heads) if target in ("query", "dout") else (n, kv_heads)
    first = r.randrange(length)
    stop = r.choice((first + 1, first + 1, length, r.randrange(first, length) + 1))
    rows = (r.choice((None, r.randrange(batch))), r.choice((None, r.randrange(of_heads))), first, stop)
    column = r.choice((None, r.randrange(dim)))
    return Case(seed, backend, problem, layouts, target, edit, rows, column)


def _pattern(r: random.Random, n: int, heads: int) -> tuple[ls.Pattern, bool]:
    kind = r.choice(("dense", "window", "dilated", "grouped", "blocks", "blocks", "topk"))
    if kind == "dense":
        return ls.Dense(), r.random() < 0.9
    if kind == "window":
        return ls.SlidingWindow(r.randrange(0, n + 2), r.randrange(0, max(2, n // 2))), r.random() < 0.5
    if kind in ("dilated", "grouped"):
        count = min(r.choice((1, 2, 3)), heads) if kind == "grouped" else r.choice((1, 2, 3))
        lengths = tuple(r.randrange(1, n + 10) for _ in range(count))
        rates = tuple(r.choice((1, 1, 2, 3, 5)) for _ in range(count))
        if kind == "grouped":
            return ls.Dilated(lengths, rates, heads="grouped"), r.random() < 0.6
        return ls.Dilated(lengths, rates, offset=r.choice(("modulo", "block"))), r.random() < 0.6
    size = r.choice((4, 8, 16, 16, 32, 64))
    if kind == "topk":
        return ls.TopKBlocks(r.randrange(1, max(1, -(-n // size)) + 1), size), r.random() < 0.8
    leaves = [
        ls.local_blocks(r.randrange(0, 4), r.randrange(0, 3), block_size=size),
        ls.global_blocks(r.randrange(1, 3), block_size=size),
        ls.strided_blocks(r.randrange(1, 4), block_size=size),
        ls.random_blocks(r.choice((0.2, 0.5, 0.8)), block_size=size, seed=r.randrange(99)),
        ls.longformer(2 * r.randrange(1, 9), block_size=size),
        ls.bigbird(block_size=size),
    ]
    found = r.choice(leaves)
    for _ in range(r.choice((0, 1, 1, 2))):
        other = r.choice(leaves)
        found = r.choice((lambda a, b: a | b, lambda a, b: a & b, lambda a, b: a | ~b))(found, other)
    return found, r.random() < 0.6


def tensors(case: Case) -> dict[str, Tensor]:
    """Query, key, value and dout as they are before the edit, contiguous."""
    return _numbers(case.seed // EDITS_EACH, case.problem)


def _numbers(seed: int, p: ls.Problem) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (p.batch, p.heads, p.q_len, p.head_dim), (p.batch, p.kv_heads, p.kv_len, p.head_dim)
    shapes = {"query": queries, "key": keys, "value": keys, "dout": queries}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPES[p.dtype])
        for name, shape in shapes.items()
    }


def edited_rows(case: Case) -> Tensor:
    """`(batch, heads or key heads, tokens)` bool."""
    p = case.problem
    shape = (p.batch, p.heads, p.q_len) if case.target in ("query", "dout") else (p.batch, p.kv_heads, p.kv_len)
    entry, head, first, stop = case.rows
    found = torch.zeros(shape, dtype=torch.bool)
    every = slice(None)
    found[every if entry is None else entry, every if head is None else head, first:stop] = True
    return found


def touched(case: Case, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Which rows of out, lse, dquery, dkey and dvalue may change, each `(batch, heads or kv_heads, tokens)` bool."""
    p, marked, seen = case.problem, edited_rows(case), _sight(case, given)
    if p.pattern.kind == "topk_blocks" and case.target in ("key", "query"):
        rows = _chosen_anew(case, marked.repeat_interleave(p.heads // marked.shape[1], 1))
        found = felt(seen, rows, "query", p.kv_heads)
        keys = found[3] | marked if case.target == "key" else found[3]
        return *found[:3], keys, keys
    return felt(seen, marked, case.target, p.kv_heads)


def _sight(case: Case, given: dict[str, Tensor]) -> Tensor:
    p = case.problem
    pattern = p.pattern
    if pattern.kind == "topk_blocks" and case.target in ("value", "dout"):
        return pattern.choose(
            given["query"],
            given["key"],
            is_causal=p.is_causal,
            scale=p.scale,
            enable_gqa=True,
            cu_seqlens=p.documents,
        ).to_dense()
    counts = visible(
        ls.Dense() if pattern.kind == "topk_blocks" else pattern,
        p.heads,
        p.q_len,
        p.kv_len,
        is_causal=p.is_causal,
        cu_seqlens=p.documents,
        query_offset=p.query_offset,
    )
    return (counts > 0).expand(p.batch, -1, -1, -1)


def _chosen_anew(case: Case, marked: Tensor) -> Tensor:
    """Rows whose blocks may be others after an edit of keys or queries: later ones if causal, all of the document."""
    p = case.problem
    found = torch.zeros(p.batch, p.heads, p.q_len, dtype=torch.bool)
    bounds = p.documents or (0, p.q_len)
    for start, stop in pairwise(bounds):
        part = marked[:, :, start:stop]
        found[:, :, start:stop] = part.cummax(-1).values if p.is_causal else part.any(-1, keepdim=True)
    return found


def _edit(case: Case, tensor: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed + 1)
    largest = torch.finfo(tensor.dtype).max
    numbers = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "1e30": 1e30, "largest": largest}
    if case.edit == "random":
        new = 3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
    else:
        new = torch.full(tensor.shape, numbers[case.edit], dtype=torch.float64).to(tensor.dtype)
    where = edited_rows(case).unsqueeze(-1).expand(tensor.shape).clone()
    if case.column is not None:
        where[..., : case.column] = where[..., case.column + 1 :] = False
    return torch.where(where, new, tensor)


def laid(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers in memory of another shape, at the same place in it whatever the numbers."""
    batch, heads, length, width = tensor.shape
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    shapes = {
        "sliced": (
            (batch, heads + 2, length + 5, width + 3),
            (slice(None), slice(1, -1), slice(2, -3), slice(3, None)),
        ),
        "strided": ((batch, heads, length, 2 * width), (..., slice(None, None, 2))),
        "fused": ((batch, length, heads, 3 * width), (..., slice(width, 2 * width))),
    }
    if layout not in shapes:
        return tensor.contiguous()
    shape, where = shapes[layout]
    view = torch.zeros(shape, dtype=tensor.dtype)[where]
    view = view.transpose(1, 2) if layout == "fused" else view
    return view.copy_(tensor)


def changes(case: Case) -> list[str] | None:
    """What changed that may not see the edit, in words; None where the backend does not take the problem."""
    shared = _unedited(case.seed // EDITS_EACH, case.backend, case.problem, case.layouts)
    if shared is None:
        return None
    plan, before = shared
    given = tensors(case)
    after = gradients_too(plan, _laid(case.layouts, {**given, case.target: _edit(case, given[case.target])}))
    found = []
    for name, old, new, rows in zip(RESULTS, before, after, touched(case, given), strict=True):
        if count := changed(old[~rows], new[~rows]):
            off = (new[~rows].double() - old[~rows].double()).abs().max()
            found.append(f"{name}: {count} numbers of {int((~rows).sum())} rows, by {float(off):.3g} at most")
    return found


@lru_cache(maxsize=1)
def _unedited(
    seed: int, backend: str, problem: ls.Problem, layouts: tuple[str, ...]
) -> tuple[ls.Plan, tuple[Tensor, ...]] | None:
    try:
        plan = ls.plan(problem, backend)
    except LongspanError:
        return None
    return plan, gradients_too(plan, _laid(layouts, _numbers(seed, problem)))


def _laid(layouts: tuple[str, ...], given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: laid(x, layout) for (name, x), layout in zip(given.items(), layouts, strict=True)}


def main() -> int:
    """Run cases, print those that changed, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next have the next")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", action="append", help="only these")
    parser.add_argument("--replay", type=int, help="one case")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads)
    backends = tuple(given.backend or BACKENDS)
    seeds = [given.replay] if given.replay is not None else range(given.seed, given.seed + given.cases)
    ran: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    refused = 0
    for seed in seeds:
        case = draw(seed, backends)
        found = changes(case)
        if found is None:
            refused += 1
            continue
        ran[case.backend] += 1
        if found:
            changed[case.backend] += 1
            print(f"{case}\n    {'; '.join(found)}", flush=True)
        elif given.replay is not None:
            print(f"{case}\n    no change", flush=True)
    for backend in ran:
        print(f"{backend}: {changed[backend]} of {ran[backend]} changed")
    print(f"{sum(changed.values())} of {sum(ran.values())} cases changed; {refused} drawn problems are refused")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
