"""How far the times behind a front may be off before other deployments are on it.

As `studies.robust`, of a set: with the times of all, it is another front; with those of one of its deployments alone,
longer, that one is beaten or misses a goal; with those of any other one alone, shorter, that one joins. With its own
times alone a deployment is held against the front of all others, which may have deployments that only it beats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from apex_opt.errors import UsageError
from apex_opt.search.scorer import Scorer
from apex_opt.search.search import silent
from apex_opt.search.spread import Alone
from apex_opt.studies.pareto import dominates, pareto
from apex_opt.studies.robust import Course, missed_by, scale, slowed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from apex_opt.plans.deployment import Deployment
    from apex_opt.search.answer import Scored
    from apex_opt.search.ledger import Costs
    from apex_opt.search.problem import Problem
    from apex_opt.search.search import Formulations, Progress
    from apex_opt.search.spread import Crew
    from apex_opt.studies.pareto import Front
    from apex_opt.studies.robust import Times


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What is where the front is another one.

    Parameters
    ----------
    joins, leaves : tuple of Scored    deployments that are on the front then and were not, and the other way around
    missed : str                       goals that the only one that leaves misses, in words; empty where it is beaten
    """

    joins: tuple[Scored, ...] = ()
    leaves: tuple[Scored, ...] = ()
    missed: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontTurn:
    """How far times may be off in one way.

    Parameters
    ----------
    times : "all", "best" or "others"    whose: "best" is one deployment of the front alone
    of : Scored or None                  that one
    slower : bool                        whether times are longer than computed
    holds : float                        the factor farthest from 1 at which the front is the same, as at all asked
                                         before it
    factor : float or None               the nearest that was found at which it is not; None: it is at all asked
    change : Change or None              what is then
    """

    times: Times
    of: Scored | None
    slower: bool
    holds: float
    factor: float | None
    change: Change | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontRobustness:
    """How far times may be off before other deployments are on a front.

    Parameters
    ----------
    turns : tuple of FrontTurn
    common : bool    whether times that are off in common can matter; else they were not asked about
    searches, simulations : int made for all this; a simulation is of one deployment of the front
    """

    turns: tuple[FrontTurn, ...]
    common: bool
    searches: int
    simulations: int


def robust_front(
    problem: Problem,
    front: Front,
    formulation: Formulations,
    progress: Progress | None = None,
    crew: Callable[[Scorer], Crew] = Alone,
) -> FrontRobustness:
    """How far times may be off before other deployments are on a front.

    Parameters
    ----------
    problem : Problem                whose front it is
    front : Front
    formulation : Formulations       the programs that enumerate plans and split layers
    progress : callable, optional    told (what, done, total) along the way
    crew : callable                  who bounds and simulates, as of `search`

    Raises
    ------
    UsageError    a front without deployments, a figure of which it is not known how it moves with times
    """
    if not front.candidates:
        raise UsageError("robust: the front has no deployment; there is nothing to hold against others")
    return _Study(problem, front, formulation, progress or silent, crew).asked()


class _Study:
    """What is asked about one front."""

    def __init__(
        self,
        problem: Problem,
        front: Front,
        formulation: Formulations,
        tell: Progress,
        crew: Callable[[Scorer], Crew],
    ) -> None:
        self._objectives = front.objectives
        self._problem = replace(problem, objective=front.objectives[0], then=tuple(front.objectives[1:]))
        self._members, self._formulation, self._crew = front.candidates, formulation, crew
        self._own = frozenset(one.deployment for one in front.candidates)
        self._costs = [self._scaled(one, 1.0) for one in front.candidates]
        self._scorer = Scorer(self._problem)
        self._searches = self._simulations = 0
        self._course = Course(tell, 2 * self._moves + len(self._members) + 1)

    def asked(self) -> FrontRobustness:
        """Everything."""
        turns = tuple(self._turns())
        return FrontRobustness(turns=turns, common=self._moves, searches=self._searches, simulations=self._simulations)

    def _turns(self) -> Iterator[FrontTurn]:
        # Without goals the front of the others is empty where all that can run are on the front.
        others = bool(self._problem.slos) or bool(self._front(1.0, self._own))
        if len(self._members) == 1 and not others:
            return  # no other can run
        if self._moves:
            yield self._turn("all", self._with_all, slower=True)
            yield self._turn("all", self._with_all, slower=False)
        for one in self._members:
            rivals = [self._scaled(other, 1.0) for other in self._front(1.0, {one.deployment})]

            def alone(factor: float, one: Scored = one, rivals: list[Costs] = rivals) -> Change | None:
                return self._alone(one, rivals, factor)

            yield self._turn("best", alone, slower=True, of=one)
        if others:
            yield self._turn("others", self._with_others, slower=False)

    def _turn(
        self, times: Times, change: Callable[[float], Change | None], *, slower: bool, of: Scored | None = None
    ) -> FrontTurn:
        """Where the front becomes another one, with the times of some.

        Parameters
        ----------
        times : whose are off
        change : callable       what changes at a factor; None where the front is the same
        slower : bool           whether factors are above 1
        of : Scored or None     the only deployment whose times are off
        """
        holds, factor, found = self._course.last_before(change, slower=slower)
        return FrontTurn(times=times, of=of, slower=slower, holds=holds, factor=factor, change=found)

    @property
    def _moves(self) -> bool:
        """Whether times that are off in common change more than all figures alike: something is not in these times."""
        problem = self._problem
        clients = problem.trace.arrival_ns
        waits = problem.trace.pause_ns > 0 or problem.trace.delay_ns is not None or int(clients[-1]) > int(clients[0])
        return waits or any(scale(goal.figure, 2.0) != 1 for goal in problem.slos)

    def _with_all(self, factor: float) -> Change | None:
        """With the times of all."""
        found = self._front(factor)
        then = {one.deployment for one in found}
        if then == self._own:
            return None
        return Change(
            joins=tuple(one for one in found if one.deployment not in self._own),
            leaves=tuple(one for one in self._members if one.deployment not in then),
        )

    def _alone(self, one: Scored, rivals: list[Costs], factor: float) -> Change | None:
        """With the times of one on the front alone.

        Parameters
        ----------
        one : Scored
        rivals : costs of the front of all others
        factor : float
        """
        self._simulations += 1
        problem = slowed(self._problem, factor)
        run = Scorer(problem, like=self._scorer).simulate(one.deployment)
        if not run.meets_slos:
            return Change(leaves=(one,), missed=missed_by(self._problem, run, factor))
        costs = self._scaled(run, factor)
        return Change(leaves=(one,)) if any(dominates(rival, costs) for rival in rivals) else None

    def _with_others(self, factor: float) -> Change | None:
        """With those of any other one alone; those of all others are asked together, as each is for itself."""
        joins = []
        for one in self._front(factor, self._own):
            costs = self._scaled(one, factor)
            if not any(costs == mine or dominates(mine, costs) for mine in self._costs):
                joins.append(one)
        return Change(joins=tuple(joins)) if joins else None

    def _scaled(self, scored: Scored, factor: float) -> Costs:
        """Costs with times so many times those of the run."""
        costs = self._problem.costs(scored.metrics)
        return tuple(
            cost * scale(objective.figure, factor) for cost, objective in zip(costs, self._objectives, strict=True)
        )

    def _front(self, factor: float, aside: Collection[Deployment] = ()) -> tuple[Scored, ...]:
        """The front with times so many times as long, of all but some."""
        self._searches += 1
        problem = slowed(self._problem, factor)
        found = pareto(problem, self._objectives, self._formulation, like=self._scorer, aside=aside, crew=self._crew)
        return found.candidates
