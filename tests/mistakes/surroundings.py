"""Mistakes of memory and manners: strides, inputs, kept buffers, threads, and torch's own state."""

from __future__ import annotations

import torch

import longspan as ls
from mistakes.sound import Sound
from mistakes.table import mistake

STRIDES = "any strides"
READ = "inputs are only read"
OWN = "a call's results are its own"
STATE = "torch's state is left as it was"


class _Reads(Sound):
    """Reads memory by strides of its own."""

    def read(self, x):
        flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        found = self.view(flat, x)
        return x if found is None else found


@mistake("every tensor is taken for a contiguous one", STRIDES)
class AssumesContiguous(_Reads):
    def view(self, flat, x):
        start = flat[x.storage_offset() :]
        return start[: x.numel()].view(x.shape) if len(start) >= x.numel() else start[:1].expand(x.shape)


@mistake("what is not contiguous is taken for (batch, seq, heads, head_dim)", STRIDES)
class AssumesSequenceFirst(_Reads):
    def view(self, flat, x):
        if x.is_contiguous() or len(flat) - x.storage_offset() < x.numel():
            return None
        batch, heads, length, width = x.shape
        return flat[x.storage_offset() :][: x.numel()].view(batch, length, heads, width).transpose(1, 2)


@mistake("where a view starts in its storage is ignored", STRIDES)
class IgnoresTheStart(_Reads):
    def view(self, flat, x):
        return flat.as_strided(x.shape, x.stride(), 0)


@mistake("batch entries are taken to lie one after the other", STRIDES)
class IgnoresTheBatchStride(_Reads):
    def view(self, flat, x):
        if x.stride(0) == 0:
            return x * torch.arange(1, len(x) + 1, dtype=x.dtype).view(-1, 1, 1, 1)
        return None


@mistake("query is scaled in place", READ)
class ScalesQuery(Sound):
    def forward(self, problem, query, key, value, dropout):
        found = super().forward(problem, query, key, value, dropout)
        query.detach().mul_(problem.scale)
        return found


@mistake("query is scaled in place, and scaled back", READ)
class ScalesQueryAndBack(Sound):
    def forward(self, problem, query, key, value, dropout):
        query.detach().mul_(2.0)
        found = super().forward(problem.replace(scale=problem.scale / 2), query, key, value, dropout)
        query.detach().div_(2.0)
        return found


@mistake("the gap after a row of value is written to", READ)
class WritesToTheGap(Sound):
    def forward(self, problem, query, key, value, dropout):
        if value.stride(2) > value.shape[3] > 0 and value.stride(1) > value.stride(2):
            value.detach().as_strided(value.shape, value.stride(), value.storage_offset() - 1)[..., 0] = 0.0
        return super().forward(problem, query, key, value, dropout)


@mistake("for a single key the value itself is returned", OWN)
class ReturnsTheValue(Sound):
    def results(self, problem, query, out, lse):
        return out, lse

    def forward(self, problem, query, key, value, dropout):
        out, lse = super().forward(problem, query, key, value, dropout)
        alone = key.shape[2] == 1 and dropout is None and value.shape == out.shape and not problem.is_causal
        return (value.detach() if alone else out), lse


@mistake("out is the same memory every time", OWN)
class OutKept(Sound):
    def results(self, problem, query, out, lse):
        kept = self.__dict__.setdefault("kept", {})
        return kept.setdefault(out.shape, out).copy_(out), lse


@mistake("lse is the same memory every time", OWN)
class LseKept(Sound):
    def results(self, problem, query, out, lse):
        kept = self.__dict__.setdefault("kept", {})
        return out, kept.setdefault(lse.shape, lse).copy_(lse)


@mistake("results are kept by the shape of the inputs", OWN)
class CachedByShape(Sound):
    def forward(self, problem, query, key, value, dropout):
        kept = self.__dict__.setdefault("kept", {})
        place = problem, query.shape, key.shape
        if place not in kept:
            kept[place] = super().forward(problem, query, key, value, dropout)
        return tuple(x.clone() for x in kept[place])


@mistake("one buffer of scores for all calls", "one plan may run in several threads")
class SharedScratch(Sound):
    def scores(self, problem, q, k, keys):
        scores, seen = super().scores(problem, q, k, keys)
        kept = self.__dict__.setdefault("scratch", {})
        buffer = kept.setdefault(scores.shape, torch.empty_like(scores))
        return buffer.copy_(scores), seen


@mistake("a kernel serves the batch it was planned for alone", "any batch and heads")
class OneBatchOnly(Sound):
    def forward(self, problem, query, key, value, dropout):
        if query.shape[:2] != (problem.batch, problem.heads):
            raise RuntimeError(f"shape {tuple(query.shape)} is invalid")
        return super().forward(problem, query, key, value, dropout)


# -------------------------------------------------------------------------------------------------------- torch's state


class _First(Sound):
    """Does something before it computes."""

    def forward(self, problem, query, key, value, dropout):
        self.do()
        return super().forward(problem, query, key, value, dropout)


@mistake("torch's generator is seeded", STATE)
class SeedsTorch(_First):
    def do(self):
        torch.manual_seed(0)


@mistake("a number is drawn from torch's generator", STATE)
class DrawsFromTorch(_First):
    def do(self):
        torch.rand(())


@mistake("the backward draws from torch's generator", STATE)
class BackwardDrawsFromTorch(Sound):
    def delta(self, dout, out):
        torch.rand(())
        return super().delta(dout, out)


@mistake("torch's default dtype is changed", STATE)
class ChangesTheDefaultDtype(_First):
    def do(self):
        torch.set_default_dtype(torch.float64)


@mistake("torch's default device is changed", STATE)
class ChangesTheDefaultDevice(_First):
    def do(self):
        torch.set_default_device("cpu:0")


@mistake("the number of threads is changed", STATE)
class ChangesTheThreads(_First):
    def do(self):
        torch.set_num_threads(2)


@mistake("deterministic algorithms are switched on", STATE)
class SwitchesDeterminism(_First):
    def do(self):
        torch.use_deterministic_algorithms(True, warn_only=True)


@mistake("the gradient mode is left changed", STATE)
class LeavesTheGradientMode(_First):
    def do(self):
        torch.set_grad_enabled(False)


@mistake("products of float32 are made less precise", STATE)
class ChangesPrecision(_First):
    def do(self):
        torch.set_float32_matmul_precision("high")


@mistake("autocast is left on", STATE)
class LeavesAutocast(_First):
    def do(self):
        torch.set_autocast_enabled("cpu", True)


@mistake("the generator is seeded where the kernel is made", STATE)
class SeedsWhenPlanned(Sound):
    @ls.hookimpl
    def longspan_kernel(self, problem):
        torch.manual_seed(1)
        return super().longspan_kernel(problem)


@mistake("it prints", "nothing is printed")
class Prints(_First):
    def do(self):
        print("using kernel v2")
