"""What is particular to single built-in backends; what is common to all is the conformance kit's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import longspan as ls
from longspan.testing import oracle
from longspan_plugins import sdpa
from longspan_plugins.sdpa import tiles
from small import PascalOnCpu, assert_same

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
        segments = [x.view(1, 2, blocks, 32, 16).permute(0, 2, 1, 3, 4).flatten(0, 1) for x in tensors(32 * blocks)]
        segments = segments if strided else [x.contiguous() for x in segments]
        assert segments[0].is_contiguous() != strided
        made = ls.plan(ls.Problem.like(*segments, is_causal=is_causal), backend="block_sparse_batched")
        made(*segments)
        found.append(launches(lambda segments=segments, made=made: made(*segments)))
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
@pytest.mark.parametrize("backend", ["pascal", "sdpa"])
def test_widened_tiles_give_the_same_whatever_their_size(monkeypatch, register, backend, tile, is_causal):
    monkeypatch.setattr(tiles, "TILE_BYTES", tile)
    register(PascalOnCpu(), "pascal")
    q, k, v = (x.requires_grad_() for x in tensors(700, torch.float16, heads=4))
    out = ls.attention(q, k, v, is_causal=is_causal, backend=backend)
    want = oracle(q, k, v, is_causal=is_causal)
    assert out.dtype == torch.float16
    assert (out - want).abs().max() < 2e-3
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).half()
    got = torch.autograd.grad(out, (q, k, v), dout)
    exact = torch.autograd.grad(want, (q, k, v), dout.double())
    for mine, right in zip(got, exact, strict=True):
        assert (mine - right).abs().max() < 4e-3


def test_widened_tiles_under_a_mask(monkeypatch):
    """A row may see keys of some tiles only, or of none."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 2**14)
    q, k, v = tensors(700, torch.float16)
    problem = ls.Problem.like(q, k, v)
    seen = torch.rand(1, 1, 700, 700, generator=torch.Generator().manual_seed(2)) < 0.3
    seen[:, :, :, 256:512] &= torch.arange(700)[:, None] % 3 > 0
    seen[:, :, 40] = False
    mask = torch.zeros(1, 1, 700, 700).masked_fill(~seen, -torch.inf)
    kernel, given = sdpa.longspan_kernel(problem), {"is_causal": False, "scale": problem.scale, "mask": seen}
    out, lse = kernel.forward(q, k, v, mask=mask.half())
    wide = [x.double() for x in (q, k, v)]
    want, want_lse = ls.blockwise.forward(*wide, **given)
    torch.testing.assert_close(out.double(), want, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
    assert not out[:, :, 40].any()
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).half()
    got = kernel.backward(dout, q, k, v, out, lse, mask=mask.half())
    exact = ls.blockwise.backward(dout.double(), *wide, want, want_lse, **given)
    for mine, right in zip(got, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, atol=3e-3, rtol=3e-3)


class Mine(torch.Tensor):
    """A user's own class."""


@pytest.mark.parametrize(("device", "backend"), [("sm_61", "pascal_fp32"), ("cpu", "cpu_fused")])
def test_half_precision_is_widened_by_the_resolution_whatever_the_caller_is(device, backend):
    for one in (torch.Tensor, Mine):
        problem = ls.Problem.like(*(x.as_subclass(one) for x in tensors(20, torch.float16)))
        assert ls.explain(problem, device=device).chosen == backend


def test_pascal_fp32_is_for_the_devices_that_it_is_named_after():
    q, k, v = tensors(20, torch.float16)
    with pytest.raises(ls.BackendUnavailable, match=r"(?s)device is cpu \(needs cuda==6\.0.*backend='cpu_fused'"):
        ls.attention(q, k, v, backend="pascal_fp32")


FLASH_ATTN = """
import torch
from longspan import blockwise

def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
                        alibi_slopes, return_softmax):
    assert (dropout_p, window_size_left, window_size_right, softcap, return_softmax) == (0.0, -1, -1, 0.0, False)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = blockwise.forward(q, k, v, is_causal=causal, scale=softmax_scale)
    return out.transpose(1, 2), lse, None, None

def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, deterministic):
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    grads = blockwise.backward(dout, q, k, v, out, softmax_lse, is_causal=causal, scale=softmax_scale)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad.transpose(1, 2))
"""


FLASH_ATTN_4 = """
from longspan import blockwise

def _flash_attn_fwd(q, k, v, softmax_scale, causal, window_size_left, window_size_right, softcap, return_lse):
    assert (window_size_left, window_size_right, softcap, return_lse) == (None, None, 0.0, True)
    out, lse = blockwise.forward(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, scale=softmax_scale)
    return out.transpose(1, 2), lse

def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale, causal):
    saved = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    grads = blockwise.backward(*saved, lse, is_causal=causal, scale=softmax_scale)
    return tuple(grad.transpose(1, 2) for grad in grads)
"""
PACKAGES = {
    "FlashAttention 2 2.8.3": (
        "flash-attn",
        ("flash_attn/flash_attn_interface.py", "flash_attn_2_cuda.py"),
        FLASH_ATTN,
    ),
    "FlashAttention 4 2.8.3": ("flash-attn-4", ("flash_attn/cute/interface.py",), FLASH_ATTN_4),
}
"""Packages of the family's forms, whose kernels are the core's arithmetic: distribution, modules, source."""


@pytest.fixture(params=PACKAGES)
def flash_attn(request, tmp_path, monkeypatch):
    distribution, modules, source = PACKAGES[request.param]
    for module in modules:
        (tmp_path / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / module).write_text(source)
    for folder in tmp_path.glob("flash_attn/**/"):
        (folder / "__init__.py").touch()
    record = tmp_path / f"{distribution.replace('-', '_')}-2.8.3.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Name: {distribution}\nVersion: 2.8.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield request.param
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        del sys.modules[name]


FLASH_PROBLEM = ls.Problem(batch=1, heads=8, q_len=128, head_dim=64, dtype="bfloat16", device="sm_90")


def test_flash_needs_a_package_and_says_which():
    from longspan_plugins.flash import serving

    if serving(FLASH_PROBLEM) is not None:
        pytest.skip("a package of the family is installed")
    found = ls.explain(FLASH_PROBLEM)
    (reason,) = found["flash"].reasons
    assert found.chosen == "sdpa" and reason.code == "package"
    assert reason.want == "the package flash-attn-4 or flash_attn_3 or flash-attn"
    assert reason.fix.endswith("install flash-attn --no-build-isolation")
    assert ls.explain(FLASH_PROBLEM, device="sm_80")["flash"].reasons[0].want == "the package flash-attn"
    (reason,) = ls.explain(FLASH_PROBLEM, device="sm_140")["flash"].reasons
    assert (reason.want, reason.fix) == ("an older device", "")


def test_flash_serves_by_the_package_that_is_installed(flash_attn):
    from longspan_plugins import flash

    assert ls.explain(FLASH_PROBLEM).chosen == "flash"
    assert flash.serving(FLASH_PROBLEM).version == "2.8.3"
    query, key, value = tensors(128, torch.bfloat16, heads=8, dim=64)
    dout = torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    for is_causal in (False, True):
        problem = FLASH_PROBLEM.replace(is_causal=is_causal)
        kernel, given = flash.longspan_kernel(problem), {"is_causal": is_causal, "scale": problem.scale}
        assert kernel.library == flash_attn
        out, lse = kernel.forward(query, key, value)
        assert_same((out, lse), ls.blockwise.forward(query, key, value, **given))
        saved = dout, query, key, value, out, lse
        assert_same(kernel.backward(*saved), ls.blockwise.backward(*saved, **given))


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


SILENT = """
import sys, torch, longspan as ls
query = torch.randn(1, 1, 32, 16, requires_grad=True)
for pattern in (ls.Dense(), ls.SlidingWindow(4, 0)):
    ls.attention(query, query, query, pattern, is_causal=True, backend=sys.argv[1]).sum().backward()
"""


@pytest.mark.parametrize("backend", ["torch_sparse", "flex"])
def test_what_torch_says_of_its_own_features_is_not_said_to_the_user(backend):
    program = [sys.executable, "-W", "error::UserWarning", "-c", SILENT, backend]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
