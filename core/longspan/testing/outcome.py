"""What became of a case: the numbers measured, and the two ways not to pass."""

from __future__ import annotations

from attrs import field, frozen

from longspan.testing.cases import Case
from longspan.testing.claims import Claim

__all__ = ["Breach", "Declined", "Measure", "Outcome"]


@frozen
class Measure:
    """One comparison with the oracle: `what` is forward, lse or gradient."""

    what: str
    error: float
    allowed: float

    @property
    def share(self) -> float:
        """How much of the allowance is used up."""
        return self.error / self.allowed if self.allowed else float(self.error > 0)


class Breach(Exception):
    """A claim does not hold: `what` happened instead, and another claim than the case's where that is to blame."""

    def __init__(self, what: str, measure: Measure | None = None, claim: Claim | None = None) -> None:
        self.what, self.measure, self.claim = what, measure, claim
        super().__init__(what)


class Declined(Exception):
    """The backend, or this machine, does not take the case, for a reason that no capability states."""


@frozen
class Outcome:
    """The end of a case: `status` is passed, refused (as it had to be), declined or failed.

    `reason` says why it was declined, or what is wrong; `claim` is the claim that failed, else the case's.
    """

    case: Case
    status: str
    claim: Claim
    reason: str = ""
    measures: tuple[Measure, ...] = field(default=(), repr=False)

    def message(self, backend: str) -> str:
        """What a failed test says: the claim, what happened instead, and what to do next."""
        return (
            f"{backend} claims {self.claim}, but {self.reason} (case {self.case.id}: {self.case.problem}). "
            f"Next: {self.claim.fix}"
        )
