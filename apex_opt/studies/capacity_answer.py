"""What is answered about rates: deployments, what shows that they sustain them, and what became of all others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apex_opt.plans.deployment import Deployment
    from apex_opt.search.answer import Scored, Status
    from apex_opt.search.ledger import Ledger
    from apex_opt.studies.steady import Evidence, Why


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRate:
    """A deployment at a rate that it sustains within the goals.

    Parameters
    ----------
    rate_per_s : float                 requests per second
    holds : Scored                     its first run at this rate
    evidence : Evidence                what shows that it goes on so
    next_rate_per_s : float or None    next rate of the grid; None at its end, or where a rate was given
    why : str                          why the next rate is not sustained (`apex_opt.studies.steady.Why`)
    missed : mapping                   goals that are, or could be, missed at the next rate, with the figure there
    """

    rate_per_s: float
    holds: Scored
    evidence: Evidence
    next_rate_per_s: float | None = None
    why: Why = ""
    missed: dict[str, float] = field(default_factory=dict)

    @property
    def deployment(self) -> Deployment:
        return self.holds.deployment


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Deployments with the highest rate, or on the fewest GPUs for a rate, best first; or why there is none.

    In the ledger `simulated` are those that were asked about a rate: `missed` and `cut_short` did not sustain the rate
    they had to reach or were worse there than those found, the others sustain the one given, or had their highest rate
    found. Of those left, bounds are of the rate.

    Parameters
    ----------
    status : "optimal", "infeasible", "unknown", or "feasible" where one deployment was asked about or not all were seen
    asked_per_s : float or None        the rate given; None where the highest was asked for
    resolution : float or None         step of the grid of rates, as a share
    plans : tuple of PlanRate
    ledger : Ledger
    larger : tuple of int              of each part those on more GPUs than are needed for the rate given
    simulations : int                  runs of all deployments together
    reason : str or None               why there is none
    """

    status: Status
    asked_per_s: float | None
    resolution: float | None
    plans: tuple[PlanRate, ...]
    ledger: Ledger
    larger: tuple[int, ...]
    simulations: int
    reason: str | None = None
