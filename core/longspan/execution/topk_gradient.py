"""The autograd node that gives block scores a gradient: kept blocks one by one, with a bias on each block's mass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from longspan.execution.autograd import Runner, no_graph
from longspan.execution.ordinary import undisturbed_gradient
from longspan.numerics.dropout import Draw
from longspan.numerics.merge import merge_
from longspan.numerics.tensors import wide_dtype
from longspan.patterns.topk.scoring import BlockScoring

__all__ = ["Scored", "biases"]


def biases(scores: Tensor, columns: Tensor, there: Tensor, scoring: BlockScoring) -> Tensor:
    """What the scores of kept blocks add to token scores, for every query.

    Args:
        scores: `(batch, heads, query blocks, key blocks)`.
        columns: the kept blocks of each row, `(batch, heads, query blocks, most)`.
        there: which of them there are, the same shape, bool.
        scoring: the blocks.

    Returns:
        `(1, batch * heads, q_len, most)`: the log of `count * softmax(scores of the row's kept blocks)`, which is 0
        where scores are equal; 0 where there is no block. Under causality the row's own block has 0 and does not count:
        its score may be made from keys that come after some of its queries.
    """
    low, high = scoring.grid.row_spans()
    if scoring.is_causal:
        own = torch.arange(scoring.rows, device=columns.device, dtype=torch.int64) + scoring.grid.first_row
        there = there & (columns != own[:, None])
    counts = there.sum(-1, keepdim=True)
    kept = scores.gather(-1, columns).masked_fill(~there & (counts > 0), -torch.inf)
    shares = kept.log_softmax(-1) + counts.clamp(min=1).to(scores.dtype).log()
    bias = shares.masked_fill(~there, 0.0)
    return bias.repeat_interleave((high - low).to(bias.device), dim=2).flatten(0, 1).unsqueeze(0)


class Scored(Function):
    """Attention over kept blocks with a gradient for their biases.

    With `soft` the biases are added; the result is merged from the kept blocks, the r-th of every row at once, and each
    one's backward gets the joint lse less its bias. Without, `joint` computes as if there were none, and the biases
    get the gradient that they would have at zero: d out / d bias_r = p_r (out_r - out), p_r being the block's share.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor,
        joint: Runner | None,
        rounds: Callable[[], Sequence[Runner]],
        draw: Draw | None,
    ) -> tuple[Tensor, Tensor]:
        """`(out, lse)`; without `joint` it is soft."""
        if joint is not None:
            out, lse = joint.forward(query, key, value, draw)
        else:
            wide = wide_dtype(query.dtype)
            total = torch.zeros(query.shape, dtype=wide, device=query.device)
            lse = torch.full(query.shape[:3], -torch.inf, dtype=wide, device=query.device)
            for number, runner in enumerate(rounds()):
                part, part_lse = runner.forward(query, key, value, draw)
                merge_(total, lse, part, part_lse.to(wide) + bias[..., number])
            out = total.to(query.dtype)
        ctx.save_for_backward(query, key, value, bias, out, lse)
        ctx.joint, ctx.rounds, ctx.draw = joint, rounds, draw
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of query, key, value and bias."""
        query, key, value, bias, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        if not undisturbed_gradient(dout, dlse, out):
            no_graph()
        tensors, draw = (query, key, value), ctx.draw
        wide = lse.dtype
        held = (dout.to(wide) * out).sum(-1)
        held = held if dlse is None else held - dlse
        dbias = torch.zeros_like(bias)
        grads: list[Tensor] | None = None
        if ctx.joint is not None:
            grads = list(ctx.joint.backward(dout, *tensors, out, lse, draw, dlse))
        sums = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in tensors] if grads is None else []
        for number, runner in enumerate(ctx.rounds()):
            added = bias[..., number] if grads is None else 0.0
            if ctx.needs_input_grad[3]:
                part, part_lse = runner.forward(*tensors, draw)
                share = (part_lse.to(wide) + added - lse).exp_().masked_fill_(lse == -torch.inf, 0.0)
                dbias[..., number] = share * ((dout.to(wide) * part).sum(-1) - held)
            if grads is None:
                found = runner.backward(dout, *tensors, out, lse - added, draw, dlse)
                for total, one in zip(sums, found, strict=True):
                    total += one
        if grads is None:
            grads = [total.to(x.dtype) for total, x in zip(sums, tensors, strict=True)]
        return (*grads, dbias, None, None, None)
