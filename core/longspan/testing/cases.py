"""The cases of the conformance kit: data, made from what a backend's own `Capabilities` claim and do not claim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen

from longspan.patterns.blocks.builders import bigbird, local_blocks, random_blocks
from longspan.patterns.dilated import Dilated
from longspan.patterns.window import SlidingWindow
from longspan.spec.backend import DTYPES, Capabilities
from longspan.spec.device import Device
from longspan.spec.pattern import Dense, Pattern
from longspan.spec.problem import Problem
from longspan.testing.claims import Claim, claim_of, contract, unclaimed

__all__ = ["HEAD_DIM", "LENGTH", "Case", "cases_of"]

LENGTH = 33
HEAD_DIM = 16
LARGEST = 256
"""The largest head_dim that is tried where `head_dim_max` allows more."""
WIDTHS = (20, 76, 100)
"""Head dimensions that are no multiple of 8, beside a tile's usual widths."""
LONG = 65_536
"""Keys of the long rows, and queries of the long columns, whose sums show how rounding grows with their number."""

PATTERNS: Mapping[str, Pattern] = {
    "dense": Dense(),
    "dilated": Dilated((8, 20), (1, 3)),
    "window": SlidingWindow(5, 2),
    "block_sparse": local_blocks(5, 2, block_size=8) | random_blocks(0.3, block_size=8, seed=1),
}
"""One pattern of each kind that the oracle knows."""

MORE_PATTERNS: Mapping[str, Pattern] = {
    "dilated-grouped": Dilated((8, 20), (1, 3), heads="grouped"),
    "dilated-block": Dilated((9, 40), (2, 3), offset="block"),
    "dilated-empty-rows": Dilated((6, 11), (3, 4)),
    "dilated-twice": Dilated((7, 7), (1, 1)),
    "window-left": SlidingWindow(3, 0),
    "window-wide": SlidingWindow(40, 40),
    "block_sparse-bigbird": bigbird(block_size=4),
    "block_sparse-empty-rows": random_blocks(0.2, block_size=4, seed=2) & ~local_blocks(9, 9, block_size=4),
}

TELLING = ("dilated-grouped", "dilated-block", "dilated-twice", "block_sparse-empty-rows")
"""Those that a kernel which takes such patterns whole is easily wrong about."""

_TILES_FIX = "rescale the sum and the output wherever the running maximum changes, and mask the last tile's tail"
_LONG_FIX = "count positions in 32 bits or more, and sum in blocks: of each tile apart, then of the tiles"
_JOINT_FIX = "compute the weights from the lse that is given, exp(score - lse), not from the keys at hand"

FORWARD, BOTH = ("forward",), ("forward", "gradient")
_FEW_HEADS = {"batch": 1, "heads": 2, "kv_heads": 2}
_ONE_HEAD = {"batch": 1, "heads": 1, "kv_heads": 1}


@frozen(kw_only=True)
class Case:
    """One test of one claim.

    Args:
        id: names the case, such as `cpu-float32-causal-gradient`.
        check: forward, gradient, sums, lse-gradient, joint, leak, contain, repeat, again, threads, backward (claims
            that must hold) or refuse.
        claim: what is put to the test.
        problem: what is computed; its device is a kind (`cuda`), until it is known which one there is.
        device: the torch device it runs on; that of a refusal need not exist.
        layout: of the tensors in memory: contiguous, transposed, sliced, strided, expanded, or pooled (the gradient of
            the output alone is expanded, along the queries).
        logits: normal, spiked (scores of 1e4), sunken (scores below -1e4), uneven (rows of scores near 300, 0 and
            -300), positive (all numbers are from 0 to 1: nothing cancels, and running sums grow).
        argument: for a refusal, the `Reason.field` that must be named.
    """

    id: str
    check: str
    claim: Claim
    problem: Problem
    device: str = "cpu"
    layout: str = "contiguous"
    logits: str = "normal"
    argument: str = ""

    def __str__(self) -> str:
        return self.id


@frozen
class _Draft:
    """A case that is to be made for each device and dtype: what it changes in the plain problem, and how it is run.

    `where`: it is about positions alone, which the core lowers the same for every dtype; the widest is enough then.
    """

    name: str
    field: str | Claim  # the capability, or the clause, that it tests
    changes: Mapping[str, Any] = {}
    checks: tuple[str, ...] = BOTH
    layout: str = "contiguous"
    logits: str = "normal"
    quick: bool = False
    where: bool = False


def cases_of(can: Capabilities, devices: Sequence[str] = ("cpu",), *, quick: bool = False) -> tuple[Case, ...]:
    """The cases that follow from a declaration.

    Args:
        can: what the backend declares.
        devices: torch devices of this machine, such as `cpu` and `cuda`, that it claims.
        quick: the fewest cases that touch every claim.
    """
    kinds = [kind for kind in PATTERNS if can.runs(kind)]
    if not kinds or not can.dtypes or not can.devices:
        return ()
    dims = _head_dims(can)
    usual = min(dims, key=lambda dim: abs(dim - HEAD_DIM))
    plain = Problem(batch=2, heads=4, q_len=LENGTH, head_dim=usual, pattern=PATTERNS[kinds[0]])
    cases: list[Case] = []
    for device in devices:
        for dtype in can.dtypes:
            base = plain.replace(dtype=dtype, device=Device.parse(device))
            for draft in _drafts(base, can, dims):
                enough = dtype != _widest(can) and _lowered(draft, can)
                if draft.quick or not (quick or enough):
                    cases += _cases(draft, base, can, device)
    return (*cases, *_refusals(plain.replace(dtype=can.dtypes[0], device=_device(can.devices[0])), can))


# ------------------------------------------------------------------------------------------------- what must be right


def _cases(draft: _Draft, base: Problem, can: Capabilities, device: str) -> Iterator[Case]:
    changes = dict(draft.changes)
    if "q_len" in changes:
        changes.setdefault("kv_len", changes["q_len"])
    if "head_dim" in changes:
        changes["scale"] = changes["head_dim"] ** -0.5
    problem = base.replace(**changes)
    if unclaimed(problem, can):
        return
    claim = draft.field if isinstance(draft.field, Claim) else claim_of(draft.field, problem, can)
    for check in draft.checks:
        if check == "gradient" and not (can.backward or draft.quick or base.dtype == _widest(can)):
            continue  # the core's own backward, whose cases in one dtype and in the quick ones are enough
        yield Case(
            id=f"{device}-{base.dtype}-{draft.name}-{check}",
            check=check,
            claim=claim,
            problem=problem.replace(requires_grad=check not in ("forward", "leak")),
            device=device,
            layout=draft.layout,
            logits=draft.logits,
        )


def _lowered(draft: _Draft, can: Capabilities) -> bool:
    """Whether it is about positions, and the core, not the kernel, sees to them."""
    kind = draft.changes.get("pattern", PATTERNS["dense"]).kind
    native = kind != "dense" and can.runs(kind)
    native |= can.documents and "documents" in draft.changes
    native |= can.query_offset and "query_offset" in draft.changes
    return draft.where and not native


def _drafts(base: Problem, can: Capabilities, dims: Sequence[int]) -> Iterator[_Draft]:
    yield from _numbers(base, dims)
    yield from _arguments(can)
    yield from _patterns(can)
    yield from _contract(base, can)
    yield from _calls(can)
    yield from _lengths()


def _numbers(base: Problem, dims: Sequence[int]) -> Iterator[_Draft]:
    yield _Draft("plain", "dtypes", quick=True)
    for dim in dims:
        if dim != base.head_dim:
            quick = dim in (*WIDTHS, max(dims))
            yield _Draft(f"head_dim={dim}", "head_dim", {"head_dim": dim, "q_len": 20}, quick=quick)


def _arguments(can: Capabilities) -> Iterator[_Draft]:
    causal = {"is_causal": True}
    yield _Draft("causal", "causal", causal, quick=True)
    yield _Draft("causal-one-token", "causal", {**causal, "q_len": 1})
    yield _Draft("causal-tiles", "causal", {**causal, **_FEW_HEADS, "q_len": 130}, quick=True)
    yield _Draft("causal-tile-edges", "causal", {**causal, **_FEW_HEADS, "q_len": 257})
    yield _Draft("gqa", "gqa", {"kv_heads": 2}, quick=True)
    yield _Draft("mqa", "gqa", {"kv_heads": 1})
    yield _Draft("gqa-causal", "gqa", {"heads": 6, "kv_heads": 2, **causal}, quick=True)
    yield _Draft("more-keys", "patterns", {"q_len": 7, "kv_len": 20}, quick=True)
    yield _Draft("more-queries", "patterns", {"q_len": 20, "kv_len": 7})
    packed = {"documents": (0, 6, 7, 7, 28)}  # an empty one, one of one token, and a tail that belongs to none
    yield _Draft("documents", "documents", packed, quick=True)
    yield _Draft("documents-causal", "documents", {**packed, **causal}, quick=True)
    for kind in ("window", "dilated", "block_sparse"):
        changes, quick = {**packed, "pattern": PATTERNS[kind]}, can.documents and can.runs(kind)
        yield _Draft(f"documents-{kind}", "documents", changes, FORWARD, quick=quick, where=True)
    # At 19 and 14 the last query meets the last key, as it does where a kernel ignores the offset and aligns the ends.
    for q_len, kv_len, offset in ((1, 20, 19), (6, 20, 14), (6, 20, 3), (20, 6, 0), (9, 9, 4)):
        shape = {"q_len": q_len, "kv_len": kv_len, "query_offset": offset}
        quick = offset in (14, 3) or can.query_offset
        yield _Draft(f"offset={offset}-causal", "query_offset", {**shape, **causal}, quick=quick, where=True)
        for kind in ("window", "dilated", "block_sparse"):
            changes, quick = {**shape, "pattern": PATTERNS[kind]}, offset == 3 and can.query_offset and can.runs(kind)
            yield _Draft(f"offset={offset}-{kind}", "query_offset", changes, FORWARD, quick=quick, where=True)
    dropout = {"dropout_p": 0.25}
    yield _Draft("dropout", "dropout", dropout, quick=True)
    yield _Draft("dropout-causal", "dropout", {**dropout, **causal})
    yield _Draft("dropout-gqa", "dropout", {**dropout, "kv_heads": 2})
    yield _Draft("dropout-window", "dropout", {**dropout, "pattern": PATTERNS["window"]})
    yield _Draft("dropout-dilated", "dropout", {**dropout, "pattern": PATTERNS["dilated"], **causal})
    yield _Draft("dropout-block_sparse", "dropout", {**dropout, "pattern": PATTERNS["block_sparse"], **causal})
    yield _Draft("dropout-documents", "dropout", {**dropout, **packed})


def _patterns(can: Capabilities) -> Iterator[_Draft]:
    for name, pattern in (*PATTERNS.items(), *MORE_PATTERNS.items()):
        if name == "dense":
            continue
        quick = name in PATTERNS or (name in TELLING and can.runs(pattern.kind))
        changes = {"pattern": pattern, **({"heads": 5, "kv_heads": 5} if name == "dilated-grouped" else {})}
        yield _Draft(name, "patterns", changes, quick=quick, where=True)
        yield _Draft(f"{name}-causal", "patterns", {**changes, "is_causal": True}, quick=quick, where=True)
    if "dense" in can.patterns:
        many = contract("a kernel may be called with any batch and heads: segments come as entries", "take any batch")
        segments = {"batch": 3, "heads": 5, "kv_heads": 5, "pattern": Dilated((4, 16), (2, 1))}
        yield _Draft("segments", many, segments, quick=True)
        joint = contract("out and lse may be those of more keys than a backward is given", _JOINT_FIX)
        yield _Draft("keys-in-two", joint, {"q_len": 12, "kv_len": 24}, ("joint",), quick=True)


def _contract(base: Problem, can: Capabilities) -> Iterator[_Draft]:
    scaled = contract("the scores are multiplied by problem.scale", "pass problem.scale on to the kernel")
    for scale in (0.3, -0.3, 0.0):
        yield _Draft(f"scale={scale}", scaled, {"scale": scale}, quick=True)
    strides = contract("any strides, but for a last dimension without gaps", "read the strides, or copy the tensor")
    for layout in ("transposed", "sliced", "strided", "expanded", "pooled"):
        kv_heads = {"kv_heads": 2} if can.gqa or "dense" in can.patterns else {}
        yield _Draft(layout, strides, kv_heads, layout=layout, quick=layout != "strided")
        yield _Draft(f"{layout}-causal", strides, {"is_causal": True}, layout=layout)
    both = contract("out and lse are those of one softmax")
    yield _Draft("plain", both, {}, ("lse-gradient",))
    empty = contract("without keys: out 0, lse -inf, gradient 0")
    yield _Draft("no-tokens", empty, {"q_len": 0}, quick=True)
    yield _Draft("no-keys", empty, {"kv_len": 0}, quick=True)
    yield _Draft("no-entries", empty, {"batch": 0})
    large = contract("scores of 1e4 overflow nothing", "subtract each row's largest score before exp")
    apart = {"q_len": min(base.head_dim, LENGTH)}  # one key a row stands out, so that the answer is well-conditioned
    yield _Draft("large-scores", large, apart, logits="spiked", quick=True)
    yield _Draft("large-scores-causal", large, {**apart, "is_causal": True}, logits="spiked")
    causal = {"is_causal": True}
    uneven = contract("each row has a largest score of its own", "keep a running maximum for each row, from -inf on")
    yield _Draft("uneven-rows", uneven, {}, FORWARD, logits="uneven", quick=True)
    crossing = {**_FEW_HEADS, **causal, "q_len": 130}
    yield _Draft("uneven-rows-causal", uneven, crossing, FORWARD, logits="uneven")
    yield _Draft("causal", "causal", causal, ("leak",), quick=True)
    yield _Draft("causal-low-scores", "causal", causal, ("leak",), logits="sunken")
    yield _Draft("causal-gqa", "causal", {**causal, "kv_heads": 2}, ("leak",))
    yield _Draft("dilated-causal", "patterns", {**causal, "pattern": PATTERNS["dilated"]}, ("leak",))
    yield _Draft("window", "patterns", {"pattern": PATTERNS["window"]}, ("leak",))
    yield _Draft("block_sparse-causal", "patterns", {**causal, "pattern": PATTERNS["block_sparse"]}, ("leak",))
    yield _Draft("documents", "documents", {"documents": (0, 6, 28)}, ("leak",))
    yield from _contained(base, can)
    steady = {"q_len": 129, "deterministic": True}
    yield _Draft("plain", "deterministic", steady, ("repeat",), quick=True)
    yield _Draft("causal", "deterministic", {**steady, **causal}, ("repeat",))


def _contained(base: Problem, can: Capabilities) -> Iterator[_Draft]:
    """What is claimed of NaN, inf and huge numbers that a row may not see."""
    if not any(base.device.matches(wanted) for wanted in can.contains_nonfinite):
        return
    words = f"contains_nonfinite={can.contains_nonfinite}"
    claim = Claim("contains_nonfinite", words, f"leave {base.device.type!r} out of it, or fix the kernel")
    causal = {"is_causal": True}
    yield _Draft("causal", claim, causal, ("contain",), quick=True)
    yield _Draft("causal-transposed", claim, {**causal, "kv_heads": 2}, ("contain",), layout="transposed")
    for kind in ("window", "dilated", "block_sparse"):
        yield _Draft(f"{kind}-causal", claim, {**causal, "pattern": PATTERNS[kind]}, ("contain",), where=True)


def _calls(can: Capabilities) -> Iterator[_Draft]:
    """What one call is to another, and to the process around it."""
    own = contract("a call's results are its own", "allocate the results of every call, and keep nothing of it")
    yield _Draft("two-calls", own, {}, ("again",), quick=True)
    threads = contract("one plan may run in several threads", "keep what a call works with in that call")
    yield _Draft("four-threads", threads, {"q_len": 129}, ("threads",), quick=True)
    if can.backward:
        yield _Draft("plain", "backward", {}, ("backward",), quick=True)


def _lengths() -> Iterator[_Draft]:
    """Lengths that are no multiple of any tile, and several tiles long."""
    short = contract("any length: a tile may be a partial one", "mask what lies beyond the end of the sequence")
    yield _Draft("one-token", short, {"q_len": 1}, quick=True)
    yield _Draft("one-key", short, {"q_len": 7, "kv_len": 1}, quick=True)
    tiles = contract("any length: rows may take several tiles", _TILES_FIX)
    yield _Draft("tile-edges", tiles, {**_FEW_HEADS, "q_len": 257}, quick=True)
    yield _Draft("thousands", tiles, {**_ONE_HEAD, "q_len": 1030}, ("gradient",))
    yield _Draft("thousands-causal", tiles, {**_ONE_HEAD, "q_len": 1030, "is_causal": True}, ("gradient",))
    wide = {**_ONE_HEAD, "q_len": 2050, "pattern": SlidingWindow(200, 20)}
    yield _Draft("thousands-window", tiles, wide, FORWARD, where=True)
    most = contract(f"any length: {LONG:,} keys or queries", _LONG_FIX)
    for name, shape in (("row", {"q_len": 8, "kv_len": LONG}), ("column", {"q_len": LONG, "kv_len": 8})):
        for logits in ("positive", "normal"):  # a row's dquery, and a column's sums, show the most in one of them
            changes, quick = {**_ONE_HEAD, **shape}, logits == {"row": "normal", "column": "positive"}[name]
            yield _Draft(f"long-{name}-{logits}", most, changes, ("sums",), logits=logits, quick=quick)


# ----------------------------------------------------------------------------------------------- what must be refused


def _refusals(good: Problem, can: Capabilities) -> Iterator[Case]:
    """The claimed problem with one thing changed that is not claimed, for each such thing."""
    for name, changes in _not_claimed(good, can):
        problem = good.replace(**changes)
        for argument in unclaimed(problem, can) or ("device",):
            claim = Claim(argument, f"no {name}", f"claim it, if the kernel does it ({argument})")
            yield Case(id=f"refuse-{name}", check="refuse", claim=claim, problem=problem, argument=argument)
            break


def _not_claimed(good: Problem, can: Capabilities) -> Iterator[tuple[str, dict[str, Any]]]:
    for word in ("cpu", "sm_61", "sm_90", "gfx942", "mps", "xpu"):
        if not any(Device.parse(word).matches(wanted) for wanted in can.devices):
            yield f"device={word}", {"device": word}
    changes: list[tuple[str, dict[str, Any]]] = [(f"dtype={dtype}", {"dtype": dtype}) for dtype in DTYPES]
    step, least, most = can.head_dim_multiple, can.head_dim_min, can.head_dim_max
    dims = {least - 1, good.head_dim + 1} | ({(most // step + 1) * step} if most else set())
    changes += [(f"head_dim={dim}", {"head_dim": dim}) for dim in sorted(dims) if dim > 0]
    changes += [(f"pattern={kind}", {"pattern": pattern}) for kind, pattern in PATTERNS.items()]
    changes += [
        ("causal", {"is_causal": True}),
        ("dropout", {"dropout_p": 0.1}),
        ("deterministic", {"deterministic": True}),
        ("gqa", {"kv_heads": 2}),
        ("documents", {"documents": (0, 6, 28)}),
        ("query_offset", {"q_len": 6, "query_offset": 14}),
    ]
    yield from ((name, change) for name, change in changes if unclaimed(good.replace(**change), can))


# -------------------------------------------------------------------------------------------------------------- shapes


def _head_dims(can: Capabilities) -> tuple[int, ...]:
    """Head dimensions within the limits: both ends, odd multiples, and some on either side of usual tile widths."""
    step = can.head_dim_multiple
    first = -(-can.head_dim_min // step) * step
    last = max(first, min(can.head_dim_max or LARGEST, LARGEST) // step * step)
    near = [dim // step * step for dim in (HEAD_DIM, *WIDTHS, 64, 80, 128)]
    return tuple(sorted({dim for dim in (first, 3 * step, 5 * step, *near, last) if first <= dim <= last}))


def _widest(can: Capabilities) -> str:
    """The most exact dtype that is claimed: errors show there that rounding would hide elsewhere."""
    return max(can.dtypes, key=DTYPES.index)


def _device(wanted: str) -> Device:
    """A device that a capability such as `cuda>=8.0` covers, whether this machine has one or not."""
    for word in ("cpu", "sm_61", "sm_70", "sm_75", "sm_80", "sm_90", "sm_100", "gfx942", "mps", "xpu"):
        if (device := Device.parse(word)).matches(wanted):
            return device
    return Device(wanted)
