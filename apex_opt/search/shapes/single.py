"""One pool on one type of GPU."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from apex_opt.plans.deployment import Deployment
from apex_opt.search.best_first import Leaf
from apex_opt.search.facts import judged
from apex_opt.search.ledger import Part
from apex_opt.search.space import Moves, every_plan, list_space

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from apex_opt.plans.plan import Plan
    from apex_opt.search.facts import Facts
    from apex_opt.search.ledger import Costs
    from apex_opt.search.space import Formulation, Progress

    Late = Callable[[Plan], Plan | None]
    _Kept = tuple[tuple[int, ...], list[Costs]]

Item = TypeVar("Item")
Found = TypeVar("Found")


class Bounded(Protocol):
    """Who bounds plans."""

    def __call__(
        self, facts: Facts, function: Callable[[Facts, Item], Found], items: Sequence[Item]
    ) -> Iterator[Found]:
        """What a function of a module makes of each item, with what is known of its plans, in order.

        Parameters
        ----------
        facts : Facts         of the plans
        function : callable   of these and an item
        items : sequence
        """
        ...


def in_turn(facts: Facts, function: Callable[[Facts, Item], Found], items: Sequence[Item]) -> Iterator[Found]:
    """One after the other, in this process, as it is asked for.

    Parameters
    ----------
    facts, function, items : as of `Bounded`
    """
    return (function(facts, item) for item in items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """A branch: one cut, with numbers of replicas in the order of their bounds."""

    part: Part
    facts: Facts
    plan: Plan
    gpu: str | None
    replicas: tuple[int, ...]
    bounds: Sequence[Costs]
    late: Late | None

    def leaves(self, first: int, last: int) -> int:
        return last - first

    def child(self, place: int) -> Leaf:
        plan = self.plan.times(self.replicas[place])
        deployment, bound = Deployment.of(plan, self.gpu), self.bounds[place]
        if self.late is None:
            return Leaf(deployment=deployment, bound=bound)
        return Leaf(deployment=deployment, bound=bound, late=self._decided, closer=self._closer)

    def _decided(self, deployment: Deployment) -> Deployment | None:
        assert self.late is not None  # only then is something decided late
        plan = self.late(deployment.plan)
        return None if plan is None else Deployment.of(plan, self.gpu)

    def _closer(self, deployment: Deployment) -> Costs:
        """What the plan cannot cost less than, whose memory is known once its layers are moved."""
        return self.facts.bounds(deployment.plan)[0]


def bounds_of(facts: Facts, cut: tuple[Plan, Sequence[int], bool]) -> tuple[list[_Kept], int]:
    """The numbers of replicas of a plan that may meet the goals, and how many of them cannot.

    Parameters
    ----------
    facts : Facts    of the problem it is of
    cut : a plan of one replica, its numbers of replicas, and whether its layers are yet to be moved
    """
    kept: list[_Kept] = []
    problem, lost = facts.problem, 0
    plan, counts, movable = cut
    for alike in facts.alike(plan, counts, movable=movable):
        bounds, possible = judged(facts.floors(alike), problem.objectives, problem.goals)
        lost += int((~possible).sum())
        order = [int(place) for place in np.lexsort(bounds.T[::-1]) if possible[place]]
        if order:
            replicas = tuple(alike.replicas[place] for place in order)
            kept.append((replicas, [tuple(bounds[place].tolist()) for place in order]))
    return kept, lost


def replicas_of(
    facts: Facts,
    part: Part,
    cuts: Sequence[tuple[Plan, Sequence[int], Late | None]],
    gpu: str | None,
    tell: Progress,
    bounded: Bounded = in_turn,
) -> Iterator[Replicas]:
    """The branches of some cuts with the numbers of replicas that find room; those that cannot meet the goals counted.

    Parameters
    ----------
    facts : Facts         of the problem they are of
    part : Part           what they are a part of
    cuts : plans of one replica, each with its numbers of replicas and what moves its layers, where these are yet to be
    gpu : str or None     as of `Pool`
    tell : callable       told (what, done, total) along the way
    bounded : callable    has plans bounded
    """
    found = bounded(facts, bounds_of, [(cut, counts, late is not None) for cut, counts, late in cuts])
    for done, (cut, _, late) in enumerate(cuts):
        tell("bounding plans", done, len(cuts))
        kept, lost = next(found)
        part.out_of_reach += lost
        for replicas, bounds in kept:
            yield Replicas(part=part, facts=facts, plan=cut, gpu=gpu, replicas=replicas, bounds=bounds, late=late)


class Single:
    """The plans of one type of GPU.

    Parameters
    ----------
    facts : Facts              of the problem with that type alone
    formulation : Formulation  enumerates how a replica can be cut
    gpu : str or None          as of `Pool`
    tell : callable            told (what, done, total) along the way
    bounded : callable         has plans bounded
    """

    def __init__(
        self,
        facts: Facts,
        formulation: Formulation,
        gpu: str | None,
        tell: Progress,
        bounded: Bounded = in_turn,
    ) -> None:
        self.facts, self.gpu, self._tell, self._bounded = facts, gpu, tell, bounded
        self.space = list_space(facts.problem, formulation, tell)
        self.moves = Moves(facts.problem, formulation)
        self.part = Part(
            shape="single",
            types=(facts.problem.offer.name,),
            objective=facts.problem.objective,
            space=self.space.size,
            infeasible=self.space.infeasible,
            complete=self.space.complete,
        )

    def branches(self) -> Iterator[Replicas]:
        """A branch for every cut and way it lies."""
        kinds = ((self.space.cuts, None), (self.space.movable, self.moves))
        # Plans of the same cut share their tables while these are still there.
        every = sorted(
            ((cut, late) for cuts, late in kinds for cut in cuts), key=lambda item: (item[0].cut, item[0].stages)
        )
        cuts = [(routed, counts, late) for cut, late in every for routed, counts in self.space.repeated(cut)]
        return replicas_of(self.facts, self.part, cuts, self.gpu, self._tell, self._bounded)

    def plans(self, deadline: float = inf) -> list[Plan]:
        """All feasible plans, with their layers moved.

        Raises
        ------
        TimeIsUp    a point in time has passed before they all were
        """
        return list(every_plan(self.space, self.moves, self._tell, deadline))
