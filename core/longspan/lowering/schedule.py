"""What a block-sparse layout runs for one problem: which groups for which heads, in launches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import product

import torch
from attrs import evolve, frozen

from longspan.lowering.blocks import BlockLayout
from longspan.lowering.dense import head_pairs
from longspan.lowering.groups import Group
from longspan.lowering.layout import Heads, head_ranges
from longspan.numerics.tensors import wide_dtype
from longspan.spec.pattern import Dense
from longspan.spec.problem import Problem

__all__ = ["PAIRS", "TEMPORARY", "Chunk", "Job", "dense_parts", "schedule"]

TEMPORARY = 16 * 2**20
"""Bytes of gathered keys, values and results that a launch may take, where the work can be cut that fine."""

PAIRS = 2**24
"""Query-key pairs of a launch, where the work can be cut that fine: some kernels hold all their scores at once."""


@frozen(eq=False)
class Chunk:
    """One launch's part of a job: batch entries, key heads (counted among the job's) and rows of the group."""

    batch: slice
    kv_heads: slice
    rows: slice


@frozen(slots=False, eq=False)
class Job:
    """A group for some heads. `heads.count` is a multiple of `kv_heads.count`, in order of the key heads shared.

    `source` is the document's number and that of its layout, whose masks the group's mask ids mean.
    `folded`: the query heads that share a key head come as further rows of one dense problem; else keys are repeated.
    `forward` and `backward` are its launches.
    """

    source: tuple[int, int]
    group: Group
    heads: Heads
    kv_heads: Heads
    folded: bool
    forward: tuple[Chunk, ...]
    backward: tuple[Chunk, ...]

    @cached_property
    def shared(self) -> int:
        """How many query heads share a key head."""
        return self.heads.count // self.kv_heads.count

    @cached_property
    def queries(self) -> int:
        """Rows of the dense problems that are posed."""
        return self.group.height * (self.shared if self.folded else 1)


def schedule(problem: Problem, layout: BlockLayout) -> tuple[Job, ...]:
    """The jobs that together compute the layout."""
    if 0 in (problem.batch, problem.heads, problem.q_len, problem.kv_len):
        return ()
    jobs = []
    for number, found in enumerate(layout.blocks):
        for which in range(len(found.layouts)):
            mine = [head for head, one in enumerate(found.of_head) if one == which]
            pairs = [pair for heads in head_ranges(mine) for pair in head_pairs(heads, problem)]
            for group in layout.groups[number, which]:
                jobs += [_job(problem, (number, which), group, *pair) for pair in pairs]
    return tuple(jobs)


def dense_parts(problem: Problem, jobs: Sequence[Job]) -> dict[tuple[int, int], Problem]:
    """The dense problems that jobs pose to a kernel, by `(q_len, kv_len)`, each with the largest batch that comes."""
    found: dict[tuple[int, int], Problem] = {}
    for job in jobs:
        for columns in job.group.columns:
            if columns.mask_ids is not None:
                continue
            chunk = job.forward[0]
            lines = _size(chunk.kv_heads) * (1 if job.folded else job.shared)
            key = job.queries, columns.keys
            rows = _size(chunk.rows)
            batch = max(_size(chunk.batch) * lines, found[key].batch if key in found else 0)
            heads = max(rows, found[key].heads if key in found else 0)
            found[key] = problem.replace(
                pattern=Dense(),
                batch=batch,
                heads=heads,
                kv_heads=heads,
                q_len=key[0],
                kv_len=key[1],
                is_causal=False,
                documents=None,
                query_offset=0,
            )
    return found


def _job(problem: Problem, source: tuple[int, int], group: Group, heads: Heads, kv_heads: Heads) -> Job:
    folded = not problem.dropout_p  # dropout numbers lines, and a line is a head of one batch entry
    repeated = 1 if folded else heads.count // kv_heads.count
    item = wide_dtype(getattr(torch, problem.dtype)).itemsize
    whole = max((one.size for one in group.columns), default=1)
    queries = group.height * heads.count // kv_heads.count
    token = 2 * problem.head_dim * item * repeated  # a key and its value
    most = max(1, min(TEMPORARY // (whole * token), PAIRS // (whole * queries)))
    cut = [part for one in group.columns for part in one.cut(most)]
    group = evolve(group, columns=tuple(cut))
    pairs = max(one.keys for one in cut) * queries
    own = 2 * queries * problem.head_dim * item
    gathered = max((one.keys * token for one in cut if one.run is None), default=0)
    masked = (part for part in cut if part.mask_ids is not None and len(part.mask_ids) > 1)
    masks = max((part.keys * group.height for part in masked), default=0)
    every = max(one.keys for one in cut) * token
    return Job(
        source,
        group,
        heads,
        kv_heads,
        folded,
        tuple(_chunks(problem.batch, kv_heads.count, group.count, own + gathered, masks, pairs)),
        tuple(_chunks(problem.batch, kv_heads.count, group.count, 3 * own + gathered + every, masks, pairs)),
    )


def _chunks(batch: int, kv_heads: int, rows: int, line: int, row: int, pairs: int) -> Iterator[Chunk]:
    """Launches of at most so many bytes (`line` for each row of each head, `row` for each row) and pairs.

    Many rows of few heads rather than few rows of many: a gather then copies one block of one head after the other.
    """
    most = max(1, min(TEMPORARY // (line + row), PAIRS // pairs))  # rows times heads times entries
    some = min(rows, most)
    heads = min(kv_heads, max(1, most // some))
    entries = max(1, most // (some * heads))
    starts = product(range(0, batch, entries), range(0, kv_heads, heads), range(0, rows, some))
    for b, h, r in starts:
        yield Chunk(
            slice(b, min(b + entries, batch)), slice(h, min(h + heads, kv_heads)), slice(r, min(r + some, rows))
        )


def _size(part: slice) -> int:
    return int(part.stop - part.start)
