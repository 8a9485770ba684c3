"""What a plan runs for `TopKBlocks`: a choice at every call, then attention over the chosen blocks.

Backends are asked for kernels when the plan is made; a call chooses and runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from longspan.execution.kernel import undisturbed_gradient
from longspan.execution.runner import Runner, Saved, no_graph
from longspan.numerics.dropout import Draw
from longspan.numerics.merge import merge_
from longspan.numerics.tensors import wide_dtype
from longspan.patterns.topk.choice import Part, choose
from longspan.patterns.topk.pattern import TopKBlocks, scorings
from longspan.patterns.topk.scoring import BlockScoring
from longspan.spec.backend import Kernel
from longspan.spec.problem import Problem

__all__ = ["ChoosingRunner", "Scored", "Way", "biases"]

Tensors = tuple[Tensor, Tensor, Tensor]


Way = Callable[[Part, Tensor], Runner]
"""How the blocks of one document are run: makes what runs these, `(batch, heads, query blocks, key blocks)` bool."""


class ChoosingRunner(Runner):
    """Chooses blocks for given tensors and attends to them, with batch entries as heads.

    Args:
        problem: with `TopKBlocks`.
        way: says how the blocks of a document are run, given the problem of that document alone.
        kernels: those that `way` has made.
    """

    def __init__(self, problem: Problem, way: Callable[[Problem], Way], kernels: list[Kernel]) -> None:
        assert isinstance(problem.pattern, TopKBlocks)
        self._problem, self._pattern, self._way = problem, problem.pattern, way
        self._scorings = scorings(problem)
        self._ways: dict[BlockScoring, Way] = {}
        most = 0
        if self._scorings:  # a backend that cannot run any says so now
            longest = max((scoring for _, scoring in self._scorings), key=lambda scoring: scoring.kv_len)
            self._way_of(longest)
            most = longest.columns
        super().__init__(f"{min(self._pattern.k, most)} of {most} key blocks a row, chosen at every call", kernels)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)`, recorded by autograd where that is on."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._pattern.scorer_gradient != "none"):
            parts = choose(self._pattern.k, self._pattern.scorer, self._scorings, query, key)
        if self._problem.documents is None and parts:
            return self._unfolded(self._attend(parts[0], self._folded(query, key, value), draw))
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        for part in parts:
            rows = slice(part.start, part.start + part.scoring.q_len)
            tensors = self._folded(query[:, :, rows], key[:, :, rows], value[:, :, rows])
            out, lse = self._unfolded(self._attend(part, tensors, draw))
            outs, lses = [*outs, out], [*lses, lse]
        rest = query.shape[2] - sum(part.scoring.q_len for part in parts)  # queries in no document
        if rest:
            outs.append(query.new_zeros(*query.shape[:2], rest, query.shape[3]))
            wide = wide_dtype(query.dtype)
            lses.append(torch.full((*query.shape[:2], rest), -torch.inf, dtype=wide, device=query.device))
        if not outs:
            outs.append(query.new_zeros(query.shape))
            lses.append(query.new_zeros(query.shape[:3], dtype=wide_dtype(query.dtype)))
        if not parts:  # nothing was computed: sums of no numbers give autograd the gradients, which are 0
            nothing = sum(x[:, :, :0].sum() for x in (query, key, value))
            outs, lses = [out + nothing for out in outs], [lse + nothing for lse in lses]
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """`(out, lse)`: a scorer may have a gradient where they have none."""
        return self.attend(query, key, value, draw)

    def backward(self, saved: Saved, dout: Tensor, dlse: Tensor | None, draw: Draw | None) -> Tensors:
        """`(dquery, dkey, dvalue)` for the choice that these tensors lead to again; a scorer gets no gradient."""
        query, key, value, out, lse = saved
        tensors = (query, key, value)
        grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in tensors]
        with torch.no_grad():
            for part in choose(self._pattern.k, self._pattern.scorer, self._scorings, query, key):
                queries = slice(part.start, part.start + part.scoring.q_len)
                keys = slice(part.start, part.start + part.scoring.kv_len)
                folded = self._folded(query[:, :, queries], key[:, :, keys], value[:, :, keys])
                do, o, row_lse = (_fold(x[:, :, queries]) for x in (dout, out, lse))
                row_dlse = None if dlse is None else _fold(dlse[:, :, queries])
                runner = self._made(part, part.chosen)
                found = runner.backward(Saved(*folded, o, row_lse), do, row_dlse, draw)
                for total, rows, one in zip(grads, (queries, keys, keys), found, strict=True):
                    total[:, :, rows] = one.view(total[:, :, rows].shape)
        return grads[0], grads[1], grads[2]

    def _attend(self, part: Part, tensors: Tensors, draw: Draw | None) -> tuple[Tensor, Tensor]:
        mode = self._pattern.scorer_gradient
        records = torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, part.scores))
        if mode == "soft" or (mode == "straight_through" and records and part.scores.requires_grad):
            columns, there = part.rounds()
            bias = biases(part.scores, columns, there, part.scoring)
            joint = self._made(part, part.chosen) if mode == "straight_through" else None
            scored: Any = Scored.apply
            out, lse = scored(*tensors, bias, joint, lambda: self._rounds(part, columns, there), draw)
            return out, lse
        runner = self._made(part, part.chosen)
        return runner.attend(*tensors, draw)

    def _rounds(self, part: Part, columns: Tensor, there: Tensor) -> Sequence[Runner]:
        """A runner for the first kept block of every row, one for the second, and so on."""
        made = []
        for number in range(columns.shape[-1]):
            at = slice(number, number + 1)
            one = torch.zeros_like(part.chosen).scatter_(-1, columns[..., at], there[..., at])
            made.append(self._made(part, one))
        return made

    def _made(self, part: Part, chosen: Tensor) -> Runner:
        """What runs chosen blocks of a document."""
        return self._way_of(part.scoring)(part, chosen)

    def _way_of(self, scoring: BlockScoring) -> Way:
        """Documents alike share what is made for them."""
        if scoring not in self._ways:
            lengths: dict[str, Any] = {"q_len": scoring.q_len, "kv_len": scoring.kv_len, "documents": None}
            document = self._problem.replace(query_offset=scoring.query_offset, **lengths)
            self._ways[scoring] = self._way(document)
        return self._ways[scoring]

    def _folded(self, *tensors: Tensor) -> Tensors:
        query, key, value = (_fold(x) for x in tensors)
        return query, key, value

    def _unfolded(self, result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        out, lse = result
        shape = self._problem.batch, self._problem.heads, out.shape[2]
        return out.view(*shape, out.shape[3]), lse.view(shape)


def _fold(tensor: Tensor) -> Tensor:
    """Batch entries as heads of one: a view where strides allow it."""
    return tensor if tensor.shape[0] == 1 else tensor.reshape(1, -1, *tensor.shape[2:])


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
            grads = list(ctx.joint.backward(Saved(*tensors, out, lse), dout, dlse, draw))
        sums = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in tensors] if grads is None else []
        for number, runner in enumerate(ctx.rounds()):
            added = bias[..., number] if grads is None else 0.0
            if ctx.needs_input_grad[3]:
                part, part_lse = runner.forward(*tensors, draw)
                share = (part_lse.to(wide) + added - lse).exp_().masked_fill_(lse == -torch.inf, 0.0)
                dbias[..., number] = share * ((dout.to(wide) * part).sum(-1) - held)
            if grads is None:
                found = runner.backward(Saved(*tensors, out, lse - added), dout, dlse, draw)
                for total, one in zip(sums, found, strict=True):
                    total += one
        if grads is None:
            grads = [total.to(x.dtype) for total, x in zip(sums, tensors, strict=True)]
        return (*grads, dbias, None, None, None)
