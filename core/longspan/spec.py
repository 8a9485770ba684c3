"""The values that describe a problem, a device, a backend and the choice made: frozen attrs with their checks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Never

import torch
from attrs import Factory, asdict, evolve, field, fields, frozen

from longspan.claims import DTYPES, check_claims
from longspan.errors import ArgumentError, brief
from longspan.foreign import unknown_argument
from longspan.inputs import check_boundaries, check_inputs, check_number, check_pattern
from longspan.patterns import FURTHEST, Dense, Pattern

__all__ = [
    "DTYPES",
    "BackendInfo",
    "BufferSpec",
    "Candidate",
    "Capabilities",
    "Device",
    "Kernel",
    "Problem",
    "Reason",
    "Resolution",
    "Verdict",
]

Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Backward = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _texts(value: Iterable[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise ArgumentError("a tuple of names", repr(value), "a tuple such as ('cpu',)", f"write ({value!r},)")
    return tuple(value)


# ---------------------------------------------------------------------------------------------------------- device


@frozen
class Device:
    """A kind of device, present on this machine or not.

    `type` is `cpu`, `cuda`, `rocm`, `mps`, `xpu` or another name that torch knows; `capability` is the CUDA compute
    capability where known; `arch` is what the vendor calls it (`sm_61`, `gfx942`); `index` is the ordinal, if any.
    """

    type: str
    capability: tuple[int, int] | None = None
    arch: str = ""
    index: int | None = field(default=None, eq=False)

    @classmethod
    def parse(cls, text: str) -> Device:
        """Read `cpu`, `cuda`, `cuda:1`, `sm_61`, `sm_90`, `gfx942`, `mps`, `xpu`. Touches no device.

        Raises:
            ArgumentError: the text names no kind of device.
        """
        word = str(text).strip().lower()
        if match := re.fullmatch(r"sm_?(\d+)(\d)[a-z]?", word):
            capability = (int(match[1]), int(match[2]))
            return cls("cuda", capability, f"sm_{match[1]}{match[2]}")
        if re.fullmatch(r"gfx[0-9a-f]{3,5}", word):
            return cls("rocm", None, word)
        if match := re.fullmatch(r"(cpu|cuda|rocm|mps|xpu)(?::(\d+))?", word):
            return cls(match[1], index=int(match[2]) if match[2] else None)
        raise ArgumentError("device", repr(text), "cpu, cuda, mps, xpu, rocm, sm_NN or gfxNNN", "e.g. sm_90")

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """The kind of a torch device. Asks CUDA for the capability only where a CUDA device is given."""
        if device.type != "cuda":
            return cls(device.type, index=device.index)
        if torch.version.hip:
            arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
            return cls("rocm", None, arch, device.index)
        major, minor = torch.cuda.get_device_capability(device)
        return cls("cuda", (major, minor), f"sm_{major}{minor}", device.index)

    def matches(self, wanted: str) -> bool:
        """Whether a capability such as `cpu`, `cuda`, `cuda>=8.0`, `cuda==6.1` or `rocm` covers this device.

        A CUDA device of unknown capability is taken to be recent enough.
        """
        match = re.fullmatch(r"([a-z]+)(?:(>=|<=|==|<|>)(\d+)\.(\d+))?", wanted)
        if match is None or match[1] != self.type:
            return False
        if match[2] is None:
            return True
        if self.capability is None:
            return match[2] in (">=", ">")
        bound = (int(match[3]), int(match[4]))
        have = self.capability
        return {
            ">=": have >= bound,
            "<=": have <= bound,
            "==": have == bound,
            "<": have < bound,
            ">": have > bound,
        }[match[2]]

    @property
    def name(self) -> str:
        """The most telling name: `sm_61`, `gfx942`, `cpu`."""
        return self.arch or self.type

    def __str__(self) -> str:
        return self.name


# --------------------------------------------------------------------------------------------------------- problem


def _device(value: Any) -> Device:
    return value if isinstance(value, Device) else Device.parse(str(value))


def _dtype(value: Any) -> str:
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ArgumentError("dtype", name, " or ".join(DTYPES), "cast the inputs, e.g. query.float()")
    return name


def _usual_scale(head_dim: Any) -> float:
    return 1.0 / math.sqrt(head_dim) if isinstance(head_dim, int) and head_dim > 0 else 1.0


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_LIKE = ("pattern", "is_causal", "scale", "dropout_p", "enable_gqa", "cu_seqlens", "query_offset")
"""The arguments of `Problem.like` beside its tensors."""


@frozen(kw_only=True, cache_hash=True)
class Problem:
    """Everything that decides which backend fits: shapes, dtype, device, pattern and arguments. Frozen and hashable.

    Lengths are in tokens. `scale` is always a number (1/sqrt(head_dim) unless given). `query_offset` is the position
    of the first query, 0 unless given; keys start at position 0.
    """

    batch: int
    heads: int
    q_len: int
    head_dim: int
    kv_heads: int = Factory(lambda self: self.heads, takes_self=True)
    kv_len: int = Factory(lambda self: self.q_len, takes_self=True)
    dtype: str = field(default="float32", converter=_dtype)
    device: Device = field(default=Device("cpu"), converter=_device)
    pattern: Pattern = Dense()
    is_causal: bool = False
    scale: float = Factory(lambda self: _usual_scale(self.head_dim), takes_self=True)
    dropout_p: float = 0.0
    documents: tuple[int, ...] | None = field(default=None, converter=_hashable)
    query_offset: int = 0
    requires_grad: bool = False
    deterministic: bool = False

    def __attrs_post_init__(self) -> None:
        _check_problem(self)

    @classmethod
    def like(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pattern: Pattern | None = None,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
        enable_gqa: bool = False,
        cu_seqlens: object = None,
        query_offset: int | None = None,
        **foreign: Never,
    ) -> Problem:
        """The problem that these tensors pose.

        Args:
            query: `(batch, heads, q_len, head_dim)`, any strides.
            key: `(batch, kv_heads, kv_len, head_dim)`.
            value: the shape of `key`.
            pattern: `Dense()` unless given.
            is_causal: key position <= query position.
            scale: factor on the scores, 1/sqrt(head_dim) unless given.
            dropout_p: probability of dropping a weight.
            enable_gqa: allow `kv_heads` to be a divisor of `heads`.
            cu_seqlens: boundaries of packed documents.
            query_offset: position of the first query; needed where `q_len != kv_len` and the result depends on
                positions.
            foreign: nothing; other arguments are refused, with longspan's word for them.

        Raises:
            ArgumentError: names the argument, what was given and what would do; for another library's argument, what
                longspan calls it.
        """
        if foreign:
            raise unknown_argument("Problem.like()", foreign, _LIKE)
        fields = check_inputs(
            query,
            key,
            value,
            cu_seqlens=cu_seqlens,
            query_offset=query_offset,
            enable_gqa=enable_gqa,
            is_causal=is_causal,
        )
        pattern = Dense() if pattern is None else check_pattern(pattern)
        if fields["q_len"] != fields["kv_len"] and query_offset is None and (is_causal or pattern.positional):
            last = fields["kv_len"] - fields["q_len"]
            raise ArgumentError(
                "query_offset",
                f"None with {fields['q_len']} queries and {fields['kv_len']} keys",
                "the position of the first query, for what depends on positions",
                "query_offset=0 aligns the first query with the first key (top left), "
                + (f"query_offset={last} the last with the last" if last >= 0 else "give more keys to align the last")
                + " (bottom right)",
            )
        return cls(
            device=Device.of(query.device),
            pattern=pattern,
            is_causal=is_causal,
            scale=_usual_scale(fields["head_dim"]) if scale is None else scale,
            dropout_p=dropout_p,
            requires_grad=torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **fields,
        )

    def replace(self, **changes: Any) -> Problem:
        """A copy with some fields changed."""
        return evolve(self, **changes)

    def __str__(self) -> str:
        shape = f"q=({self.batch},{self.heads},{self.q_len},{self.head_dim})"
        if (self.kv_heads, self.kv_len) != (self.heads, self.q_len):
            shape += f" kv=({self.batch},{self.kv_heads},{self.kv_len},{self.head_dim})"
        words = [self.pattern.spec, shape, self.dtype, self.device.name]
        words += ["causal"] if self.is_causal else []
        words += ["grad"] if self.requires_grad else []
        words += [f"dropout={self.dropout_p}"] if self.dropout_p else []
        words += ["documents"] if self.documents is not None else []
        return " ".join(words)


def _check_problem(problem: Problem) -> None:
    for name in ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "query_offset"):
        value = getattr(problem, name)
        least = 1 if name == "head_dim" else 0
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ArgumentError(name, brief(value), f"an integer of at least {least}")
        if value > FURTHEST:
            raise ArgumentError(name, brief(value), "an integer of at most 2**62", "no sequence reaches so far")
    check_pattern(problem.pattern)
    if problem.kv_heads and problem.heads % problem.kv_heads:
        raise ArgumentError(
            "kv_heads",
            f"{problem.kv_heads} key heads for {problem.heads} query heads",
            "a divisor of the number of query heads",
            "repeat or drop key heads until they divide",
        )
    check_number("scale", problem.scale)
    if not 0.0 <= check_number("dropout_p", problem.dropout_p) < 1.0:
        raise ArgumentError("dropout_p", problem.dropout_p, "a probability of at least 0 and below 1")
    if problem.documents is not None:
        check_boundaries(problem.documents, problem.q_len, problem.kv_len)
    if problem.query_offset and problem.documents is not None:
        want = "0 or None with cu_seqlens: positions count from each document's start"
        raise ArgumentError("query_offset", problem.query_offset, want, "leave it out")
    problem.pattern.check(problem.heads)


# -------------------------------------------------------------------------------------------------------- backends


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
        check_claims({one.name: getattr(self, one.name) for one in fields(Capabilities)}, _SWITCHES)
        numbers: dict[str, Any] = {name: getattr(self, name) for name in ("head_dim_min", "head_dim_multiple")}
        if self.head_dim_max is not None:
            numbers["head_dim_max"] = self.head_dim_max
        for name, value in (*numbers.items(), ("tier", self.tier), ("api", self.api)):
            if not isinstance(value, int) or isinstance(value, bool) or (name in numbers and value < 1):
                want = "an integer of at least 1" if name in numbers else "an integer"
                raise ArgumentError(f"Capabilities.{name}", repr(value), want)
        if self.head_dim_max is not None and self.head_dim_max < self.head_dim_min:
            got, want = str(self.head_dim_max), f"at least head_dim_min, {self.head_dim_min}"
            raise ArgumentError("Capabilities.head_dim_max", got, want)


_SWITCHES = tuple(one.name for one in fields(Capabilities) if isinstance(one.default, bool))
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
    """

    forward: Forward
    backward: Backward | None = None
    operators: tuple[str, ...] = ()
    library: str = ""


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
        """Plain values for JSON."""
        return asdict(self, filter=lambda attribute, _: attribute.name != "capabilities")


# ------------------------------------------------------------------------------------------------------ resolution


def _no_reasons(problem: Problem) -> Iterable[Reason]:
    return ()


@frozen
class Candidate:
    """What the resolver knows of one backend."""

    info: BackendInfo
    unsupported: Callable[[Problem], Iterable[Reason]] = field(default=_no_reasons, repr=False, eq=False)

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.info.name


@frozen
class Verdict:
    """One candidate, weighed: `ok` says that it can serve the problem; `reasons` say why not, or why not by auto."""

    name: str
    ok: bool
    reasons: tuple[Reason, ...] = ()


@frozen
class Resolution:
    """Who was chosen for a problem, who decided, and what was held against each of the others.

    `chosen` is None where nothing fits, or where the backend that was `asked` for by name does not. `decided_by` is
    argument, context, environment or auto; `candidates` are in auto's order, those that fit first.
    """

    problem: Problem
    chosen: str | None
    decided_by: str
    why: str
    candidates: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()
    asked: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values: chosen, decided_by, why, problem, notes and candidates with their reasons."""
        return {
            "chosen": self.chosen,
            "decided_by": self.decided_by,
            "why": self.why,
            "problem": str(self.problem),
            "notes": list(self.notes),
            "candidates": [asdict(candidate) for candidate in self.candidates],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict())

    def __getitem__(self, name: str) -> Verdict:
        """The verdict on one backend."""
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise KeyError(name)

    def __str__(self) -> str:
        width = max([len(verdict.name) for verdict in self.candidates], default=0)
        lines = [str(self.problem)]
        for verdict in self.candidates:
            word = "chosen" if verdict.name == self.chosen else "ok" if verdict.ok else "no"
            lines.append(f"  {verdict.name:<{width}}  {word:<6}  {'; '.join(map(str, verdict.reasons))}".rstrip())
        lines.append(f"decided by {self.decided_by}: {self.why}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
