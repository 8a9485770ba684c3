"""Mistakes about who sees whom: causal, offsets, windows, documents, dilated and block-sparse patterns, key heads."""

from __future__ import annotations

import math

import torch

from mistakes.sound import Sound, Whole
from mistakes.table import mistake

# --------------------------------------------------------------------------------------------------------------- causal


@mistake("a query does not see its own key", "causal=True")
class StrictlyBefore(Sound):
    def causal(self, query, key):
        return key < query


@mistake("a query sees one key too many", "causal=True")
class OneTooMany(Sound):
    def causal(self, query, key):
        return key <= query + 1


@mistake("is_causal is ignored", "causal=True")
class NotCausal(Sound):
    def causal(self, query, key):
        return key >= 0


@mistake("the triangle is upside down", "causal=True")
class UpsideDown(Sound):
    def causal(self, query, key):
        return key >= query


@mistake("whole tiles are masked, and no key inside the diagonal's", "causal=True")
class CausalByTiles(Sound):
    def causal(self, query, key):
        return key // 16 <= query // 16


@mistake("the diagonal's tile alone is masked", "causal=True")
class DiagonalTileOnly(Sound):
    def causal(self, query, key):
        return (key <= query) | (key // self.tile != query // self.tile)


@mistake("under is_causal the last tile of keys is left out", "causal=True")
class CausalLosesLastTile(Sound):
    def tiles(self, problem, length):
        every = super().tiles(problem, length)
        return every[:-1] if problem.is_causal and len(every) > 1 else every


@mistake("a hidden value that is NaN is multiplied with a weight of 0", "causal=True")
class CausalLeaksNaN(Sound):
    def product(self, weights, values, seen):
        return weights @ values


@mistake("hidden scores get -1e4 added", "causal=True")
class MasksWithALargeNumber(Sound):
    def scores(self, problem, q, k, keys):
        scores = q @ k[:, :, keys].mT * problem.scale
        if problem.is_causal:
            seen = self.causal(torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, keys])
            scores = scores - 1e4 * (~seen).to(scores.dtype)
        return scores, None


# -------------------------------------------------------------------------------------------------------------- offsets


@mistake("the last query is always at the last key (bottom right)", "query_offset=True")
class BottomRight(Whole):
    def offset(self, problem):
        return problem.kv_len - problem.q_len if problem.documents is None else 0


@mistake("the first query is always at the first key (top left)", "query_offset=True")
class TopLeft(Whole):
    def offset(self, problem):
        return 0


@mistake("the offset is used only where there are more keys than queries", "query_offset=True")
class OffsetOfSquaresIgnored(Whole):
    def offset(self, problem):
        return problem.query_offset if problem.kv_len > problem.q_len else 0


@mistake("the offset is used for causal, and not for patterns", "query_offset=True")
class PatternsIgnoreTheOffset(Whole):
    def pattern_counts(self, problem, heads, query, key, length):
        back = 0 if problem.documents is not None else problem.query_offset
        return super().pattern_counts(problem, heads, query - back, key, length)


@mistake("the offset is one too large", "query_offset=True")
class OffsetOneTooLarge(Whole):
    def offset(self, problem):
        return problem.query_offset + (problem.query_offset > 0)


# -------------------------------------------------------------------------------------------------------------- windows


@mistake("the window is one short on the left", "'window' in patterns")
class WindowShortOnTheLeft(Whole):
    def window(self, pattern, query, key):
        return (key > query - pattern.left) & (key <= query + pattern.right)


@mistake("the window is one long on the left", "'window' in patterns")
class WindowLongOnTheLeft(Whole):
    def window(self, pattern, query, key):
        return (key >= query - pattern.left - 1) & (key <= query + pattern.right)


@mistake("the window is one short on the right", "'window' in patterns")
class WindowShortOnTheRight(Whole):
    def window(self, pattern, query, key):
        return (key >= query - pattern.left) & (key < query + pattern.right)


@mistake("the window is one long on the right", "'window' in patterns")
class WindowLongOnTheRight(Whole):
    def window(self, pattern, query, key):
        return (key >= query - pattern.left) & (key <= query + pattern.right + 1)


@mistake("the window takes left for both sides", "'window' in patterns")
class SymmetricWindow(Whole):
    def window(self, pattern, query, key):
        return (key - query).abs() <= pattern.left


@mistake("left and right are exchanged", "'window' in patterns")
class MirroredWindow(Whole):
    def window(self, pattern, query, key):
        return (key >= query - pattern.right) & (key <= query + pattern.left)


@mistake("a window is never causal", "causal=True")
class WindowForgetsCausal(Whole):
    def counts(self, problem, heads, query, key):
        plain = problem.replace(is_causal=False) if problem.pattern.kind == "window" else problem
        return super().counts(plain, heads, query, key)


@mistake("a causal window has no left end", "'window' in patterns")
class CausalForgetsTheWindow(Whole):
    def pattern_counts(self, problem, heads, query, key, length):
        counts = super().pattern_counts(problem, heads, query, key, length)
        return counts | (key <= query) if problem.is_causal and problem.pattern.kind == "window" else counts


# ------------------------------------------------------------------------------------------------------------ documents


@mistake("documents are ignored", "documents=True")
class OneDocument(Whole):
    def locate(self, problem, rows):
        return torch.zeros_like(rows), rows


@mistake("a document's last token is taken for the next one's", "documents=True")
class BoundaryOffByOne(Whole):
    def locate(self, problem, rows):
        document, position = super().locate(problem, rows + 1)
        return document, position


@mistake("the last document is left out", "documents=True")
class LastDocumentLost(Whole):
    def locate(self, problem, rows):
        document, position = super().locate(problem, rows)
        return document.masked_fill(document == len(problem.documents) - 2, -1), position


@mistake("the first document is seen by all", "documents=True")
class FirstDocumentLeaks(Whole):
    def counts(self, problem, heads, query, key):
        counts = super().counts(problem, heads, query, key)
        if problem.documents is None or problem.pattern.kind != "dense" or problem.is_causal:
            return counts
        return counts | (key < problem.documents[1])


@mistake("the tail that belongs to no document is one more", "documents=True")
class TailIsADocument(Whole):
    def locate(self, problem, rows):
        bounds = (*problem.documents, max(problem.q_len, problem.documents[-1] + 1))
        return super().locate(problem.replace(documents=bounds), rows) if problem.q_len > 28 else (rows * 0, rows)


@mistake("positions go on from one document to the next", "documents=True")
class PositionsNotRestarted(Whole):
    def locate(self, problem, rows):
        document, _ = super().locate(problem, rows)
        return document, rows


@mistake("in documents, is_causal is ignored", "causal=True")
class DocumentsForgetCausal(Whole):
    def counts(self, problem, heads, query, key):
        plain = problem.replace(is_causal=False) if problem.documents is not None else problem
        return super().counts(plain, heads, query, key)


@mistake("a token without a document: 0 / 0", "documents=True")
class NaNWithoutKeys(Whole):
    def finish(self, problem, query, acc, total, largest):
        return self.results(problem, query, acc / total, (largest + total.log()).squeeze(-1))


@mistake("a token without a document: lse 0", "documents=True")
class LseZeroWithoutKeys(Whole):
    def results(self, problem, query, out, lse):
        return out, lse.masked_fill(lse == -math.inf, 0.0)


@mistake("a token without a document: the gradient is NaN", "documents=True")
class NaNGradientWithoutKeys(Whole):
    def backward(self, problem, dout, query, key, value, out, lse, dropout):
        grads = super().backward(problem, dout, query, key, value, out, lse, dropout)
        return grads[0] + (lse - lse).unsqueeze(-1).to(query.dtype), *grads[1:]


# --------------------------------------------------------------------------------------------- dilated and block-sparse


@mistake("a key that two branches see counts once", "'dilated' in patterns")
class SeenTwiceCountsOnce(Whole):
    def dilated(self, pattern, heads, head, query, key):
        return super().dilated(pattern, heads, head, query, key).clamp(max=1)


@mistake("offset='block' is taken for 'modulo'", "'dilated' in patterns")
class BlockOffsetIsModulo(Whole):
    def branches(self, pattern, heads, head):
        if pattern.heads == "grouped":
            return super().branches(pattern, heads, head)
        return [(w, r, head % r) for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)]


@mistake("every head starts at offset 0", "'dilated' in patterns")
class OffsetZero(Whole):
    def branch(self, w, r, s, query, key):
        return super().branch(w, r, 0, query, key)


@mistake("the ragged last segment is left out", "'dilated' in patterns")
class RaggedSegmentLost(Whole):
    def dilated(self, pattern, heads, head, query, key):
        whole = [w * (int(key.max() + 1) // w) for w in pattern.segment_lengths]
        parts = zip(whole, self.branches(pattern, heads, head), strict=False)
        return sum((self.branch(*branch, query, key) & ((key < end) | (end == 0))).long() for end, branch in parts)


@mistake("rates count from the start of the sequence, not of the segment", "'dilated' in patterns")
class RateFromTheStart(Whole):
    def branch(self, w, r, s, query, key):
        return (query // w == key // w) & (query % r == s) & (key % r == s)


@mistake("queries are not thinned out, keys alone are", "'dilated' in patterns")
class QueriesNotDilated(Whole):
    def branch(self, w, r, s, query, key):
        return (query // w == key // w) & (key % w % r == s)


@mistake("heads='grouped' is taken for 'all'", "'dilated' in patterns")
class GroupedIsAll(Whole):
    def dilated(self, pattern, heads, head, query, key):
        pairs = zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)
        if pattern.heads != "grouped":
            return super().dilated(pattern, heads, head, query, key)
        return sum(self.branch(w, r, head % r, query, key).long() for w, r in pairs)


@mistake("heads that groups do not divide go to the last group", "'dilated' in patterns")
class RemainderToTheLast(Whole):
    def branch_of(self, heads, head, count):
        return min(head // (heads // count), count - 1)


@mistake("branches are mixed by their number of keys", "'dilated' in patterns")
class BranchesAveraged(Whole):
    def forward(self, problem, query, key, value, dropout):
        out, lse = super().forward(problem, query, key, value, dropout)
        if problem.pattern.kind == "dilated" and problem.pattern.heads == "all":
            lse = lse - math.log(len(problem.pattern.dilation_rates))
        return out, lse


@mistake("inside a diagonal block every key is seen", "'block_sparse' in patterns")
class BlocksCausalByBlock(Whole):
    def counts(self, problem, heads, query, key):
        if problem.pattern.kind != "block_sparse" or not problem.is_causal or problem.documents is not None:
            return super().counts(problem, heads, query, key)
        size = problem.pattern.block_size
        seen = super().counts(problem.replace(is_causal=False), heads, query, key)
        return seen * (key // size <= (query + problem.query_offset) // size)


@mistake("the ragged last block is left out", "'block_sparse' in patterns")
class RaggedBlockLost(Whole):
    def blocks(self, problem, query, key, head, length):
        counts = super().blocks(problem, query, key, head, length)
        return counts * (key < problem.kv_len // problem.pattern.block_size * problem.pattern.block_size)


@mistake("every head has the first one's blocks, shifted by one for the others", "'block_sparse' in patterns")
class BlocksShifted(Whole):
    def blocks(self, problem, query, key, head, length):
        shift = problem.pattern.block_size if head else 0
        return super().blocks(problem, query, (key - shift).clamp(min=0), head, length)


@mistake("a row without blocks: NaN", "'block_sparse' in patterns")
class NaNWithoutBlocks(Whole):
    def finish(self, problem, query, acc, total, largest):
        out, lse = super().finish(problem, query, acc, total, largest)
        return (acc / total).to(out.dtype) if problem.pattern.kind == "block_sparse" else out, lse


# ------------------------------------------------------------------------------------------------------------ key heads


@mistake("query head h reads key head h % kv_heads", "gqa=True")
class HeadsModulo(Sound):
    def group(self, heads, kv_heads):
        return [head % kv_heads for head in range(heads)]


@mistake("every query head reads key head 0", "gqa=True")
class FirstHeadOnly(Sound):
    def group(self, heads, kv_heads):
        return [0] * heads


@mistake("groups are of a power of two", "gqa=True")
class GroupsOfTwo(Sound):
    def group(self, heads, kv_heads):
        size = 2 ** int(math.log2(heads // kv_heads))
        return [min(head // size, kv_heads - 1) for head in range(heads)]


@mistake("dk and dv are those of a group's first head", "gqa=True")
class GroupSumForgotten(Sound):
    def gathered(self, gradient, kv_heads):
        return gradient[:, :: gradient.shape[1] // kv_heads]


@mistake("dk and dv are averaged over a group", "gqa=True")
class GroupMean(Sound):
    def gathered(self, gradient, kv_heads):
        return super().gathered(gradient, kv_heads) * kv_heads / gradient.shape[1]


@mistake("claims gqa and takes none", "gqa=True")
class NoSuchHeads(Sound):
    def share(self, x, heads):
        if x.shape[1] != heads:
            raise ValueError("no such kernel")
        return x
