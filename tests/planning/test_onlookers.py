"""Who looks on while attention runs: fake tensors, wrappers, dispatch modes, tracers that are not dynamo, dual tensors.

None of these may reach a kernel that reads memory by its address. Every call has a plan in the cache by then, and runs
on the backend that `auto` takes as well as on those that are made of torch's operators.
"""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import longspan as ls
import small
from small import assert_same, randn

qkv = partial(small.qkv, n=33, dim=8, dtype=torch.float32)
BACKENDS = ("cpu_fused", "sdpa", "reference")
OPERATORS = (torch.ops.longspan.attention.default, torch.ops.longspan.attention_backward.default)

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def calls(backend, pattern=None, **given):
    """`attention`, and a plan, of these arguments: both have run on ordinary tensors before."""
    given = {"is_causal": True, **given}
    plan = ls.plan(ls.Problem.like(*qkv(), pattern, **given) if pattern else ls.Problem.like(*qkv(), **given), backend)

    def attend(q, k, v):
        return ls.attention(q, k, v, pattern, backend=backend, return_lse=True, **given)

    for call in (attend, plan):
        call(*qkv())
    return {"attention": attend, "plan": plan}


each_call = pytest.mark.parametrize("call", ["attention", "plan"])


# --- subclasses and modes -----------------------------------------------------------------------------------------


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, around one that has it."""

    @staticmethod
    def __new__(cls, inner):
        given = {"dtype": inner.dtype, "device": inner.device, "requires_grad": inner.requires_grad}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), **given)

    def __init__(self, inner):
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


@each_backend
@each_call
def test_wrappers_are_served_forward_and_backward(backend, call):
    run, tensors = calls(backend)[call], qkv(grad=True)
    wrapped = [Wrapper(x) for x in tensors]
    got = run(*wrapped)
    wanted = run(*tensors)
    assert all(type(x) is Wrapper for x in got)
    assert_same([x.inner for x in got], [x.detach() for x in wanted])
    douts = [randn(*x.shape, seed=5, dtype=torch.float32) for x in wanted]
    found = torch.autograd.grad(got, wrapped, [Wrapper(x) for x in douts])
    assert_same([x.inner for x in found], torch.autograd.grad(wanted, tensors, douts))


@each_backend
@each_call
@pytest.mark.parametrize("which", range(3))
def test_one_wrapper_among_plain_tensors(backend, call, which):
    run, tensors = calls(backend)[call], qkv()
    mixed = [Wrapper(x) if i == which else x for i, x in enumerate(tensors)]
    assert_same([x.inner for x in run(*mixed)], run(*tensors))


@each_backend
@each_call
def test_a_wrapped_gradient_for_a_plain_forward(backend, call):
    """What comes back from a collective is such a tensor."""
    run, tensors = calls(backend)[call], qkv(grad=True)
    out, _ = run(*tensors)
    dout = randn(*out.shape, seed=5, dtype=torch.float32)
    wanted = torch.autograd.grad(out, tensors, dout, retain_graph=True)
    found = torch.autograd.grad(out, tensors, Wrapper(dout))
    assert_same([x.inner for x in found], wanted)


@each_backend
@each_call
def test_fake_tensors_get_shapes_and_no_memory(backend, call):
    run = calls(backend)[call]
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(x).requires_grad_() for x in qkv()]
        out, lse = run(*tensors)
        grads = torch.autograd.grad([out, lse], tensors, [torch.ones_like(out), torch.ones_like(lse)])
    outside = run(*[x.detach() for x in tensors])
    for x in (out, lse, *grads, *outside):
        assert isinstance(x, FakeTensor)
    assert [x.shape for x in (out, lse)] == [(2, 4, 33, 8), (2, 4, 33)]
    assert [x.shape for x in outside] == [(2, 4, 33, 8), (2, 4, 33)]
    assert [x.shape for x in grads] == [x.shape for x in tensors]


def test_fake_documents_are_not_read():
    with FakeTensorMode() as mode:
        bounds = mode.from_tensor(torch.tensor([0, 5, 33]))
        out = ls.attention(*[mode.from_tensor(x) for x in qkv()], cu_seqlens=bounds)
    assert isinstance(out, FakeTensor) and out.shape == (2, 4, 33, 8)


@each_call
def test_a_dispatch_mode_sees_the_operators(call):
    run, tensors = calls("cpu_fused")[call], qkv(grad=True)
    wanted = [*run(*tensors), *torch.autograd.grad(run(*tensors)[0].sum(), tensors)]
    with Seen() as seen:
        out, lse = run(*tensors)
        grads = torch.autograd.grad(out.sum(), tensors)
    assert_same([out, lse, *grads], wanted)
    assert [x for x in seen.operators if x in OPERATORS] == list(OPERATORS)
    out, _ = run(*tensors)
    with Seen() as seen:  # over the backward alone
        assert_same(torch.autograd.grad(out.sum(), tensors), wanted[2:])
    assert [x for x in seen.operators if x in OPERATORS] == [OPERATORS[1]]


class Plain(torch.Tensor):
    """A subclass that has memory and changes no operator."""


@each_call
@pytest.mark.parametrize("kind", [Plain, Parameter, torch.nn.Buffer])
def test_subclasses_with_plain_memory_do_not_pay_for_the_operators(monkeypatch, call, kind):
    run, tensors = calls("cpu_fused")[call], qkv()
    wanted = run(*tensors)
    for module in ("longspan.planning.attention", "longspan.planning.plan"):
        monkeypatch.setattr(sys.modules[module], "attend_in_graph", None)
    of_kind = [x.as_subclass(kind) if kind is Plain else kind(x) for x in tensors]
    with torch.no_grad():
        got = run(*of_kind)
    assert_same([x.as_subclass(torch.Tensor) for x in got], wanted)


@each_call
def test_a_function_mode_alone_does_not_pay_either(monkeypatch, call):
    """`torch.device` as a context, and torch.set_default_device, are such modes."""
    run, tensors = calls("cpu_fused")[call], qkv()
    for module in ("longspan.planning.attention", "longspan.planning.plan"):
        monkeypatch.setattr(sys.modules[module], "attend_in_graph", None)
    with torch.device("cpu"):
        run(*tensors)


@each_call
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("layout", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn], ids=["sparse", "mkldnn"])
def test_other_layouts_are_refused_by_name_where_a_plan_is_cached(call, which, layout):
    run = calls("cpu_fused")[call]
    tensors = [layout(x) if i == which else x for i, x in enumerate(qkv())]
    with pytest.raises(ls.ArgumentError, match=f"{('query', 'key', 'value')[which]}: got .*strided"):
        run(*tensors)


# --- tracers ------------------------------------------------------------------------------------------------------


PATTERNS = {"dense": None, "dilated": ls.Dilated((8, 16), (1, 2)), "blocks": ls.local_blocks(9, block_size=4)}


@each_backend
@each_call
@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic", "before autograd"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_make_fx_records_the_operator(backend, call, tracing, pattern):
    run = calls(backend, PATTERNS[pattern])[call]
    options = {"pre_dispatch": True} if tracing == "before autograd" else {"tracing_mode": tracing}
    graph = make_fx(lambda *x: run(*x), **options)(*qkv())
    others = [x.flip(0) for x in qkv()]
    assert_same(graph(*others), run(*others))
    assert [x.target for x in graph.graph.nodes].count(OPERATORS[0]) == 1


@each_backend
@each_call
@pytest.mark.parametrize("tracing", ["real", "fake"])
def test_make_fx_of_a_gradient(backend, call, tracing):
    run = calls(backend)[call]

    def gradients(q, k, v, dout):
        tensors = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(run(*tensors)[0], tensors, dout)

    dout = randn(2, 4, 33, 8, seed=5, dtype=torch.float32)
    graph = make_fx(gradients, tracing_mode=tracing)(*qkv(), dout)
    others = (*(x.flip(0) for x in qkv()), dout.flip(0))
    assert_same(graph(*others), gradients(*others))


@each_call
def test_make_fx_of_a_backward_alone(call):
    """The forward ran before the tracer came: its tensors are constants of the graph."""
    tensors = qkv(grad=True)
    out, _ = calls("cpu_fused")[call](*tensors)
    graph = make_fx(lambda dout: torch.autograd.grad(out, tensors, dout, retain_graph=True))(torch.ones_like(out))
    dout = randn(*out.shape, seed=5, dtype=torch.float32)
    assert_same(graph(dout), torch.autograd.grad(out, tensors, dout))


@each_backend
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("trace", [make_fx, lambda run: lambda *given: torch.jit.trace(run, given)])
def test_the_backward_of_a_plan_is_recorded(backend, trace):
    query, key, value = qkv()
    plan = ls.plan(ls.Problem.like(query, key, value), backend=backend)
    out, lse = plan(query, key, value)
    given = (torch.ones_like(out), query, key, value, out, lse)
    plan.backward(*given)  # what is made at the first call is made
    recorded = trace(lambda *x: plan.backward(*x))(*given)
    others = (randn(*out.shape, seed=5, dtype=torch.float32), *given[1:])
    assert_same(recorded(*others), plan.backward(*others))


@each_backend
@each_call
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_records_the_operator(backend, call):
    run = calls(backend)[call]
    traced = torch.jit.trace(lambda q, k, v: run(q, k, v), tuple(qkv()))
    assert "longspan::attention" in str(traced.graph)
    others = [x.flip(0) for x in qkv()]
    assert_same(traced(*others), run(*others))


# --- gradients of many at once ------------------------------------------------------------------------------------


@each_backend
@each_call
def test_batched_gradients(backend, call):
    run, tensors = calls(backend)[call], qkv(grad=True)
    out, lse = run(*tensors)
    douts = [randn(3, *x.shape, seed=5, dtype=torch.float32) for x in (out, lse)]
    found = torch.autograd.grad([out, lse], tensors, douts, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad([out, lse], tensors, x, retain_graph=True) for x in zip(*douts, strict=True)]
    assert_same(found, [torch.stack(x) for x in zip(*single, strict=True)])


def test_a_vectorized_jacobian():
    tensors = tuple(small.qkv(batch=1, heads=2, n=5, dim=3))
    found, wanted = (
        torch.autograd.functional.jacobian(lambda *x: ls.attention(*x, is_causal=True), tensors, vectorize=vectorize)
        for vectorize in (True, False)
    )
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_traced_gradients_of_top_k_blocks_are_refused():
    """No operator stands for the blocks that were chosen."""
    tensors = qkv(grad=True)
    out = ls.attention(*tensors, ls.TopKBlocks(2, 8))
    with pytest.raises(ls.LongspanError, match=r"TopKBlocks.*Next:"):
        torch.autograd.grad(out, tensors, Wrapper(torch.ones_like(out)))


# --- forward mode -------------------------------------------------------------------------------------------------


@each_backend
@each_call
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("grad", [False, True], ids=["", "requires_grad"])
def test_a_dual_tensor_is_refused(backend, call, which, grad):
    run, tensors = calls(backend)[call], qkv(grad=grad)
    with forward_ad.dual_level():
        run(*tensors)  # nobody has a tangent
        tensors[which] = forward_ad.make_dual(tensors[which], randn(2, 4, 33, 8, seed=9, dtype=torch.float32))
        with pytest.raises(NotImplementedError, match=r"forward-mode.*Next:") as caught:
            run(*tensors)
    assert isinstance(caught.value, ls.LongspanError)


@each_call
def test_a_dual_gradient_is_refused(call):
    tensors = qkv(grad=True)
    out, _ = calls("cpu_fused")[call](*tensors)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"forward-mode.*Next:"):
        torch.autograd.grad(out, tensors, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


@each_backend
@each_call
def test_jvp_jacfwd_and_hessian_are_refused(backend, call):
    run, (q, k, v) = calls(backend)[call], qkv()
    for way in (
        lambda: torch.func.jvp(lambda q: run(q, k, v)[0], (q,), (torch.ones_like(q),)),
        lambda: torch.func.jacfwd(lambda q: run(q, k, v)[0])(q),
        lambda: torch.func.hessian(lambda q: run(q, k, v)[0].sum())(q),
        lambda: torch.func.vmap(lambda q: torch.func.jvp(lambda x: run(x, k, v)[0], (q,), (q,)))(q[None]),
    ):
        with pytest.raises(NotImplementedError, match=r"forward-mode.*Next:"):
            way()


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_dual_tensor_is_refused_in_a_compiled_function(fullgraph):
    torch._dynamo.reset()
    q, k, v = qkv()
    compiled = torch.compile(lambda q, k, v: ls.attention(q, k, v), backend="aot_eager", fullgraph=fullgraph)
    compiled(q, k, v)  # a graph is there already
    with forward_ad.dual_level(), pytest.raises(Exception, match="forward-mode"):
        compiled(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
    assert torch.equal(compiled(q, k, v), ls.attention(q, k, v))
