"""What is answered about rates: plans, what shows that they sustain them, and how all others were accounted for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apex_opt.plan.plan import Plan
    from apex_opt.search.answer import Candidate, Status
    from apex_opt.search.steady import Evidence, Why


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRate:
    """A plan at a rate that it sustains within the goals.

    Parameters
    ----------
    plan : Plan
    rate_per_s : float                 requests per second
    holds : Candidate                  its first run at this rate
    evidence : Evidence                what shows that it goes on so
    next_rate_per_s : float or None    next rate of the grid; None at its end, or where a rate was given
    why : str                          why the next rate is not sustained (`apex_opt.search.steady.Why`)
    missed : mapping                   goals that are, or could be, missed at the next rate, with the figure there
    """

    plan: Plan
    rate_per_s: float
    holds: Candidate
    evidence: Evidence
    next_rate_per_s: float | None = None
    why: Why = ""
    missed: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCertificate:
    """How every plan of the space was accounted for.

    Parameters
    ----------
    space : int              plans there are
    infeasible : mapping     plans that break a constraint family, charged to the first in order
    bounded : int            plans that a lower bound ruled out: they miss a goal at any rate, or are no better
    ruled_out : int          plans that did not sustain the rate they had to reach, or were worse there than those found
    repeated : int           plans whose layers, moved to lighten the heaviest stage, stay even: listed already
    found : int              plans whose highest rate was found or, where a rate was given, that sustain it
    larger : int             plans on more GPUs than were needed for the rate given
    simulations : int        runs of all plans together
    complete : bool          every plan is accounted for
    """

    space: int
    infeasible: dict[str, int]
    bounded: int
    ruled_out: int
    found: int
    larger: int
    simulations: int
    complete: bool
    repeated: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Plans with the highest rate, or on the fewest GPUs for a rate, best first; or why there is none.

    Parameters
    ----------
    status : "optimal", "infeasible", or "feasible" where one plan was asked about or not all were seen
    asked_per_s : float or None        the rate given; None where the highest was asked for
    resolution : float or None         step of the grid of rates, as a share
    plans : tuple of PlanRate
    certificate : RateCertificate
    reason : str or None               why there is no plan
    """

    status: Status
    asked_per_s: float | None
    resolution: float | None
    plans: tuple[PlanRate, ...]
    certificate: RateCertificate
    reason: str | None = None
