"""Mistakes of the backward."""

from __future__ import annotations

import torch

import longspan as ls
from mistakes.sound import Sound
from mistakes.table import mistake

JOINT = "backward=True with api=1 (out and lse may be those of more keys"


@mistake("out and lse are computed again, from the keys at hand", JOINT)
class PartialLse(Sound):
    def backward(self, problem, dout, query, key, value, out, lse, dropout):
        out, lse = self.forward(problem, query, key, value, dropout)
        return super().backward(problem, dout, query, key, value, out, lse, dropout)


@mistake("dout . out is computed again, from the keys at hand", JOINT)
class PartialDelta(Sound):
    def backward(self, problem, dout, query, key, value, out, lse, dropout):
        out, _ = self.forward(problem, query, key, value, dropout)
        return super().backward(problem, dout, query, key, value, out, lse, dropout)


@mistake("dout . out is left out", "backward=True")
class NoDelta(Sound):
    def delta(self, dout, out):
        return torch.zeros_like(out[..., :1])


@mistake("dout . out is averaged over the channels", "backward=True")
class MeanDelta(Sound):
    def delta(self, dout, out):
        return (dout * out).mean(-1, keepdim=True)


@mistake("dout . out has the wrong sign", "backward=True")
class WrongDelta(Sound):
    def delta(self, dout, out):
        return -super().delta(dout, out)


@mistake("dquery lacks the scale", "backward=True")
class QuerySlopeUnscaled(Sound):
    def gradients(self, problem, dq, dk, dv):
        return dq / (problem.scale or 1.0), dk, dv


@mistake("dkey lacks the scale", "backward=True")
class KeySlopeUnscaled(Sound):
    def gradients(self, problem, dq, dk, dv):
        return dq, dk / (problem.scale or 1.0), dv


@mistake("dkey and dvalue are exchanged", "backward=True")
class KeysAndValuesExchanged(Sound):
    def gradients(self, problem, dq, dk, dv):
        return dq, dv, dk


@mistake("dkey is zero", "backward=True")
class NoKeySlope(Sound):
    def gradients(self, problem, dq, dk, dv):
        return dq, torch.zeros_like(dk), dv


@mistake("dquery is that of the last tile of keys", "backward=True with api=1 (any length")
class LastTileSlope(Sound):
    def add(self, total, part):
        return part


@mistake("the backward is not causal", "backward=True with causal=True")
class BackwardNotCausal(Sound):
    def backward(self, problem, *tensors):
        return super().backward(problem.replace(is_causal=False), *tensors)


@mistake("the backward has the usual scale", "backward=True with api=1 (the scores are multiplied")
class BackwardWithTheUsualScale(Sound):
    def backward(self, problem, *tensors):
        return super().backward(problem.replace(scale=problem.head_dim**-0.5), *tensors)


@mistake("two backwards differ in their last bits", "deterministic=True")
class NotDeterministic(Sound):
    calls = 0

    def gradients(self, problem, dq, dk, dv):
        self.calls += 1
        return dq * (1.0 + 2.4e-7 * (self.calls % 2)), dk, dv


@mistake("two forwards differ in their last bits", "deterministic=True")
class ForwardNotDeterministic(Sound):
    calls = 0

    def results(self, problem, query, out, lse):
        self.calls += 1
        return out * (1.0 + 2.4e-7 * (self.calls % 2)), lse


@mistake("it claims a backward, and has none", "backward=True")
class NoBackward(Sound):
    @ls.hookimpl
    def longspan_kernel(self, problem):
        return ls.Kernel(lambda *tensors, dropout=None: self.forward(problem, *tensors, dropout))


@mistake("the backward reads dout as if its rows lay side by side", "any strides")
class DoutWithoutStrides(Sound):
    def backward(self, problem, dout, *rest):
        if not dout.is_contiguous():
            flat = torch.empty(0, dtype=dout.dtype).set_(dout.untyped_storage())
            dout = flat.repeat(-(-dout.numel() // len(flat)))[: dout.numel()].view(dout.shape)
        return super().backward(problem, dout, *rest)


@mistake("the backward uses what the latest forward saved", "a call's results are its own")
class LatestForward(Sound):
    def forward(self, problem, query, key, value, dropout):
        self.saved = query.detach().clone()
        return super().forward(problem, query, key, value, dropout)

    def backward(self, problem, dout, query, *rest):
        saved = self.saved if self.saved.shape == query.shape else query
        return super().backward(problem, dout, saved, *rest)


@mistake("the backward returns the same memory every time", "a call's results are its own")
class GradientsKept(Sound):
    def gradients(self, problem, dq, dk, dv):
        kept = self.__dict__.setdefault("kept", {})
        return tuple(kept.setdefault((n, x.shape), x).copy_(x) for n, x in enumerate((dq, dk, dv)))


@mistake("the backward writes to dout", "inputs are only read")
class WritesToDout(Sound):
    def backward(self, problem, dout, *rest):
        found = super().backward(problem, dout, *rest)
        dout.mul_(problem.scale)
        return found
