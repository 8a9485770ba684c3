"""The choice of a backend: a pure function of the problem, what is registered and what the user asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from types import MappingProxyType

from longspan.errors import BackendUnavailable, UnknownBackend
from longspan.registry.policy import Policy
from longspan.spec.backend import Capabilities, Reason
from longspan.spec.device import Device
from longspan.spec.problem import Problem
from longspan.spec.resolution import Candidate, Resolution, Verdict, native_refusals

__all__ = ["require", "refusals", "resolve"]


def resolve(
    problem: Problem,
    candidates: Sequence[Candidate],
    policy: Policy,
    known_refusals: Mapping[str, tuple[Reason, ...]] = MappingProxyType({}),
    measured: Mapping[str, float] = MappingProxyType({}),
) -> Resolution:
    """Choose a backend. Touches no device: a CPU machine can ask for any GPU.

    `known_refusals` are reasons against backends, by name, that came up elsewhere; `measured` the seconds that backends
    took for such a problem on this machine.

    Order: block, then the backend named (argument, context, environment), then preferences, then what was measured,
    fastest first, then native support of the pattern, tier, name. A named backend that does not fit is not replaced:
    `chosen` is None.

    Raises:
        UnknownBackend: a name in the policy that no candidate has.
    """
    known = [candidate.name for candidate in candidates]
    _check_names(policy, known)
    consent = {policy.backend, *policy.prefer}
    verdicts: dict[str, Verdict] = {}
    eligible: list[Candidate] = []
    for candidate in candidates:
        hard = (*_state(candidate, policy), *refusals(problem, candidate), *known_refusals.get(candidate.name, ()))
        soft = () if hard or candidate.name in consent else _not_by_auto(candidate)
        verdicts[candidate.name] = Verdict(candidate.name, not hard, (*hard, *soft))
        if not hard and not soft:
            eligible.append(candidate)
    eligible.sort(key=lambda candidate: _rank(candidate, problem, policy, measured))
    ranked = [candidate.name for candidate in eligible]
    order = ranked + [name for name in sorted(known) if name not in ranked]
    ordered = tuple(verdicts[name] for name in sorted(order, key=lambda name: not verdicts[name].ok))
    notes = _overridden(policy)

    def resolution(chosen: str | None, decided_by: str, why: str) -> Resolution:
        return Resolution(problem, chosen, decided_by, why, ordered, notes, policy.backend)

    if policy.backend is not None:
        fits = verdicts[policy.backend].ok
        why = f"{policy.backend} was named" + ("" if fits else ", and does not fit")
        return resolution(policy.backend if fits else None, policy.backend_from, why)
    if not ranked:
        return resolution(None, "auto", "no backend fits" + _by_name_only(ordered))
    chosen = eligible[0]
    if chosen.name in policy.prefer:
        passed = policy.prefer[: policy.prefer.index(chosen.name)]
        skipped = f" after {', '.join(passed)}, which did not fit" if passed else ""
        return resolution(chosen.name, policy.prefer_from, f"{chosen.name} was preferred{skipped}")
    missed = f"; preferred {', '.join(policy.prefer)} did not fit" if policy.prefer else ""
    return resolution(chosen.name, "auto", _why(chosen, ranked, measured) + missed)


def require(resolution: Resolution) -> str:
    """The chosen backend's name.

    Raises:
        BackendUnavailable: none was chosen; the message holds every reason, or those of the backend that was named.
    """
    if resolution.chosen is not None:
        return resolution.chosen
    shown = resolution.candidates
    if resolution.asked is not None:
        shown = (resolution[resolution.asked],)
    lines = [f"{resolution.why} for {resolution.problem}"]
    lines += [f"  {verdict.name}: " + "; ".join(map(str, verdict.reasons)) for verdict in shown]
    fitting = [verdict.name for verdict in resolution.candidates if verdict.ok]
    lines.append(
        f"Next: these fit: {', '.join(fitting)}; pass backend={fitting[0]!r}"
        if fitting
        else "Next: follow a fix above, or see `longspan explain`"
    )
    raise BackendUnavailable("\n".join(lines), resolution)


def refusals(problem: Problem, candidate: Candidate) -> tuple[Reason, ...]:
    """Every reason why a loaded backend cannot serve the problem: from its capabilities, then its own."""
    can = candidate.info.capabilities
    if can is None:
        return ()
    found = [*_device(problem.device, can), *_numbers(problem, can), *_arguments(problem, can)]
    return (*found, *candidate.unsupported(problem)) if not found else tuple(found)


def _device(device: Device, can: Capabilities) -> list[Reason]:
    if any(device.matches(wanted) for wanted in can.devices):
        return []
    return [Reason("device", "device", device.name, " or ".join(can.devices), "choose another backend or device")]


def _numbers(problem: Problem, can: Capabilities) -> list[Reason]:
    found = []
    if problem.dtype not in can.dtypes:
        want = " or ".join(can.dtypes)
        best = "float32" if "float32" in can.dtypes else next(iter(can.dtypes), "")  # rather than lose precision
        fix = f"query.to(torch.{best}), and key and value" if best else ""
        found.append(Reason("dtype", "dtype", problem.dtype, want, fix))
    dim = problem.head_dim
    if can.head_dim_max is not None and dim > can.head_dim_max:
        found.append(Reason("head_dim", "head_dim", str(dim), f"at most {can.head_dim_max}", "split the heads"))
    if dim < can.head_dim_min:
        found.append(Reason("head_dim", "head_dim", str(dim), f"at least {can.head_dim_min}", "pad with zeros"))
    if dim % can.head_dim_multiple:
        want = f"a multiple of {can.head_dim_multiple}"
        fix = f"pad with zeros to {-(-dim // can.head_dim_multiple) * can.head_dim_multiple}"
        found.append(Reason("head_dim", "head_dim", str(dim), want, fix))
    return found


def _arguments(problem: Problem, can: Capabilities) -> list[Reason]:
    found = []
    kind = problem.pattern.kind
    if "dense" not in can.patterns:  # no kernel to lower to
        if can.runs(kind):
            found += native_refusals(problem, can)
        else:
            found.append(Reason("pattern", "pattern", kind, " or ".join(can.patterns), "choose another backend"))
    if problem.is_causal and not can.causal:
        found.append(Reason("causal", "is_causal", "True", "False", "choose another backend"))
    if problem.dropout_p and not can.dropout:
        found.append(Reason("dropout", "dropout_p", str(problem.dropout_p), "0.0", "pass dropout_p=0.0"))
    if problem.deterministic and not can.deterministic:
        fix = "torch.use_deterministic_algorithms(False), or choose another backend"
        found.append(Reason("deterministic", "deterministic", "True", "False", fix))
    return found


def _state(candidate: Candidate, policy: Policy) -> tuple[Reason, ...]:
    info = candidate.info
    if info.name in policy.deny:
        return (Reason("blocked", "backend", f"{info.name}, blocked", "a backend not blocked", "lift the block"),)
    if info.state == "blocked":
        return (Reason("blocked", "backend", info.error, "a backend that may be loaded", "change that variable"),)
    if info.state != "loaded":
        fix = f"fix or uninstall {info.distribution}" if info.distribution else "see `longspan backends`"
        return (Reason(info.state, "backend", info.error or info.state, "a loaded plugin", fix),)
    return ()


def _not_by_auto(candidate: Candidate) -> tuple[Reason, ...]:
    can, name = candidate.info.capabilities, candidate.name
    assert can is not None  # loaded
    fix = f"backend={name!r}"
    if not can.exact:
        return (Reason("approximate", "backend", "an approximation", "an exact backend for auto", fix),)
    if can.experimental:
        return (Reason("experimental", "backend", "experimental", "a stable backend for auto", fix),)
    if candidate.info.opt_in:
        return (Reason("opt_in", "backend", "by name only", "to be named", fix),)
    return ()


def _rank(
    candidate: Candidate, problem: Problem, policy: Policy, measured: Mapping[str, float]
) -> tuple[int, float, bool, int, str]:
    can = candidate.info.capabilities
    assert can is not None  # loaded
    prefer = policy.prefer
    place = prefer.index(candidate.name) if candidate.name in prefer else len(prefer)
    seconds = measured.get(candidate.name, inf)
    return place, seconds, not can.runs(problem.pattern.kind), -can.tier, candidate.name


def _why(chosen: Candidate, ranked: Sequence[str], measured: Mapping[str, float]) -> str:
    fitting = len(ranked)
    among = "the only one that auto may take" if fitting == 1 else f"the first of {fitting} that auto may take"
    times = [f"{name} {1e3 * measured[name]:.3g} ms" for name in ranked if name in measured]
    if fitting > 1 and chosen.name in measured:
        among = f"the fastest measured on this machine ({', '.join(times)})"
    return f"{chosen.name} is {among}"


def _overridden(policy: Policy) -> tuple[str, ...]:
    """Wishes that have no effect beside another."""
    if policy.backend is None or not policy.prefer:
        return ()
    preferred = f"{', '.join(policy.prefer)} (preferred in the {policy.prefer_from})"
    return (f"{preferred} was not considered: {policy.backend} was named in the {policy.backend_from}",)


def _by_name_only(verdicts: Sequence[Verdict]) -> str:
    able = [verdict.name for verdict in verdicts if verdict.ok]
    return f" unasked (by name: {', '.join(able)})" if able else ""


def _check_names(policy: Policy, known: Sequence[str]) -> None:
    if policy.backend is not None and policy.backend not in known:
        raise UnknownBackend(policy.backend, known, f"from the {policy.backend_from}")
    for name in policy.prefer:
        if name not in known:
            raise UnknownBackend(name, known, f"preferred in the {policy.prefer_from}")
    for name in policy.deny:
        if name not in known:
            raise UnknownBackend(name, known, "blocked")
