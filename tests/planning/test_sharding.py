"""Distributed tensors: two processes against one, forward and backward; what no rank could compute is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist

import longspan as ls
import small
from small import assert_same, randn

qkv = partial(small.qkv, n=33, dim=8, dtype=torch.float32)

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch was built without gloo"
)

CALLS = {
    "dense": {"is_causal": True},
    "window": {"pattern": ls.SlidingWindow(9, 2)},
    "dilated": {"pattern": ls.Dilated((8, 16), (1, 2)), "is_causal": True},
    "blocks": {"pattern": ls.local_blocks(9, block_size=4), "is_causal": True},
    "top k": {"pattern": ls.TopKBlocks(2, 8)},
    "documents": {"is_causal": True, "cu_seqlens": (0, 5, 20)},
    "gqa": {"is_causal": True, "enable_gqa": True},
    "fewer queries": {"is_causal": True, "query_offset": 20},
}


def single(given):
    """Inputs, `(out, lse)`, incoming gradients and gradients of one process."""
    shape = {"kv_heads": 2} if "enable_gqa" in given else {}
    shape |= {"n": 13, "kv_len": 33} if "query_offset" in given else {}
    tensors = [x.requires_grad_() for x in qkv(**shape)]
    results = ls.attention(*tensors, **given, return_lse=True)
    douts = [randn(*x.shape, seed=5 + i, dtype=x.dtype) for i, x in enumerate(results)]
    return tensors, results, douts, torch.autograd.grad(results, tensors, douts)


def sharded(tensors, mesh, placements):
    from torch.distributed.tensor import distribute_tensor

    found = [distribute_tensor(x.detach(), mesh, [p]) for x, p in zip(tensors, placements, strict=True)]
    return [x.requires_grad_(y.requires_grad) for x, y in zip(found, tensors, strict=True)]


def check(function, given, mesh, placements, arriving):
    """That this rank gets its part of what one process gets; `arriving` is how the gradients of the results lie."""
    tensors, results, douts, grads = single(given)
    parts = sharded(tensors, mesh, placements)
    found = function(*parts)
    assert all(x.placements == parts[0].placements for x in found)
    back = torch.autograd.grad(found, parts, sharded(douts, mesh, [arriving] * 2))
    assert all(x.placements == y.placements for x, y in zip(back, parts, strict=True))
    assert_same([x.full_tensor() for x in (*found, *back)], [*results, *grads])


def refused(said, function, *tensors):
    with pytest.raises(ls.ArgumentError, match=said) as caught:
        function(*tensors)
    assert "Next:" in str(caught.value)


def by_two(rank, store):
    """What each of two processes does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    heads, batch, everywhere = [Shard(1)] * 3, [Shard(0)] * 3, [Replicate()] * 3
    for given in CALLS.values():

        def attend(*tensors, given=given):
            return ls.attention(*tensors, **given, return_lse=True)

        for placements, arriving in ((heads, Shard(1)), (batch, Replicate()), (everywhere, Shard(2))):
            check(attend, given, mesh, placements, arriving)
    given = CALLS["gqa"]
    plan = ls.plan(ls.Problem.like(*single(given)[0], **given))
    check(plan, given, mesh, heads, Shard(1))
    check(plan, given, mesh, [Shard(1), Replicate(), Replicate()], Shard(1))
    compiled = torch.compile(lambda *x: ls.attention(*x, **given, return_lse=True), fullgraph=True, backend="aot_eager")
    check(compiled, given, mesh, heads, Shard(1))
    with ls.use(backend="sdpa"):
        check(lambda *x: ls.attention(*x, is_causal=True, return_lse=True), CALLS["dense"], mesh, heads, Shard(1))

    parts, plain = sharded(qkv(), mesh, heads), qkv()
    refused("query: got .*Shard.dim=2", ls.attention, *sharded(qkv(), mesh, [Shard(2)] * 3))
    refused("key: got .*Shard.dim=2", ls.attention, *sharded(qkv(), mesh, [Shard(1), Shard(2), Shard(1)]))
    refused("value: got .*Shard.dim=0", ls.attention, *sharded(qkv(), mesh, [Shard(1), Shard(1), Shard(0)]))
    refused("query: got .*Partial", ls.attention, DTensor.from_local(plain[0], mesh, [Partial()]), *parts[1:])
    refused("key: got a plain tensor", ls.attention, parts[0], plain[1], plain[2])
    refused("query: got a plain tensor", ls.attention, plain[0], parts[1], parts[2])
    refused(
        "key: got 1 heads over 2",
        partial(ls.attention, enable_gqa=True),
        *sharded(qkv(kv_heads=1), mesh, heads[:1] + everywhere[:2]),
    )
    refused("dropout_p: got 0.5", partial(ls.attention, dropout_p=0.5, dropout_seed=3), *parts)
    for pattern in (
        ls.Dilated((8, 16), (1, 4)),
        ls.Dilated((8, 16), (1, 2), offset="block"),
        ls.Dilated((8, 16), (1, 2), heads="grouped"),
        ls.per_head([ls.local_blocks(9, block_size=4), *[ls.local_blocks(5, block_size=4)] * 3]),
    ):
        refused("pattern: got", partial(ls.attention, pattern=pattern), *parts)
        ls.attention(*sharded(qkv(), mesh, batch), pattern=pattern)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    torch.multiprocessing.spawn(by_two, (str(tmp_path / "store"),), nprocs=2)
