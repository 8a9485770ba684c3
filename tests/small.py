"""Small tensors for the tests, the same in every run, and what it means that two results are the same."""

from __future__ import annotations

import torch
from attrs import evolve

import longspan as ls
from longspan_plugins import pascal_fp32

__all__ = ["PascalOnCpu", "assert_same", "qkv", "randn"]


def randn(*shape, seed=0, dtype=torch.float64):
    """Drawn in float64 whatever the dtype, so that every dtype rounds the same numbers."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(batch=2, heads=4, n=16, dim=4, kv_heads=None, kv_len=None, dtype=torch.float64, grad=False, more=()):
    """`[query, key, value]`; `more` dimensions stand in front."""
    shapes = [(heads, n), *[(kv_heads or heads, kv_len or n)] * 2]
    made = [randn(*more, batch, h, length, dim, seed=i, dtype=dtype) for i, (h, length) in enumerate(shapes)]
    return [x.requires_grad_() for x in made] if grad else made


def assert_same(found, wanted):
    """Bit for bit, dtypes included."""
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.dtype == other.dtype and torch.equal(one, other), f"result {number}"


class PascalOnCpu:
    """pascal_fp32 as it is, for CPUs: what it widens runs on torch's operators there too, and needs no GPU of 2016."""

    @ls.hookimpl
    def longspan_capabilities(self):
        return evolve(pascal_fp32.longspan_capabilities(), devices=("cpu",), contains_nonfinite=("cpu",), opt_in=True)

    @ls.hookimpl
    def longspan_kernel(self, problem):
        return pascal_fp32.longspan_kernel(problem)
