"""Numbers far beyond any sequence: refused by name, at once, without the memory that they would take."""

from __future__ import annotations

import resource
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

import longspan as ls
from longspan.testing.oracle import oracle

X = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
HUGE = 10**30

REFUSED = {
    "scale": lambda: ls.attention(X, X, X, scale=10**400),
    "dropout_p": lambda: ls.attention(X, X, X, dropout_p=10**400),
    "query_offset": lambda: ls.attention(X, X, X, query_offset=2**63),
    "q_len": lambda: ls.Problem(batch=1, heads=1, q_len=HUGE, head_dim=8),
    "left": lambda: ls.SlidingWindow(HUGE),
    "right": lambda: ls.SlidingWindow(0, 2**63),
    "segment_lengths": lambda: ls.Dilated(HUGE, 1),
    "dilation_rates": lambda: ls.Dilated(8, HUGE),
    "positions": lambda: ls.global_tokens((0, -HUGE)),
    "blocks": lambda: ls.global_blocks(10**9),
    "stride": lambda: ls.strided_blocks(HUGE),
    "reach": lambda: ls.dilated_blocks(HUGE, 1),
    "rate": lambda: ls.dilated_blocks(1, HUGE),
    "near": lambda: ls.hierarchical_blocks(HUGE),
    "window": lambda: ls.longformer(HUGE),
    "density": lambda: ls.random_blocks(10**400),
    "block_size": lambda: ls.local_blocks(8, block_size=10**6),
    "k": lambda: ls.TopKBlocks(HUGE),
    "cu_seqlens": lambda: ls.attention(X, X, X, cu_seqlens=(0, HUGE)),
    "pattern": lambda: ls.parse_pattern(f"blocks:128:global:{HUGE}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_beyond_any_sequence_are_refused_by_name(name):
    with pytest.raises(ls.ArgumentError, match=rf"^{name}: got .*; want .*\. Next: ") as caught:
        REFUSED[name]()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("digits", [30, 400, 5000])
@pytest.mark.parametrize(
    "text",
    [
        "window:N", "window:1,N", "dilated:N/1", "dilated:8/N", "blocks:N:all", "blocks:8:local:N,0",
        "blocks:8:tokens:N", "blocks:8:global:-N", "blocks:8:strided:N", "blocks:8:dilated:N,1",
        "blocks:8:hierarchical:N", "blocks:8:strided:2@N", "topk_blocks:N", "topk_blocks:2:N",
    ],
)  # fmt: skip
def test_so_are_those_of_a_text(text, digits):
    with pytest.raises(ls.ArgumentError):
        ls.parse_pattern(text.replace("N", "9" * digits))


LITTLE = """
import resource, torch, longspan as ls
torch.zeros(1)
limit = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    ls.global_blocks(10**9)
except ls.ArgumentError:
    print("refused")
parts = [ls.local_blocks(100), ls.global_blocks(1), ls.strided_blocks(3), ls.hierarchical_blocks(),
         ls.random_blocks(.5), ls.global_tokens(), ~ls.local_blocks(100)]
for pattern in parts:
    far = pattern.csr(256, 1024, query_offset=2**40, is_causal=True)
    plain = pattern.csr(256, 1024, query_offset=2**40)
    assert far == plain, pattern  # every key is before the first query
print("in little memory")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and limits the address space")
def test_a_query_far_beyond_the_keys_takes_no_memory_for_the_way_there():
    assert resource.RLIMIT_AS
    done = subprocess.run([sys.executable, "-c", LITTLE], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["refused", "in little memory"], done.stderr


@pytest.mark.parametrize("offset", [0, 5, 16, 40, 2**40, 2**62])
def test_far_queries_see_what_the_predicate_says(offset):
    pattern = ls.local_blocks(min(offset + 3, 2**62), block_size=4) & ~ls.global_tokens((2,), block_size=4)
    query, key = X[:, :, :7], X
    out, lse = ls.attention(query, key, key, pattern, is_causal=True, query_offset=offset, return_lse=True)
    want, want_lse = oracle(query, key, key, pattern, is_causal=True, query_offset=offset, return_lse=True)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


# --- TopKBlocks: more blocks than there are, and scorers that could not learn --------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("documents", [None, (0, 5, 13, 16)])
@pytest.mark.parametrize("k", [4, 5, 1000])
def test_more_blocks_than_there_are_keep_all(k, documents, is_causal):
    tensors = [X.double().clone().requires_grad_() for _ in range(3)]
    pattern = ls.TopKBlocks(k, 4)
    out = ls.attention(*tensors, pattern, is_causal=is_causal, cu_seqlens=documents)
    again = [x.detach().clone().requires_grad_() for x in tensors]
    parts = [oracle(*(x[:, :, a:b] for x in again), ls.Dense(), is_causal=is_causal) for a, b in
             pairwise(documents or (0, 16))]  # fmt: skip
    want = torch.cat(parts, 2)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=1e-12)
    found, wanted = torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(want.sum(), again)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    mass = pattern.mass(X, X, is_causal=is_causal, cu_seqlens=documents, exact=True)
    torch.testing.assert_close(mass, torch.ones_like(mass))


def test_a_million_blocks_of_a_short_sequence_are_planned_in_little_memory():
    resolution = ls.explain(ls.Problem.like(X, X, X, ls.TopKBlocks(2**60, 8), is_causal=True))
    assert resolution.chosen is not None


@pytest.mark.parametrize("mode", ["soft", "straight_through"])
def test_a_scorers_gradient_that_would_be_zero_is_refused(mode):
    """The softmax over one block is constant; under causality the row's own does not count."""
    with pytest.raises(ls.ArgumentError, match=r"scorer_gradient: .* want k of at least 2"):
        ls.TopKBlocks(1, 4, scorer_gradient=mode)
    two = ls.TopKBlocks(2, 4, scorer_gradient=mode)
    with pytest.raises(ls.ArgumentError, match=r"scorer_gradient: .* want k of at least 3.*scorer_gradient='none'"):
        ls.attention(X, X, X, two, is_causal=True)
    for k, is_causal in ((2, False), (3, True)):
        weight = torch.ones((), requires_grad=True)

        def scorer(query, key, scoring, weight=weight):
            return weight * (scoring.represent(query) @ scoring.pool(key).mT)

        out = ls.attention(X, X, X, ls.TopKBlocks(k, 4, scorer, mode), is_causal=is_causal)
        out.square().sum().backward()
        assert weight.grad.abs() > 1e-6
