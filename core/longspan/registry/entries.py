"""Entry points as discovery reads them: what brings them is asked once, and nothing is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import Distribution, EntryPoint

from attrs import frozen

from longspan.spec.backend import BackendInfo

__all__ = ["BUILTIN", "Entry", "entries_of"]

BUILTIN = "longspan"
"""The distribution whose backends auto may take unasked."""


@frozen(eq=False)
class Entry:
    """An entry point with the name and the version of its distribution, both empty where it has none.

    `importlib.metadata` parses the metadata again at every question, hence these copies.
    """

    point: EntryPoint
    distribution: str = ""
    version: str = ""

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.point.name

    @property
    def owner(self) -> str:
        """The distribution with its version, for messages."""
        return f"{self.distribution} {self.version}".strip()

    def is_among(self, allowed: Iterable[str]) -> bool:
        """Whether an allow-list names the backend, `builtin`, or its distribution as pip would (PEP 503)."""
        words = {self.name, "builtin" if self.distribution == BUILTIN else self.name}
        return bool(words & set(allowed)) or _canonical(self.distribution) in map(_canonical, allowed)

    def row(self, state: str = "blocked", error: str = "") -> BackendInfo:
        """The ledger's row while it is not imported."""
        opt_in = self.distribution != BUILTIN
        return BackendInfo(self.name, state, self.distribution, self.version, opt_in=opt_in, error=error)

    def duplicate(self, same: Iterable[Entry]) -> BackendInfo:
        """The row of one of several entry points with one name."""
        owners = " and ".join(sorted(one.owner for one in same))
        error = f"claimed by {owners}. Next: uninstall one of them, or name the other in LONGSPAN_PLUGINS"
        return self.row("duplicate", error)


def entries_of(points: Iterable[EntryPoint]) -> list[Entry]:
    """Entry points by name and distribution; one that is listed twice by the same distribution counts once."""
    asked: dict[Distribution, tuple[str, str]] = {}
    found: dict[tuple[str, str, str], Entry] = {}
    for point in points:
        distribution, version = "", ""
        if point.dist is not None:
            if point.dist not in asked:
                asked[point.dist] = _name_and_version(point.dist)
            distribution, version = asked[point.dist]
        found.setdefault((point.name, point.value, distribution), Entry(point, distribution, version))
    return sorted(found.values(), key=lambda entry: (entry.name, entry.distribution))


def _name_and_version(distribution: Distribution) -> tuple[str, str]:
    metadata = distribution.metadata  # without `get` before Python 3.12
    name, version = (metadata[key] if key in metadata else "" for key in ("Name", "Version"))  # noqa: SIM401
    return name, version


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
