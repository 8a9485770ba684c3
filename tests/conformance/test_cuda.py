"""Every backend on a CUDA device; where there is none, a skip that says what the backend would need."""

from __future__ import annotations

import pytest
import torch

import longspan as ls
from longspan.testing import verify

NAMES = [row.name for row in ls.backends() if row.state == "loaded"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", NAMES)
def test_conforms_on_cuda(backend):
    found = ls.explain(ls.Problem(batch=1, heads=8, q_len=128, head_dim=64, dtype="float16", device="cuda"))
    reasons = "; ".join(map(str, found[backend].reasons)) or "would fit"
    if not torch.cuda.is_available():
        pytest.skip(f"no CUDA device here; {backend}: {reasons}")
    if not found[backend].ok:
        pytest.skip(f"{backend}: {reasons}")
    certificate = verify(backend, "cuda", quick=True)
    assert certificate.conformant, "\n".join(certificate.messages())
