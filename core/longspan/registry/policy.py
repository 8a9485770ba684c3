"""What the user asked for: by argument, in a `with` block, or in the environment. Read when a plan is made."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

from attrs import evolve, frozen

from longspan.errors import PolicyError

__all__ = [
    "Policy",
    "current",
    "fingerprint",
    "flag",
    "in_force",
    "is_name",
    "names",
    "use",
    "with_backend",
]


@frozen
class Policy:
    """A wish: one backend by name, an order of preference, a list never to use; and who said so.

    `deny`: what `use(block=...)` and `LONGSPAN_BLOCK` name. `is_final`: all sources were read before, and none is to be
    read again.
    """

    backend: str | None = None
    backend_from: str = "auto"
    prefer: tuple[str, ...] = ()
    prefer_from: str = "auto"
    deny: tuple[str, ...] = ()
    is_final: bool = False

    @property
    def text(self) -> str:
        """All fields as text, for a graph to hold; `in_force` reads it back."""
        return json.dumps([self.backend, self.backend_from, self.prefer, self.prefer_from, self.deny])


AUTO = "auto"
"""In place of a backend's name: none is named, and longspan chooses."""

P = ParamSpec("P")
R = TypeVar("R")

_context: ContextVar[Policy] = ContextVar("longspan_policy", default=Policy())  # noqa: B039 - frozen
_outer: ContextVar[tuple[Policy, ...]] = ContextVar("longspan_outer_policies", default=())


class use:
    """Set the policy for a `with` block, or for a function as a decorator. Per thread and per async task.

    What torch.compile made is bound to the policy that it was traced under, and is traced anew where another is in
    force; a block inside the compiled function breaks the graph there, so put it around. Graphs of torch.export and
    AOTInductor keep, for good, the policy that was in force when they were made.

    Args:
        backend: exactly this backend; an error where it does not fit. The inner of two nested blocks wins. "auto" is
            the same as None: this block names none.
        prefer: these first, in this order, where they fit; others after them. Naming an opt-in backend is consent.
        block: never these; nested blocks add up.

    Raises:
        PolicyError: an argument is not a name or a list of names.
    """

    def __init__(
        self, backend: str | None = None, *, prefer: Iterable[str] | str = (), block: Iterable[str] | str = ()
    ) -> None:
        self._backend = _name(backend)
        self._prefer, self._deny = _listed("prefer", prefer), _listed("block", block)

    def __enter__(self) -> None:
        outer = _context.get()
        policy = evolve(outer, deny=(*outer.deny, *self._deny))
        if self._backend is not None:
            policy = evolve(policy, backend=self._backend, backend_from="context")
        if self._prefer:
            policy = evolve(policy, prefer=self._prefer, prefer_from="context")
        _outer.set((*_outer.get(), outer))
        _context.set(policy)

    def __exit__(self, *_: object) -> None:
        *outer, policy = _outer.get()
        _outer.set(tuple(outer))
        _context.set(policy)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """The function under this policy; a coroutine function while its coroutine runs."""

        def again() -> use:
            return use(self._backend, prefer=self._prefer, block=self._deny)

        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise PolicyError(
                f"use() on the generator function {function.__name__!r} would end before its body runs. "
                "Next: put the with block inside it"
            )
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
                with again():
                    return await function(*args, **kwargs)

            return cast("Callable[P, R]", awaited)

        @wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            with again():
                return function(*args, **kwargs)

        return called

    def __repr__(self) -> str:
        return f"longspan.use(backend={self._backend!r}, prefer={self._prefer!r}, block={self._deny!r})"


def _name(value: object) -> str | None:
    """A backend's name; None where nobody is named, for which "auto" is another word."""
    if value is None or value == AUTO:
        return None
    if isinstance(value, str) and value:
        return value
    raise PolicyError(f"backend={value!r}: want a backend's name. Next: `longspan backends` lists them")


def _listed(argument: str, value: object) -> tuple[str, ...]:
    words = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    named = tuple(name for name in words if isinstance(name, str) and name)
    if len(named) != len(words):
        raise PolicyError(f"{argument}={value!r}: want backend names. Next: write e.g. use({argument}=('sdpa',))")
    return named


def fingerprint() -> tuple[object, ...]:
    """A cheap, hashable value that changes whenever `current` would."""
    get = os.environ.get
    return _context.get(), get("LONGSPAN_BACKEND"), get("LONGSPAN_PREFER"), get("LONGSPAN_BLOCK")


def current(backend: str | None = None, environ: Mapping[str, str] | None = None) -> Policy:
    """The policy in force: argument before context before environment; denied names add up.

    Raises:
        PolicyError: an environment variable that cannot be read.
    """
    policy, backend = _context.get(), _name(backend)
    if policy.is_final:
        return policy if backend is None else evolve(policy, backend=backend, backend_from="argument")
    deny = (*policy.deny, *names("LONGSPAN_BLOCK", environ))
    policy = evolve(policy, deny=tuple(dict.fromkeys(deny)))
    if not policy.prefer and (prefer := names("LONGSPAN_PREFER", environ)):
        policy = evolve(policy, prefer=prefer, prefer_from="environment")
    if backend is not None:
        return evolve(policy, backend=backend, backend_from="argument")
    if policy.backend is None and (wanted := names("LONGSPAN_BACKEND", environ)):
        if len(wanted) > 1:
            raise PolicyError(
                f"LONGSPAN_BACKEND={','.join(wanted)!r}: want one name. Next: use LONGSPAN_PREFER for an order"
            )
        if (backend := _name(wanted[0])) is not None:
            policy = evolve(policy, backend=backend, backend_from="environment")
    return policy


@lru_cache(maxsize=64)
def _text_of(_: tuple[object, ...]) -> str:
    """The text of the policy in force, whose fingerprint this is."""
    return current().text


def __getattr__(name: str) -> str:
    """`policy.text`: the policy in force as text.

    An attribute of the module, and not a function, because torch.compile guards on what it reads from a module: the
    guard asks here again before each run of the compiled code, in the thread and task of that run. Where the answer is
    another one, the function is traced anew, or an earlier trace of it under that policy runs.

    Raises:
        PolicyError: an environment variable that cannot be read.
    """
    if name == "text":
        return _text_of(fingerprint())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def with_backend(backend: str | None, text: str) -> str:
    """The policy of `text`, but for a backend that is named by argument, in code that a tracer follows."""
    named = _name(backend)
    return text if named is None else f"{named}\n{text}"


@contextmanager
def in_force(text: str) -> Iterator[None]:
    """Set the policy of a text (`Policy.text`, or `with_backend` of one), in place of any other."""
    argument, _, rest = text.rpartition("\n")
    backend, backend_from, prefer, prefer_from, deny = json.loads(rest)
    policy = Policy(backend, backend_from, tuple(prefer), prefer_from, tuple(deny), is_final=True)
    token = _context.set(evolve(policy, backend=argument, backend_from="argument") if argument else policy)
    try:
        yield
    finally:
        _context.reset(token)


def names(variable: str, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """A comma-separated list of names from an environment variable; empty where it is unset or empty.

    Raises:
        PolicyError: an entry is empty or holds anything but letters, digits, `_`, `-` and `.`.
    """
    text = (os.environ if environ is None else environ).get(variable, "")
    if not text.strip():
        return ()
    parts = tuple(part.strip() for part in text.split(","))
    for name in parts:
        if name != AUTO and not is_name(name):
            raise PolicyError(
                f"{variable}={text!r}: entry {name!r} is no backend name. "
                f"Next: give names separated by commas, e.g. {variable}=sdpa, or unset it"
            )
    return parts


def is_name(value: object) -> bool:
    """Whether a backend may be called so: ASCII letters, digits, `_`, `-` and `.`; but not "auto"."""
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.-]+", value) is not None and value != AUTO


def flag(variable: str, environ: Mapping[str, str] | None = None) -> bool:
    """A yes or no from an environment variable; no where it is unset or empty.

    Raises:
        PolicyError: the value is neither.
    """
    text = (os.environ if environ is None else environ).get(variable, "").strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("", "0", "false", "no", "off"):
        return False
    raise PolicyError(f"{variable}={text!r}: want 1 or 0. Next: unset it, or set it to 1")
