"""The conformance kit must be able to fail: backends that are wrong on purpose, and one that is right."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

import longspan as ls
from longspan.spec.backend import DTYPES
from longspan.testing import cases_for, oracle, run_case, tolerance, verify, visible
from longspan.testing.answers import answer, dense, factors, sight
from longspan.testing.cases import PATTERNS, cases_of
from longspan.testing.checks import lost
from longspan.testing.claims import unclaimed
from longspan.testing.tensors import make

# ---------------------------------------------------------------------------------------------------- right and wrong


def attend(q, k, v, scale, is_causal=False, is_right=lambda scores: scores):
    """The plainest right kernel: computed in float64, with no NaN from where a row may not look."""
    group = q.shape[1] // k.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ key.mT * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    out = scores.softmax(-1) @ torch.where(value.isfinite(), value, 0.0)
    if is_causal:
        out = out + ls.blockwise.taint(value)
    lse = scores.logsumexp(-1)
    return out.to(q.dtype), lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


class TenLines:
    """Dense attention, and nothing else claimed."""

    @ls.hookimpl
    def longspan_capabilities(self):
        return ls.Capabilities(devices=("cpu",), dtypes=("float32", "float64"), patterns=("dense",), causal=True)

    @ls.hookimpl
    def longspan_kernel(self, problem):
        return lambda q, k, v: attend(q, k, v, problem.scale, problem.is_causal)


def says(**fields):
    return MappingProxyType(fields)


class Wrong:
    """A backend with a flaw; what else it does is right."""

    claims = says()

    @ls.hookimpl
    def longspan_capabilities(self):
        usual = {"devices": ("cpu",), "dtypes": ("float32",), "patterns": ("dense",), "causal": True}
        return ls.Capabilities(**{**usual, **self.claims})

    @ls.hookimpl
    def longspan_kernel(self, problem):
        def forward(q, k, v, **given):
            return self.forward(problem, q, k, v, **given)

        if not self.claims.get("backward"):
            return forward
        return ls.Kernel(forward, lambda *tensors: self.backward(problem, *tensors))

    def forward(self, problem, q, k, v, **_):
        return attend(q, k, v, problem.scale, problem.is_causal)

    def backward(self, problem, dout, q, k, v, out, lse):
        given = {"is_causal": problem.is_causal, "scale": problem.scale}
        return ls.blockwise.backward(dout, q, k, v, out, lse, **given)


class BaseTwo(Wrong):
    def forward(self, problem, q, k, v):
        out, lse = attend(q, k, v, problem.scale, problem.is_causal)
        return out, lse / math.log(2)


class IgnoresDropout(Wrong):
    claims = says(dropout=True)


class DropsByItsOwnMask(Wrong):
    """Torch's dropout: right on average, and another answer than every other backend's."""

    claims = says(dropout=True)

    def forward(self, problem, q, k, v, dropout=None):
        out, lse = attend(q, k, v, problem.scale, problem.is_causal)
        return (torch.dropout(out, problem.dropout_p, True) if dropout else out), lse


class WrongHead(Wrong):
    claims = says(gqa=True)

    def forward(self, problem, q, k, v):
        wrong = [head % k.shape[1] for head in range(q.shape[1])]
        return attend(q, k[:, wrong], v[:, wrong], problem.scale, problem.is_causal)


class IgnoresScale(Wrong):
    def forward(self, problem, q, k, v):
        return attend(q, k, v, problem.head_dim**-0.5, problem.is_causal)


class LeaksTheFuture(Wrong):
    """A masked weight of 0 times NaN is NaN."""

    def forward(self, problem, q, k, v):
        out, lse = attend(q, k, v, problem.scale, problem.is_causal)
        return out + 0.0 * v.repeat_interleave(q.shape[1] // k.shape[1], 1).sum(2, keepdim=True), lse


class MasksWithALargeNumber(Wrong):
    """Adding -1e4 hides nothing from rows whose visible scores are lower still."""

    def forward(self, problem, q, k, v):
        scores = q.double() @ k.double().mT * problem.scale
        if problem.is_causal:
            scores = scores - 1e4 * torch.ones(scores.shape[-2:]).triu(1)
        return (scores.softmax(-1) @ v.double()).to(q.dtype), scores.logsumexp(-1).float()


class GradientOfItsOwnKeys(Wrong):
    """A backward that recomputes out and lse from the keys at hand, as autograd would."""

    claims = says(backward=True)

    def backward(self, problem, dout, q, k, v, out, lse):
        out, lse = attend(q, k, v, problem.scale, problem.is_causal)
        return super().backward(problem, dout, q, k, v, out, lse)


class NoGradientForKeys(Wrong):
    claims = says(backward=True)

    def backward(self, problem, *tensors):
        dq, dk, dv = super().backward(problem, *tensors)
        return dq, torch.zeros_like(dk), dv


class DropsCausal(Wrong):
    def forward(self, problem, q, k, v):
        return attend(q, k, v, problem.scale)


class NaNWithoutKeys(Wrong):
    """Runs packed documents itself, with a softmax over nothing for the tokens that belong to none."""

    claims = says(documents=True)

    def forward(self, problem, q, k, v):
        scores = q.double() @ k.double().mT * problem.scale
        if problem.documents is not None:
            kwargs = {"is_causal": problem.is_causal, "cu_seqlens": problem.documents}
            seen = visible(problem.pattern, q.shape[1], q.shape[2], k.shape[2], **kwargs)
            scores = scores.masked_fill(seen == 0, -math.inf)
        elif problem.is_causal:
            return attend(q, k, v, problem.scale, True)
        return (scores.softmax(-1) @ v.double()).to(q.dtype), scores.logsumexp(-1).float()


class HalfLse(Wrong):
    def forward(self, problem, q, k, v):
        out, lse = attend(q, k, v, problem.scale, problem.is_causal)
        return out, lse.half()


class RoundedLse(Wrong):
    """The right dtype by then, and half its digits."""

    def forward(self, problem, q, k, v):
        out, lse = attend(q, k, v, problem.scale, problem.is_causal)
        return out, lse.half().float()


class NotReallyFloat64(Wrong):
    claims = says(dtypes=("float32", "float64"))

    def forward(self, problem, q, k, v):
        out, lse = attend(q.float(), k.float(), v.float(), problem.scale, problem.is_causal)
        return out.to(q.dtype), lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


class NeverTheSame(Wrong):
    claims = says(deterministic=True)
    calls = 0

    def forward(self, problem, q, k, v):
        out, lse = attend(q, k, v, problem.scale, problem.is_causal)
        self.calls += 1
        return out * (1.0 + 2e-7 * (self.calls % 2)), lse


class NarrowHeads(Wrong):
    """Reads the first 64 channels of a head."""

    claims = says(head_dim_max=256)

    def forward(self, problem, q, k, v):
        out, lse = attend(q[..., :64], k[..., :64], v[..., :64], problem.scale, problem.is_causal)
        return torch.cat((out, v[..., :1, 64:].expand(*q.shape[:3], -1)), -1), lse


class OneBatchOnly(Wrong):
    """Takes the batch of the problem for that of the call."""

    def forward(self, problem, q, k, v):
        if q.shape[:2] != (problem.batch, problem.heads):
            raise RuntimeError(f"shape {tuple(q.shape)} is invalid")
        return attend(q, k, v, problem.scale, problem.is_causal)


class ReadsPastTheEnd(Wrong):
    """Takes every tensor for one without gaps between its heads."""

    def forward(self, problem, q, k, v):
        q, k, v = (x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride()) for x in (q, k, v))
        return attend(q, k, v, problem.scale, problem.is_causal)


class Overflows(Wrong):
    """exp before the largest score is taken off."""

    def forward(self, problem, q, k, v):
        weights = (q @ k.mT * problem.scale).exp()
        if problem.is_causal:
            weights = weights.tril()
        total = weights.sum(-1, keepdim=True)
        return weights @ v / total, total.log().squeeze(-1)


class WritesToItsInput(Wrong):
    def forward(self, problem, q, k, v):
        out, lse = attend(q, k, v, problem.scale, problem.is_causal)
        q.mul_(problem.scale)
        return out, lse


class Crashes(Wrong):
    claims = says(gqa=True)

    def forward(self, problem, q, k, v):
        if q.shape[1] != k.shape[1]:
            raise ValueError("no such kernel")
        return attend(q, k, v, problem.scale, problem.is_causal)


WRONG = [
    (BaseTwo, "api=1 (lse in natural log)", "it is that in base 2"),
    (IgnoresDropout, "dropout=True", "it is that of dropout_p=0.0"),
    (DropsByItsOwnMask, "dropout=True", "out is not the oracle's"),
    (WrongHead, "gqa=True", "key head h % kv_heads"),
    (IgnoresScale, "api=1 (the scores are multiplied by problem.scale)", "scale=1/sqrt(head_dim)"),
    (LeaksTheFuture, "causal=True", "NaN in value"),
    (MasksWithALargeNumber, "causal=True", "rows that may not see it"),
    (GradientOfItsOwnKeys, "backward=True", "d"),
    (NoGradientForKeys, "backward=True", "dkey is not the oracle's"),
    (DropsCausal, "causal=True", "it is that of is_causal=False"),
    (NaNWithoutKeys, "documents=True", "NaN"),
    (HalfLse, "in dtypes", "torch.float16"),
    (RoundedLse, "'float32' in dtypes", "lse is not the oracle's"),
    (NotReallyFloat64, "'float64' in dtypes", "allowed 1e-12"),
    (NeverTheSame, "deterministic=True", "two runs differ"),
    (NarrowHeads, "head_dim_max=256", "not the oracle's"),
    (OneBatchOnly, "api=1 (a kernel may be called with any batch and heads", "is invalid"),
    (ReadsPastTheEnd, "api=1 (any strides", ""),
    (Overflows, "api=1 (scores of 1e4 overflow nothing)", "NaN or infinite"),
    (WritesToItsInput, "api=1 (inputs are only read)", "it wrote to query"),
    (Crashes, "gqa=True", "it raised ValueError: no such kernel"),
]


@pytest.mark.parametrize("flaw, claim, words", WRONG, ids=[flaw.__name__ for flaw, _, _ in WRONG])
def test_a_wrong_backend_is_caught_by_the_quick_cases_and_the_claim_is_named(register, flaw, claim, words):
    name = register(flaw(), f"test-{flaw.__name__}")
    certificate = verify(name, quick=True)
    assert not certificate.conformant
    failed = certificate.of("failed")
    named = [outcome for outcome in failed if claim in outcome.claim.text]
    assert named, f"blamed instead: {sorted({outcome.claim.text for outcome in failed})}"
    assert any(words in outcome.reason for outcome in named), [outcome.reason for outcome in named]
    for outcome in failed:
        message = outcome.message(name)
        assert message.startswith(f"{name} claims ") and " Next: " in message and outcome.case.id in message
    assert any(claim in line for line in certificate.messages())


@pytest.mark.parametrize("flaw, field", [(WrongHead, "gqa"), (GradientOfItsOwnKeys, "backward")])
def test_withdrawing_the_claim_that_is_named_mends_it(register, flaw, field):
    """And no other claim is blamed before, in all cases."""
    found = verify(register(flaw(), f"test-{flaw.__name__}"))
    assert {outcome.claim.field for outcome in found.of("failed")} == {field}
    modest = type("Modest", (flaw,), {"claims": says(**{field: False})})
    assert verify(register(modest(), f"test-modest-{flaw.__name__}")).messages() == ()


def test_ten_right_lines_pass(register):
    certificate = verify(register(TenLines(), "test-ten-lines"))
    assert certificate.messages() == ()
    assert certificate.conformant
    refused = {outcome.case.id for outcome in certificate.of("refused")}
    assert {"refuse-dtype=float16", "refuse-device=sm_90", "refuse-dropout", "refuse-deterministic"} <= refused
    kinds = {outcome.case.problem.pattern.kind for outcome in certificate.of("passed")}
    assert kinds == {"dense", "dilated", "window", "block_sparse"}
    assert certificate.computed >= 150


# --------------------------------------------------------------------------------------------------------- refusals


class TakesAnything(TenLines):
    """A resolver that had lost its checks would find that everything fits."""


def test_what_is_not_refused_is_caught(register, monkeypatch):
    name = register(TakesAnything(), "test-anything")
    monkeypatch.setattr("longspan.registry.resolve._arguments", lambda problem, can: [])
    failed = verify(name, quick=True).of("failed")
    assert {outcome.case.id for outcome in failed} == {"refuse-dropout", "refuse-deterministic"}
    assert "test-anything claims no dropout, but longspan.explain says that it fits" in failed[0].message(name)


def test_a_refusal_for_another_reason_is_caught(register, monkeypatch):
    name = register(TenLines(), "test-other-reason")
    other = [ls.Reason("other", "weather", "rain")]
    monkeypatch.setattr("longspan.registry.resolve._arguments", lambda problem, can: other if problem.dropout_p else [])
    case = next(case for case in cases_for(name) if case.id == "refuse-dropout")
    assert "for weather, not for dropout_p" in run_case(name, case).message(name)


def test_a_refusal_of_what_is_claimed_is_caught(register, monkeypatch):
    name = register(TenLines(), "test-refused")
    no = [ls.Reason("causal", "is_causal", "True", "False")]
    monkeypatch.setattr("longspan.registry.resolve._arguments", lambda problem, can: no if problem.is_causal else [])
    case = next(case for case in cases_for(name) if case.id == "cpu-float32-causal-forward")
    outcome = run_case(name, case)
    assert outcome.status == "failed" and outcome.claim.text == "causal=True"
    assert "the resolver refuses what is claimed" in outcome.reason


class Unwilling(TenLines):
    """Refuses causal problems in its own words."""

    @ls.hookimpl
    def longspan_unsupported(self, problem):
        return [ls.Reason("mood", "is_causal", "True", "a better day")] if problem.is_causal else []


def test_reasons_of_its_own_are_no_failure_and_leave_the_claim_unproven(register):
    certificate = verify(register(Unwilling(), "test-unwilling"), quick=True)
    assert certificate.conformant
    assert "causal=True" in certificate.unproven
    assert "'float32' in dtypes" not in certificate.unproven
    assert {outcome.reason for outcome in certificate.of("declined")} == {"is_causal is True (needs a better day)"}


class Idle(TenLines):
    """Refuses everything."""

    @ls.hookimpl
    def longspan_unsupported(self, problem):
        return [ls.Reason("missing", "acme", "not installed", "acme>=2", "pip install acme")]


def test_a_backend_that_runs_nothing_is_not_conformant(register):
    certificate = verify(register(Idle(), "test-idle"), quick=True)
    assert not certificate.conformant
    assert certificate.messages() == (
        "nothing of test-idle could be run here: acme is not installed (needs acme>=2); fix: pip install acme",
    )


class Empty:
    @ls.hookimpl
    def longspan_capabilities(self):
        return ls.Capabilities()


def test_a_backend_that_claims_nothing_fails(register):
    (message,) = verify(register(Empty(), "test-empty")).messages()
    assert "Capabilities.devices is empty" in message


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(ls.UnknownBackend, match="Did you mean 'reference'"):
        verify("referense")


# ------------------------------------------------------------------------------------------------------------ the cases


class WindowOnly(Wrong):
    """No dense kernel to lower to: what the window kernel does not take must be refused."""

    claims = says(patterns=("window",), backward=True)

    def forward(self, problem, q, k, v):
        seen = visible(problem.pattern, q.shape[1], q.shape[2], k.shape[2], is_causal=problem.is_causal)
        finite = (torch.where(x.isfinite(), x, 0.0).double() for x in (k, v))
        out, lse = dense(q.double(), *finite, seen, problem.scale)
        bad = (seen > 0).double() @ (~(k + v).isfinite()).double()
        return out.masked_fill(bad > 0, math.nan).to(q.dtype), lse.float()

    def backward(self, problem, dout, q, k, v, out, lse):
        leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
        seen = visible(problem.pattern, q.shape[1], q.shape[2], k.shape[2], is_causal=problem.is_causal)
        with torch.enable_grad():
            mine, _ = dense(*leaves, seen, problem.scale)
        return tuple(x.to(q.dtype) for x in torch.autograd.grad(mine, leaves, dout.double()))


def test_a_backend_without_a_dense_kernel(register):
    certificate = verify(register(WindowOnly(), "test-window"))
    assert certificate.messages() == ()
    refused = {outcome.case.id: outcome.case.argument for outcome in certificate.of("refused")}
    assert refused["refuse-pattern=dense"] == refused["refuse-pattern=dilated"] == "pattern"
    assert refused["refuse-gqa"] == "kv_heads"
    assert refused["refuse-documents"] == "cu_seqlens"
    assert refused["refuse-query_offset"] == "query_offset"
    assert {outcome.case.problem.pattern.kind for outcome in certificate.of("passed")[1:]} == {"window"}


FULL = ls.Capabilities(
    devices=("cpu",), dtypes=DTYPES, patterns=("dense",), causal=True, gqa=True, dropout=True, backward=True,
    deterministic=True,
)  # fmt: skip


def test_every_claim_has_a_case_and_quick_ones_touch_them_all():
    for quick in (False, True):
        cases = cases_of(FULL, quick=quick)
        fields = {case.claim.field for case in cases}
        assert {"dtypes", "head_dim", "patterns", "causal", "gqa", "dropout", "deterministic", "api"} <= fields
        assert {case.check for case in cases} >= {"forward", "gradient", "sums", "joint", "leak", "repeat", "refuse"}
        assert {case.problem.dtype for case in cases} == set(DTYPES)
    assert len(cases_of(FULL, quick=True)) < 0.6 * len(cases_of(FULL))


def test_what_is_claimed_is_never_refused_and_the_other_way_round():
    poor = ls.Capabilities(devices=("cuda>=8.0",), dtypes=("bfloat16",), patterns=("dense",), head_dim_multiple=8)
    for can in (FULL, poor, ls.Capabilities(devices=("mps",), dtypes=("float16",), patterns=("window",))):
        for case in cases_of(can, devices=("cuda",)):
            assert (case.check == "refuse") == bool(case.argument)
            if case.check != "refuse":
                assert unclaimed(case.problem, can) == ()


@pytest.mark.parametrize("changes, wanted", [
    ({"head_dim_max": 128, "head_dim_multiple": 8}, {8, 16, 24, 40, 64, 72, 80, 96, 128}),
    ({"head_dim_min": 32, "head_dim_max": 64, "head_dim_multiple": 32}, {32, 64}),
    ({"head_dim_min": 1, "head_dim_max": 100, "head_dim_multiple": 8}, {8, 16, 24, 40, 64, 72, 80, 96}),
    ({}, {1, 3, 5, 16, 20, 64, 76, 80, 100, 128, 256}),
])  # fmt: skip
def test_head_dims_are_within_the_limits_and_at_both_ends(changes, wanted):
    can = ls.Capabilities(devices=("cpu",), dtypes=("float32",), patterns=("dense",), **changes)
    dims = {case.problem.head_dim for case in cases_of(can) if case.check == "forward"}
    assert dims == wanted


def test_a_case_is_data():
    case = cases_of(FULL)[0]
    assert hash(case) == hash(cases_of(FULL)[0])
    assert str(case) == case.id == "cpu-float16-plain-forward"


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "expanded"])
def test_gaps_in_memory_hold_nan_and_the_values_are_the_same(layout):
    case = next(case for case in cases_of(FULL) if case.layout == layout)
    inputs = make(case)
    assert all(x.isfinite().all() for x in inputs.qkv)
    if layout in ("sliced", "strided"):
        assert torch.empty(0, dtype=inputs.query.dtype).set_(inputs.query.untyped_storage()).isnan().any()
    assert not inputs.query.is_contiguous()


# ------------------------------------------------------------------------------------------------ answers and tolerance


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=str)
def test_the_formula_that_dropout_is_judged_by_is_the_oracle(pattern):
    problem = ls.Problem(batch=2, heads=4, kv_heads=2, q_len=21, head_dim=5, pattern=pattern, is_causal=True)
    shapes = [(2, 4, 21, 5), (2, 2, 21, 5), (2, 2, 21, 5)]
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    got = dense(q, k, v, sight(problem), problem.scale)
    want = oracle(q, k, v, pattern, is_causal=True, enable_gqa=True, return_lse=True)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x.isinf(), y.isinf())
        assert tolerance.error(x, y) < 1e-14


@pytest.mark.parametrize("name", ["long-row-normal", "long-column-positive"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_columns_of_65536_have_gradients_and_are_quick(name, dtype):
    (case,) = [case for case in cases_of(FULL, quick=True) if case.id == f"cpu-{dtype}-{name}-sums"]
    assert max(case.problem.q_len, case.problem.kv_len) == 65_536 and case.problem.requires_grad
    assert {f"cpu-{dtype}-{name}-sums", f"cpu-{dtype}-long-row-positive-sums"} <= {one.id for one in cases_of(FULL)}
    assert bool((make(case).dout > 0).all()) == ("positive" in name)


def test_what_is_lost_is_a_mean_and_leaves_out_rows_without_keys():
    want = torch.tensor([3.0, 4.0, -math.inf], dtype=torch.float64)
    assert lost(torch.tensor([3.0, 4.5, -math.inf]), want) == pytest.approx(0.1)
    assert math.isnan(lost(torch.tensor([3.0, math.nan, -math.inf]), want))


def test_dropout_factors_keep_the_mean():
    problem = ls.Problem(batch=3, heads=4, q_len=200, head_dim=8, dropout_p=0.25)
    assert float(factors(problem).mean()) == pytest.approx(1.0, abs=0.01)
    assert set(factors(problem).unique().tolist()) == {0.0, 4 / 3}


def test_errors_are_relative_above_one_and_nan_is_infinite():
    want = torch.tensor([1e6, 0.5, -math.inf], dtype=torch.float64)
    assert tolerance.error(want + torch.tensor([1.0, 1e-6, 0.0]), want) == pytest.approx(1e-6, rel=1e-3)
    assert tolerance.error(torch.tensor([1e6, math.nan, -math.inf]), want) == math.inf
    assert tolerance.error(torch.tensor([1e6, 0.5, 0.0]), want) == math.inf
    assert tolerance.error(torch.empty(0), torch.empty(0)) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rule_is_twice_naive_torch_and_the_floor_is_far_below_a_narrower_dtype(dtype):
    problem = ls.Problem(batch=2, heads=4, q_len=33, head_dim=16, dtype=dtype)
    case = next(case for case in cases_of(FULL) if case.id == f"cpu-{dtype}-plain-forward")
    right = answer(problem, make(case))
    torch_dtype = getattr(torch, dtype)
    least = tolerance.floor(torch_dtype, right.lse)
    narrower = {"float64": 6e-8, "float32": 4.9e-4}.get(dtype, 1.0)  # eps of half as many bits
    assert least < narrower / 50
    assert tolerance.allowed(torch_dtype, 0.5, 2.0, least) == 1.0
    assert tolerance.allowed(torch_dtype, 0.0, 2.0, least) == max(least, 1e-12 * (dtype == "float64"))
    if dtype == "float64":
        assert tolerance.allowed(torch_dtype, tolerance.error(right.naive_out, right.out), 2.0, least) == 1e-12


# ---------------------------------------------------------------------------------------------- in pytest, and without


HEAD = """
    import sys
    sys.path.insert(0, {folder!r})
    import torch
    import longspan as ls
    import longspan.testing
    from {module} import {backend}

    ls.register({backend}(), name="mine")
"""


def run_pytest(tmp_path: Path, body: str, *arguments: str, backend: str = "TenLines"):
    head = HEAD.format(folder=str(Path(__file__).parent), module=Path(__file__).stem, backend=backend)
    (tmp_path / "test_mine.py").write_text(textwrap.dedent(head) + textwrap.dedent(body))
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py", *arguments]
    return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)


CLASS = """
    class TestMine(longspan.testing.BackendConformance):
        backend = "mine"
"""


def test_the_class_in_two_lines(tmp_path):
    done = run_pytest(tmp_path, CLASS)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout and "failed" not in done.stdout


def test_the_class_fails_with_the_claim_and_nothing_of_the_kit(tmp_path):
    done = run_pytest(tmp_path, CLASS, "-k", "float32-causal-forward or refuse", backend="DropsCausal")
    assert done.returncode == 1
    assert "AssertionError: mine claims causal=True, but its out is not the oracle's" in done.stdout
    assert "Next: set causal=False, or fix the kernel" in done.stdout
    assert "def run_case" not in done.stdout and "1 failed" in done.stdout


def test_an_unknown_name_fails_one_test_and_stops_no_other(tmp_path):
    other = CLASS.replace("TestMine", "TestMime").replace('"mine"', '"mime"')
    done = run_pytest(tmp_path, CLASS + other, "-k", "loaded")
    assert done.returncode == 1
    assert "Did you mean 'mine'" in done.stdout
    assert "1 failed, 1 passed" in done.stdout


def test_the_option_reruns_tests_on_one_backend(tmp_path):
    body = """
    import pytest

    def test_policy():
        x = torch.randn(1, 2, 5, 4)
        made = ls.plan(ls.Problem.like(x, x, x))
        assert made.backend == "mine" and made.resolution.decided_by == "context"

    @pytest.mark.parametrize("backend", ["sdpa", "reference"])
    def test_narrowed(backend):
        assert backend == "mine"

    @pytest.mark.parametrize("backend", ["front", "rear"])
    def test_other_words_stay(backend):
        assert backend in ("front", "rear")

    def test_fixture(backend_name):
        assert backend_name == "mine"

    def test_unclaimed():
        x = torch.randn(1, 2, 5, 4, dtype=torch.float16)
        ls.attention(x, x, x)
    """
    (tmp_path / "conftest.py").write_text(
        textwrap.dedent(HEAD.format(folder=str(Path(__file__).parent), module=Path(__file__).stem, backend="TenLines"))
    )
    text = textwrap.dedent("import torch\nimport longspan as ls\n") + textwrap.dedent(body)
    (tmp_path / "test_option.py").write_text(text)
    line = [sys.executable, "-m", "pytest", "-ra", "-p", "longspan.testing.pytest_plugin"]
    line += ["-p", "no:cacheprovider", "test_option.py"]
    done = subprocess.run([*line, "--longspan-backend=mine"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed, 1 skipped" in done.stdout
    assert "mine refuses: dtype is float16" in done.stdout
    assert "longspan backend: mine" in done.stdout
    bad = subprocess.run([*line, "--longspan-backend=mime"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert bad.returncode == 4
    assert "Did you mean 'mine'" in bad.stderr + bad.stdout


def test_longspan_testing_needs_no_pytest():
    code = """
        import sys
        sys.modules["pytest"] = sys.modules["_pytest"] = None
        import longspan.testing
        done = longspan.testing.verify("torch_sparse", quick=True)
        assert "torch" in sys.modules and done.computed
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LONGSPAN_")}
    environment = {**kept, "LONGSPAN_CACHE": os.environ["LONGSPAN_CACHE"]}
    line = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


def test_threads_and_the_generator_are_as_before(register):
    before = torch.get_num_threads()
    torch.manual_seed(3)
    want = torch.randn(3)
    torch.manual_seed(3)
    torch.set_num_threads(2)  # the kit computes with one
    try:
        verify(register(TenLines(), "test-threads"), quick=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.randn(3), want)


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def cli(capsys, monkeypatch):
    from longspan.tools.cli import main

    monkeypatch.delenv("COLUMNS", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return int(caught.value.code or 0), printed.out, printed.err

    return run


def test_verify_prints_a_certificate(register, cli):
    name = register(TenLines(), "test-cli")
    code, stdout, stderr = cli("verify", name, "--quick")
    assert code == 0 and not stderr
    assert f"{name} of this process: conformant" in stdout
    assert "float32" in stdout and "float64" in stdout and "of 1.0e-12" in stdout
    assert "0 failed" in stdout


def test_verify_as_json(register, cli):
    name = register(TenLines(), "test-cli-json")
    code, stdout, _ = cli("verify", name, "--quick", "--json", "--device", "cpu")
    found = json.loads(stdout)
    assert code == 0 and found["conformant"] is True
    assert found["cases"]["failed"] == 0 < found["cases"]["run"] and found["cases"]["refused"] > 0
    assert found["devices"] == [{"device": "cpu", "is": "cpu"}]
    worst = {row["dtype"]: row for row in found["worst"]}
    assert 0 <= worst["float64"]["forward"]["error"] <= worst["float64"]["forward"]["allowed"] == 1e-12
    assert set(worst["float32"]) == {"device", "dtype", "forward", "lse", "gradient"}
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["longspan"] == ls.__version__


def test_verify_lists_each_claim_that_fails_once(register, cli):
    name = register(NaNWithoutKeys(), "test-cli-wrong")
    code, stdout, stderr = cli("verify", name, "--quick", "--json")
    found = json.loads(stdout)
    assert code == 1 and found["conformant"] is False
    assert {failure["claim"] for failure in found["failures"]} >= {"documents=True"}
    assert stderr.count("claims documents=True, but") == 1


@pytest.mark.parametrize("device", ["cuda:99", "sm_61", "abacus"])
def test_verify_on_a_device_that_is_not_here(register, cli, device):
    code, stdout, stderr = cli("verify", register(TenLines(), "test-cli-device"), "--device", device)
    assert code == 2 and not stdout
    assert stderr.startswith("error: device:")


def test_verify_of_nobody(cli):
    code, _, stderr = cli("verify", "spda")
    assert code == 2 and "Did you mean 'sdpa'" in stderr
