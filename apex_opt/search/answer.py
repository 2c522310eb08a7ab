"""What is answered: scored deployments, best first, and why nothing else wins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from apex_opt.figures.units import percent
from apex_opt.plans.deployment import Deployment

if TYPE_CHECKING:
    from collections.abc import Iterable

    from apex_opt.cost import Usage
    from apex_opt.figures import Goal
    from apex_opt.figures.metrics import Metrics
    from apex_opt.plans.deployment import Pool
    from apex_opt.plans.memory import StageMemory
    from apex_opt.plans.plan import Plan
    from apex_opt.search.ledger import Ledger
    from apex_opt.simulator.transient import Transient

Status = Literal["optimal", "feasible", "infeasible", "unknown"]
"""A search ends optimal or infeasible, or feasible where not all was seen; what is given is feasible or infeasible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolUse:
    """What a pool does in a run of its deployment.

    Parameters
    ----------
    pool : Pool
    requests : int                  requests it serves
    usage : Usage                   over its GPUs, for as long as the deployment runs
    memory : StageMemory of each stage
    preemptions, batches : int
    """

    pool: Pool
    requests: int
    usage: Usage
    memory: tuple[StageMemory, ...]
    preemptions: int
    batches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorityUse:
    """What the requests of one priority saw.

    Parameters
    ----------
    name : str                   of `PRIORITIES`
    requests : int
    latency_s : mapping of figure to mapping of statistic to seconds    as of `Metrics`
    preemptions : int or None    of these; None where the batches of the run are not known one by one
    """

    name: str
    requests: int
    latency_s: dict[str, dict[str, float]]
    preemptions: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A simulated deployment.

    Parameters
    ----------
    pools : tuple of PoolUse
    value : float              the first objective
    metrics : Metrics
    transient : Transient      how the run begins and ends
    bound : float or None      what it could not be better than by the first objective, signed such that less is better
    moved : int or None        moves of requests between replicas, where they may move
    priorities : tuple of PriorityUse    where there are requests of several priorities
    handover_s : mapping of part to mapping of statistic to seconds, or None
        where prompts are handed over, what a first token takes: its "prompt", the "wait" for the read,
        the "read", and the "answer" until it is seen
    """

    pools: tuple[PoolUse, ...]
    value: float
    metrics: Metrics
    transient: Transient
    bound: float | None
    moved: int | None = None
    priorities: tuple[PriorityUse, ...] = ()
    handover_s: dict[str, dict[str, float]] | None = None

    @property
    def deployment(self) -> Deployment:
        return Deployment(pools=tuple(use.pool for use in self.pools))

    @property
    def text(self) -> str:
        return str(self.deployment)

    @property
    def devices(self) -> int:
        """GPUs it takes."""
        return sum(use.pool.plan.devices for use in self.pools)

    @property
    def requests(self) -> int:
        """Requests it serves; where prompts are handed over each of them passes both pools."""
        served = [use.requests for use in self.pools]
        return served[0] if self.deployment.disaggregated else sum(served)

    @property
    def only(self) -> PoolUse:
        """The only pool."""
        (use,) = self.pools
        return use

    @property
    def plan(self) -> Plan:
        """The plan of the only pool."""
        return self.only.pool.plan

    @property
    def meets_slos(self) -> bool:
        return all(self.metrics.slo_met.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The best deployment and the runners-up, or why there is none.

    Parameters
    ----------
    status : str
    candidates : tuple of Scored          those that meet the goals, best first
    alone : tuple of Scored or None       the best on each type of GPU alone; None where none meets the goals
    ledger : Ledger                       why nothing else wins
    reason : str or None                  why there is none
    told : int                            runs that were made to tell why, beside those of the ledger
    """

    status: Status
    candidates: tuple[Scored, ...]
    alone: tuple[Scored | None, ...]
    ledger: Ledger
    reason: str | None = None
    told: int = 0

    @property
    def best(self) -> Scored | None:
        return self.candidates[0] if self.candidates else None


def misses(metrics: Metrics, slos: Iterable[Goal]) -> str:
    """The goals that a run misses and what it reaches, in words."""
    missed = (slo for slo in slos if not metrics.slo_met[slo.text])
    return " and ".join(f"{slo.text} (it reaches {reached(slo, slo.reached(metrics))})" for slo in missed)


def reached(slo: Goal, value: float) -> str:
    """What a goal is compared with, in words."""
    if slo.fraction is None:
        return slo.told(value)
    return percent(value, slo.fraction)
