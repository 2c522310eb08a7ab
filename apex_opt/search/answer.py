"""What is answered: scored plans, and the certificate that none in the space is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from apex_opt.cost import Usage
    from apex_opt.figures import Goal
    from apex_opt.figures.measure import Metrics
    from apex_opt.plan.memory import StageMemory
    from apex_opt.plan.plan import Plan
    from apex_opt.simulator.transient import Transient

Status = Literal["optimal", "feasible", "infeasible", "unknown"]
"""A search ends optimal or infeasible, or feasible where not all plans were seen; one given plan is feasible or
infeasible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A simulated plan."""

    plan: Plan
    value: float
    metrics: Metrics
    transient: Transient
    usage: Usage
    memory: tuple[StageMemory, ...]
    bound: float | None
    preemptions: int
    batches: int

    @property
    def meets_slos(self) -> bool:
        return all(self.metrics.slo_met.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Why no plan of the space is better.

    Parameters
    ----------
    space : int                      plans there are
    infeasible : mapping             plans that break a constraint family, charged to the first in order
    bounded : int                    plans that a lower bound ruled out (of the objective, or of an SLO)
    out_of_reach : int               of these, plans whose bound misses a goal
    least_bound : float or None      of the others the best that any could be by the first objective, in its unit
    incumbent : float or None        what they had to be better than: the last of the plans to show
    repeated : int                   plans whose layers, moved to lighten the heaviest stage, stay even: listed already
    simulated : int                  plans whose batches were simulated, those cut short included
    cut_short : int                  simulations that ended early, when their own requests had proved that the plan is
                                     worse than those found or misses an SLO
    missed : int                     simulated plans that missed an SLO
    left : int                       plans that could still be among those to show when the time limit was reached
    optimal : bool                   every plan is accounted for, or none of those left can be better than the answer
    gap : float or None              how far the answer can be from the best, as a share of it, by the first objective
                                     in which it can; None without an answer
    before : tuple of Certificate    of the searches that found the best value of an objective with a tolerance, which
                                     plans then had to come near
    """

    space: int
    infeasible: dict[str, int]
    bounded: int
    simulated: int
    cut_short: int
    missed: int
    optimal: bool
    gap: float | None
    left: int = 0
    repeated: int = 0
    out_of_reach: int = 0
    least_bound: float | None = None
    incumbent: float | None = None
    before: tuple[Certificate, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The best plan and the runners-up, or why there is none."""

    status: Status
    best: Candidate | None
    candidates: tuple[Candidate, ...]
    certificate: Certificate
    reason: str | None = None


def misses(metrics: Metrics, slos: Iterable[Goal]) -> str:
    """The goals that a run misses and what it reaches, in words."""
    missed = (slo for slo in slos if not metrics.slo_met[slo.text])
    return " and ".join(f"{slo.text} (it reaches {_reached(slo, metrics.judged(slo))})" for slo in missed)


def _reached(slo: Goal, value: float) -> str:
    return f"{value:.1%}" if slo.statistic == "attain" else slo.told(value)
