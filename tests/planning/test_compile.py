"""torch.compile and torch.export: whole graphs, forward and backward, static and dynamic shapes, and the eager answer.

`aot_eager` runs the traced graph, forward and joint, with eager kernels: results must be equal bit for bit. Inductor is
used where its own code could matter, and skipped where there is no C++ compiler.
"""

from __future__ import annotations

import asyncio
import io
import operator
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

import longspan as ls
import small
from longspan import Capabilities, Kernel, blockwise, hookimpl
from longspan.registry.policy import Policy
from small import assert_same, randn

qkv = partial(small.qkv, grad=True)

PATTERNS = {
    "dense": ls.Dense(),
    "all": ls.Dilated((4, 8), (1, 2)),
    "block": ls.Dilated((4, 8), (2, 3), offset="block"),
    "grouped": ls.Dilated((4, 8), (1, 2), heads="grouped"),
    "window": ls.SlidingWindow(3, 2),
}
ARGUMENTS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "gqa": {"enable_gqa": True},
    "documents, a tensor": {"cu_seqlens": torch.tensor([0, 5, 5, 11], dtype=torch.int32)},
    "documents, a tuple": {"cu_seqlens": (0, 5, 5, 11), "is_causal": True},
    "offset": {"query_offset": 9, "is_causal": True},
    "dropout": {"dropout_p": 0.5, "dropout_seed": 7},
    "lse": {"return_lse": True, "is_causal": True},
    "backend": {"backend": "reference"},
}
HAS_COMPILER = any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "c++", "clang++"))

each_pattern = pytest.mark.parametrize("name", PATTERNS)
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="Inductor needs a C++ compiler, and there is none on PATH")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(function, tensors):
    """Outputs, then gradients of everything at once."""
    found = function(*tensors)
    outs = found if isinstance(found, tuple) else (found,)
    douts = [randn(*out.shape, seed=50 + i, dtype=out.dtype) for i, out in enumerate(outs)]
    return [*outs, *torch.autograd.grad(outs, [x for x in tensors if x.requires_grad], douts)]


def whole(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def counted(function, backend="aot_eager", **options):
    """The compiled function, and what counts how many graphs were compiled."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def inputs_for(given, **sizes):
    if "query_offset" in given:
        sizes = {"n": sizes.get("n", 16) - given["query_offset"], "kv_len": sizes.get("n", 16)}
    return qkv(kv_heads=2 if "enable_gqa" in given else None, **sizes)


# --- every argument ---------------------------------------------------------------------------------------------


@each_pattern
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_whole_graphs_forward_and_backward(name, argument):
    given = ARGUMENTS[argument]

    def attend(q, k, v):
        return ls.attention(q, k, v, PATTERNS[name], **given)

    compiled, counter = counted(attend)
    tensors = inputs_for(given)
    assert_same(run(compiled, tensors), run(attend, tensors))
    assert counter.frame_count == 1


DYNAMIC = [(name, argument) for name in PATTERNS for argument in ARGUMENTS if name == "all" or argument == "causal"]


@pytest.mark.parametrize("name, argument", DYNAMIC)
def test_dynamic_shapes_forward_and_backward(name, argument):
    """Any batch and length with one graph: sizes of 0 and 1 have their own in torch, nothing else does."""
    given = ARGUMENTS[argument]

    def attend(q, k, v):
        return ls.attention(q, k, v, PATTERNS[name], **given)

    compiled, counter = counted(attend, dynamic=True)
    graphs = []
    # Sizes that are equal at first are one size to torch.
    for n, batch in ((17, 3), (23, 3), (12, 5), (31, 2), (13, 4)):
        tensors = inputs_for(given, n=n, batch=batch)
        assert_same(run(compiled, tensors), run(attend, tensors))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1] <= 2  # torch traces twice where a default is a float


@each_pattern
def test_shapes_that_turn_out_to_be_dynamic(name):
    """Without `dynamic=True` torch compiles twice, and then no more."""

    def attend(q, k, v):
        return ls.attention(q, k, v, PATTERNS[name], is_causal=True)

    compiled, counter = counted(attend)
    for n in (16, 17, 23, 8, 31):
        tensors = qkv(n=n)
        assert_same(run(compiled, tensors), run(attend, tensors))
    assert counter.frame_count == 2


@each_pattern
def test_marked_dynamic(name):
    def attend(q, k, v):
        return ls.attention(q, k, v, PATTERNS[name], is_causal=True)

    compiled, counter = counted(attend)
    for n in (17, 21):
        tensors = qkv(n=n)
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 2)
        assert_same(run(compiled, tensors), run(attend, tensors))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(dtype):
    def attend(q, k, v):
        return ls.attention(q, k, v, PATTERNS["all"], is_causal=True, return_lse=True)

    tensors = qkv(dtype=dtype)
    assert_same(run(whole(attend), tensors), run(attend, tensors))


def test_strides_in_and_out():
    """A fake kernel that lied about strides would be found by what comes after it."""

    def attend(q, k, v):
        out = ls.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), PATTERNS["all"], is_causal=True)
        return out.transpose(1, 2).flatten(2), out.stride()[2] * out

    tensors = [randn(2, 16, 4, 4, seed=i).requires_grad_() for i in range(3)]
    found, wanted = run(whole(attend), tensors), run(attend, tensors)
    assert_same(found[:1] + found[2:], wanted[:1] + wanted[2:])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    tensors = qkv()
    with context():
        got = whole(lambda q, k, v: ls.attention(q, k, v, PATTERNS["all"]))(*tensors)
    assert not got.requires_grad
    assert torch.equal(got, ls.attention(*tensors, PATTERNS["all"]))


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (0, 2)])
def test_some_inputs_alone_need_gradients(needs):
    tensors = [x.requires_grad_(i in needs) for i, x in enumerate(qkv(grad=False))]

    def attend(q, k, v):
        return ls.attention(q, k, v, PATTERNS["window"])

    assert_same(run(whole(attend), tensors), run(attend, tensors))


def test_an_lse_that_alone_is_differentiated():
    def attend(q, k, v):
        return ls.attention(q, k, v, PATTERNS["all"], is_causal=True, return_lse=True)[1].masked_fill(v[..., 0] > 9, 0)

    q, k, v = qkv()
    wanted = torch.autograd.grad(attend(q, k, v).sum(), (q, k))
    assert_same(torch.autograd.grad(whole(attend)(q, k, v).sum(), (q, k)), wanted)


def test_autocast_inside_and_around():
    tensors = qkv(dtype=torch.float32)

    def inside(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ls.attention(q, k.bfloat16(), v, is_causal=True)

    def plain(q, k, v):
        return ls.attention(q, k.bfloat16(), v, is_causal=True)

    wanted = run(inside, tensors)
    assert wanted[0].dtype == torch.bfloat16
    assert_same(run(whole(inside), tensors), wanted)
    compiled = whole(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compiled(*tensors)
    assert torch.equal(found, wanted[0])


def test_a_second_derivative_is_refused():
    q, k, v = qkv()
    out = whole(lambda q, k, v: ls.attention(q, k, v))(q, k, v)
    with pytest.raises(RuntimeError):
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        first.sum().backward()


def test_compiled_autograd_takes_the_backwards_operator():
    """The forward ran eagerly; what the compiler traces is its backward."""
    plain, traced = qkv(), qkv()
    ls.attention(*plain, PATTERNS["all"], is_causal=True).sin().sum().backward()
    out = ls.attention(*traced, PATTERNS["all"], is_causal=True).sin().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        out.backward()
    assert_same([x.grad for x in traced], [x.grad for x in plain])


# --- what the graph holds ---------------------------------------------------------------------------------------


def graphs_of(function, *inputs):
    """The traced graphs, as torch.fx graph modules."""
    found = []

    def keep(graph, example_inputs):
        found.append(graph)
        return graph.forward

    torch.compile(function, backend=keep)(*inputs)
    return found


@each_pattern
def test_one_operator_and_nothing_else(name):
    """Whatever the pattern: no call of the lowering is traced, and there is one graph."""
    graphs = graphs_of(lambda q, k, v: ls.attention(q, k, v, PATTERNS[name], is_causal=True), *qkv())
    assert len(graphs) == 1
    nodes = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert nodes.count(torch.ops.longspan.attention.default) == 1
    asked = torch._C._functorch.maybe_current_level  # a question to torch, which costs nothing and AOT drops
    assert set(nodes) <= {torch.ops.longspan.attention.default, operator.getitem, asked}


def test_a_model_around_it_does_not_break():
    linear = torch.nn.Linear(16, 48).double()

    def model(x):
        q, k, v = linear(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        out = ls.attention(q, k, v, PATTERNS["all"], is_causal=True)
        return x + torch.nn.functional.gelu(out).transpose(1, 2).flatten(2)

    x = randn(2, 16, 16).requires_grad_()
    explained = torch._dynamo.explain(model)(x)
    assert explained.graph_break_count == 0 and explained.graph_count == 1
    assert_same(run(whole(model), [x]), run(model, [x]))


# --- plans --------------------------------------------------------------------------------------------------------


@each_pattern
@pytest.mark.parametrize(
    "given", [{}, {"is_causal": True}, {"dropout_p": 0.5}, {"documents": (0, 5, 5, 11)}, {"scale": -0.3}], ids=str
)
def test_plans(name, given):
    tensors = qkv()
    problem = ls.Problem(batch=2, heads=4, q_len=16, head_dim=4, dtype="float64", pattern=PATTERNS[name], **given)
    plan = ls.plan(problem, backend="reference")

    def attend(q, k, v):
        return plan(q, k, v, dropout_seed=3)

    assert_same(run(whole(attend), tensors), run(attend, tensors))


def test_plans_with_fewer_key_heads_and_an_offset():
    tensors = qkv(n=5, kv_len=16, kv_heads=2)
    problem = ls.Problem.like(*tensors, PATTERNS["all"], is_causal=True, enable_gqa=True, query_offset=9)
    plan = ls.plan(problem)
    assert_same(run(whole(plan), tensors), run(plan, tensors))


def test_a_plan_keeps_its_backend_in_a_graph(register):
    spy = Spy()
    register(spy, "test-spy")
    plan = ls.plan(ls.Problem.like(*qkv(grad=False)), backend="test-spy")
    with ls.use(backend="reference"):
        whole(plan)(*qkv(grad=False))
    assert spy.launches == 1


# --- patterns built inside -----------------------------------------------------------------------------------------


BUILT = {
    "dense": lambda n: ls.Dense(),
    "all": lambda n: ls.Dilated((n // 4, n), (1, 2)),
    "one branch": lambda n: ls.Dilated(n // 2, 2),
    "grouped": lambda n: ls.Dilated([n // 4, n // 2], [1, 3], heads="grouped", offset="block"),
    "window": lambda n: ls.SlidingWindow(n // 4, 1),
    "one side": lambda n: ls.SlidingWindow(left=n),
    "parsed": lambda n: ls.parse_pattern("dilated:4/1,8/2"),
}


@pytest.mark.parametrize("build", BUILT)
def test_patterns_built_inside_from_constants(build):
    def attend(q, k, v):
        return ls.attention(q, k, v, BUILT[build](16), is_causal=True)

    tensors = qkv()
    assert_same(run(whole(attend), tensors), run(attend, tensors))


@pytest.mark.parametrize("build", BUILT)
def test_patterns_built_inside_from_the_shape(build):
    def attend(q, k, v):
        return ls.attention(q, k, v, BUILT[build](q.shape[2]), is_causal=True)

    compiled = whole(attend, dynamic=True)
    for n in (16, 9):
        tensors = qkv(n=n, grad=False)
        assert_same([compiled(*tensors)], [attend(*tensors)])


@pytest.mark.parametrize("build", BUILT)
def test_patterns_built_inside_from_a_number_that_changes(build):
    """From the second value on, torch traces an integer argument as a symbol."""

    def attend(q, k, v, n):
        return ls.attention(q, k, v, BUILT[build](n), is_causal=True)

    compiled, tensors = whole(attend), qkv()
    for n in (16, 8):
        assert_same([compiled(*tensors, n)], [attend(*tensors, n)])


NEAR, FIRST = ls.local_blocks(9, block_size=4), ls.global_blocks(2, block_size=4)
COMPOSED = {
    "or": lambda: NEAR | FIRST,
    "and": lambda: NEAR & ls.SlidingWindow(3, 0),
    "a window on the left": lambda: ls.SlidingWindow(3, 0) | FIRST,
    "complement": lambda: NEAR.complement() | FIRST,
    "built inside": lambda: ls.local_blocks(9, block_size=4) & ls.strided_blocks(2, block_size=4).complement(),
    "not": lambda: ~NEAR,
    "not, built inside": lambda: ~(ls.local_blocks(9, block_size=4) | ~FIRST),
}


@pytest.mark.parametrize("compose", COMPOSED)
@pytest.mark.parametrize("fullgraph", [True, False])
def test_patterns_composed_inside(compose, fullgraph):
    """dynamo has no rule for `~` on anybody's object: it breaks the graph there, and refuses a whole one."""

    def attend(q, k, v):
        return ls.attention(q, k, v, COMPOSED[compose](), is_causal=True)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=fullgraph)
    if compose.startswith("not") and fullgraph:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="invert"):
            compiled(*qkv(grad=False))
        return
    tensors = qkv()
    assert_same(run(compiled, tensors), run(attend, tensors))


# --- no storm of recompilations -----------------------------------------------------------------------------------


def test_an_offset_that_grows_as_in_decoding():
    compiled, counter = counted(lambda q, k, v, offset: ls.attention(q, k, v, is_causal=True, query_offset=offset))
    for length in range(4, 20):
        q, k, v = qkv(n=1, kv_len=length, grad=False)
        got = compiled(q, k, v, length - 1)
        assert torch.equal(got, ls.attention(q, k, v, is_causal=True, query_offset=length - 1))
    assert counter.frame_count <= 3


def test_an_offset_that_follows_from_the_shapes():
    def attend(q, k, v):
        return ls.attention(q, k, v, PATTERNS["window"], is_causal=True, query_offset=k.shape[2] - q.shape[2])

    compiled, counter = counted(attend, dynamic=True)
    for length in range(4, 20):
        tensors = qkv(n=3, kv_len=length)
        assert_same(run(compiled, tensors), run(attend, tensors))
    assert counter.frame_count <= 3  # one of them for as many queries as keys


def test_documents_that_change():
    def attend(q, k, v, bounds):
        return ls.attention(q, k, v, PATTERNS["all"], is_causal=True, cu_seqlens=bounds)

    compiled, counter = counted(attend)
    for bounds in ((0, 3, 16), (0, 4, 12), (0, 4, 4, 12), (0, 1, 2, 3, 4), (0, 2, 4, 6, 8, 10), (0, 0, 16)):
        tensors, documents = qkv(), torch.tensor(bounds, dtype=torch.int32)
        found, wanted = (run(lambda *x, f=f, b=documents: f(*x, b), tensors) for f in (compiled, attend))
        assert_same(found, wanted)
    assert counter.frame_count <= 2


def test_seeds_that_change():
    compiled, counter = counted(lambda q, k, v, seed: ls.attention(q, k, v, dropout_p=0.3, dropout_seed=seed))
    tensors = qkv(grad=False)
    for seed in (5, 6, 7, -3, 2**40, 11):
        assert torch.equal(compiled(*tensors, seed), ls.attention(*tensors, dropout_p=0.3, dropout_seed=seed))
    assert counter.frame_count <= 3


def test_calls_with_the_same_shapes_compile_once():
    compiled, counter = counted(lambda q, k, v: ls.attention(q, k, v, PATTERNS["all"]))
    for seed in range(5):
        compiled(*(randn(2, 4, 16, 4, seed=seed + i) for i in range(3)))
    assert counter.frame_count == 1


# --- policy -------------------------------------------------------------------------------------------------------


class Spy:
    """Counts its launches."""

    def __init__(self, backward=False):
        self.launches = self.backwards = 0
        self.backward = backward

    @hookimpl
    def longspan_capabilities(self):
        return Capabilities(
            devices=("cpu",), dtypes=("float64",), patterns=("dense",), causal=True, backward=self.backward
        )

    @hookimpl
    def longspan_kernel(self, problem):
        def forward(q, k, v):
            self.launches += 1
            return blockwise.forward(q, k, v, is_causal=problem.is_causal, scale=problem.scale)

        def backward(*tensors):
            self.backwards += 1
            return blockwise.backward(*tensors, is_causal=problem.is_causal, scale=problem.scale)

        return Kernel(forward, backward) if self.backward else forward


@pytest.mark.parametrize("how", ["argument", "context", "prefer", "environment", "decorator"])
def test_the_policy_in_force_is_honoured_before_and_after_the_tracing(register, monkeypatch, how):
    """Each policy has a trace of its own, and finds it again."""
    spy = Spy()
    register(spy, "test-spy")
    tensors = qkv(grad=False)
    given = {"backend": "test-spy"} if how == "argument" else {}
    compiled, counter = counted(lambda q, k, v: ls.attention(q, k, v, is_causal=True, **given))

    def launches():
        before = spy.launches
        if how == "context":
            with ls.use(backend="test-spy"):
                compiled(*tensors)
        elif how == "prefer":
            with ls.use(prefer=("test-spy",)):
                compiled(*tensors)
        elif how == "environment":
            with monkeypatch.context() as patch:
                patch.setenv("LONGSPAN_BACKEND", "test-spy")
                compiled(*tensors)
        elif how == "decorator":
            ls.use(backend="test-spy")(compiled)(*tensors)
        else:
            compiled(*tensors)
        return spy.launches - before

    assert launches() == 1, "the policy was not honoured"
    before = spy.launches
    with ls.use(backend="reference"):
        compiled(*tensors)
    assert spy.launches - before == (how == "argument"), "an earlier policy was in force"
    assert launches() == 1, "a later policy was in force"
    assert counter.frame_count == 2


def elsewhere(way, function):
    """Run it in another thread, or in an async task of its own; whatever it raises is raised here."""
    if way == "thread":
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function).result()

    async def run():
        return function()

    return asyncio.run(run())


POLICIES = {
    "context": lambda patch: ls.use(backend="no-such"),
    "block": lambda patch: ls.use(block=("test-spy",)),
    "LONGSPAN_BACKEND": lambda patch: patch.setenv("LONGSPAN_BACKEND", "no-such"),
    "LONGSPAN_BLOCK": lambda patch: patch.setenv("LONGSPAN_BLOCK", "test-spy"),
    "unreadable": lambda patch: patch.setenv("LONGSPAN_PREFER", "a b"),
}


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("named", [None, "test-spy"], ids=["auto", "by argument"])
@pytest.mark.parametrize("name", POLICIES)
def test_what_eager_code_refuses_compiled_code_refuses_too(register, monkeypatch, name, named, fullgraph):
    register(Spy(), "test-spy")
    tensors = qkv(grad=False)

    def attend(q, k, v):
        return ls.attention(q, k, v, backend=named)

    def outcome(function):
        with monkeypatch.context() as patch, POLICIES[name](patch) or nullcontext():
            return refusal(function, *tensors)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=fullgraph)
    compiled(*tensors)
    eager, found = outcome(attend), outcome(compiled)
    assert (eager is None) == (found is None), (eager, found)
    if eager is not None:
        assert isinstance(found, type(eager)) or str(eager) in str(found)
    compiled(*tensors)


@pytest.mark.parametrize("way", ["thread", "task"])
def test_the_policy_is_that_of_the_thread_and_the_task(register, way):
    spy = Spy()
    register(spy, "test-spy")
    tensors = qkv(grad=False)
    compiled = whole(lambda q, k, v: ls.attention(q, k, v))

    def named():
        with ls.use(backend="test-spy"):
            return compiled(*tensors)

    compiled(*tensors)
    elsewhere(way, named)
    assert spy.launches == 1
    with ls.use(backend="test-spy"):
        compiled(*tensors)
        assert spy.launches == 2
        if way == "thread":  # a task starts with the policy of who made it
            elsewhere(way, lambda: compiled(*tensors))
            assert spy.launches == 2


def test_two_functions_with_blocks_of_their_own(register):
    """Each `use` inside breaks its graph, and what is compiled behind the break is shared: not so the answer."""
    spies = {name: Spy() for name in ("test-one", "test-two")}
    for name, spy in spies.items():
        register(spy, name)

    def one(q, k, v):
        with ls.use(backend="test-one"):
            return ls.attention(q, k, v)

    def two(q, k, v):
        with ls.use(backend="test-two"):
            return ls.attention(q, k, v)

    compiled = [torch.compile(function, backend="aot_eager") for function in (one, two)]
    for round_ in range(1, 3):
        for function in compiled:
            function(*qkv(grad=False))
        assert [spy.launches for spy in spies.values()] == [round_, round_]


def test_the_backward_keeps_the_forwards_policy(register):
    """Whatever is in force when the backward runs, and in whichever thread."""
    spy = Spy(backward=True)
    register(spy, "test-spy")
    tensors = qkv()
    compiled = whole(lambda q, k, v: ls.attention(q, k, v))
    with ls.use(backend="test-spy"):
        out = compiled(*tensors)
    with ls.use(backend="reference"):
        elsewhere("thread", lambda: torch.autograd.grad(out.sum(), tensors))
    assert (spy.launches, spy.backwards) == (1, 1)


@pytest.mark.parametrize("name", ["a|b", "a,b", 'a"b', "a\nb"])
def test_names_that_nobody_could_register_are_refused_in_a_graph_as_ever(name):
    compiled, tensors = whole(lambda q, k, v: ls.attention(q, k, v)), qkv(grad=False)
    for options in ({"backend": name}, {"prefer": (name,)}):
        with ls.use(**options), pytest.raises(ls.UnknownBackend):
            compiled(*tensors)
    with pytest.raises(ls.UnknownBackend):
        whole(lambda q, k, v: ls.attention(q, k, v, backend=name))(*tensors)


def test_an_exported_graph_keeps_the_policy_of_its_making(register):
    spy = Spy()
    register(spy, "test-spy")
    tensors = tuple(qkv(grad=False))
    with ls.use(backend="test-spy"):
        exported = export(Attend(), tensors)
    with ls.use(backend="reference"):
        exported.module()(*tensors)
    assert spy.launches > 0


def test_a_blocked_backend_is_not_used_in_a_graph(register):
    spy = Spy()
    register(spy, "test-spy")
    compiled = whole(lambda q, k, v: ls.attention(q, k, v, backend="test-spy"))
    with ls.use(block=("test-spy",)), pytest.raises(ls.BackendUnavailable, match="test-spy"):
        compiled(*qkv(grad=False))
    assert spy.launches == 0


def test_the_backward_runs_with_the_forwards_backend(register):
    spy = Spy()
    register(spy, "test-spy")
    tensors = qkv()
    compiled = whole(lambda q, k, v: ls.attention(q, k, v, backend="test-spy"))
    found = run(compiled, tensors)
    assert_same(found, run(lambda q, k, v: ls.attention(q, k, v, backend="test-spy"), tensors))


def test_a_policy_set_inside_is_honoured_where_the_graph_may_break(register):
    spy = Spy()
    register(spy, "test-spy")

    def attend(q, k, v):
        with ls.use(backend="test-spy"):
            return ls.attention(q, k, v)

    torch.compile(attend, backend="aot_eager")(*qkv(grad=False))
    assert spy.launches == 1


# --- torch.func inside a compiled function ---------------------------------------------------------------------------

TRANSFORMED = {
    "vmap": lambda q, k, v: torch.func.vmap(lambda *x: ls.attention(*x, PATTERNS["all"], is_causal=True))(q, k, v),
    "grad": lambda q, k, v: torch.func.grad(lambda x: ls.attention(x, k[0], v[0]).sin().sum())(q[0]),
}


@pytest.mark.parametrize("transform", TRANSFORMED)
def test_transforms_inside_are_right_whether_the_graph_breaks_or_not(transform):
    tensors = [randn(3, 2, 4, 16, 4, seed=i) for i in range(3)]
    got = torch.compile(TRANSFORMED[transform], backend="aot_eager")(*tensors)
    assert torch.equal(got, TRANSFORMED[transform](*tensors))


# --- errors -------------------------------------------------------------------------------------------------------

REFUSED_WHEN_RUN = {
    "key's dtype": (lambda q, k, v: ls.attention(q, k.float(), v), ls.ArgumentError, "key: got"),
    "three dimensions": (lambda q, k, v: ls.attention(q[0], k[0], v[0]), ls.ArgumentError, "query: got"),
    "integers": (lambda q, k, v: ls.attention(q.int(), k.int(), v.int()), ls.ArgumentError, "query: got"),
    "fewer heads": (lambda q, k, v: ls.attention(q, k[:, :2], v[:, :2]), ls.ArgumentError, "enable_gqa"),
    "no divisor": (
        lambda q, k, v: ls.attention(q, k[:, :3], v[:, :3], enable_gqa=True), ls.ArgumentError, "divisor",
    ),
    "no offset": (
        lambda q, k, v: ls.attention(q, k[:, :, :5], v[:, :, :5], is_causal=True), ls.ArgumentError, "query_offset",
    ),
    "negative offset": (lambda q, k, v: ls.attention(q, k, v, query_offset=-1), ls.ArgumentError, "query_offset: got"),
    "dropout of 1.5": (lambda q, k, v: ls.attention(q, k, v, dropout_p=1.5), ls.ArgumentError, "dropout_p: got"),
    "infinite scale": (lambda q, k, v: ls.attention(q, k, v, scale=float("inf")), ls.ArgumentError, "scale: got"),
    "falling documents": (lambda q, k, v: ls.attention(q, k, v, cu_seqlens=(0, 7, 3)), ls.ArgumentError, "never fall"),
    "documents beyond": (lambda q, k, v: ls.attention(q, k, v, cu_seqlens=(0, 99)), ls.ArgumentError, "cu_seqlens"),
    "documents of floats": (
        lambda q, k, v: ls.attention(q, k, v, cu_seqlens=torch.tensor([0.0, 9.0])), ls.ArgumentError, "cu_seqlens",
    ),
    "more branches than heads": (
        lambda q, k, v: ls.attention(q, k, v, ls.Dilated((2, 3, 4, 5, 6), (1,) * 5, heads="grouped")),
        ls.ArgumentError,
        "pattern: got",
    ),
    "unknown backend": (lambda q, k, v: ls.attention(q, k, v, backend="sdp"), ls.UnknownBackend, "sdpa"),
    "a backend that does not fit": (
        lambda q, k, v: ls.attention(q.half(), k.half(), v.half(), backend="test-spy"), ls.BackendUnavailable, "dtype",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_WHEN_RUN)
def test_errors_are_the_librarys_own(register, case):
    register(Spy(), "test-spy")
    function, kind, said = REFUSED_WHEN_RUN[case]
    with pytest.raises(kind, match=said):
        function(*qkv(grad=False))
    with pytest.raises(kind, match=said):
        whole(function)(*qkv(grad=False))


REFUSED_WHEN_TRACED = {
    "is_causal, a number": (lambda q, k, v: ls.attention(q, k, v, is_causal=1), "is_causal: got"),
    "enable_gqa, a number": (lambda q, k, v: ls.attention(q, k, v, enable_gqa=1), "enable_gqa: got"),
    "scale, true": (lambda q, k, v: ls.attention(q, k, v, scale=True), "scale: got"),
    "scale, text": (lambda q, k, v: ls.attention(q, k, v, scale="x"), "scale: got"),
    "dropout_p, true": (lambda q, k, v: ls.attention(q, k, v, dropout_p=True), "dropout_p: got"),
    "query_offset, true": (lambda q, k, v: ls.attention(q, k, v, query_offset=True), "query_offset: got"),
    "query_offset, a float": (lambda q, k, v: ls.attention(q, k, v, query_offset=1.5), "query_offset: got"),
    "cu_seqlens, floats": (lambda q, k, v: ls.attention(q, k, v, cu_seqlens=(0, 3.5, 16)), "cu_seqlens: got"),
    "cu_seqlens, truths": (lambda q, k, v: ls.attention(q, k, v, cu_seqlens=(False, True)), "cu_seqlens: got"),
    "cu_seqlens, text": (lambda q, k, v: ls.attention(q, k, v, cu_seqlens="09"), "cu_seqlens: got"),
    "cu_seqlens, a number": (lambda q, k, v: ls.attention(q, k, v, cu_seqlens=9), "cu_seqlens: got"),
    "pattern, text": (lambda q, k, v: ls.attention(q, k, v, "dense"), "pattern: got"),
    "a window that is negative": (lambda q, k, v: ls.attention(q, k, v, ls.SlidingWindow(-1)), "left: got"),
    "a rate too many": (lambda q, k, v: ls.attention(q, k, v, ls.Dilated((3,), (1, 2))), "dilation_rates: got"),
    "backend, nothing": (lambda q, k, v: ls.attention(q, k, v, backend=""), "backend=''"),
    "key, none": (lambda q, k, v: ls.attention(q, None, v), "key: got"),
}


def refusal(function, *inputs):
    """What it raises, if anything; dynamo wraps what it meets while tracing in exceptions of its own."""
    try:
        function(*inputs)
    except Exception as error:  # noqa: BLE001
        return error
    return None


@pytest.mark.parametrize("case", REFUSED_WHEN_TRACED)
def test_what_is_refused_eagerly_is_refused_in_a_graph(case):
    """Never a result. Where the graph may break, which is torch's default, the message is the library's."""
    function, said = REFUSED_WHEN_TRACED[case]
    with pytest.raises(ls.LongspanError, match=said):
        function(*qkv(grad=False))
    assert refusal(whole(function), *qkv(grad=False)) is not None, "a result, in a whole graph"
    torch._dynamo.reset()
    error = refusal(torch.compile(function, backend="aot_eager"), *qkv(grad=False))
    assert error is not None and said in str(error)


def test_none_is_the_dense_pattern_in_a_graph_too():
    tensors = qkv()
    assert_same(
        run(whole(lambda q, k, v: ls.attention(q, k, v, None)), tensors),
        run(lambda q, k, v: ls.attention(q, k, v, None), tensors),
    )


def test_a_plan_refuses_other_tensors_in_a_graph():
    plan = ls.plan(ls.Problem.like(*qkv(grad=False)))
    assert refusal(whole(plan.__call__), *qkv(n=5, grad=False)) is not None
    torch._dynamo.reset()
    with pytest.raises(ls.ArgumentError, match=r"query: got \(2, 4, 5, 4\)"):
        torch.compile(plan.__call__, backend="aot_eager")(*qkv(n=5, grad=False))


# --- the operators --------------------------------------------------------------------------------------------------

OPERATOR_CASES = {
    "plain": {},
    "dilated, causal, float32": {"pattern": "dilated:4/1,8/2", "is_causal": True, "dtype": torch.float32},
    "documents": {"cu_seqlens": torch.tensor([0, 3, 3, 9])},
    "dropout": {"seed": torch.tensor(5), "dropout_p": 0.5},
    "gqa and offset": {"kv_heads": 2, "enable_gqa": True, "query_offset": 3, "is_causal": True},
    "window, transposed": {"pattern": "window:3,1", "transposed": True, "scale": 0.3},
    "grouped, bfloat16": {"pattern": "dilated:4/1,8/2:grouped:block", "dtype": torch.bfloat16},
    "no gradients": {"grad": False},
}


def operator_inputs(case):
    given = dict(OPERATOR_CASES[case])
    keywords = {name: given.pop(name) for name in ("kv_heads", "dtype", "grad") if name in given}
    q, k, v = qkv(**keywords)
    if given.pop("transposed", False):
        q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    rest = (
        given.get("cu_seqlens"), given.get("seed"), *ls.parse_pattern(given.get("pattern", "dense")).code,
        given.get("is_causal", False),
        given.get("scale"), given.get("dropout_p", 0.0), given.get("enable_gqa", False), given.get("query_offset"),
        Policy().text,
    )  # fmt: skip
    return q, k, v, rest


@pytest.mark.parametrize("case", OPERATOR_CASES)
def test_opcheck(case):
    q, k, v, rest = operator_inputs(case)
    checks = torch.library.opcheck(torch.ops.longspan.attention.default, (q, k, v, *rest))
    assert set(checks.values()) == {"SUCCESS"} and len(checks) == 4
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = torch.ops.longspan.attention(q, k, v, *rest)
    for dlse in (None, torch.randn_like(lse)):
        given = (torch.randn_like(out), dlse, q, k, v, out, lse, *rest)
        checks = torch.library.opcheck(torch.ops.longspan.attention_backward.default, given)
        assert set(checks.values()) == {"SUCCESS"} and len(checks) == 4


def test_both_operators_are_all_there_are():
    """Each has its opcheck above."""
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("longspan::")}
    assert names == {"longspan::attention", "longspan::attention_backward"}


# --- export -------------------------------------------------------------------------------------------------------


class Attend(torch.nn.Module):
    def __init__(self, **given):
        super().__init__()
        self.given = given

    def forward(self, q, k, v):
        return ls.attention(q, k, v, PATTERNS["all"], is_causal=True, **self.given)


def outputs(function, tensors):
    torch.manual_seed(1)
    found = function(*tensors)
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize(
    "given, strict",
    [
        ({"return_lse": True}, True),
        ({}, False),
        ({"cu_seqlens": (0, 4, 9)}, False),
        ({"dropout_p": 0.5, "dropout_seed": 3}, True),
        ({"dropout_p": 0.5}, False),
    ],
    ids=str,
)
def test_export(given, strict):
    module = Attend(**given)
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=9, max=512)
    exported = export(module, tuple(qkv(grad=False)), dynamic_shapes=({0: batch, 2: length},) * 3, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for n, entries in ((23, 3), (9, 1)):
        tensors = qkv(n=n, batch=entries, grad=False)
        wanted = outputs(module, tensors)
        for graph in (exported.module(), loaded.module()):
            assert_same(outputs(graph, tensors), wanted)
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.longspan.attention.default) == 1


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_documents_as_an_input(strict):
    class Packed(torch.nn.Module):
        def forward(self, q, k, v, bounds):
            return ls.attention(q, k, v, PATTERNS["window"], cu_seqlens=bounds)

    tensors, module = tuple(qkv(grad=False)), Packed()
    shapes = (None, None, None, {0: Dim("boundaries")})
    exported = export(module, (*tensors, torch.tensor([0, 4, 9])), dynamic_shapes=shapes, strict=strict)
    for bounds in ((0, 4, 9), (0, 1, 1, 2, 16)):
        given = (*tensors, torch.tensor(bounds))
        assert torch.equal(exported.module()(*given), module(*given))


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_a_plan(strict):
    class Planned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.plan = ls.plan(ls.Problem.like(*qkv(grad=False), PATTERNS["grouped"], is_causal=True))

        def forward(self, q, k, v):
            return self.plan(q, k, v)

    module, tensors = Planned(), tuple(qkv(grad=False))
    exported = export(module, tensors, strict=strict)
    assert_same(exported.module()(*tensors), module(*tensors))


# --- Inductor -----------------------------------------------------------------------------------------------------


@needs_compiler
def test_inductor_gives_the_eager_answer():
    """A layer with its projections, forward and backward, of lengths that change."""
    torch.manual_seed(0)
    into, back = torch.nn.Linear(16, 48).double(), torch.nn.Linear(16, 16).double()

    def layer(x):
        q, k, v = into(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        out, lse = ls.attention(q, k, v, PATTERNS["all"], is_causal=True, return_lse=True)
        mixed = out * torch.sigmoid(lse.masked_fill(lse == -torch.inf, 0.0)).unsqueeze(-1)
        return x + back(mixed.transpose(1, 2).flatten(2)).sin()

    compiled, counter = counted(layer, backend="inductor", dynamic=True)
    parameters, graphs = [*into.parameters(), *back.parameters()], []
    for n in (19, 33):
        x = randn(2, n, 16, seed=n).requires_grad_()
        results = []
        for function in (compiled, layer):
            out = function(x)
            results.append([out, *torch.autograd.grad(out, [x, *parameters], randn(*out.shape, seed=9))])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


@needs_compiler
def test_inductor_repeats_its_dropout_by_seed_and_redraws_it_in_the_backward():
    n = 16
    compiled = whole(lambda q, k, v: ls.attention(q, k, v, dropout_p=0.5), backend="inductor")
    query, key = (torch.zeros(1, 2, n, n, dtype=torch.float64) for _ in range(2))
    eye = torch.eye(n, dtype=torch.float64).expand(1, 2, n, n)
    value = eye.contiguous().requires_grad_()
    torch.manual_seed(0)
    first, second = compiled(query, key, value), compiled(query, key, value)
    assert not torch.equal(first, second)
    assert 0.3 < (first == 0).double().mean() < 0.7
    for out in (first, second):
        (gradient,) = torch.autograd.grad(out, value, eye)
        assert torch.equal(gradient != 0, out.mT != 0)  # dV = P^T dO
    torch.manual_seed(0)
    assert torch.equal(compiled(query, key, value), first)
