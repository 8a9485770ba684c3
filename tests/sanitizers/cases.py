"""The cases of `fuzz.py`: how one is drawn, run and judged."""

from __future__ import annotations

import contextlib
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

import longspan as ls
from longspan.testing import oracle
from longspan_plugins.cpu_fused import library, native
from longspan_plugins.cpu_fused.patterns import program_for

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 1e-2}
AGAIN = "Again: python tests/sanitizers/fuzz.py --seed {} --only {}"
MOST_WORK = 10**7
MOST = 10
"""Wrong results that end a run."""
GRADIENTS = 4
"""Times the tolerance, for what is summed over rows."""


class Wrong(Exception):
    """A result, or an error, that is no answer to the case."""


class Wrapper(Tensor):
    """A tensor whose numbers lie in another, as those of a DTensor do."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Wrapper, lambda x: x.inner, (args, kwargs or {}))
        return function(*args, **kwargs)


class Named(Tensor):
    """A class of its own, in memory of its own."""


class Case:
    """One problem with its tensors, and how they are handed over."""

    def __init__(self, seed: int, number: int) -> None:
        self.number = number
        self.draw = draw = random.Random(f"{seed}/{number}")
        self.generator = torch.Generator().manual_seed(draw.getrandbits(60))
        self.dtype = draw.choice(list(TOLERANCE))
        self.batch = draw.choice([0, 1, 1, 1, 2, 3])
        self.kv_heads = draw.choice([0, 1, 1, 2, 2, 3])
        self.heads = self.kv_heads * draw.choice([1, 1, 1, 2, 3])
        self.dim = draw.choice([1, 2, 3, 8, 15, 16, 17, 24, 32, 33, 64, 100, 128, 129, 260, draw.randint(1, 260)])
        self.q_len = draw.choice([0, 1, 7, 8, 9, 31, 64, 127, 128, 129, draw.randint(1, 200), draw.randint(100, 330)])
        self.kv_len = self.q_len if draw.random() < 0.7 else draw.choice([0, 1, 5, 64, draw.randint(1, 300)])
        if self.batch * self.heads * self.q_len * self.kv_len * (self.dim + 100) > MOST_WORK:  # many are to be drawn
            self.batch, self.heads, self.kv_heads = min(self.batch, 1), min(self.heads, 2), min(self.kv_heads, 1)
        self.is_causal = draw.random() < 0.5
        self.scale = draw.choice([None, None, None, 0.3, -0.2, 0.0, 1e-30])
        self.offset = draw.choice([0, 0, 3, 40, 1000]) if self.q_len == self.kv_len else draw.randint(0, 300)
        self.documents: tuple[int, ...] | None = None
        if self.q_len == self.kv_len and draw.random() < 0.2:
            self.offset = 0
            cuts = sorted(draw.randint(0, self.q_len) for _ in range(draw.randint(1, 4)))
            self.documents = (0, *cuts, *([self.q_len] if draw.random() < 0.5 else []))
        self.dropout = draw.choice([0.0, 0.0, 0.0, 0.3])
        self.pattern = self._pattern()
        self.backend = draw.choice(["cpu_fused"] * 6 + [None])
        if isinstance(self.pattern, ls.TopKBlocks) and self.documents:
            self.dropout = 0.0
        self.default = draw.choice([torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.float16])
        self.place = draw.choice([None] * 5 + ["meta"])
        self.threads = draw.choice([1, 1, 2, 3, 8])
        self.callers = draw.choice([1] * 7 + [3])
        self.mode = draw.choice(
            ["grad"] * 10
            + ["plan", "plan", "no_grad", "inference", "operator", "vmap", "func", "wrong", "wrong", "wrong", "make_fx"]
        )
        if self.mode in ("plan", "wrong"):  # these draw on
            self.callers = 1
        self.kinds = [draw.choice(list(LAYOUTS)) for _ in range(4)]
        self.classes = [draw.choice(["plain"] * 12 + ["parameter", "named", "negative"]) for _ in range(4)]
        if draw.random() < 0.04:
            self.classes[draw.randrange(3)] = draw.choice(["wrapper", "fake", "freed", "cut"])

    def _pattern(self) -> ls.Pattern:
        draw = self.draw
        size = draw.choice([16, 32, 48, 128, 160])
        longest = max(1, min(self.q_len, self.kv_len))
        topk = min(size, 32)

        def blocks() -> Any:
            return draw.choice(
                [
                    lambda: ls.local_blocks(draw.randint(0, 100), draw.randint(0, 40), block_size=size),
                    lambda: ls.random_blocks(draw.random(), block_size=size, seed=draw.randint(0, 99)),
                    lambda: ls.global_tokens((0, draw.randint(0, longest - 1)), block_size=size),
                    lambda: ls.dilated_blocks(draw.randint(1, 3), draw.randint(1, 3), block_size=size),
                    lambda: ls.strided_blocks(draw.randint(1, 4), block_size=size),
                    lambda: ~ls.random_blocks(draw.random(), block_size=size, seed=draw.randint(0, 99)),
                ]
            )()

        def dilated(heads: str) -> ls.Pattern:
            count = draw.randint(1, 3 if heads == "all" else max(1, min(3, self.heads)))
            lengths = tuple(draw.randint(8, 260) for _ in range(count))
            rates = tuple(draw.randint(1, min(6, w)) for w in lengths)
            return ls.Dilated(lengths, rates, heads=heads, offset=draw.choice(["modulo", "block"]))

        return draw.choice(
            [
                ls.Dense,
                ls.Dense,
                lambda: ls.SlidingWindow(draw.randint(0, 150), draw.choice([0, 0, 5, 90, 2**62])),
                lambda: dilated("all"),
                lambda: dilated("grouped" if self.heads else "all"),
                blocks,
                lambda: blocks() | blocks(),
                lambda: blocks() & blocks(),
                lambda: ls.TopKBlocks(
                    draw.randint(1, 4) if longest > 96 and not self.documents else 1, block_size=topk
                ),
            ]
        )()

    def tensors(self) -> list[Tensor]:
        """Query, key, value and a gradient, plain."""
        shapes = [(self.heads, self.q_len), *[(self.kv_heads, self.kv_len)] * 2, (self.heads, self.q_len)]
        return [
            LAYOUTS[kind](self, (self.batch, heads, length, self.dim))
            for kind, (heads, length) in zip(self.kinds, shapes, strict=True)
        ]

    def fresh(self, *shape: int) -> Tensor:
        made = torch.randn(shape, dtype=torch.float32, device="cpu", generator=self.generator)
        return made.to(self.dtype)

    @property
    def given(self) -> dict[str, Any]:
        """The arguments of `longspan.attention` beside the tensors."""
        more: dict[str, Any] = {"is_causal": self.is_causal, "scale": self.scale}
        if self.heads != self.kv_heads:
            more["enable_gqa"] = True
        if self.documents is not None:
            more["cu_seqlens"] = self.documents
        elif self.offset or self.q_len != self.kv_len:
            more["query_offset"] = self.offset
        return more

    def __repr__(self) -> str:
        told = {key: value for key, value in vars(self).items() if key not in ("draw", "generator")}
        return ", ".join(f"{key}={value}" for key, value in told.items())


def _tail(case: Case, shape: tuple[int, ...]) -> Tensor:
    """Its last number is the last of its storage, and its first at an odd place."""
    count, start = math.prod(shape), case.draw.choice([1, 3, 7])
    return case.fresh(start + count)[start:].view(shape)


LAYOUTS: dict[str, Callable[[Case, tuple[int, ...]], Tensor]] = {
    "whole": lambda case, s: case.fresh(*s),
    "tail": _tail,
    "bshd": lambda case, s: case.fresh(s[0], s[2], s[1], s[3]).transpose(1, 2),
    "packed": lambda case, s: case.fresh(s[0], s[2], 3, s[1], s[3])[:, :, 2].transpose(1, 2),
    "wide": lambda case, s: case.fresh(*s[:3], s[3] + 3)[..., 1 : s[3] + 1],
    "rows": lambda case, s: case.fresh(s[0], s[1], 2 * s[2] + 1, s[3])[:, :, 1::2],
    "gaps": lambda case, s: case.fresh(*s[:3], 2 * s[3])[..., ::2],
    "column": lambda case, s: case.fresh(s[0], s[1], s[3], s[2]).transpose(2, 3),
    "one-entry": lambda case, s: case.fresh(1, *s[1:]).expand(s),
    "one-head": lambda case, s: case.fresh(s[0], 1, *s[2:]).expand(s),
    "one-row": lambda case, s: case.fresh(*s[:2], 1, s[3]).expand(s),
    "one-number": lambda case, s: case.fresh(1, 1, 1, 1).expand(s),
    "odd-one": lambda case, s: case.fresh(*s, 3)[..., 1],
}


def dressed(tensor: Tensor, kind: str) -> Tensor:
    """The same numbers as another kind of tensor."""
    if kind == "parameter":
        return Parameter(tensor)
    if kind == "named":
        return tensor.as_subclass(Named)
    if kind == "negative":
        return torch._neg_view(-tensor)
    if kind == "wrapper":
        return Wrapper(tensor)
    if kind == "fake":
        return FakeTensorMode().from_tensor(tensor)
    if kind in ("freed", "cut"):
        copy = tensor.clone(memory_format=torch.contiguous_format)
        copy.untyped_storage().resize_(0 if kind == "freed" else max(0, copy.untyped_storage().nbytes() - 2))
        return copy
    return tensor


@contextlib.contextmanager
def defaults(dtype: torch.dtype, place: str | None):
    torch.set_default_dtype(dtype)
    try:
        with torch.device(place) if place else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def wanted(case: Case, tensors: list[Tensor], slopes: bool) -> list[Tensor]:
    """`[out, dquery, dkey, dvalue]` of plain torch in double precision; without `slopes`, `[out]`."""
    if 0 in (case.batch, case.heads):
        return [torch.zeros_like(x, dtype=torch.float64) for x in (tensors[0], *tensors[:3])]
    wide = [x.detach().double().requires_grad_() for x in tensors[:3]]
    if case.dropout or isinstance(case.pattern, ls.TopKBlocks):  # a choice follows the dtype's rounding
        if not case.dropout:
            wide = [x.detach().clone().requires_grad_() for x in tensors[:3]]
        out = ls.attention(
            *wide, case.pattern, **case.given, dropout_p=case.dropout, dropout_seed=5, backend="reference"
        )
    else:
        out = oracle(*wide, case.pattern, **case.given)
    return [out, *gradients(out, wide, tensors[3].to(out.dtype))] if slopes else [out]


def gradients(out: Tensor, leaves: list[Tensor], dout: Tensor) -> list[Tensor]:
    """Of what chooses among no blocks, autograd has no record."""
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    return list(torch.autograd.grad(out, leaves, dout))


def close(case: Case, found: Iterable[Tensor], want: Iterable[Tensor], what: str) -> None:
    tolerance = TOLERANCE[case.dtype]
    for number, (one, other) in enumerate(zip(found, want, strict=True)):
        limit = tolerance * (GRADIENTS if number else 1)
        size = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        wrong = float((one.double() - other.double()).abs().max()) if other.numel() else 0.0
        if one.shape != other.shape or not wrong <= limit * size:
            raise Wrong(f"{what}, result {number}: off by {wrong:.3g} of {size:.3g}")


def attend(case: Case, tensors: list[Tensor]) -> str:
    """Run the case; returns what became of it."""
    plain = tensors
    tensors = [dressed(x, kind) for x, kind in zip(plain, case.classes, strict=True)]
    if {"freed", "cut"} & set(case.classes):
        return straight(case, plain, tensors)
    more = {**case.given, "dropout_p": case.dropout, "backend": case.backend}
    if case.dropout:
        more["dropout_seed"] = 5
    odd = any(kind in ("wrapper", "fake", "freed", "cut") for kind in case.classes)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ls.attention(query, key, value, case.pattern, **more)

    with defaults(case.default, case.place):
        if case.mode in ("no_grad", "inference") or odd:
            with torch.inference_mode() if case.mode == "inference" else torch.no_grad():
                found = [run(*tensors[:3])]
        elif case.mode == "plan":
            leaves = tensors[:3]
            problem = ls.Problem.like(*leaves, pattern=case.pattern, dropout_p=case.dropout, **case.given)
            made = ls.plan(problem, backend=case.backend)
            with torch.no_grad():
                out, lse = made(*leaves, **({"dropout_seed": 5} if case.dropout else {}))
                dlse = case.draw.choice([None, torch.zeros_like(lse), torch.zeros_like(lse[..., :1]).expand_as(lse)])
                found = [out, *made.backward(tensors[3], *leaves, out, lse, dlse=dlse, seed=5)]
        elif case.mode == "wrong":
            return misuse(case, plain)
        elif case.mode == "vmap" and not case.dropout:
            stacked = [torch.stack([x, x]) for x in plain[:3]]
            found = [torch.vmap(run)(*stacked)[1]]
        elif case.mode == "func" and not case.dropout:
            out, pull = torch.func.vjp(run, *plain[:3])
            found = [out, *pull(plain[3])]
        elif case.mode == "make_fx" and not case.dropout:
            from torch.fx.experimental.proxy_tensor import make_fx

            found = [make_fx(run)(*plain[:3])(*plain[:3])]
        else:
            leaves = [x.detach().requires_grad_() for x in tensors[:3]]
            by = ls.checkpoint if case.mode == "operator" else lambda function, *x: function(*x)
            out = by(run, *leaves)
            found = [out, *gradients(out, leaves, tensors[3])]
    if isinstance(found[0], Tensor) and type(found[0]).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return "an answer of its own class"
    if isinstance(case.pattern, ls.TopKBlocks) and case.kinds[1] in ("one-number", "one-row"):
        return "a choice among equals"  # it follows the rounding, and so the strides
    want = wanted(case, plain, len(found) > 1)
    close(case, found, want[: len(found)], "against the reference")
    return "right"


def straight(case: Case, plain: list[Tensor], tensors: list[Tensor]) -> str:
    """To the kernel, past all that would copy: torch itself does not survive reading what was freed."""
    problem = ls.Problem.like(*plain[:3], pattern=case.pattern, **case.given)
    chooses = isinstance(case.pattern, ls.TopKBlocks)
    program = None if chooses else program_for(problem, library.load())
    if program is None:
        return "no program"
    kernel = native.kernel(problem, program, library.load())
    query, key, value = (x.contiguous() for x in plain[:3])
    out, lse = kernel.forward(query, key, value)
    kernel.forward(*tensors[:3])
    kernel.backward(tensors[3], *tensors[:3], out, lse)
    return "served"


def misuse(case: Case, tensors: list[Tensor]) -> str:
    """`Plan.backward` with what is not the forward's."""
    query, key, value, dout = tensors
    draw = case.draw
    problem = ls.Problem.like(query, key, value, pattern=case.pattern, dropout_p=case.dropout, **case.given)
    made = ls.plan(problem, backend=case.backend)
    with torch.no_grad():
        out, lse = made(query, key, value)
        given = {"dout": dout, "query": query, "key": key, "value": value, "out": out, "lse": lse, "dlse": lse}
        for name in draw.sample(list(given), draw.randint(1, 3)):
            x = given[name]
            ways = [
                x.double(),
                x.half() if x.dtype is not torch.float16 else x.float(),
                x.to("meta"),
                x[..., : x.shape[-1] // 2],
                x[:, :, : x.shape[2] // 2],
                x[:, :1],
                x[:0],
                x.flatten(),
                x.unsqueeze(0),
                torch.cat([x, x], 2),
                Wrapper(x),
                x.to(torch.int32),
                x.to_sparse() if x.numel() else x,
                None,
                0,
                x.transpose(-1, -2),
                x.to(torch.complex64),
            ]
            given[name] = draw.choice(ways)
        made.backward(**given, seed=0)
    return "served"


def refused(case: Case, error: Exception) -> bool:
    """Whether an error is an answer: to tensors without numbers, or that are not the plan's."""
    if any(kind in ("fake", "wrapper", "freed", "cut") for kind in case.classes):
        return True  # torch refuses some of them in its own words
    return case.mode == "wrong" and (isinstance(error, ls.ArgumentError) or "storage" in str(error))


def run_case(case: Case) -> str:
    """What became of it.

    Raises:
        Wrong: it was.
    """
    torch.set_num_threads(case.threads)
    native.PAYS = 1 if case.threads > 1 else 2**21  # else small problems have one thread
    tensors, told = case.tensors(), []

    def once() -> None:
        try:
            told.append(attend(case, tensors))
        except Wrong as error:
            told.append(error)
        except Exception as error:  # noqa: BLE001 - every kind is judged
            kind = f"refused: {type(error).__name__}"
            told.append(kind if refused(case, error) else Wrong(f"{type(error).__name__}: {error}"))

    with torch.random.fork_rng(devices=[]):
        # The default dtype is every thread's, and so is what make_fx patches.
        if case.callers == 1 or case.default is not torch.float32 or case.mode == "make_fx":
            once()
        else:
            callers = [threading.Thread(target=once) for _ in range(case.callers)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
    for one in told:
        if isinstance(one, Wrong):
            raise one
    return str(told[0])


def run(seed: int, numbers: range, current: Path) -> int:
    """Run these cases; 0 where all were right. `current` holds the case that is running, should it be the last."""
    counts: Counter[str] = Counter()
    wrong = 0
    for number in numbers:
        case = Case(seed, number)
        current.write_text(f"case {number} of seed {seed}: {case}\n{AGAIN.format(seed, number)}\n")
        try:
            counts[run_case(case)] += 1
        except Wrong as error:
            print(f"{error}\n{current.read_text()}", flush=True)
            wrong += 1
            if wrong == MOST:
                break
    told = ", ".join(f"{many} {what}" for what, many in counts.most_common())
    print(f"Cases {numbers.start} to {number} of seed {seed}: no report, {wrong} wrong, {told}", flush=True)
    return 1 if wrong else 0
