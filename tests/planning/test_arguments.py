"""Every argument of `attention`, alone and in pairs, on every built-in backend: honoured or refused, never ignored.

The cases are made from one table. A case works (it equals the oracle, forward and backward) or is refused before launch
with a `Reason` whose field names one of the arguments. The only pairs that no backend may accept are those in ILLEGAL.
"""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

import longspan as ls
from longspan import Capabilities, blockwise, hookimpl
from longspan.testing.oracle import oracle, visible

BATCH, HEADS, N, DIM, SEED, P = 2, 4, 13, 16, 12345, 0.5

BUILT_IN = tuple(info for info in ls.backends() if info.state == "loaded" and info.distribution == "longspan")
BACKENDS = tuple(info.name for info in BUILT_IN)
WIDEST = ("float64", "float32", "float16", "bfloat16")

TABLE = {
    "pattern": {
        "window": ls.SlidingWindow(3, 2),
        "window of one side": ls.SlidingWindow(4, 0),
        "all": ls.Dilated((4, 9), (1, 2)),
        "all, block": ls.Dilated((5, 16), (2, 3), offset="block"),
        "grouped": ls.Dilated((4, 9), (1, 2), heads="grouped"),
    },
    "is_causal": {"causal": True},
    "scale": {"small": 0.3, "negative": -0.7},
    "dropout_p": {"half": P},
    "enable_gqa": {"two key heads": 2, "one key head": 1},
    "cu_seqlens": {"a tensor": torch.tensor([0, 4, 4, 9], dtype=torch.int32), "a tuple": (0, 5, 13), "empty": (0, 0)},
    "query_offset": {"last rows": (4, 13, 9), "one row": (1, 13, 12), "more queries": (13, 5, 0), "later": (13, 13, 3)},
    "return_lse": {"lse": True},
    "dtype": {name: name for name in WIDEST},
    "layout": {name: name for name in ("transposed", "sliced", "strided")},
}

FIELDS = {
    "pattern": {"pattern", "is_causal"},  # a window is lowered to causal squares
    "is_causal": {"is_causal"},
    "scale": {"scale"},
    "dropout_p": {"dropout_p"},
    "enable_gqa": {"kv_heads", "enable_gqa"},
    "cu_seqlens": {"cu_seqlens"},
    "query_offset": {"query_offset"},
    "return_lse": {"return_lse"},
    "dtype": {"dtype"},
    "layout": set(),
}
"""What a refusal may name, by argument."""

ILLEGAL = {frozenset({"cu_seqlens", "query_offset"}): {"cu_seqlens", "query_offset"}}
"""Pairs that mean nothing (positions count from each document's start), and what the ArgumentError may name."""

SETTINGS = [(argument, name) for argument, named in TABLE.items() for name in named]
PAIRS = [(a, b) for a, b in combinations(SETTINGS, 2) if a[0] != b[0]]
SINGLES = [(), *((one,) for one in SETTINGS)]
FIRST = {argument: next(iter(named)) for argument, named in TABLE.items()}
PAIRS_OF_ARGUMENTS = [((a, FIRST[a]), (b, FIRST[b])) for a, b in combinations(TABLE, 2)]
THOROUGH = ("sdpa", "reference")  # all pairs of settings; the others get all settings and all pairs of arguments
CASES = [
    (case, backend)
    for backend in BACKENDS
    for case in (*SINGLES, *(PAIRS if backend in THOROUGH else PAIRS_OF_ARGUMENTS))
]
TOLERANCE = {"float64": 1e-12, "float32": 3e-5, "float16": 2e-2, "bfloat16": 1.5e-1}


def label(case):
    return " + ".join(f"{argument}: {name}" for argument, name in case) or "no argument"


# --- one case -------------------------------------------------------------------------------------------------------


def laid_out(batch, heads, length, dim, layout, seed):
    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    if layout == "transposed":
        return randn(batch, length, heads, dim).transpose(1, 2)
    if layout == "sliced":
        return randn(batch, heads + 2, length + 5, dim + 3)[:, 1:-1, 2 : length + 2, 3:]
    if layout == "strided":
        return randn(batch, heads, length, 2 * dim)[..., ::2]
    return randn(batch, heads, length, dim)


def inputs(chosen, dtype, dim=DIM, batch=BATCH, heads=HEADS, n=N):
    """query, key, value as the settings want them, leaves that require gradients."""
    q_len, kv_len, _ = chosen.get("query_offset", (n, n, 0))
    kv_heads = chosen.get("enable_gqa", heads)
    layout = chosen.get("layout", "contiguous")
    made = [laid_out(batch, heads, q_len, dim, layout, 1)]
    made += [laid_out(batch, kv_heads, kv_len, dim, layout, seed) for seed in (2, 3)]
    return [x.to(getattr(torch, dtype)).detach().requires_grad_() for x in made]


def keywords(chosen):
    found = {name: chosen[name] for name in ("is_causal", "scale", "cu_seqlens") if name in chosen}
    if "enable_gqa" in chosen:
        found["enable_gqa"] = True
    if "query_offset" in chosen:
        found["query_offset"] = chosen["query_offset"][2]
    return found


def factors(batch, heads, q_len, kv_len, offset):
    """What dropout multiplies each weight with: the output for equal scores and the identity as values shows it."""
    zeros = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.float64)
    eye = torch.eye(kv_len, dtype=torch.float64).expand(batch, heads, kv_len, kv_len)
    keys = torch.zeros_like(eye)
    given = {"dropout_p": P, "dropout_seed": SEED, "query_offset": offset}
    return kv_len * ls.attention(zeros, keys, eye, backend="reference", **given)


def expected(chosen, q, k, v):
    """(out, lse) in float64: the oracle, or the same by hand where weights are dropped."""
    pattern, given = chosen.get("pattern", ls.Dense()), keywords(chosen)
    if "dropout_p" not in chosen:
        return oracle(q, k, v, pattern, return_lse=True, **given)
    (batch, heads, q_len, dim), kv_len, offset = q.shape, k.shape[2], given.get("query_offset", 0)
    where = {name: given[name] for name in ("is_causal", "cu_seqlens") if name in given}
    counts = visible(pattern, heads, q_len, kv_len, query_offset=offset, **where)
    keys, values = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    scores = given.get("scale", dim**-0.5) * (q @ keys.mT) + counts.double().log()
    bare = (counts == 0).all(-1)
    lse = scores.masked_fill(bare[..., None], 0.0).logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    return (weights * factors(batch, heads, q_len, kv_len, offset)) @ values, lse.masked_fill(bare, -math.inf)


def gap(got, want):
    """The largest error relative to max(1, |want|); infinite where -inf or NaN stand in other places."""
    assert got.shape == want.shape
    got = got.detach().double()
    want = want.detach()
    if got.isnan().any() or not torch.equal(got == -math.inf, want == -math.inf):
        return math.inf
    finite = want.isfinite()
    error = (got[finite] - want[finite]).abs() / want[finite].abs().clamp(min=1)
    return error.max().item() if error.numel() else 0.0


def call(chosen, backend, q, k, v):
    given = keywords(chosen)
    if "dropout_p" in chosen:
        given |= {"dropout_p": P, "dropout_seed": SEED}
    return ls.attention(q, k, v, chosen.get("pattern", ls.Dense()), backend=backend, return_lse=True, **given)


def base_dtype(backend):
    """The widest dtype in which the backend serves plain dense attention here; else the widest that it declares."""
    can = next(info.capabilities for info in ls.backends() if info.name == backend)
    declared = [name for name in WIDEST if name in can.dtypes]
    problem = ls.Problem(batch=BATCH, heads=HEADS, q_len=N, head_dim=DIM)
    fit = [name for name in declared if ls.explain(problem.replace(dtype=name), backend=backend)[backend].ok]
    return (fit or declared)[0]


def fields_of(resolution, backend):
    return {reason.field for reason in resolution[backend].reasons}


def outcome(case, backend):
    """'works', 'refused' or 'illegal'; anything else is an assertion error."""
    arguments = {argument for argument, _ in case}
    chosen = {argument: TABLE[argument][name] for argument, name in case}
    dtype = chosen.get("dtype", base_dtype(backend))
    q, k, v = inputs(chosen, dtype)
    try:
        out, lse = call(chosen, backend, q, k, v)
    except ls.BackendUnavailable as refusal:
        named = fields_of(refusal.resolution, backend)
        assert all(field in str(refusal) for field in named)
        plain = ls.Problem(batch=BATCH, heads=HEADS, q_len=N, head_dim=DIM, dtype=dtype)
        anyway = fields_of(ls.explain(plain, backend=backend), backend)  # such as a device that is not here
        allowed = anyway.union(*(FIELDS[argument] for argument in arguments))
        assert named and named <= allowed, f"refused for {named}, which is none of the arguments {arguments}"
        return "refused"
    except ls.ArgumentError as error:
        assert error.argument in ILLEGAL.get(frozenset(arguments), ()), f"{error} for a pair that means something"
        return "illegal"
    assert frozenset(arguments) not in ILLEGAL, "accepted what means nothing"
    assert out.dtype == q.dtype and lse.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, want_lse = expected(chosen, *exact)
    tolerance = TOLERANCE[dtype]
    assert gap(out, want) <= tolerance, "out"
    assert gap(lse, want_lse) <= tolerance, "lse"
    dout = laid_out(*out.shape, chosen.get("layout", "contiguous"), 7).to(out.dtype)
    outputs, wants, douts = [out], [want], [dout]
    if "return_lse" in chosen:
        dlse = torch.randn(lse.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
        outputs, wants, douts = [out, lse], [want, want_lse], [dout, dlse.to(lse.dtype)]
    found = torch.autograd.grad(outputs, (q, k, v), douts)
    right = torch.autograd.grad(wants, exact, [x.double() for x in douts], allow_unused=True, materialize_grads=True)
    for one, other, name in zip(found, right, ("dquery", "dkey", "dvalue"), strict=True):
        assert one.dtype == q.dtype
        assert gap(one, other) <= tolerance, name
    if "return_lse" not in chosen:
        alone = ls.attention(q, k, v, chosen.get("pattern", ls.Dense()), backend=backend, **_dropping(chosen))
        assert torch.equal(alone, out), "return_lse changes out"
    return "works"


def _dropping(chosen):
    given = keywords(chosen)
    return given | {"dropout_p": P, "dropout_seed": SEED} if "dropout_p" in chosen else given


@pytest.mark.parametrize("case, backend", CASES, ids=lambda part: part if isinstance(part, str) else label(part))
def test_an_argument_or_a_pair_works_or_is_refused(case, backend):
    assert outcome(case, backend) in ("works", "refused", "illegal")


def test_the_table_makes_as_many_cases_as_it_should():
    import inspect

    sizes = [len(named) for named in TABLE.values()]
    settings = sum(sizes)
    pairs = (settings**2 - sum(size**2 for size in sizes)) // 2
    assert len(SETTINGS) == settings == 26
    assert len(PAIRS) == pairs == 295
    assert len(PAIRS_OF_ARGUMENTS) == len(TABLE) * (len(TABLE) - 1) // 2 == 45
    assert set(THOROUGH) <= set(BACKENDS)
    others = len(BACKENDS) - len(THOROUGH)
    each = 1 + settings
    assert len(set(CASES)) == len(CASES) == len(BACKENDS) * each + len(THOROUGH) * pairs + others * 45
    elsewhere = {"query", "key", "value", "backend", "dropout_seed", "foreign"}
    assert set(inspect.signature(ls.attention).parameters) - elsewhere == set(TABLE) - {"dtype", "layout"}


@pytest.mark.parametrize("backend", THOROUGH)
def test_the_plain_backends_refuse_nothing(backend):
    """Neither of the two that serve everything may hide behind a refusal."""
    found = [outcome(case, backend) for case in (*SINGLES, *PAIRS)]
    illegal = len(TABLE["cu_seqlens"]) * len(TABLE["query_offset"])
    assert found.count("illegal") == illegal == 12
    assert found.count("works") == len(found) - illegal


FORM = ("return_lse", "dtype", "layout")  # change the form of the result, not its value


@pytest.mark.parametrize("setting", [one for one in SETTINGS if one[0] not in FORM], ids=lambda one: label((one,)))
def test_every_setting_changes_what_is_expected(setting):
    """Else a backend that ignores it would pass."""
    argument, name = setting
    chosen = {argument: TABLE[argument][name]}
    if argument in ("enable_gqa", "query_offset"):  # the inputs are others; what counts is how they are read
        causal = {"is_causal": True} if argument == "query_offset" else {}
        q, k, v = (x.detach() for x in inputs(chosen, "float64"))
        with_it = expected(chosen | causal, q, k, v)[0]
        if argument == "enable_gqa":
            heads = chosen["enable_gqa"]
            other = [x.repeat(1, HEADS // heads, 1, 1) for x in (k, v)]  # head h reads h % kv_heads: the other way
            if heads == 1:
                assert torch.equal(oracle(q, *other), with_it), "one key head serves all"
                return
            without = oracle(q, *other)
        else:
            moved = {"query_offset": (*chosen["query_offset"][:2], chosen["query_offset"][2] + 1)}
            without = expected(moved | causal, q, k, v)[0]
            if chosen["query_offset"][2] + 1 >= k.shape[2]:  # the last row sees everything, wherever it stands
                moved = {"query_offset": (*chosen["query_offset"][:2], 0)}
                without = expected(moved | causal, q, k, v)[0]
    else:
        q, k, v = (x.detach() for x in inputs({}, "float64"))
        with_it, without = expected(chosen, q, k, v)[0], expected({}, q, k, v)[0]
    assert (with_it - without).abs().max() > TOLERANCE["bfloat16"]


# --- the judge is judged: backends that refuse, and backends that lie ----------------------------------------------


class Modest:
    """Dense and nothing else, in float64: the core refuses the rest by the argument's name."""

    @hookimpl
    def longspan_capabilities(self):
        return Capabilities(devices=("cpu",), dtypes=("float64",), patterns=("dense",))

    @hookimpl
    def longspan_kernel(self, problem):
        return lambda q, k, v: blockwise.forward(q, k, v, is_causal=False, scale=problem.scale)


class Alone(Modest):
    """Windows natively and no dense kernel to lower to: what it does not declare, nobody can do for it."""

    @hookimpl
    def longspan_capabilities(self):
        return Capabilities(devices=("cpu",), dtypes=("float64",), patterns=("window",))


REFUSED_BY_MODEST = ("is_causal", "dropout_p")
REFUSED_BY_ALONE = {
    "is_causal": "is_causal", "dropout_p": "dropout_p", "cu_seqlens": "cu_seqlens", "enable_gqa": "kv_heads",
    "query_offset": "query_offset", "pattern": "pattern", "dtype": "dtype",
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda one: label((one,)))
def test_a_modest_backend_is_refused_by_the_arguments_name(register, setting):
    register(Modest(), "test-modest")
    refused = setting[0] in REFUSED_BY_MODEST or (setting[0] == "dtype" and setting[1] != "float64")
    refused |= setting[1].startswith("window")  # a window is lowered to causal squares, which its kernel does not take
    assert outcome((setting,), "test-modest") == ("refused" if refused else "works")


@pytest.mark.parametrize("argument", REFUSED_BY_ALONE)
def test_a_refusal_names_the_argument_and_the_backends_that_take_it(register, argument):
    register(Alone(), "test-alone")
    window = {} if argument == "pattern" else {"pattern": ls.SlidingWindow(3, 2)}
    name, value = next(iter(TABLE[argument].items()))
    if argument == "pattern":
        name, value = "all", TABLE["pattern"]["all"]
    chosen = {**window, argument: value}
    dtype = "float16" if argument == "dtype" else "float64"
    q, k, v = inputs(chosen, dtype)
    with pytest.raises(ls.BackendUnavailable) as caught:
        call(chosen, "test-alone", q, k, v)
    reasons = caught.value.resolution["test-alone"].reasons
    assert {reason.field for reason in reasons} == {REFUSED_BY_ALONE[argument]}, name
    assert all(reason.code and reason.got and reason.want and reason.fix for reason in reasons)
    assert REFUSED_BY_ALONE[argument] in str(caught.value)
    assert "sdpa" in str(caught.value) and "reference" in str(caught.value), "it names those that fit"


class Liar(Modest):
    """Claims everything, and ignores one thing."""

    def __init__(self, ignores):
        self.ignores = ignores

    @hookimpl
    def longspan_capabilities(self):
        return Capabilities(
            devices=("cpu",), dtypes=WIDEST, patterns=("dense",), causal=True, gqa=True, dropout=True, backward=True
        )

    @hookimpl
    def longspan_kernel(self, problem):
        given = {"is_causal": problem.is_causal, "scale": problem.scale}
        if self.ignores == "is_causal":
            given["is_causal"] = False
        if self.ignores == "scale":
            given["scale"] = problem.head_dim**-0.5

        def forward(q, k, v, **dropout):
            out, lse = blockwise.forward(q, k, v, **given, **({} if self.ignores == "dropout_p" else dropout))
            return out, lse + 1e-6 if self.ignores == "return_lse" else lse

        def backward(*tensors, **dropout):
            grads = blockwise.backward(*tensors, **given, **({} if self.ignores == "backward mask" else dropout))
            return (grads[0] * (1 + 1e-9), *grads[1:]) if self.ignores == "gradient" else grads

        return ls.Kernel(forward, backward)


@pytest.mark.parametrize(
    "ignores, caught_by",
    [
        ("is_causal", ("is_causal", "causal")),
        ("scale", ("scale", "small")),
        ("dropout_p", ("dropout_p", "half")),
        ("backward mask", ("dropout_p", "half")),
        ("return_lse", ("return_lse", "lse")),
        ("gradient", ("return_lse", "lse")),
    ],
)
def test_a_backend_that_ignores_an_argument_is_caught(register, ignores, caught_by):
    register(Liar(ignores), "test-liar")
    if ignores == "gradient":
        caught_by = ("is_causal", "causal")
    with pytest.raises(AssertionError):
        outcome((caught_by,), "test-liar")


def test_a_backend_that_ignores_nothing_is_not(register):
    register(Liar(""), "test-honest")
    assert outcome((("is_causal", "causal"), ("dropout_p", "half")), "test-honest") == "works"


# --- gradcheck: numerical derivatives, of every argument and every pair, for each pattern --------------------------

GRAD_PATTERNS = {
    "dense": ls.Dense(),
    "all": ls.Dilated((2, 4), (1, 2)),
    "grouped": ls.Dilated((2, 4), (1, 2), heads="grouped"),
    "window": ls.SlidingWindow(2, 1),
}
GRAD_TABLE = {
    "is_causal": {"causal": True},
    "scale": {"large": 1.5, "negative": -0.7},
    "dropout_p": {"half": P},
    "enable_gqa": {"one key head": 1},
    "cu_seqlens": {"empty ones among them": (0, 2, 2, 4)},
    "query_offset": {"last rows": (2, 5, 3), "more queries": (5, 3, 0)},
    "return_lse": {"lse": True},
    "layout": {"transposed": "transposed", "strided": "strided"},
}
GRAD_SETTINGS = [(argument, name) for argument, named in GRAD_TABLE.items() for name in named]
GRAD_CASES = [
    (),
    *((one,) for one in GRAD_SETTINGS),
    *((a, b) for a, b in combinations(GRAD_SETTINGS, 2) if a[0] != b[0] and frozenset({a[0], b[0]}) not in ILLEGAL),
]
IN_DOUBLE = tuple(name for name in BACKENDS if base_dtype(name) == "float64")
GRADCHECKS = [
    (case, pattern, backend)
    for backend in IN_DOUBLE
    for pattern in GRAD_PATTERNS
    for case in GRAD_CASES
    if len(case) < 2 or backend in THOROUGH
]


def test_the_table_makes_as_many_gradchecks_as_it_should():
    sizes = {argument: len(named) for argument, named in GRAD_TABLE.items()}
    total = sum(sizes.values())
    illegal = sizes["cu_seqlens"] * sizes["query_offset"]
    pairs = (total**2 - sum(size**2 for size in sizes.values())) // 2 - illegal
    assert len(set(GRAD_CASES)) == len(GRAD_CASES) == 1 + total + pairs == 1 + 11 + 50
    assert set(THOROUGH) <= set(IN_DOUBLE)
    others = len(IN_DOUBLE) - len(THOROUGH)
    assert len(set(GRADCHECKS)) == len(GRADCHECKS) == len(GRAD_PATTERNS) * (62 * len(THOROUGH) + 12 * others)


@pytest.mark.parametrize(
    "case, pattern, backend", GRADCHECKS, ids=lambda part: part if isinstance(part, str) else label(part)
)
def test_gradcheck(case, pattern, backend):
    chosen = {argument: GRAD_TABLE[argument][name] for argument, name in case} | {"pattern": GRAD_PATTERNS[pattern]}
    tensors = inputs(chosen, "float64", dim=2, batch=1, heads=2, n=5)
    used = torch.tensor(True)

    def run(q, k, v):
        nonlocal used
        out, lse = call(chosen, backend, q, k, v)
        used = out.detach().abs().sum() > 0
        return (out, lse.masked_fill(lse == -math.inf, 0.0)) if "return_lse" in chosen else out

    try:
        run(*tensors)
    except ls.BackendUnavailable as refusal:
        named = fields_of(refusal.resolution, backend)
        assert named and named <= set().union(*(FIELDS[argument] for argument in chosen))
        return
    cheap = pattern == "dense" or (len(case) < 2 and backend in THOROUGH)
    assert torch.autograd.gradcheck(run, tensors, fast_mode=not cheap)
    assert used, "no row saw a key: nothing was checked"


def test_gradcheck_catches_a_wrong_gradient(register):
    register(Liar("backward mask"), "test-liar")
    tensors = inputs({}, "float64", dim=2, batch=1, heads=2, n=5)
    for fast in (True, False):
        with pytest.raises(GradcheckError):
            torch.autograd.gradcheck(
                lambda q, k, v: call({"dropout_p": P}, "test-liar", q, k, v)[0], tensors, fast_mode=fast
            )


# --- dtypes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend, dtype", list(product(BACKENDS, WIDEST)))
def test_a_dtype_is_served_where_it_is_declared_and_refused_where_not(backend, dtype):
    can = next(info.capabilities for info in BUILT_IN if info.name == backend)
    problem = ls.Problem(batch=BATCH, heads=HEADS, q_len=N, head_dim=DIM, dtype=dtype)
    verdict = ls.explain(problem, backend=backend)[backend]
    if dtype not in can.dtypes:
        assert "dtype" in {reason.field for reason in verdict.reasons}
    found = outcome((("dtype", dtype),), backend)
    assert found == ("works" if verdict.ok else "refused")
