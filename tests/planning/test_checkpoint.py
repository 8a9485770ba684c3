"""Checkpointing: attention is neither run nor resolved again, and gradients are those of the plain run."""

from __future__ import annotations

import pytest
import torch

import longspan as ls


class Counting:
    """A dense backend that counts what it is asked for."""

    def __init__(self):
        self.kernels = self.forwards = self.backwards = 0

    @ls.hookimpl
    def longspan_capabilities(self):
        return ls.Capabilities(
            devices=("cpu",), dtypes=("float64",), patterns=("dense",), causal=True, dropout=True, backward=True
        )

    @ls.hookimpl
    def longspan_kernel(self, problem):
        self.kernels += 1
        given = {"is_causal": problem.is_causal, "scale": problem.scale}

        def forward(q, k, v, **more):
            self.forwards += 1
            return ls.blockwise.forward(q, k, v, **given, **more)

        def backward(*tensors, **more):
            self.backwards += 1
            return ls.blockwise.backward(*tensors, **given, **more)

        return ls.Kernel(forward, backward)


@pytest.fixture
def counting():
    plugin = Counting()
    ls.register(plugin, name="test-counting")
    yield plugin
    ls.unregister("test-counting")


def layer(weight, dropout_p=0.0):
    def run(x):
        q, k, v = (x @ weight).view(2, 12, 3, 4, 8).permute(2, 0, 3, 1, 4)
        out = ls.attention(q, k, v, is_causal=True, dropout_p=dropout_p, backend="test-counting")
        return torch.tanh(out).transpose(1, 2).flatten(2)

    return run


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_attention_is_not_run_again(counting, dropout_p):
    torch.manual_seed(0)
    weight = torch.randn(16, 96, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
    run = layer(weight, dropout_p)
    torch.manual_seed(1)
    plain = torch.autograd.grad(run(x).square().sum(), (x, weight))
    before = (counting.kernels, counting.forwards, counting.backwards)
    torch.manual_seed(1)
    out = ls.checkpoint(run, x)
    kept = torch.autograd.grad(out.square().sum(), (x, weight))
    assert counting.forwards - before[1] == 1, "once in the forward, not again in the recomputation"
    assert counting.backwards - before[2] == 1
    for mine, want in zip(kept, plain, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)


def test_torchs_own_checkpoint_finds_the_plan_again(counting):
    torch.manual_seed(0)
    weight = torch.randn(16, 96, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(layer(weight), x, use_reentrant=False)
    made = counting.kernels
    out.sum().backward()
    assert counting.forwards == 2
    assert counting.kernels == made, "no second plan"
