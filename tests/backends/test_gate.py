"""The gate to the native kernels: what is no plain tensor in memory of its own, as planned, does not reach C."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter

import longspan as ls
from longspan_plugins.cpu_fused import library, native
from longspan_plugins.cpu_fused.patterns import program_for
from longspan_plugins.cpu_fused.program import Program
from small import assert_same, qkv, randn

NATIVE = pytest.mark.skipif(library.compiler() is None, reason="no C compiler: there are no native kernels")
PATTERNS = {
    "dense": ls.Dense(),
    "window": ls.SlidingWindow(20, 0),
    "dilated": ls.Dilated((64, 128), (1, 2)),
    "blocks": ls.random_blocks(0.3, block_size=16, seed=5),
}


def plan_of(n=130, dim=16, heads=2, kv_heads=2, dtype="float32", **more):
    problem = ls.Problem(batch=1, heads=heads, kv_heads=kv_heads, q_len=n, head_dim=dim, dtype=dtype, **more)
    return ls.plan(problem, backend="cpu_fused")


def drawn(n=130, dim=16, heads=2, kv_heads=2, dtype=torch.float32):
    """Query, key, value and a gradient."""
    return [*qkv(1, heads, n, dim, kv_heads, dtype=dtype), randn(1, heads, n, dim, seed=9, dtype=dtype)]


def kernel_of(pattern=PATTERNS["dense"], n=130, dim=16, heads=2, **more):
    problem = ls.Problem(batch=1, heads=heads, q_len=n, head_dim=dim, pattern=pattern, **more)
    return native.kernel(problem, program_for(problem, library.load()), library.load())


class Wrapper(torch.Tensor):
    """A tensor whose numbers lie in another, as those of a DTensor do."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args = torch.utils._pytree.tree_map_only(Wrapper, lambda x: x.inner, args)
        return function(*args, **(kwargs or {}))


class Named(torch.Tensor):
    """A class of its own, in memory of its own."""


@NATIVE
@pytest.mark.parametrize("place", range(4))
def test_tensors_without_memory_of_their_own_are_refused(place):
    kernel, tensors = kernel_of(), drawn()
    out, lse = kernel.forward(*tensors[:3])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(tensors[place])
    freed = tensors[place].clone()
    freed.untyped_storage().resize_(0)
    cut = tensors[place].clone()
    cut.untyped_storage().resize_(cut.nbytes - 4)
    for bad in (Wrapper(tensors[place]), fake, freed, cut, tensors[place].to("meta")):
        query, key, value, dout = (*tensors[:place], bad, *tensors[place + 1 :])
        with pytest.raises(ls.ArgumentError, match=r"Next: ."):
            kernel.backward(dout, query, key, value, out, lse)
        if place < 3:
            with pytest.raises(ls.ArgumentError, match=r"Next: ."):
                kernel.forward(query, key, value)


@NATIVE
def test_results_that_a_mode_makes_without_memory_are_refused():
    kernel, tensors = kernel_of(), drawn()
    out, lse = kernel.forward(*tensors[:3])
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(ls.LongspanError, match="Next: leave the mode"):
            kernel.forward(*tensors[:3])
        with pytest.raises(ls.LongspanError, match="Next: leave the mode"):
            kernel.backward(tensors[3], *tensors[:3], out, lse)


@NATIVE
def test_tensors_with_memory_of_their_own_are_served_whatever_their_class():
    kernel, (query, key, value, dout) = kernel_of(), drawn()
    want = kernel.forward(query, key, value)
    assert_same(kernel.forward(Parameter(query), key.as_subclass(Named), torch.nn.Buffer(value)), want)
    grads = kernel.backward(dout, query, key, value, *want)
    named = [x.as_subclass(Named) for x in (dout, query, key, value, *want)]
    assert_same(kernel.backward(*named), grads)
    blocks = ls.TopKBlocks(2, block_size=32)  # chosen from the tensors: of their class
    chosen = ls.attention(*(x.as_subclass(Named) for x in (query, key, value)), blocks, backend="cpu_fused")
    assert torch.equal(chosen, ls.attention(query, key, value, blocks, backend="cpu_fused"))


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_negative_bit_is_a_sign(dtype):
    """`torch._neg_view` negates without touching the memory."""
    plan, tensors = plan_of(dtype=str(dtype).removeprefix("torch.")), drawn(dtype=dtype)
    out, lse = plan(*tensors[:3])
    grads = plan.backward(tensors[3], *tensors[:3], out, lse)
    negative = [torch._neg_view(-x) for x in tensors]
    assert all(x.is_neg() for x in negative)
    assert_same(plan(*negative[:3]), (out, lse))
    assert_same(plan.backward(negative[3], *negative[:3], torch._neg_view(-out), torch._neg_view(-lse)), grads)
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    plan(*(torch._neg_view(-x) for x in leaves))[0].backward(negative[3])
    assert_same([x.grad for x in leaves], grads)


WRONG = {
    "lse-double": lambda x: {**x, "lse": x["lse"].double()},
    "lse-short": lambda x: {**x, "lse": x["lse"][..., :10]},
    "dlse-short": lambda x: {**x, "dlse": x["lse"][..., :10]},
    "dlse-double": lambda x: {**x, "dlse": x["lse"].double()},
    "dout-double": lambda x: {**x, "dout": x["dout"].double()},
    "dout-half": lambda x: {**x, "dout": x["dout"].half()},
    "dout-short": lambda x: {**x, "dout": x["dout"][:, :, :10]},
    "dout-sparse": lambda x: {**x, "dout": x["dout"].to_sparse()},
    "key-sparse": lambda x: {**x, "key": x["key"].to_sparse()},
    "dout-meta": lambda x: {**x, "dout": x["dout"].to("meta")},
    "dout-none": lambda x: {**x, "dout": None},
    "out-narrow": lambda x: {**x, "out": x["out"][..., :4]},
    "keys-short": lambda x: {**x, "key": x["key"][:, :, :10], "value": x["value"][:, :, :10]},
    "keys-heads": lambda x: {**x, "key": x["key"][:, :1], "value": x["value"][:, :1]},
    "query-batch": lambda x: {**x, "query": x["query"].expand(2, -1, -1, -1)},
    "seed": lambda x: {**x, "seed": 0.5},
}


@pytest.mark.parametrize("backend", ["cpu_fused", "sdpa", "reference"])
@pytest.mark.parametrize("name", WRONG)
def test_the_backward_of_a_plan_checks_what_its_forward_does(name, backend):
    query, key, value, dout = drawn(n=20)
    plan = ls.plan(ls.Problem.like(query, key, value), backend=backend)
    out, lse = plan(query, key, value)
    given = {"dout": dout, "query": query, "key": key, "value": value, "out": out, "lse": lse}
    plan.backward(**given)
    with pytest.raises(ls.ArgumentError, match=rf"^({name.split('-')[0].removesuffix('s')}|dropout_).*Next: "):
        plan.backward(**WRONG[name](given))


@NATIVE
def test_the_kernels_check_heads_too():
    grouped = kernel_of(ls.Dilated((64, 128), (1, 2), heads="grouped"), heads=4)
    x = qkv(1, 4, 130, 16, dtype=torch.float32)
    grouped.forward(*x)
    with pytest.raises(ls.ArgumentError, match="heads"):  # which of the programs would they run?
        grouped.forward(*qkv(1, 6, 130, 16, dtype=torch.float32))
    with pytest.raises(ls.ArgumentError, match="heads"):
        kernel_of().forward(*qkv(1, 3, 130, 16, kv_heads=2, dtype=torch.float32))


@NATIVE
@pytest.mark.parametrize("name", PATTERNS)
def test_a_program_that_leaves_its_tensors_is_refused(name):
    """Of another length: as a layout would be that a cache gave to the wrong problem."""
    problem = ls.Problem(batch=1, heads=2, q_len=130, head_dim=16, pattern=PATTERNS[name], is_causal=True)
    program = program_for(problem, library.load())
    native.kernel(problem, program, library.load())
    tables = [program.tiles, program.segments, program.ranges, program.of_head]
    for table, column in ((0, 0), (0, 1), (0, 2), (0, 4), (0, 5), (1, 0), (1, 2), (1, 6), (2, 1), (3, 0)):
        for wrong in (-7, 10**6):
            if (table, column, wrong) == (1, 6, -7):  # any negative number is no mask
                continue
            changed = [one.tensor() for one in tables]
            changed[table].view(len(changed[table]), -1)[-1, column] = wrong
            masks = None if program.masks is None else program.masks.tensor()
            with pytest.raises(ls.LongspanError, match="Next: clear the pattern cache"):
                native.kernel(problem, Program.of(*changed, program.covered, masks), library.load())
    with pytest.raises(ls.LongspanError, match="leaves its tensors"):
        native.kernel(problem.replace(q_len=120, kv_len=120), program, library.load())


@NATIVE
def test_a_single_column_may_have_any_stride():
    """torch calls a tensor contiguous whatever the stride of a dimension of 1."""
    wide = randn(1, 2, 40, 7, dtype=torch.float32)
    query = wide[..., :1]
    assert query.stride(3) == 1 and query.as_strided(query.shape, (*query.stride()[:3], 5)).stride(3) == 5
    odd = query.as_strided(query.shape, (*query.stride()[:3], 5))
    plain = query.contiguous()
    assert_same(
        ls.attention(odd, odd, odd, backend="cpu_fused", return_lse=True),
        ls.attention(plain, plain, plain, backend="cpu_fused", return_lse=True),
    )
