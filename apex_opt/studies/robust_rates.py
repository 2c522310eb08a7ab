"""How far the times behind a capacity may be off before another deployment is answered.

As `studies.robust`, with rates: were everything to take f times as long, what sustains a rate would be what sustains f
times the rate in the problem that is f times as slow. Rates of both lie on one grid, so a deployment wins where it is
steps ahead, and of those that share a step the one with fewer GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from apex_opt.errors import UsageError
from apex_opt.search.scorer import Scorer
from apex_opt.search.search import silent
from apex_opt.studies.capacity import fewest_gpus, highest_rate
from apex_opt.studies.robust import MOST_TIED, Course, Loss, Robustness, Turn, deciding, scale, slowed
from apex_opt.studies.trials import Here
from apex_opt.workload.steady import rate_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from apex_opt.plans.deployment import Deployment
    from apex_opt.search.problem import Problem
    from apex_opt.search.search import Formulations, Progress
    from apex_opt.studies.capacity_answer import Capacity, PlanRate
    from apex_opt.studies.robust import Times
    from apex_opt.studies.steady import Steady
    from apex_opt.studies.trials import Trials

HIGHEST: Final = "highest rate"
"""What deployments are held against each other by where no rate is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateRobustness(Robustness):
    """As `Robustness`, of a capacity.

    Parameters
    ----------
    values : mapping    of every deployment that is told: the rate that it sustains, or its GPUs where a rate was given,
                        times as computed
    """

    values: dict[Deployment, float]


def robust_rate(
    problem: Problem,
    answer: Capacity,
    formulation: Formulations,
    error: float | None = None,
    progress: Progress | None = None,
    trials: Callable[[Steady], Trials] = Here,
) -> RateRobustness:
    """How far times may be off before another deployment is answered than the best of a capacity.

    Parameters
    ----------
    problem : Problem
    answer : Capacity                its answer
    formulation : Formulations       the programs that enumerate plans and split layers
    error : float or None            of the deciding objective, as far as deployments do not share it, as a share; of a
                                     highest rate none is known
    progress : callable, optional    told (what, done, total) along the way
    trials : callable                who tries deployments at rates, as of `highest_rate`

    Raises
    ------
    UsageError    an answer without a deployment, a figure of which it is not known how it moves with times
    """
    if not answer.plans:
        raise UsageError("robust: the answer has no deployment; there is nothing to hold against others")
    return _Study(problem, answer, formulation, progress or silent, trials).asked(error)


class _Study:
    """What is asked about one answer."""

    def __init__(
        self,
        problem: Problem,
        answer: Capacity,
        formulation: Formulations,
        tell: Progress,
        trials: Callable[[Steady], Trials],
    ) -> None:
        self._problem, self._answer, self._formulation, self._trials = problem, answer, formulation, trials
        self._course = Course(tell, 2 * self._moves + 2)
        self._like = Scorer(problem)
        self._best = answer.plans[0]
        self._same = {self._best.deployment}
        self._searches = 0
        self._rival = self._runner_up = self._another(1.0)

    def asked(self, error: float | None) -> RateRobustness:
        """Everything."""
        tied = None if error is None else self._tied(error)
        if tied:
            self._same |= {one.deployment for one in tied}
            self._rival = self._another(1.0)
        turns = tuple(self._turns())
        told = (*(one for one in (self._runner_up,) if one is not None), *(tied or ()))
        return RateRobustness(
            turns=turns,
            common=self._moves,
            runner_up=None if self._runner_up is None else self._runner_up.holds,
            deciding=HIGHEST if self._given is None else deciding(self._problem).name,
            tied=None if tied is None else tuple(one.holds for one in tied),
            searches=self._searches,
            simulations=0,
            values={one.deployment: self.value(one, 1.0) for one in told},
        )

    @property
    def _given(self) -> float | None:
        """The rate that was asked for."""
        return self._answer.asked_per_s

    @property
    def _moves(self) -> bool:
        """Whether times that are off in common change more than all rates alike."""
        return self._given is not None or any(scale(goal.figure, 2.0) != 1 for goal in self._problem.slos)

    def value(self, one: PlanRate, factor: float) -> float:
        """What is maximal or minimal, of a deployment in the problem that is so many times as slow."""
        return one.rate_per_s / factor if self._given is None else float(one.deployment.devices)

    def _turns(self) -> Iterator[Turn]:
        if self._moves:
            yield self._turn("all", self._beaten_by_all, slower=True)
            yield self._turn("all", self._beaten_by_all, slower=False)
        yield self._turn("best", self._beaten_alone, slower=True)
        yield self._turn("others", self._beaten_by_others, slower=False)

    def _turn(self, times: Times, lost: Callable[[float], Loss | None], *, slower: bool) -> Turn:
        holds, factor, loss = self._course.last_before(lost, slower=slower)
        return Turn(times=times, slower=slower, holds=holds, factor=factor, loss=loss)

    def _beaten_by_all(self, factor: float) -> Loss | None:
        """With the times of all."""
        found = next(iter(self._search(factor, 1).plans), None)
        if found is not None and found.deployment == self._best.deployment:
            return None
        own = self._own(factor)
        if found is not None and found.deployment in self._same and own is not None:
            return None
        return self._loss(own, found, factor)

    def _beaten_alone(self, factor: float) -> Loss | None:
        """With the times of the best alone."""
        own = self._own(factor)
        if own is None:
            return self._loss(None, self._runner_up, 1.0)
        if self._rival is None or self._rank(own, factor) < self._rank(self._rival, 1.0):
            return None
        return self._loss(own, self._rival, 1.0)

    def _beaten_by_others(self, factor: float) -> Loss | None:
        """With those of any other alone; those of all others are asked together, as each is for itself."""
        rival = self._another(factor)
        if rival is None or self._rank(self._best, 1.0) < self._rank(rival, factor):
            return None
        return self._loss(self._best, rival, factor)

    def _loss(self, own: PlanRate | None, winner: PlanRate | None, of_winner: float) -> Loss:
        """What is, where the best deployment sustains so much, or nothing, and another wins.

        Parameters
        ----------
        own, winner : PlanRate or None
        of_winner : float    factor of the winner's times
        """
        value = None if winner is None else self.value(winner, of_winner)
        missed = "" if own is not None else "its goals at any rate" if self._given is None else "its goals at this rate"
        return Loss(winner=None if winner is None else winner.holds, value=value, missed=missed)

    def _rank(self, one: PlanRate, factor: float) -> tuple[object, ...]:
        """Better first, with its times so many times those of its run."""
        size = (one.deployment.devices, str(one.deployment))
        if self._given is None:
            assert self._answer.resolution is not None
            ahead = math.log(self.value(one, factor) / rate_of(self._problem.trace))
            return -round(ahead / math.log1p(self._answer.resolution)), *size
        objectives, costs = self._problem.objectives, self._problem.costs(one.holds.metrics)
        scaled = (cost * scale(each.figure, factor) for cost, each in zip(costs, objectives, strict=True))
        return size[0], *scaled, size[1]

    def _another(self, factor: float) -> PlanRate | None:
        """The best that is neither the best as computed nor tied with it, with times so many times as long."""
        plans = self._search(factor, 1 if self._given else len(self._same) + 1, aside=self._same).plans
        return next((one for one in plans if one.deployment not in self._same), None)

    def _own(self, factor: float) -> PlanRate | None:
        """The best deployment in the problem that is so many times as slow; None where it sustains nothing."""
        return next(iter(self._search(factor, 1, self._best.deployment).plans), None)

    def _tied(self, error: float) -> tuple[PlanRate, ...]:
        """Those on as few GPUs that are as near to the best by the deciding objective as an error, as a share."""
        by, best = deciding(self._problem), self._best
        least = by.signed(by.value(best.holds.metrics))
        near = (
            one
            for one in self._search(1.0, MOST_TIED + 1).plans
            if one.deployment != best.deployment
            and one.deployment.devices == best.deployment.devices
            and by.signed(by.value(one.holds.metrics)) <= least + error * abs(least)
        )
        return tuple(near)[:MOST_TIED]

    def _search(
        self, factor: float, top: int, deployment: Deployment | None = None, aside: Collection[Deployment] = ()
    ) -> Capacity:
        """The answer with times so many times as long.

        Parameters
        ----------
        factor : float
        top : int                          deployments to find
        deployment : Deployment or None    the only one to ask about
        aside : set of Deployment          that are left out where a rate is given, as one of them on fewer GPUs ends
                                           the search
        """
        self._searches += 1
        problem = slowed(self._problem, factor)
        asked: dict[str, Any] = {"deployment": deployment, "top": top, "like": self._like, "trials": self._trials}
        if self._given is not None:
            return fewest_gpus(problem, self._formulation, self._given * factor, aside=aside, **asked)
        assert self._answer.resolution is not None
        return highest_rate(problem, self._formulation, resolution=self._answer.resolution, **asked)
