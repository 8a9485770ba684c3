"""What installed backends compute, in float64, against the oracle: dense attention is all that they bring.

usage: oracle.py REPORT.json NAME...
"""

import json
import sys

import torch

import longspan as ls
from longspan.testing import oracle

torch.set_num_threads(1)
CASES = {
    "dense": ("dense", {}),
    "dense, causal": ("dense", {"is_causal": True}),
    "dense, scale": ("dense", {"scale": -0.7}),
    "dense, fewer queries, causal": ("dense", {"q_len": 30, "query_offset": 41, "is_causal": True}),
    "dilated": ("dilated:16/1,40/3", {}),
    "dilated, causal": ("dilated:16/1,40/3", {"is_causal": True}),
    "dilated, rows that see nothing": ("dilated:16/4", {"is_causal": True}),
    "dilated, grouped": ("dilated:16/1,40/3:grouped", {"is_causal": True}),
    "dilated, block": ("dilated:16/2,40/3:block", {}),
    "window": ("window:7,4", {}),
    "window, causal": ("window:7,0", {"is_causal": True}),
    "window, fewer queries": ("window:7,4", {"q_len": 30, "query_offset": 41}),
    "shared key heads": ("dense", {"kv_heads": 2, "is_causal": True}),
    "shared key heads, dilated": ("dilated:16/1,40/3", {"kv_heads": 2, "is_causal": True}),
    "shared key heads, window": ("window:7,4", {"kv_heads": 1}),
    "documents": ("dense", {"cu_seqlens": (0, 5, 5, 40, 71), "is_causal": True}),
    "documents, dilated": ("dilated:16/1,40/3", {"cu_seqlens": (0, 5, 40, 71)}),
    "documents, window": ("window:7,4", {"cu_seqlens": (0, 1, 40, 71), "is_causal": True}),
}
KV_LEN, HEADS, DIM = 71, 4, 8


class Counter:
    """An extension that counts the calls of every kernel."""

    forward = backward = 0

    def _counted(self, function, which):
        def called(*tensors, **given):
            setattr(self, which, getattr(self, which) + 1)
            return function(*tensors, **given)

        return called

    @ls.hookimpl(wrapper=True)
    def longspan_kernel(self):
        made = yield
        kernel = made if isinstance(made, ls.Kernel) else ls.Kernel(made)
        backward = kernel.backward and self._counted(kernel.backward, "backward")
        return ls.Kernel(self._counted(kernel.forward, "forward"), backward)


def error(got, want):
    assert got.shape == want.shape, (got.shape, want.shape)
    assert torch.equal(got.isneginf(), want.isneginf())
    finite = want.isfinite()
    return (got - want)[finite].abs().max().item()


def largest(got, want):
    return max(error(*pair) for pair in zip(got, want, strict=True))


def judge(name, pattern, q_len=KV_LEN, kv_heads=HEADS, **arguments):
    torch.manual_seed(0)
    shapes = ((2, HEADS, q_len, DIM), (2, kv_heads, KV_LEN, DIM), (2, kv_heads, KV_LEN, DIM))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    given = {"pattern": ls.parse_pattern(pattern), "enable_gqa": kv_heads != HEADS, "return_lse": True, **arguments}
    problem = {key: value for key, value in given.items() if key != "return_lse"}
    plan = ls.plan(ls.Problem.like(*inputs, **problem), backend=name)
    count = Counter()
    ls.register(count, name="counter")
    out, lse = ls.attention(*inputs, backend=name, **given)
    want, want_lse = oracle(*inputs, **given)
    dout = torch.randn_like(out)
    dlse = torch.randn_like(lse) * lse.isfinite()

    def gradients(out, lse, with_lse):
        total = (out * dout).sum()
        if with_lse:
            total = total + (lse.masked_fill(lse.isneginf(), 0) * dlse).sum()
        return torch.autograd.grad(total, inputs, retain_graph=True)

    found = {"backend": plan.backend, "out": error(out, want), "lse": error(lse, want_lse)}
    found["gradients"] = largest(gradients(out, lse, False), gradients(want, want_lse, False))
    found["calls"] = [count.forward, count.backward]
    found["lse gradients"] = largest(gradients(out, lse, True), gradients(want, want_lse, True))
    ls.unregister("counter")
    return found


found = {name: {case: judge(name, kind, **given) for case, (kind, given) in CASES.items()} for name in sys.argv[2:]}
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
