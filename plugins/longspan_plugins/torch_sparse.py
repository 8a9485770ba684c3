"""Attention on torch's sparse tensors: a sampled dense-dense product, a sparse softmax, a sparse-dense product.

Experimental: exact, but torch's sparse operators are slow and differ from device to device; auto never takes it. The
mask of a dense problem is its only sparsity here: a causal triangle keeps half of the pairs, in CSR.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache, lru_cache

import torch
from torch import Tensor

from longspan.plugin import Capabilities, Kernel, Problem, Reason, hookimpl

PAIRS = 2**25
"""Pairs of one head that are kept at once."""


@hookimpl
def longspan_capabilities() -> Capabilities:
    """Single and double precision on a CPU."""
    return Capabilities(
        devices=("cpu",),
        dtypes=("float32", "float64"),
        patterns=("dense",),
        causal=True,
        contains_nonfinite=("cpu",),
        experimental=True,
        opt_in=True,
    )


@hookimpl
def longspan_unsupported(problem: Problem) -> Iterable[Reason]:
    """Heads of more query-key pairs than `PAIRS`."""
    pairs = problem.q_len * problem.kv_len
    if problem.pattern.kind == "dense" and pairs > PAIRS:
        yield Reason("size", "q_len x kv_len", f"{pairs:,} pairs a head", f"at most {PAIRS:,}", "backend='sdpa'")


@hookimpl
def longspan_kernel(problem: Problem) -> Kernel:
    """One head at a time, over the CSR pattern that all heads share."""
    scale = problem.scale
    _hear_torch_out()

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        pattern = _pattern(query.shape[2], key.shape[2], problem.is_causal)
        out = torch.empty(query.shape, dtype=query.dtype, device="cpu")
        lse = torch.empty(query.shape[:3], dtype=query.dtype, device="cpu")
        for b in range(query.shape[0]):
            for h in range(query.shape[1]):
                out[b, h], lse[b, h] = _head(pattern, query[b, h] * scale, key[b, h], value[b, h])
        return out, lse

    return Kernel(forward, operators=("aten::sparse_sampled_addmm",))


@cache
def _hear_torch_out() -> None:
    """Have torch say here, once a process and to nobody, that its CSR tensors may change: of no use to the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state", category=UserWarning)
        _csr(*_pattern(1, 1, False)[:2], torch.zeros(1, dtype=torch.float32, device="cpu"), (1, 1))


def _csr(pointers: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """A sparse matrix; torch wants to be told whether to check what it is given."""
    return torch.sparse_csr_tensor(
        pointers, columns, values, size, dtype=values.dtype, device="cpu", check_invariants=False
    )


@lru_cache(maxsize=8)
def _pattern(rows: int, columns: int, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Row pointers and column numbers of the kept pairs, and the row of each pair."""
    counts = (
        torch.arange(1, rows + 1, dtype=torch.int64, device="cpu").clamp_(max=columns)
        if is_causal
        else torch.full((rows,), columns, dtype=torch.int64, device="cpu")
    )
    pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    row = torch.repeat_interleave(counts)
    return pointers, torch.arange(int(pointers[-1]), dtype=torch.int64, device="cpu") - pointers[row], row


def _head(pattern: tuple[Tensor, Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    pointers, columns, row = pattern
    size = (query.shape[0], key.shape[0])
    sample = _csr(pointers, columns, torch.zeros(len(columns), dtype=query.dtype, device="cpu"), size)
    scores = torch.sparse.sampled_addmm(sample, query.contiguous(), key.t().contiguous(), beta=0.0).values()
    largest = torch.segment_reduce(scores, "max", offsets=pointers)
    weights = (scores - largest[row]).exp_()
    wide = weights.double()  # both sums below add up a row's keys one after the other
    total = wide.new_zeros(len(largest)).index_add_(0, row, wide)
    shares = _csr(pointers, columns, wide / total[row], size)
    return (shares @ value.double()).to(query.dtype), (largest + total.log()).to(query.dtype)
