"""What is particular to single built-in backends; what is common to all is the conformance kit's."""

from __future__ import annotations

import pytest
import torch

import longspan as ls
from longspan.testing import oracle

VIEWS = {
    "as_strided", "view", "_unsafe_view", "expand", "slice", "transpose", "unsqueeze", "squeeze", "flatten", "permute",
    "select", "empty", "empty_like", "new_empty", "mT", "unbind", "item", "is_nonzero", "_local_scalar_dense", "detach",
    "lift_fresh",
}  # fmt: skip
"""Operators that launch nothing: views and allocations, and the copy of one number to the host."""


def launches(run) -> list[str]:
    """The operators that a call makes, outermost layer, without those that launch nothing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    outermost = [event for event in profiler.events() if event.cpu_parent is None and "::" in event.name]
    casts = [event.name for event in outermost if event.name == "aten::to" and event.cpu_children]
    others = [event.name for event in outermost if event.name != "aten::to"]
    return casts + [name for name in others if name.removeprefix("aten::") not in VIEWS]


def tensors(n: int, dtype: torch.dtype = torch.float32, heads: int = 2, dim: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(1, heads, n, dim, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_block_sparse_batched_launches_at_most_ten_kernels_however_many_blocks(is_causal, strided):
    found = []
    for blocks in (2, 16, 128):
        strips = [x.view(1, 2, blocks, 32, 16).permute(0, 2, 1, 3, 4).flatten(0, 1) for x in tensors(32 * blocks)]
        strips = strips if strided else [x.contiguous() for x in strips]
        assert strips[0].is_contiguous() != strided
        made = ls.plan(ls.Problem.like(*strips, is_causal=is_causal), backend="block_sparse_batched")
        made(*strips)
        found.append(launches(lambda strips=strips, made=made: made(*strips)))
    assert found[0] == found[1] == found[2]
    assert {"aten::baddbmm", "aten::bmm"} <= set(found[0])
    assert len(found[0]) <= 10, found[0]


def test_verify_shows_which_operator_ran():
    for backend, operator in (
        ("sdpa", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        ("reference", "aten::amax"),
        ("torch_sparse", "aten::sparse_sampled_addmm"),
    ):
        made = ls.plan(ls.Problem(batch=1, heads=2, q_len=32, head_dim=16, is_causal=True), backend=backend)
        proof = made.verify()
        assert proof.ok is True
        assert proof.ran[operator] >= 1
        assert operator in str(proof)


def test_verify_tells_a_false_claim():
    class Liar:
        @ls.hookimpl
        def longspan_capabilities(self):
            return ls.Capabilities(devices=("cpu",), dtypes=("float32",), patterns=("dense",))

        @ls.hookimpl
        def longspan_kernel(self, problem):
            given = {"is_causal": False, "scale": problem.scale}
            return ls.Kernel(lambda q, k, v: ls.blockwise.forward(q, k, v, **given), operators=("aten::flash",))

    ls.register(Liar(), name="test-liar")
    try:
        proof = ls.plan(ls.Problem(batch=1, heads=1, q_len=8, head_dim=8), backend="test-liar").verify()
    finally:
        ls.unregister("test-liar")
    assert proof.ok is False
    assert proof.missing == ("aten::flash",)
    assert "aten::flash" in str(proof)


@pytest.mark.parametrize("tile", [2**14, 2**16, 2**23])
@pytest.mark.parametrize("is_causal", [False, True])
def test_pascal_fp32_gives_the_same_whatever_its_tiles(monkeypatch, tile, is_causal):
    from longspan_plugins import pascal_fp32

    monkeypatch.setattr(pascal_fp32, "TILE_BYTES", tile)
    q, k, v = (x.requires_grad_() for x in tensors(700, torch.float16, heads=4))
    out = ls.attention(q, k, v, is_causal=is_causal, backend="pascal_fp32")
    want = oracle(q, k, v, is_causal=is_causal)
    assert out.dtype == torch.float16
    assert (out - want).abs().max() < 2e-3
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).half()
    got = torch.autograd.grad(out, (q, k, v), dout)
    exact = torch.autograd.grad(want, (q, k, v), dout.double())
    for mine, right in zip(got, exact, strict=True):
        assert (mine - right).abs().max() < 4e-3


def test_pascal_fp32_is_chosen_by_the_resolution_whatever_the_caller_is():
    class Mine(torch.Tensor):
        pass

    q, k, v = tensors(20, torch.float16)
    assert ls.plan(ls.Problem.like(q, k, v)).backend == "pascal_fp32"
    assert (
        ls.plan(ls.Problem.like(q.as_subclass(Mine), k.as_subclass(Mine), v.as_subclass(Mine))).backend == "pascal_fp32"
    )


def test_flash_says_which_library_serves():
    from longspan_plugins import flash

    problem = ls.Problem(batch=1, heads=8, q_len=128, head_dim=64, dtype="bfloat16", device="sm_90")
    library = flash.serving(problem)
    assert library.name in {"torch", "FlashAttention 2", "FlashAttention 3", "FlashAttention 4"}
    assert library.version


def test_what_is_missing_stays_a_candidate_with_its_install_line():
    found = ls.explain(ls.Problem(batch=1, heads=8, q_len=128, head_dim=64, dtype="float16"), device="sm_70")
    verdict = found["xformers"]
    try:
        import xformers  # noqa: F401
    except ImportError:
        assert not verdict.ok
        assert "pip install" in verdict.reasons[0].fix
    else:
        assert verdict.ok or verdict.reasons[0].code == "xformers"


def test_torch_sparse_is_experimental_and_says_so():
    found = ls.explain(ls.Problem(batch=1, heads=2, q_len=32, head_dim=16))
    assert found["torch_sparse"].ok
    assert found["torch_sparse"].reasons[0].code == "experimental"
    assert found.chosen != "torch_sparse"
