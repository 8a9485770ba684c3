"""What a backend claims: each field of its `Capabilities`, and the contract that `api=1` stands for."""

from __future__ import annotations

from attrs import frozen

from longspan.patterns.window import SlidingWindow
from longspan.spec.backend import Capabilities
from longspan.spec.problem import Problem

__all__ = ["Claim", "backward_of", "claim_of", "contract", "unclaimed"]


@frozen
class Claim:
    """A claim in words: the field it is made in, what that field says, and what to do where it does not hold."""

    field: str
    text: str
    fix: str = "fix the kernel"

    def __str__(self) -> str:
        return self.text


def contract(clause: str, fix: str = "fix the kernel") -> Claim:
    """A clause of the kernel contract, which every backend takes on with the version that it states."""
    return Claim("api", f"api=1 ({clause})", fix)


def claim_of(field: str, problem: Problem, can: Capabilities) -> Claim:
    """What the capabilities say in a field, as it concerns a problem."""
    kind = problem.pattern.kind
    if field == "dtypes":
        return Claim(field, f"{problem.dtype!r} in dtypes", f"drop {problem.dtype!r} from dtypes, or fix the kernel")
    if field == "devices":
        return Claim(field, f"{problem.device.type!r} in devices", "narrow devices, or fix the kernel")
    if field == "head_dim":
        limits = f"head_dim_min={can.head_dim_min}, head_dim_max={can.head_dim_max}"
        text = f"{limits}, head_dim_multiple={can.head_dim_multiple}"
        return Claim(field, f"{text} (head_dim={problem.head_dim} is within)", "narrow them, or fix the kernel")
    if field == "patterns":
        if can.runs(kind):
            said = f"{kind!r} in patterns" if kind in can.patterns else "window=True"
            lowered = ", so that the core lowers it," if "dense" in can.patterns and kind != "dense" else ""
            return Claim(field, said, f"leave {kind!r} out{lowered} or fix the kernel")
        return Claim(field, f"'dense' in patterns (to which the core lowers {kind!r})")
    if getattr(can, field) is not True:  # the core does it in the backend's place, with dense calls
        how = "key heads then come as views of stride 0" if field == "gqa" else f"the core lowers {field} to it"
        return Claim("patterns", f"'dense' in patterns ({how})")
    fixes = {
        "gqa": "set gqa=False, so that the core repeats key heads, or fix the kernel",
        "backward": "set backward=False, so that the core's own backward serves, or fix the kernel's",
    }
    return Claim(field, f"{field}=True", fixes.get(field, f"set {field}=False, or fix the kernel"))


def backward_of(claim: Claim) -> Claim:
    """A claim on the forward, as the backend's own backward shares it."""
    if claim.field == "backward":
        return claim
    fix = "fix its backward, or set backward=False, so that the core's serves"
    return Claim("backward", f"backward=True with {claim.text}", fix)


def unclaimed(problem: Problem, can: Capabilities) -> tuple[str, ...]:
    """The arguments at fault, where the capabilities do not claim a problem; the device is left to the caller.

    Written from the documentation of `Capabilities` and not from the resolver, which it judges.
    """
    dense, kind = "dense" in can.patterns, problem.pattern.kind
    native = kind in can.patterns or (isinstance(problem.pattern, SlidingWindow) and can.window)
    shifted = problem.q_len != problem.kv_len or problem.query_offset != 0
    positional = problem.is_causal or problem.pattern.positional
    dim, most = problem.head_dim, can.head_dim_max
    faults = {
        "dtype": problem.dtype not in can.dtypes,
        "head_dim": dim < can.head_dim_min or dim % can.head_dim_multiple != 0 or (most is not None and dim > most),
        "is_causal": problem.is_causal and not can.causal,
        "dropout_p": problem.dropout_p > 0 and not (can.dropout and dense),
        "deterministic": problem.deterministic and not can.deterministic,
        "pattern": not dense and not native,
        # What follows, the core does with dense calls where there is a dense kernel.
        "kv_heads": not dense and problem.kv_heads != problem.heads and not can.gqa,
        "cu_seqlens": not dense and problem.documents is not None and not can.documents,
        "query_offset": not dense and shifted and positional and not can.query_offset,
    }
    return tuple(argument for argument, wrong in faults.items() if wrong)
