"""Mistakes of arithmetic: lse, scale, the online softmax, tails, widths, precision, long sequences, dropout."""

from __future__ import annotations

import math

import torch
from attrs import evolve

from mistakes.sound import Sound, says
from mistakes.table import mistake

HALVES = says(dtypes=("float16", "bfloat16"))

# ------------------------------------------------------------------------------------------------------------------ lse


class _Lse(Sound):
    """Returns another lse."""

    def results(self, problem, query, out, lse):
        return super().results(problem, query, out, self.lse(problem, query, lse))


@mistake("lse is in base 2", "lse in natural log")
class BaseTwo(_Lse):
    def lse(self, problem, query, lse):
        return lse / math.log(2)


@mistake("lse has the wrong sign", "in dtypes")
class MinusLse(_Lse):
    def lse(self, problem, query, lse):
        return -lse


@mistake("lse is rounded to half precision on the way", "in dtypes")
class RoundedLse(_Lse):
    def lse(self, problem, query, lse):
        return lse.half().float()


@mistake("lse is returned in half precision", "in dtypes")
class HalfLse(_Lse):
    claims = HALVES

    def lse(self, problem, query, lse):
        return lse.to(query.dtype)


@mistake("lse is float64 for float32", "out like query; lse float32 or float64")
class WideLse(_Lse):
    def lse(self, problem, query, lse):
        return lse.double()


@mistake("lse is (batch, q_len, heads)", "in dtypes")
class TransposedLse(_Lse):
    def lse(self, problem, query, lse):
        return lse.mT


@mistake("lse lacks the rows of the last partial tile", "any length")
class LseOfWholeTiles(_Lse):
    def lse(self, problem, query, lse):
        rows = lse.shape[2] // 32 * 32
        return torch.cat((lse[:, :, :rows], torch.zeros_like(lse[:, :, rows:])), 2) if rows else lse


@mistake("lse is the largest score alone", "in dtypes")
class LargestOnly(Sound):
    def finish(self, problem, query, acc, total, largest):
        out, _ = super().finish(problem, query, acc, total, largest)
        return out, largest.squeeze(-1)


@mistake("lse lacks the largest score", "in dtypes")
class WithoutTheLargest(Sound):
    def finish(self, problem, query, acc, total, largest):
        out, _ = super().finish(problem, query, acc, total, largest)
        return out, total.log().squeeze(-1)


@mistake("lse is that of the unscaled scores", "in dtypes")
class UnscaledLse(Sound):
    def forward(self, problem, query, key, value, dropout):
        out, _ = super().forward(problem, query, key, value, dropout)
        return out, super().forward(problem.replace(scale=1.0), query, key, value, dropout)[1]


# ---------------------------------------------------------------------------------------------------------------- scale


class _Scale(Sound):
    """Scores times another number."""

    def scale(self, problem):
        return self.factor(problem.scale, problem.head_dim)


@mistake("problem.scale is ignored", "multiplied by problem.scale")
class ScaleIgnored(_Scale):
    def factor(self, scale, dim):
        return dim**-0.5


@mistake("scores are scaled twice", "multiplied by problem.scale")
class ScaledTwice(_Scale):
    def factor(self, scale, dim):
        return scale * dim**-0.5


@mistake("a negative scale is taken for a positive one", "multiplied by problem.scale")
class ScaleWithoutSign(_Scale):
    def factor(self, scale, dim):
        return abs(scale)


@mistake("a scale of 0 is taken for none given", "multiplied by problem.scale")
class ZeroIsTheDefault(_Scale):
    def factor(self, scale, dim):
        return scale or dim**-0.5


@mistake("the usual scale is that of the padded head", "head_dim")
class ScaleOfThePaddedHead(_Scale):
    def factor(self, scale, dim):
        return (-(-dim // 16) * 16) ** -0.5 if dim >= 16 and scale == dim**-0.5 else scale


@mistake("out is scaled by 1/sqrt(head_dim), lse by problem.scale", "multiplied by problem.scale")
class ScaleInTheLseAlone(Sound):
    def forward(self, problem, query, key, value, dropout):
        _, lse = super().forward(problem, query, key, value, dropout)
        return super().forward(problem.replace(scale=problem.head_dim**-0.5), query, key, value, dropout)[0], lse


# ------------------------------------------------------------------------------------------------------- online softmax

TILES = "any length: rows may take several tiles"


@mistake("sum and output are not rescaled when the maximum changes", TILES)
class NeverRescaled(Sound):
    def shrink(self, before, now):
        return torch.ones_like(before)


@mistake("the sum is rescaled, the output is not", TILES)
class OutputNotRescaled(Sound):
    def shrink_out(self, shrink):
        return torch.ones_like(shrink)


@mistake("sum and output are rescaled by the wrong sign", TILES)
class RescaledUpwards(Sound):
    def shrink(self, before, now):
        return torch.exp(now - before).nan_to_num(0.0, 0.0, 0.0)


@mistake("the last partial tile is left out", TILES)
class LastTileLost(Sound):
    def tiles(self, problem, length):
        return [
            keys for keys in super().tiles(problem, length) if keys.stop - keys.start == self.tile or not keys.start
        ]


@mistake("the last tile's tail is not masked: scores of 0", "in dtypes")
class TailNotMasked(Sound):
    def summed(self, weights):
        missing = -weights.shape[-1] % 16
        return super().summed(weights) + missing * weights.amin(-1, keepdim=True)


@mistake("the values of the tile before are used", TILES)
class ValuesOneTileLate(Sound):
    def values(self, v, keys):
        late = slice(keys.start - self.tile, keys.stop - self.tile) if keys.start else keys
        return v[:, :, late]


@mistake("the running maximum starts at 0", "each row has a largest score of its own")
class LargestStartsAtZero(Sound):
    def first_largest(self, q):
        return super().first_largest(q).fill_(0.0)


@mistake("one maximum for all rows of a tile", "each row has a largest score of its own")
class OneLargestForAll(Sound):
    def tile_largest(self, scores):
        return scores.amax((-2, -1), keepdim=True).expand(*scores.shape[:3], 1)


@mistake("exp of the scores as they are", "overflow nothing")
class Overflows(Sound):
    def exp(self, scores, largest):
        return torch.exp(scores)

    def shrink(self, before, now):
        return torch.ones_like(before)

    def finish(self, problem, query, acc, total, largest):
        return super().finish(problem, query, acc, total, torch.zeros_like(largest))


@mistake("scores are cut off at 80", "overflow nothing")
class ScoresCutOff(Sound):
    def scores(self, problem, q, k, keys):
        scores, seen = super().scores(problem, q, k, keys)
        return scores.clamp(max=80.0), seen


# ---------------------------------------------------------------------------------------------------------------- tails


class _Rows(Sound):
    """Zeros in some rows."""

    def finish(self, problem, query, acc, total, largest):
        out, lse = super().finish(problem, query, acc, total, largest)
        out[:, :, self.rows(query.shape[2])] = 0.0
        return out, lse


@mistake("rows beyond a multiple of 16 are not written", "in dtypes")
class RowsInSixteens(_Rows):
    def rows(self, length):
        return slice(length // 16 * 16 if length > 16 else length, None)


@mistake("rows beyond a multiple of 128 are not written", "any length")
class RowsInHundreds(_Rows):
    def rows(self, length):
        return slice(length // 128 * 128 if length > 128 else length, None)


@mistake("keys beyond a multiple of 8 are not read", "in dtypes")
class KeysInEights(Sound):
    def tiles(self, problem, length):
        every = super().tiles(problem, length)
        return [slice(x.start, max(x.start + 1, x.stop // 8 * 8)) for x in every]


@mistake("a single query takes the way of decoding, whose lse is the score alone", "any length")
class OneQuery(Sound):
    def finish(self, problem, query, acc, total, largest):
        out, lse = super().finish(problem, query, acc, total, largest)
        return (out * 0.5, lse) if query.shape[2] == 1 else (out, lse)


@mistake("a single key is padded to two", "any length")
class OneKey(Sound):
    def summed(self, weights):
        return super().summed(weights) * (2.0 if weights.shape[-1] == 1 else 1.0)


@mistake("a length of one more than whole tiles loses its last row", TILES)
class OneRowTooMany(_Rows):
    def rows(self, length):
        return slice(length - 1 if length > self.tile and length % self.tile == 1 else length, None)


# ---------------------------------------------------------------------------------------------------------- head widths


class _Width(Sound):
    """Reads some channels of a head alone for its scores."""

    def scores(self, problem, q, k, keys):
        width = self.width(q.shape[3])
        return super().scores(problem, q[..., :width], k[..., :width], keys)


@mistake("head_dim 20 is cut to 16", "head_dim")
class CutToSixteens(_Width):
    def width(self, dim):
        return dim // 16 * 16 if 16 < dim < 64 else dim


@mistake("head_dim 76 is cut to 64", "head_dim=76")
class CutToSixtyFour(_Width):
    def width(self, dim):
        return 64 if 64 < dim < 80 else dim


@mistake("head_dim 100 is cut to 96", "head_dim=100")
class CutToNinetySix(_Width):
    def width(self, dim):
        return 96 if 96 < dim < 128 else dim


@mistake("a head wider than 128 is cut", "head_dim=256")
class CutToHundredTwentyEight(_Width):
    def width(self, dim):
        return min(dim, 128)


@mistake("a head wider than 128 is not taken, and no limit is declared", "head_dim=256")
class LimitNotDeclared(_Width):
    def width(self, dim):
        if dim > 128:
            raise RuntimeError(f"unsupported head dimension {dim}")
        return dim


# ------------------------------------------------------------------------------------------------------------ precision


@mistake("out is float32 for half precision", "in dtypes")
class OutNotLikeQuery(Sound):
    claims = HALVES

    def results(self, problem, query, out, lse):
        return out.float(), lse


@mistake("float64 is computed in float32", "'float64' in dtypes")
class NotReallyFloat64(Sound):
    claims = says(dtypes=("float32", "float64"))

    def scores(self, problem, q, k, keys):
        scores, seen = super().scores(problem, q.float(), k.float(), keys)
        return scores.to(q.dtype), seen


@mistake("bfloat16 is claimed and refused by the kernel", "'bfloat16' in dtypes")
class RefusesBfloat16(Sound):
    claims = HALVES

    def read(self, x):
        if x.dtype == torch.bfloat16:
            raise TypeError("bfloat16 is not supported")
        return x


@mistake("bfloat16 is read as float16", "'bfloat16' in dtypes")
class BfloatAsHalf(Sound):
    claims = HALVES

    def read(self, x):
        return x.contiguous().view(torch.float16) if x.dtype == torch.bfloat16 else x


# ---------------------------------------------------------------------------------------------------------- long inputs


@mistake("rows from 256 on are not written", TILES)
class RowsBelow256(_Rows):
    def rows(self, length):
        return slice(256, None)


@mistake("rows from 4,096 on are not written", "any length: 65,536 keys")
class RowsBelow4096(_Rows):
    def rows(self, length):
        return slice(4096, None)


@mistake("keys are counted in 16 bits", "any length: 65,536 keys")
class KeysInSixteenBits(Sound):
    def tiles(self, problem, length):
        return [keys for keys in super().tiles(problem, length) if keys.start < 2**15]


@mistake("keys from 1,024 on are not read", "any length: 65,536 keys")
class KeysBelow1024(Sound):
    def tiles(self, problem, length):
        return [keys for keys in super().tiles(problem, length) if keys.start < 1024]


@mistake("a row's keys are summed one after the other", "any length: 65,536 keys")
class OneAfterTheOther(Sound):
    def tiles(self, problem, length):
        return [slice(0, length)] if length > 4096 else super().tiles(problem, length)

    def product(self, weights, values, seen):
        return (
            one_after_the_other(weights, values) if weights.shape[3] > 4096 else super().product(weights, values, seen)
        )


@mistake("a column's queries are summed one after the other in the backward", "any length: 65,536 keys")
class ColumnsOneAfterTheOther(Sound):
    def over_queries(self, weights, rows):
        return one_after_the_other(weights.mT, rows) if weights.shape[2] > 4096 else super().over_queries(weights, rows)


@mistake("dquery is added up in half precision, tile by tile", "any length: 65,536 keys")
class QuerySlopeInHalf(Sound):
    claims = HALVES

    def add(self, total, part):
        return (total + part).bfloat16().float()


@mistake("the output is kept in half precision from tile to tile", "any length: 65,536 keys")
class OutputInHalf(Sound):
    claims = HALVES

    def shrink_out(self, shrink):
        return shrink.bfloat16().float()

    def product(self, weights, values, seen):
        return super().product(weights, values, seen).bfloat16().float()


def one_after_the_other(weights, rows):
    """`weights @ rows`, each sum from its first term to its last."""
    found = rows.new_zeros(*weights.shape[:3], rows.shape[3])
    index = torch.zeros(rows.shape[2], dtype=torch.int64)
    for batch in range(weights.shape[0]):
        for head in range(weights.shape[1]):
            for row in range(weights.shape[2]):
                terms = weights[batch, head, row, :, None] * rows[batch, head]
                found[batch, head, row].unsqueeze(0).index_add_(0, index, terms)
    return found


# -------------------------------------------------------------------------------------------------------------- dropout


@mistake("dropout is ignored", "dropout=True")
class DropoutIgnored(Sound):
    def factors(self, weights, dropout, keys):
        return torch.ones_like(weights)


@mistake("kept weights are not made larger", "dropout=True")
class DropoutNotRescaled(Sound):
    def factors(self, weights, dropout, keys):
        return (super().factors(weights, dropout, keys) > 0).to(weights.dtype)


@mistake("the backward has no mask", "dropout=True")
class BackwardWithoutDropout(Sound):
    def backward(self, problem, dout, query, key, value, out, lse, dropout):
        return super().backward(problem, dout, query, key, value, out, lse, None)


@mistake("the backward draws another mask", "dropout=True")
class BackwardDropsOthers(Sound):
    def backward(self, problem, dout, query, key, value, out, lse, dropout):
        other = dropout and evolve(dropout, seed=dropout.seed + 1)
        return super().backward(problem, dout, query, key, value, out, lse, other)


@mistake("dropout comes from torch's generator", "dropout=True")
class DropoutFromTorch(Sound):
    def factors(self, weights, dropout, keys):
        return torch.dropout(torch.ones_like(weights), dropout.p, True)


@mistake("the seed is ignored", "dropout=True")
class SeedIgnored(Sound):
    def factors(self, weights, dropout, keys):
        return super().factors(weights, evolve(dropout, seed=0), keys)


@mistake("lse is that of the weights after dropout", "dropout=True")
class LseAfterDropout(Sound):
    def dropped(self, weights, dropout, keys):
        self.left = super().dropped(weights, dropout, keys)
        return self.left

    def summed(self, weights):
        return self.left.sum(-1, keepdim=True)


@mistake("the tile's place is left out of the mask", "dropout=True")
class DropoutByTheTile(Sound):
    tile = 16

    def factors(self, weights, dropout, keys):
        return super().factors(weights, dropout, slice(0, keys.stop - keys.start))
