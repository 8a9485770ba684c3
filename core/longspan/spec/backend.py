"""What a backend says of itself and makes: capabilities, kernels, workspace, and reasons why it does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from attrs import asdict, field, fields, frozen

from longspan.errors import ArgumentError, brief, is_integer, nearest
from longspan.spec.pattern import Pattern

__all__ = ["DTYPES", "BackendInfo", "BufferSpec", "Capabilities", "Kernel", "Reason"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
DEVICES = ("cpu", "cuda", "rocm", "mps", "xpu")
ELSEWHERE = ("hpu", "mlu", "musa", "npu", "xla")
"""Devices that torch knows once a package of their maker's is imported."""

SYNONYMS = {
    "devices": {
        "amd": "rocm",
        "apple": "mps",
        "gpu": "cuda",
        "hip": "rocm",
        "intel": "xpu",
        "metal": "mps",
        "nvidia": "cuda",
    },
    "dtypes": {"bf16": "bfloat16", "double": "float64", "float": "float32", "fp16": "float16", "fp32": "float32",
               "fp64": "float64", "half": "float16"},
    "patterns": {"blocks": "block_sparse", "full": "dense", "local": "window", "sliding": "window",
                 "sliding_window": "window", "sparse": "block_sparse"},
}  # fmt: skip
"""Words that are not ours, and ours."""


def check_claims(claims: Mapping[str, Any], switches: Iterable[str]) -> None:
    """Refuse words and values that a field of `Capabilities` cannot have.

    Args:
        claims: the fields, by name.
        switches: the names of those that are True or False.

    Raises:
        ArgumentError: names the field, what it was given and the nearest thing that would do.
    """
    for name in switches:
        if not isinstance(claims[name], bool):
            fix = f"{name}={bool(claims[name])}"
            raise ArgumentError(f"Capabilities.{name}", brief(claims[name]), "True or False", fix)
    for dtype in claims["dtypes"]:
        if dtype not in DTYPES:
            raise _unknown("dtypes", dtype, DTYPES)
    kinds = tuple(sorted(kind for kind in _kinds(Pattern) if kind))
    for pattern in claims["patterns"]:
        if pattern == "causal":
            raise ArgumentError("Capabilities.patterns", "'causal'", f"names out of {', '.join(kinds)}", "causal=True")
        if pattern not in kinds:
            raise _unknown("patterns", pattern, kinds)
    for name in ("devices", "contains_nonfinite"):
        for device in claims[name]:
            _check_device(name, device)


def _kinds(kind: type[Pattern]) -> set[str]:
    """The kinds of all patterns that there are, those of other packages too."""
    return {kind.kind}.union(*[_kinds(derived) for derived in kind.__subclasses__()])


def _check_device(name: str, device: object) -> None:
    text = str(device)
    match = re.fullmatch(r"([a-z]+)(?:(?:>=|<=|==|<|>)\d+\.\d+)?", text)
    if match is None:
        fix = f"e.g. {name}=('cpu', 'cuda>=8.0')"
        if arch := re.fullmatch(r"sm_?(\d+)(\d)", text):
            fix = f"write 'cuda>={arch[1]}.{arch[2]}', or == for this one alone"
        elif spaced := re.fullmatch(r"([a-z]+)\s*(>=|<=|==|<|>)\s*(\d+)(\.\d+)?", text):
            fix = f"write {spaced[1] + spaced[2] + spaced[3] + (spaced[4] or '.0')!r}"
        elif plain := re.fullmatch(r"([a-z]+):\d+", text):
            fix = f"write {plain[1]!r}, whatever its number"
        raise ArgumentError(f"Capabilities.{name}", brief(device), "a form such as cpu, cuda or cuda>=8.0", fix)
    word = match[1]
    if word not in (*DEVICES, *ELSEWHERE) and not _torch_knows(word):
        raise _unknown(name, device, DEVICES)


def _torch_knows(device: str) -> bool:
    """Whether torch has such devices, here or elsewhere: what a maker's package renamed, for example."""
    try:
        torch.device(device)
    except RuntimeError:
        return False
    return True


def _unknown(field: str, word: object, known: tuple[str, ...]) -> ArgumentError:
    text = str(word).removeprefix("torch.").lower()
    meant = SYNONYMS["devices" if field == "contains_nonfinite" else field]
    near = meant.get(text) or nearest(text, known, 0.5)
    near = text if text in known else near
    fix = f"write {near!r}" if near else f"e.g. {field}=({known[0]!r},)"
    return ArgumentError(f"Capabilities.{field}", brief(word), f"names out of {', '.join(known)}", fix)


Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Backward = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _texts(value: Iterable[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise ArgumentError("a tuple of names", repr(value), "a tuple such as ('cpu',)", f"write ({value!r},)")
    return tuple(value)


@frozen
class Reason:
    """Why a backend does not fit, as data: `code` is a word, `field` what is at fault, `fix` what to type next."""

    code: str
    field: str
    got: str = ""
    want: str = ""
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.field} is {self.got}" if self.got else self.field
        text += f" (needs {self.want})" if self.want else ""
        return text + (f"; fix: {self.fix}" if self.fix else "")


def _reasons(value: Iterable[Reason]) -> tuple[Reason, ...]:
    return tuple(value)


@frozen(kw_only=True)
class Capabilities:
    """What a backend can do: the single declaration that the resolver, the error texts and the tests read.

    Every default is the poorest one: silence claims nothing.

    Args:
        devices: such as `cpu`, `cuda`, `cuda>=8.0`, `rocm`, `mps`.
        dtypes: names out of float16, bfloat16, float32, float64.
        patterns: what the kernel does natively; with `dense` among them the core lowers every other pattern to it.
        causal: the dense kernel takes `is_causal` for as many queries as keys.
        mask: the dense kernel's forward and backward also take `mask=`, `(1, 1, q_len, kv_len)` of query's dtype: 0
            where a query sees a key, else -inf.
        gqa: takes fewer key heads than query heads; else the core passes key heads as stride-0 views.
        dropout, documents, window, query_offset: native support of these arguments.
        backward: the `Kernel` has a backward; else the core's blockwise backward serves.
        head_dim_min, head_dim_max, head_dim_multiple: limits on the head dimension.
        deterministic: same inputs, same bits, run to run, forward and backward.
        contains_nonfinite: devices, in the form of `devices`, where nothing that a row may not see, be it NaN, inf or
            so large that products overflow, changes a bit of the row's results and gradients, nor of the gradients of
            keys that no such row sees. (Finite numbers of usual size never may, on any device.)
        exact: False for approximations; auto never takes one.
        experimental: auto never takes it, and says so.
        opt_in: auto takes it only where the user named it.
        tier: auto prefers a higher number among backends that fit.
        api: the version of the hook contract that the backend was written for.
        lacks: what is missing on this machine without which the backend works, but slower: as reasons, each with the
            line that brings it as its fix. `explain`, `doctor` and the demo show them; nothing is refused for them.
    """

    devices: tuple[str, ...] = field(default=(), converter=_texts)
    dtypes: tuple[str, ...] = field(default=(), converter=_texts)
    patterns: tuple[str, ...] = field(default=(), converter=_texts)
    causal: bool = False
    mask: bool = False
    gqa: bool = False
    dropout: bool = False
    documents: bool = False
    window: bool = False
    query_offset: bool = False
    backward: bool = False
    head_dim_min: int = 1
    head_dim_max: int | None = None
    head_dim_multiple: int = 1
    deterministic: bool = False
    contains_nonfinite: tuple[str, ...] = field(default=(), converter=_texts)
    exact: bool = True
    experimental: bool = False
    opt_in: bool = False
    tier: int = 0
    api: int = 1
    lacks: tuple[Reason, ...] = field(default=(), converter=_reasons)

    def runs(self, kind: str) -> bool:
        """Whether the kernel takes this kind of pattern natively."""
        return kind in self.patterns or (kind == "window" and self.window)

    def __attrs_post_init__(self) -> None:
        check_claims({claim.name: getattr(self, claim.name) for claim in fields(Capabilities)}, _SWITCHES)
        numbers: dict[str, Any] = {name: getattr(self, name) for name in ("head_dim_min", "head_dim_multiple")}
        if self.head_dim_max is not None:
            numbers["head_dim_max"] = self.head_dim_max
        for name, value in (*numbers.items(), ("tier", self.tier), ("api", self.api)):
            if not is_integer(value) or (name in numbers and value < 1):
                want = "an integer of at least 1" if name in numbers else "an integer"
                raise ArgumentError(f"Capabilities.{name}", repr(value), want)
        if self.head_dim_max is not None and self.head_dim_max < self.head_dim_min:
            got, want = str(self.head_dim_max), f"at least head_dim_min, {self.head_dim_min}"
            raise ArgumentError("Capabilities.head_dim_max", got, want)


_SWITCHES = tuple(claim.name for claim in fields(Capabilities) if isinstance(claim.default, bool))
"""The fields that are True or False."""


@frozen
class Kernel:
    """What a backend makes for one problem.

    `forward(query, key, value)` returns `(out, lse)`: `out` of query's shape and dtype, `lse` `(batch, heads, q_len)`,
    natural log, float32 (float64 for float64 inputs); a row without keys has out 0 and lse -inf.
    `backward(dout, query, key, value, out, lse)` returns `(dquery, dkey, dvalue)`, where `out` and `lse` may be those
    of a softmax over more keys than `key` holds. None: the core's blockwise backward serves.

    Tensors come with a last dimension without gaps and any other strides. For a problem with `dropout_p` (only where
    `Capabilities.dropout` says so) both take `dropout=`, a `longspan.Dropout`. Where `is_causal`, a NaN or inf in a
    value must not reach rows that may not see it: `longspan.blockwise.taint` helps. `operators` names what the
    profiler will see of a forward, such as `aten::bmm`, for `Plan.verify`; `library` says who serves it.

    `for_blocks(layout)`, of a kernel that takes a block-sparse problem natively, returns the kernel of the same problem
    with other blocks, a `BlockLayout`, or None where the core is to lower them: `TopKBlocks`, whose blocks are chosen
    at every call, asks it and no hook.
    """

    forward: Forward
    backward: Backward | None = None
    operators: tuple[str, ...] = ()
    library: str = ""
    for_blocks: Callable[[Any], Kernel | None] | None = None


@frozen
class BufferSpec:
    """Workspace that a kernel wants: a name, a shape and a dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@frozen
class BackendInfo:
    """A row of the ledger: one backend that was found, whatever became of it.

    `state` is one of loaded, blocked, broken, duplicate, incompatible. `opt_in`: auto does not take it unasked.
    """

    name: str
    state: str
    distribution: str = ""
    version: str = ""
    description: str = ""
    opt_in: bool = True
    error: str = ""
    import_ms: float = 0.0
    capabilities: Capabilities | None = field(default=None, repr=False)

    @property
    def lacks(self) -> tuple[Reason, ...]:
        """What would make it faster here: `Capabilities.lacks`."""
        return () if self.capabilities is None else self.capabilities.lacks

    def to_dict(self) -> dict[str, Any]:
        """All fields but the capabilities, as values that JSON can hold."""
        return asdict(self, filter=lambda attribute, _: attribute.name != "capabilities")
