"""A right kernel in plain torch, cut into small steps so that a mistake can be made in any one of them.

It works as fused kernels do: key tile by key tile, with a running maximum, sum and output (Milakov and Gimelshein 2018;
FlashAttention, arXiv 2205.14135), and a backward that makes the weights again from the joint log-sum-exp.
"""

from __future__ import annotations

import math
from types import MappingProxyType

import torch

import longspan as ls

__all__ = ["Sound", "Whole", "says"]


def says(**fields):
    """Capabilities, to be laid over those of `Sound`."""
    return MappingProxyType(fields)


class Sound:
    """Dense attention, and what a dense kernel may claim besides; the core lowers every pattern to it."""

    claims = says()
    tile = 64

    @ls.hookimpl
    def longspan_capabilities(self):
        usual = {"devices": ("cpu",), "dtypes": ("float32",), "patterns": ("dense",)}
        able = dict.fromkeys(("causal", "gqa", "dropout", "backward", "deterministic"), True)
        return ls.Capabilities(**{**usual, **able, **self.claims})

    @ls.hookimpl
    def longspan_kernel(self, problem):
        def forward(*tensors, dropout=None):
            return self.forward(problem, *tensors, dropout)

        def backward(*tensors, dropout=None):
            return self.backward(problem, *tensors, dropout)

        return ls.Kernel(forward, backward)

    # ------------------------------------------------------------------------------------------------------- forward

    def forward(self, problem, query, key, value, dropout):
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        q, k, v = (self.read(x).to(wide) for x in (query, key, value))
        k, v = self.share(k, q.shape[1]), self.share(v, q.shape[1])
        largest = self.first_largest(q)
        total, acc = torch.zeros_like(largest), torch.zeros_like(q)
        for keys in self.tiles(problem, k.shape[2]):
            scores, seen = self.scores(problem, q, k, keys)
            new = torch.maximum(largest, self.tile_largest(scores))
            safe = new.masked_fill(new == -math.inf, 0.0)
            weights, shrink = self.exp(scores, safe), self.shrink(largest, safe)
            dropped = self.dropped(weights, dropout, keys)
            total = total * shrink + self.summed(weights)
            acc = acc * self.shrink_out(shrink) + self.product(dropped, self.values(v, keys), seen)
            largest = new
        return self.finish(problem, query, acc, total, largest)

    def read(self, x):
        """A tensor as the kernel reads it from memory."""
        return x

    def group(self, heads, kv_heads):
        """The key head of each query head."""
        return [head // (heads // kv_heads) for head in range(heads)]

    def share(self, x, heads):
        return x if x.shape[1] == heads else x[:, self.group(heads, x.shape[1])]

    def tiles(self, problem, length):
        tile = self.tile if length <= 4096 else 1024  # tiles, too, are summed one after the other
        return [slice(start, min(start + tile, length)) for start in range(0, length, tile)]

    def first_largest(self, q):
        return q.new_full((*q.shape[:3], 1), -math.inf)

    def tile_largest(self, scores):
        return scores.amax(-1, keepdim=True)

    def exp(self, scores, largest):
        return torch.exp(scores - largest)

    def shrink(self, before, now):
        """What the running sum is multiplied with, now that the maximum is another."""
        return torch.exp(before - now)

    def shrink_out(self, shrink):
        return shrink

    def summed(self, weights):
        return weights.sum(-1, keepdim=True)

    def values(self, v, keys):
        return v[:, :, keys]

    def dropped(self, weights, dropout, keys):
        return weights if dropout is None else weights * self.factors(weights, dropout, keys)

    def factors(self, weights, dropout, keys):
        return dropout.factors(slice(None), slice(None), keys, weights.dtype)

    def product(self, weights, values, seen):
        """A value that is NaN or inf reaches the rows that see it."""
        finite = values.isfinite()
        part = weights @ torch.where(finite, values, 0.0)
        if seen is None:
            return part + torch.where(finite, 0.0, values).sum(2, keepdim=True)
        if not finite.all():
            part = part.masked_fill((seen > 0).to(values.dtype) @ (~finite).to(values.dtype) > 0, math.nan)
        return part

    def finish(self, problem, query, acc, total, largest):
        empty = total == 0.0
        out = acc / total.masked_fill(empty, 1.0)
        lse = (largest + total.log()).masked_fill(empty, -math.inf).squeeze(-1)
        return self.results(problem, query, out, lse)

    def results(self, problem, query, out, lse):
        return out.to(query.dtype), lse

    # -------------------------------------------------------------------------------------------------------- scores

    def scale(self, problem):
        return problem.scale

    def scores(self, problem, q, k, keys):
        """Scaled scores of a tile, -inf where a query does not see a key; and how often it does (None: once)."""
        scores = q @ k[:, :, keys].mT * self.scale(problem)
        seen = self.counts(problem, q.shape[1], torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, keys])
        if seen is None:
            return scores, None
        return torch.where(seen > 0, scores + seen.to(q.dtype).log(), -math.inf), seen

    def counts(self, problem, heads, query, key):
        """How often each query (a column of numbers) sees each key (a row of them), `(heads or 1, queries, keys)`."""
        if problem.pattern.kind == "dense" and problem.documents is None and not problem.is_causal:
            return None
        if problem.documents is None:
            allowed, length = True, problem.kv_len
            query = query + self.offset(problem)
        else:
            q_document, query = self.locate(problem, query)
            k_document, key = self.locate(problem, key)
            allowed, length = (q_document == k_document) & (q_document >= 0), None
        if problem.is_causal:
            allowed &= self.causal(query, key)
        return self.pattern_counts(problem, heads, query, key, length) * allowed

    def offset(self, problem):
        return problem.query_offset

    def causal(self, query, key):
        return key <= query

    def locate(self, problem, rows):
        """The document of each row (-1: none), and its position there."""
        bounds = torch.tensor(problem.documents)
        document = torch.searchsorted(bounds, rows.contiguous(), right=True) - 1
        document = document.masked_fill(document == len(bounds) - 1, -1)
        return document, rows - bounds[document.clamp(min=0)]

    def pattern_counts(self, problem, heads, query, key, length):
        pattern, shape = problem.pattern, torch.broadcast_shapes(query.shape, key.shape)
        if pattern.kind == "window":
            return self.window(pattern, query, key)[None].long()
        if pattern.kind == "dilated":
            return torch.stack([self.dilated(pattern, heads, head, query, key) for head in range(heads)])
        if pattern.kind == "block_sparse":
            return torch.stack([self.blocks(problem, query, key, head, length) for head in range(heads)])
        return torch.ones((1, *shape), dtype=torch.int64)

    def window(self, pattern, query, key):
        return (key >= query - pattern.left) & (key <= query + pattern.right)

    def branches(self, pattern, heads, head):
        """The (segment length, rate, offset) of each branch that a head runs."""
        pairs = list(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True))
        if pattern.heads == "grouped":
            number = self.branch_of(heads, head, len(pairs))
            w, r = pairs[number]
            return [(w, r, number % r)]
        if pattern.offset == "block":
            return [(w, r, head // -(-heads // r)) for w, r in pairs]
        return [(w, r, head % r) for w, r in pairs]

    def branch_of(self, heads, head, count):
        size, more = divmod(heads, count)
        return [number for number in range(count) for _ in range(size + (number < more))][head]

    def dilated(self, pattern, heads, head, query, key):
        return sum(self.branch(w, r, s, query, key).long() for w, r, s in self.branches(pattern, heads, head))

    def branch(self, w, r, s, query, key):
        return (query // w == key // w) & (query % w % r == s) & (key % w % r == s)

    def blocks(self, problem, query, key, head, length):
        pattern = problem.pattern
        if length is not None:
            return pattern.allowed(query, key, head, length).long()
        counts = torch.zeros(torch.broadcast_shapes(query.shape, key.shape), dtype=torch.int64)
        bounds = torch.tensor(problem.documents)
        lengths = bounds.diff()[self.locate(problem, torch.arange(len(query)))[0].clamp(0, len(bounds) - 2)]
        for size in lengths.unique().tolist():
            rows = lengths == size
            counts[rows] = pattern.allowed(query[rows], key, head, size).long()
        return counts

    # ------------------------------------------------------------------------------------------------------ backward

    def backward(self, problem, dout, query, key, value, out, lse, dropout):
        wide = lse.dtype
        do, q, k, v, o = (self.read(x).to(wide) for x in (dout, query, key, value, out))
        k, v = self.share(k, q.shape[1]), self.share(v, q.shape[1])
        delta = self.delta(do, o)
        usable = lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for keys in self.tiles(problem, k.shape[2]):
            weights = torch.exp(self.scores(problem, q, k, keys)[0] - usable)
            factors = 1.0 if dropout is None else self.factors(weights, dropout, keys)
            dv[:, :, keys] = self.over_queries(weights * factors, do)
            slopes = weights * (do @ v[:, :, keys].mT * factors - delta)
            dq = self.add(dq, slopes @ k[:, :, keys] * self.scale(problem))
            dk[:, :, keys] = self.over_queries(slopes, q) * self.scale(problem)
        kv_heads = key.shape[1]
        found = dq, self.gathered(dk, kv_heads), self.gathered(dv, kv_heads)
        return self.gradients(problem, *(x.to(query.dtype) for x in found))

    def delta(self, dout, out):
        return (dout * out).sum(-1, keepdim=True)

    def over_queries(self, weights, rows):
        return weights.mT @ rows

    def add(self, total, part):
        return total + part

    def gathered(self, gradient, kv_heads):
        """The gradient of shared key heads: the sum over their group."""
        heads = gradient.shape[1]
        return gradient if heads == kv_heads else gradient.unflatten(1, (kv_heads, heads // kv_heads)).sum(2)

    def gradients(self, problem, dq, dk, dv):
        return dq, dk, dv


class Whole(Sound):
    """It takes every pattern, packed documents and offsets whole, so that nothing is lowered."""

    claims = says(
        patterns=("dense", "window", "dilated", "block_sparse"), documents=True, window=True, query_offset=True
    )
