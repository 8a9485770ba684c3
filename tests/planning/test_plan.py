"""Plans, and the promise behind them: bring one dense kernel, get every pattern, forward and backward."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import longspan as ls
import small
from longspan import Capabilities, blockwise, hookimpl
from longspan.registry.discovery import registry
from longspan.testing.oracle import oracle
from small import randn

qkv = partial(small.qkv, n=21, dim=6)

VARIABLES = ("LONGSPAN_BACKEND", "LONGSPAN_PREFER", "LONGSPAN_BLOCK", "LONGSPAN_PLUGINS", "LONGSPAN_STRICT")
BACKENDS = ("sdpa", "reference")
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def close(got, want, atol=1e-12, what=""):
    assert got.shape == want.shape, what
    assert torch.equal(got == -math.inf, want == -math.inf), f"{what}: -inf in other places"
    finite = want.isfinite()
    torch.testing.assert_close(got[finite].double(), want[finite].double(), rtol=0, atol=atol, msg=what or None)


# --- a third party's kernels ----------------------------------------------------------------------------------------


class TenLines:
    """The smallest backend that the design shows: dense, one forward, in plain torch."""

    @hookimpl
    def longspan_capabilities(self):
        return Capabilities(devices=("cpu",), dtypes=("float32", "float64"), patterns=("dense",), causal=True)

    @hookimpl
    def longspan_kernel(self, problem):
        def forward(q, k, v):
            scores = problem.scale * q @ k.transpose(-1, -2)
            if problem.is_causal:
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            return scores.softmax(-1) @ v, scores.logsumexp(-1)

        return forward


class Picky(TenLines):
    """The same, and it checks what the contract promises to a kernel."""

    def __init__(self, gqa=False, backward=False, causal=True):
        self.gqa, self.has_backward, self.causal = gqa, backward, causal
        self.problems, self.backwards, self.forwards = [], 0, 0

    @hookimpl
    def longspan_capabilities(self):
        return Capabilities(
            devices=("cpu",), dtypes=("float16", "bfloat16", "float32", "float64"), patterns=("dense",),
            causal=self.causal, gqa=self.gqa, backward=self.has_backward,
        )  # fmt: skip

    @hookimpl
    def longspan_kernel(self, problem):
        self.problems.append(problem)
        given = {"is_causal": problem.is_causal, "scale": problem.scale}

        def check(q, k, v):
            assert q.dim() == k.dim() == v.dim() == 4
            assert k.shape == v.shape
            assert q.shape[0] == k.shape[0]
            assert q.shape[1] % k.shape[1] == 0
            assert self.gqa or q.shape[1] == k.shape[1], "this kernel takes no shared key heads"
            assert (q.shape[2], k.shape[2], q.shape[3]) == (problem.q_len, problem.kv_len, problem.head_dim)
            assert not problem.is_causal or q.shape[2] == k.shape[2]
            assert str(q.dtype).removeprefix("torch.") == problem.dtype == str(v.dtype).removeprefix("torch.")
            assert not (q.requires_grad or k.requires_grad or v.requires_grad) or not torch.is_grad_enabled()
            assert q.shape[-1] == 1 or q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "a last dimension with gaps"
            assert 0 not in q.shape and 0 not in k.shape, "launched for nothing"

        def forward(q, k, v):
            self.forwards += 1
            check(q, k, v)
            return blockwise.forward(q, k, v, **given)

        def backward(dout, q, k, v, out, lse):
            self.backwards += 1
            check(q, k, v)
            assert dout.shape == out.shape == q.shape
            assert dout.dtype == out.dtype == q.dtype
            assert lse.shape == q.shape[:3]
            assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
            assert q.shape[-1] == 1 or dout.stride(-1) == out.stride(-1) == 1, "a last dimension with gaps"
            return blockwise.backward(dout, q, k, v, out, lse, **given)

        return ls.Kernel(forward, backward if self.has_backward else None)


CASES = {
    "dense": ({}, {}),
    "dense causal": ({}, {"is_causal": True}),
    "dilated": ({}, {"pattern": ls.Dilated((5, 9, 40), (1, 2, 3)), "is_causal": True}),
    "dilated to both sides": ({}, {"pattern": ls.Dilated((5, 9), (2, 3))}),
    "dilated block": ({}, {"pattern": ls.Dilated((6, 13), (2, 3), offset="block"), "is_causal": True}),
    "grouped": ({}, {"pattern": ls.Dilated((5, 9, 40), (1, 2, 3), heads="grouped"), "is_causal": True}),
    "shared heads": ({"kv_heads": 2}, {"enable_gqa": True, "is_causal": True}),
    "one key head": ({"kv_heads": 1}, {"enable_gqa": True, "pattern": ls.Dilated((5, 9), (1, 2)), "is_causal": True}),
    "shared and dilated": ({"kv_heads": 2}, {"enable_gqa": True, "pattern": ls.Dilated((5, 9), (3, 2))}),
    "offset": ({"n": 7, "kv_len": 21}, {"query_offset": 14, "is_causal": True}),
    "offset within": ({"n": 7, "kv_len": 21}, {"query_offset": 3, "is_causal": True}),
    "offset dilated": (
        {"n": 7, "kv_len": 21}, {"query_offset": 11, "is_causal": True, "pattern": ls.Dilated((4, 10), (1, 3))}
    ),
    "one token": ({"n": 1, "kv_len": 21}, {"query_offset": 20, "is_causal": True}),
    "more queries than keys": ({"n": 21, "kv_len": 7}, {"query_offset": 0, "is_causal": True}),
    "documents": ({}, {"cu_seqlens": (0, 4, 4, 15, 19), "is_causal": True}),
    "documents dilated": ({}, {"cu_seqlens": (0, 4, 15), "pattern": ls.Dilated((4, 10), (1, 3)), "is_causal": True}),
    "documents of both": ({"kv_heads": 2}, {"cu_seqlens": (0, 9, 21), "enable_gqa": True}),
    "scale": ({}, {"scale": -0.4, "pattern": ls.Dilated((5,), (2,))}),
    "scale zero": ({}, {"scale": 0.0, "is_causal": True}),
}  # fmt: skip


def judge(backend, tensors, arguments, atol=1e-12):
    out, lse = ls.attention(*tensors, backend=backend, return_lse=True, **arguments)
    want, want_lse = oracle(*tensors, return_lse=True, **arguments)
    close(out, want, atol, "out")
    close(lse, want_lse, atol, "lse")
    dout = randn(*want.shape, seed=9)
    got = torch.autograd.grad(out, tensors, dout.to(out.dtype))
    for one, other, name in zip(got, torch.autograd.grad(want, tensors, dout), ("dq", "dk", "dv"), strict=True):
        close(one, other, atol, name)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "make",
    [TenLines, Picky, lambda: Picky(gqa=True), lambda: Picky(backward=True), lambda: Picky(gqa=True, backward=True)],
    ids=["ten lines", "picky", "gqa", "backward", "both"],
)
def test_one_dense_kernel_serves_everything(register, case, make):
    sizes, arguments = CASES[case]
    plugin = make()
    judge(register(plugin, "test-mine"), qkv(**sizes, grad=True), arguments)
    if isinstance(plugin, Picky):
        assert plugin.forwards
        assert bool(plugin.backwards) is plugin.has_backward


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_so_do_the_built_in_ones(backend, case):
    sizes, arguments = CASES[case]
    judge(backend, qkv(**sizes, grad=True), arguments)


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("budget", [1, 300])
@pytest.mark.parametrize("case", ["dilated", "shared and dilated", "offset dilated", "documents of both"])
def test_small_launches_change_nothing(register, monkeypatch, gqa, budget, case):
    """Every launch as small as it can be cut, over tensors whose dimensions do not fold."""
    from longspan.execution import strided

    monkeypatch.setattr(strided, "TEMPORARY", budget)
    sizes, arguments = CASES[case]
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv(**{**sizes, "batch": 3})]
    judge(register(Picky(gqa=gqa, backward=True), "test-mine"), tensors, arguments)


def test_the_dense_problems_say_what_the_kernel_gets(register):
    plugin = Picky()
    name = register(plugin, "test-mine")
    q, k, v = qkv(kv_heads=2, n=20)
    pattern = ls.Dilated((4, 8), (1, 2))
    made = ls.plan(
        ls.Problem.like(q, k, v, pattern, enable_gqa=True, is_causal=True, scale=0.3), backend=name
    )  # fmt: skip
    assert plugin.problems
    for problem in plugin.problems:
        assert problem.pattern == ls.Dense()
        assert problem.documents is None
        assert problem.query_offset == 0
        assert problem.scale == 0.3
        assert problem.heads == problem.kv_heads
    assert len(plugin.problems) == len(set(plugin.problems)), "a kernel is made once for each dense problem"
    made(q, k, v)


class Refusing(Picky):
    """A dense kernel for lengths that are multiples of 8, which it says in the hook made for such reasons."""

    @hookimpl
    def longspan_unsupported(self, problem):
        if problem.q_len % 8:
            return [ls.Reason("length", "q_len", str(problem.q_len), "a multiple of 8", "pad")]
        return []


def test_what_a_backend_refuses_it_is_not_asked_for_by_lowering(register):
    """Segments of 20 are dense problems of length 20, whatever the length of the whole."""
    plugin = Refusing()
    name = register(plugin, "test-mine")
    q, k, v = qkv(n=40)
    with pytest.raises(ls.BackendUnavailable, match="a multiple of 8"):
        ls.attention(q, k, v, ls.Dilated((20,), (1,)), backend=name)
    assert all(problem.q_len % 8 == 0 for problem in plugin.problems)


# --- calls and their checks -----------------------------------------------------------------------------------------


def test_a_plan_returns_out_and_lse_and_says_what_it_is():
    q, k, v = qkv()
    made = ls.plan(ls.Problem.like(q, k, v, is_causal=True), backend="reference")
    out, lse = made(q, k, v)
    want, want_lse = oracle(q, k, v, is_causal=True, return_lse=True)
    close(out, want)
    close(lse, want_lse)
    assert made.backend == "reference" == made.resolution.chosen
    assert made.problem == ls.Problem.like(q, k, v, is_causal=True)
    for word in ("Plan", "reference", "dense", "causal"):
        assert word in repr(made)
    assert "reference" in str(made.resolution)


def test_a_plan_pickles_as_its_problem_and_its_backend():
    q, k, v = qkv()
    made = ls.plan(ls.Problem.like(q, k, v, ls.Dilated((5, 9), (1, 2)), is_causal=True), backend="reference")
    data = pickle.dumps(made)
    assert len(data) < 2000, "more than (problem, backend name)"
    for again in (pickle.loads(data), copy.deepcopy(made), copy.copy(made)):
        assert (again.problem, again.backend, again.layout) == (made.problem, made.backend, made.layout)
        for one, other in zip(again(q, k, v), made(q, k, v), strict=True):
            assert torch.equal(one, other)


def test_a_pickled_plan_keeps_its_backend_under_another_policy():
    q, k, v = qkv()
    data = pickle.dumps(ls.plan(ls.Problem.like(q, k, v)))
    with ls.use(backend="reference"):
        assert pickle.loads(data).backend == "sdpa"
    with ls.use(block="sdpa"), pytest.raises(ls.BackendUnavailable, match="blocked"):
        pickle.loads(data)


WRONG = {
    "length": (0, lambda x: x[:, :, :-1]),
    "key length": (1, lambda x: x[:, :, :-1]),
    "value length": (2, lambda x: torch.cat([x, x], 2)),
    "heads": (0, lambda x: x[:, :-1]),
    "batch": (1, lambda x: x[:1]),
    "head_dim": (2, lambda x: x[..., :-1]),
    "dimensions": (0, lambda x: x[0]),
    "dtype": (0, lambda x: x.float()),
    "key dtype": (1, lambda x: x.to(torch.bfloat16)),
    "value dtype": (2, lambda x: x.long()),
    "device": (0, lambda x: x.to("meta")),
    "key device": (1, lambda x: x.to("meta")),
    "value device": (2, lambda x: x.to("meta")),
    "none": (1, lambda x: None),
    "a list": (2, lambda x: x.tolist()),
    "an array": (0, lambda x: x.numpy()),
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_a_plan_refuses_what_it_was_not_made_for(case):
    tensors = qkv()
    made = ls.plan(ls.Problem.like(*tensors))
    place, change = WRONG[case]
    tensors[place] = change(tensors[place])
    with pytest.raises(ls.ArgumentError) as caught:
        made(*tensors)
    assert str(caught.value).startswith(("query", "key", "value")[place])
    assert "Next:" in str(caught.value)
    made(*qkv())


def test_a_plan_refuses_another_device_and_dtype_for_all_three():
    made = ls.plan(ls.Problem.like(*qkv()))
    with pytest.raises(ls.ArgumentError, match="meta"):
        made(*(x.to("meta") for x in qkv()))
    with pytest.raises(ls.ArgumentError, match="float32"):
        made(*(x.float() for x in qkv()))


def test_a_plan_made_without_gradients_still_gives_them():
    with torch.no_grad():
        made = ls.plan(ls.Problem.like(*qkv(), is_causal=True))
    tensors = qkv(grad=True)
    out, _ = made(*tensors)
    got = torch.autograd.grad(out.sum(), tensors)
    for one, other in zip(got, torch.autograd.grad(oracle(*tensors, is_causal=True).sum(), tensors), strict=True):
        close(one, other)
    with torch.no_grad():
        assert not made(*tensors)[0].requires_grad
    assert not made(*qkv())[0].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", [ls.Dense(), ls.Dilated((5, 9), (1, 2))], ids=lambda pattern: pattern.spec)
def test_a_plan_runs_no_hook(backend, pattern):
    tensors = qkv(grad=True)
    made = ls.plan(ls.Problem.like(*tensors, pattern, is_causal=True), backend=backend)
    seen = []
    undo = registry._manager.add_hookcall_monitoring(
        lambda hook, impls, arguments: seen.append(hook), lambda outcome, hook, impls, arguments: None
    )
    try:
        out, _ = made(*tensors)
        torch.autograd.grad(out.sum(), tensors)
        assert seen == []
        ls.plan(made.problem.replace(scale=0.77), backend=backend)
        assert "longspan_kernel" in seen, "the monitor sees hooks when there are any"
    finally:
        undo()


def test_attention_makes_a_plan_once(register):
    plugin = Picky()
    name = register(plugin, "test-mine")
    for arguments in (
        {}, {"pattern": ls.Dilated((5, 9), (1, 2))}, {"cu_seqlens": (0, 4, 21)}, {"cu_seqlens": [0, 5, 21]},
        {"cu_seqlens": torch.tensor([0, 6, 21])}, {"cu_seqlens": torch.tensor([0, 7, 21], dtype=torch.int32)},
    ):  # fmt: skip
        ls.attention(*qkv(), backend=name, **arguments)
        known = len(plugin.problems)
        assert known
        for _ in range(3):
            ls.attention(*qkv(), backend=name, **arguments)
        assert len(plugin.problems) == known, f"planned again for {arguments}"
        plugin.problems.clear()


# --- gradients ------------------------------------------------------------------------------------------------------

SOME_PATTERNS = [ls.Dense(), ls.Dilated((5, 9), (1, 2)), ls.Dilated((6, 8), (2, 3), heads="grouped")]


@pytest.mark.parametrize("backend", [*BACKENDS, "test-mine"])
@pytest.mark.parametrize("pattern", SOME_PATTERNS, ids=lambda pattern: pattern.spec)
def test_a_gradient_that_is_one_number_repeated(register, backend, pattern):
    """`out.sum().backward()` hands over a tensor all of whose strides are 0."""
    register(Picky(backward=True), "test-mine")
    tensors = qkv(grad=True)
    ls.attention(*tensors, pattern, is_causal=True, backend=backend).sum().backward()
    want = torch.autograd.grad(oracle(*tensors, pattern, is_causal=True).sum(), tensors)
    for x, other in zip(tensors, want, strict=True):
        close(x.grad, other)


GAPS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "last dimension first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "sliced": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4))[..., 1:-4, 3:-2],
    "one for all": lambda x: x[:1, :1].expand(x.shape),
    "one number": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "backwards": lambda x: x.flip(2),
    "negative view": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
}


@pytest.mark.parametrize("backend", [*BACKENDS, "test-mine"])
@pytest.mark.parametrize("pattern", SOME_PATTERNS, ids=lambda pattern: pattern.spec)
@pytest.mark.parametrize("gaps", GAPS, ids=str)
def test_any_memory_layout_of_inputs_and_gradients(register, backend, pattern, gaps):
    register(Picky(backward=True), "test-mine")
    tensors = [GAPS[gaps](x).requires_grad_() for x in qkv()]
    dout = GAPS[gaps](randn(2, 4, 21, 6, seed=5))
    before = [x.detach().clone() for x in tensors]
    out = ls.attention(*tensors, pattern, is_causal=True, backend=backend)
    want = oracle(*tensors, pattern, is_causal=True)
    close(out, want)
    for one, other in zip(
        torch.autograd.grad(out, tensors, dout), torch.autograd.grad(want, tensors, dout), strict=True
    ):
        close(one, other)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True)), "an input was written to"


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "test-mine"])
@pytest.mark.parametrize("pattern", SOME_PATTERNS, ids=lambda pattern: pattern.spec)
def test_lower_precision_loses_no_more_than_twice_what_naive_torch_does(register, backend, pattern, dtype):
    """Design, section Testing: at most 2x that error forward, 3x for gradients."""
    register(Picky(), "test-mine")
    tensors = qkv(n=64, dim=16, dtype=dtype, grad=True)
    dout = randn(2, 4, 64, 16, seed=9, dtype=dtype)
    out, lse = ls.attention(*tensors, pattern, is_causal=True, backend=backend, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    want = oracle(*tensors, pattern, is_causal=True)
    wants = torch.autograd.grad(want, tensors, dout.double())
    got = torch.autograd.grad(out, tensors, dout)
    assert all(x.dtype == dtype for x in got)

    from longspan.testing.oracle import visible

    counts = visible(pattern, 4, 64, 64, is_causal=True).to(dtype)
    q, k, v = tensors
    bare = (counts == 0).all(-1, keepdim=True)
    scores = (q @ k.transpose(-1, -2)) * 0.25 + counts.masked_fill(bare, 1).log()  # log 0 hides, log 2 counts twice
    naive = scores.softmax(-1).masked_fill(bare, 0.0) @ v
    naives = torch.autograd.grad(naive, tensors, dout)

    def error(x, y):
        return (x.double() - y).abs().max().item()

    assert error(out, want) <= 2 * error(naive, want)
    for one, other, plain, name in zip(got, wants, naives, ("dq", "dk", "dv"), strict=True):
        assert error(one, other) <= 3 * error(plain, other), name


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", SOME_PATTERNS, ids=lambda pattern: pattern.spec)
def test_a_second_derivative_is_refused_never_wrong(backend, pattern, create):
    q, k, v = qkv(grad=True)
    out = ls.attention(q, k, v, pattern, backend=backend)
    gradient = torch.autograd.grad(out.square().sum(), q, create_graph=create)[0]
    with pytest.raises((RuntimeError, ls.LongspanError)) as caught:
        gradient.sum().backward()
    if create:
        assert any(word in str(caught.value) for word in ("twice", "second", "double"))


def test_a_gradient_penalty_does_not_lose_the_second_order_term_in_silence():
    """The classic: part of the loss depends on a gradient, part does not; without an error the sum would be wrong."""
    q, k, v = qkv(grad=True)
    out = ls.attention(q, k, v)
    (gradient,) = torch.autograd.grad(out.sum(), v, create_graph=True)
    with pytest.raises((RuntimeError, ls.LongspanError)):
        (out.sum() + gradient.square().sum()).backward()


def test_inputs_changed_before_the_backward_are_noticed():
    q, k, v = qkv(grad=True)
    leaf = q * 1.0
    out = ls.attention(leaf, k, v, ls.Dilated((5,), (1,)))
    leaf.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_outputs_may_be_changed_in_place_where_torch_allows_it():
    """`out` is no view of an input: writing to it changes nothing else."""
    q, k, v = qkv()
    before = [x.clone() for x in (q, k, v)]
    for pattern in SOME_PATTERNS:
        for backend in BACKENDS:
            ls.attention(q, k, v, pattern, backend=backend).fill_(math.nan)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


class Bf16Sums(TenLines):
    """A backward whose key gradients bfloat16 cannot add one after the other: 256, then ones."""

    @hookimpl
    def longspan_capabilities(self):
        return Capabilities(devices=("cpu",), dtypes=("bfloat16",), patterns=("dense",), backward=True)

    @hookimpl
    def longspan_kernel(self, problem):
        launches = []

        def forward(q, k, v):
            return torch.zeros_like(q), torch.zeros(q.shape[:3])

        def backward(dout, q, k, v, out, lse):
            launches.append(1)
            size = 256.0 if len(launches) == 1 else 1.0
            return torch.zeros_like(q), torch.full_like(k, size), torch.full_like(v, size)

        return ls.Kernel(forward, backward)


def test_gradients_of_a_shared_key_head_add_up_in_float32(register):
    """Eight query heads share a key head, and the memory layout makes eight launches of them.

    256 + 7 is 263, in bfloat16 264. Added one after the other in bfloat16 it stays 256: 257 rounds to even.
    """
    name = register(Bf16Sums(), "test-mine")
    heads, kv_heads, batch, n, dim = 72, 9, 10, 3, 2
    q = torch.zeros(batch, n, heads, dim, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    k, v = (
        torch.zeros(batch, n, kv_heads, dim, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(2)
    )
    out = ls.attention(q, k, v, enable_gqa=True, backend=name)
    _, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for gradient in (dk, dv):
        assert gradient.dtype == torch.bfloat16
        assert gradient.unique().tolist() == [264.0]


# --- kernels that break the contract --------------------------------------------------------------------------------


class Broken(TenLines):
    def __init__(self, made):
        self.made = made

    @hookimpl
    def longspan_kernel(self, problem):
        return self.made


@pytest.mark.parametrize("made", [None, 5, "kernel", (1, 2), torch.zeros(1)], ids=lambda x: type(x).__name__)
def test_a_hook_that_makes_no_kernel(register, made):
    name = register(Broken(made), "test-mine")
    with pytest.raises(ls.PluginError, match="test-mine") as caught:
        ls.plan(ls.Problem.like(*qkv()), backend=name)
    assert "longspan_kernel" in str(caught.value)
    assert "callable" in str(caught.value)


RETURNS = {
    "out alone": lambda q, k, v: torch.zeros_like(q),
    "nothing": lambda q, k, v: None,
    "three": lambda q, k, v: (torch.zeros_like(q), torch.zeros(q.shape[:3]), None),
    "no lse": lambda q, k, v: (torch.zeros_like(q), None),
    "lse with a last dimension": lambda q, k, v: (torch.zeros_like(q), torch.zeros(*q.shape[:3], 1)),
    "lse of one head": lambda q, k, v: (torch.zeros_like(q), torch.zeros(q.shape[2])),
    "lse in half precision": lambda q, k, v: (torch.zeros_like(q), torch.zeros(q.shape[:3], dtype=torch.float16)),
    "out of one head": lambda q, k, v: (torch.zeros_like(q)[:, :1], torch.zeros(q.shape[:3])),
    "rows first": lambda q, k, v: (torch.zeros_like(q).transpose(1, 2), torch.zeros(q.shape[:3])),
}


@pytest.mark.parametrize("case", RETURNS, ids=str)
@pytest.mark.parametrize("pattern", [ls.Dense(), ls.Dilated((5, 9), (1, 2))], ids=lambda pattern: pattern.spec)
def test_a_kernel_that_returns_something_else_is_said_to(register, case, pattern):
    """A bare `out` whose first dimension is 2 even unpacks as a pair, and small shapes broadcast: named, not used."""
    name = register(Broken(RETURNS[case]), "test-mine")
    with pytest.raises(ls.PluginError, match="test-mine"):
        ls.attention(*qkv(), pattern, backend=name)


GRADIENTS = {
    "two": lambda q, k, v: (torch.zeros_like(q), torch.zeros_like(k)),
    "nothing": lambda q, k, v: None,
    "none of the values": lambda q, k, v: (torch.zeros_like(q), torch.zeros_like(k), None),
    "of one head": lambda q, k, v: (torch.zeros_like(q), torch.zeros_like(k)[:, :1], torch.zeros_like(v)),
    "a number": lambda q, k, v: (torch.zeros(()).to(q), torch.zeros_like(k), torch.zeros_like(v)),
    "dout alone": lambda q, k, v: torch.zeros_like(q),
}


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
@pytest.mark.parametrize("pattern", [ls.Dense(), ls.Dilated((5, 9), (1, 2))], ids=lambda pattern: pattern.spec)
def test_a_backward_that_returns_something_else_is_said_to(register, case, pattern):
    """Added in place, a gradient of one head would be repeated for all of them."""

    def forward(q, k, v):
        return blockwise.forward(q, k, v, is_causal=False, scale=1.0)

    def backward(dout, q, k, v, out, lse):
        return GRADIENTS[case](q, k, v)

    class WithBackward(Broken):
        @hookimpl
        def longspan_capabilities(self):
            return Capabilities(devices=("cpu",), dtypes=("float64",), patterns=("dense",), backward=True)

    name = register(WithBackward(ls.Kernel(forward, backward)), "test-mine")
    out = ls.attention(*qkv(grad=True), pattern, backend=name)
    with pytest.raises(ls.PluginError, match="test-mine"):
        out.sum().backward()


def test_a_kernels_own_error_comes_through():
    class Failing(TenLines):
        @hookimpl
        def longspan_kernel(self, problem):
            def forward(q, k, v):
                raise ZeroDivisionError("mine")

            return forward

    ls.register(Failing(), name="test-failing")
    try:
        with pytest.raises(ZeroDivisionError, match="mine"):
            ls.attention(*qkv(), backend="test-failing")
    finally:
        ls.unregister("test-failing")


# --- native patterns ------------------------------------------------------------------------------------------------


class Native(TenLines):
    """Serves dilated attention as it is, and says so. Its layout is its own."""

    def __init__(self, backward=False, own_layout=True, **can):
        self.has_backward, self.own_layout, self.can = backward, own_layout, can
        self.problems, self.layouts, self.forwards, self.backwards = [], [], 0, 0

    @hookimpl
    def longspan_capabilities(self):
        can = {"patterns": ("dense", "dilated"), **self.can}
        return Capabilities(
            devices=("cpu",), dtypes=("float32", "float64"), causal=True, backward=self.has_backward, **can
        )

    @hookimpl
    def longspan_pattern(self, problem):
        return ("my own layout", problem.pattern.spec) if self.own_layout else None

    @hookimpl
    def longspan_kernel(self, problem, layout):
        self.problems.append(problem)
        self.layouts.append(layout)
        arguments = {
            "is_causal": problem.is_causal, "scale": problem.scale, "pattern": problem.pattern,
            "cu_seqlens": problem.documents, "query_offset": problem.query_offset, "enable_gqa": True,
        }  # fmt: skip

        def forward(q, k, v):
            self.forwards += 1
            out, lse = oracle(q, k, v, return_lse=True, **arguments)
            return out.to(q.dtype), lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)

        def backward(dout, q, k, v, out, lse):
            self.backwards += 1
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (q, k, v)]
                return torch.autograd.grad(oracle(*inputs, **arguments), inputs, dout.double())

        return ls.Kernel(forward, backward if self.has_backward else None)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_native_backend_gets_the_problem_as_it_is(register, backward, causal):
    plugin = Native(backward)
    name = register(plugin, "test-native")
    pattern = ls.Dilated((5, 9), (1, 2))
    tensors = qkv(grad=True)
    judge(name, tensors, {"pattern": pattern, "is_causal": causal})
    assert {problem.pattern for problem in plugin.problems} == {pattern}
    assert plugin.problems[0] == ls.Problem.like(*tensors, pattern, is_causal=causal)
    assert plugin.layouts[0] == ("my own layout", pattern.spec)
    assert (plugin.forwards, plugin.backwards) == (1, int(backward))
    assert ls.plan(plugin.problems[0], backend=name).layout == ("my own layout", pattern.spec)


LEFT = [
    "shared heads",
    "one key head",
    "shared and dilated",
    "offset",
    "offset dilated",
    "documents",
    "documents dilated",
]


@pytest.mark.parametrize("case", LEFT)
@pytest.mark.parametrize("own_layout", [False, True])
def test_what_a_native_backend_does_not_take_natively_is_lowered(register, case, own_layout):
    """It declares dense and dilated, but no shared heads, offsets or documents: those come as dense problems.

    That it brings a layout of its own for its native pattern may not stand in the way.
    """
    plugin = Native(own_layout=own_layout)
    name = register(plugin, "test-native")
    sizes, arguments = CASES[case]
    judge(name, qkv(**sizes, grad=True), arguments)
    for problem in plugin.problems:
        assert problem.pattern == ls.Dense()
        assert problem.heads == problem.kv_heads
        assert problem.documents is None and problem.query_offset == 0
        assert not problem.is_causal or problem.q_len == problem.kv_len


@pytest.mark.parametrize("own_layout", [False, True])
def test_an_empty_sequence_is_no_business_of_a_native_backend(register, own_layout):
    plugin = Native(own_layout=own_layout)
    name = register(plugin, "test-native")
    q, k, v = (torch.zeros(2, 4, 0, 6, requires_grad=True) for _ in range(3))
    out = ls.attention(q, k, v, ls.Dilated((5, 9), (1, 2)), backend=name)
    assert out.shape == q.shape
    assert plugin.forwards == 0


@pytest.mark.parametrize(
    ("flags", "case"),
    [
        ({"gqa": True}, "shared and dilated"),
        ({"documents": True}, "documents dilated"),
        ({"query_offset": True}, "offset dilated"),
    ],
)
def test_what_a_native_backend_claims_it_gets(register, flags, case):
    plugin = Native(**flags)
    name = register(plugin, "test-native")
    sizes, arguments = CASES[case]
    judge(name, qkv(**sizes, grad=True), arguments)
    assert {problem.pattern for problem in plugin.problems} == {arguments["pattern"]}


@pytest.mark.parametrize("case", ["shared and dilated", "offset dilated", "documents dilated"])
def test_a_backend_for_one_pattern_alone_is_never_asked_for_another(register, case):
    """Without `dense` among its patterns there is nothing to lower to: honoured natively or refused."""
    plugin = Native(patterns=("dilated",))
    name = register(plugin, "test-native")
    sizes, arguments = CASES[case]
    with pytest.raises(ls.BackendUnavailable, match=name):
        ls.attention(*qkv(**sizes), backend=name, **arguments)
    assert all(problem.pattern.kind == "dilated" for problem in plugin.problems)


def test_backends_do_not_get_each_others_layouts(register):
    """The store is shared; what one backend keeps for a problem is not what another one reads."""
    pattern = ls.Dilated((4, 10), (1, 3))
    tensors = qkv(grad=True)
    problem = ls.Problem.like(*tensors, pattern)
    name = register(Native(), "test-native")
    first = ls.plan(problem, backend=name)
    second = ls.plan(problem, backend="sdpa")
    assert first.layout == ("my own layout", pattern.spec)
    assert isinstance(second.layout, ls.Layout)
    assert ls.plan(problem, backend=name).layout == first.layout
    close(second(*tensors)[0], oracle(*tensors, pattern))
    close(first(*tensors)[0], oracle(*tensors, pattern))


def test_a_backend_registered_anew_is_asked_for_its_layout_anew(register):
    problem = ls.Problem.like(*qkv(), ls.Dilated((4, 10), (1, 3)))
    ls.register(Native(), name="test-native")
    ls.plan(problem, backend="test-native")
    ls.unregister("test-native")
    plugin = Native(own_layout=False)
    register(plugin, "test-native")
    ls.plan(problem, backend="test-native")
    assert isinstance(plugin.layouts[0], ls.Layout)


def test_a_layout_for_a_pattern_that_is_not_declared_is_an_error(register):
    plugin = Native(patterns=("dense",))
    name = register(plugin, "test-native")
    with pytest.raises(ls.PluginError, match="test-native") as caught:
        ls.plan(ls.Problem.like(*qkv(), ls.Dilated((5,), (2,))), backend=name)
    assert "longspan_pattern" in str(caught.value)


# --- buffers --------------------------------------------------------------------------------------------------------


class Buffered(TenLines):
    """Wants workspace, and takes it while it runs."""

    def __init__(self, take="scores"):
        self.take, self.taken = take, []

    @hookimpl
    def longspan_buffers(self, problem, layout):
        return [ls.BufferSpec("scores", (problem.q_len, problem.kv_len), problem.dtype), ls.BufferSpec("flags", (3,))]

    @hookimpl
    def longspan_kernel(self, problem, buffers):
        run = TenLines.longspan_kernel(self, problem)
        assert isinstance(buffers, ls.Workspace)

        def forward(q, k, v):
            buffer = buffers.take(self.take, q.device)
            buffer.fill_(math.nan)
            self.taken.append((tuple(buffer.shape), buffer.dtype, buffer.device, problem.q_len, problem.kv_len))
            return run(q, k, v)

        return forward


def test_a_kernel_gets_the_workspace_that_it_declared(register):
    plugin = Buffered()
    name = register(plugin, "test-mine")
    judge(name, qkv(grad=True), CASES["dilated"][1])
    assert plugin.taken
    for shape, dtype, device, q_len, kv_len in plugin.taken:
        assert (shape, dtype, device.type) == ((q_len, kv_len), torch.float64, "cpu")
    plugin.take, plugin.taken = "flags", []
    ls.attention(*qkv(), backend=name)
    assert plugin.taken[0][:2] == ((3,), torch.float32)


def test_a_buffer_that_was_not_declared(register):
    name = register(Buffered("secret"), "test-mine")
    with pytest.raises(ls.PluginError, match="'secret'") as caught:
        ls.attention(*qkv(), backend=name)
    assert "scores" in str(caught.value)
    assert "longspan_buffers" in str(caught.value)


def test_an_extension_may_provide_the_memory(register):
    class Pool:
        def __init__(self):
            self.given = []

        def allocate(self, spec, device):
            self.given.append((spec, device))
            return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)

    pool = Pool()

    class Extension:
        @hookimpl
        def longspan_allocator(self, device):
            assert device == ls.Device("cpu")
            return pool

    name = register(Buffered(), "test-mine")
    register(Extension(), "test-pool")
    out = ls.attention(*qkv(), backend=name)
    close(out, oracle(*qkv()))
    assert [spec.name for spec, _ in pool.given] == ["scores"]
    assert pool.given[0][0].shape == (21, 21)


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_plan_in_many_threads(backend):
    pattern = ls.Dilated((5, 9), (1, 2))
    made = ls.plan(ls.Problem.like(*qkv(), pattern, is_causal=True), backend=backend)
    inputs = [[randn(2, 4, 21, 6, seed=10 * i + j) for j in range(3)] for i in range(8)]
    alone = [made(*one)[0] for one in inputs]
    go = threading.Barrier(8)

    def work(number):
        go.wait(30)
        found = []
        for _ in range(10):
            tensors = [x.clone().requires_grad_() for x in inputs[number]]
            out, _ = made(*tensors)
            out.sum().backward()
            found.append((out.detach(), tensors[0].grad))
        return found

    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(work, range(8))):
            for out, gradient in found:
                assert torch.equal(out, alone[number])
                assert torch.equal(gradient, found[0][1])


def test_threads_that_plan_at_once_get_the_same_answers():
    tensors = qkv()
    patterns = [ls.Dilated((w, 21), (1, r)) for w in (3, 4, 5, 6) for r in (2, 3)]
    want = [oracle(*tensors, pattern) for pattern in patterns]
    go = threading.Barrier(8)

    def work(number):
        go.wait(30)
        return [ls.attention(*tensors, pattern) for pattern in patterns[number:] + patterns[:number]]

    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(work, range(8))):
            for out, other in zip(found, want[number:] + want[:number], strict=True):
                close(out, other)


def test_more_shapes_than_are_kept():
    """The store of plans is bounded; what falls out is made again."""
    for n in range(1, 700):
        ls.attention(*(x[:, :, :n] for x in LONG))
    short = [x[:, :, :1] for x in LONG]
    assert torch.equal(ls.attention(*short), short[2])


LONG = [randn(1, 1, 700, 1, seed=i) for i in range(3)]
