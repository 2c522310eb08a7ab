"""One pool on one type of GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.plans.deployment import Deployment
from apex_opt.search.best_first import Leaf
from apex_opt.search.facts import judged
from apex_opt.search.ledger import Part
from apex_opt.search.space import Moves, every_plan, list_space

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from apex_opt.plans.plan import Plan
    from apex_opt.search.facts import Facts
    from apex_opt.search.ledger import Costs
    from apex_opt.search.space import Formulation, Progress

    Late = Callable[[Plan], Plan | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """A branch: one cut, with numbers of replicas in the order of their bounds."""

    part: Part
    plan: Plan
    gpu: str | None
    replicas: tuple[int, ...]
    bounds: Sequence[Costs]
    late: Late | None

    def leaves(self, first: int, last: int) -> int:
        return last - first

    def child(self, place: int) -> Leaf:
        plan = self.plan.times(self.replicas[place])
        return Leaf(deployment=Deployment.of(plan, self.gpu), bound=self.bounds[place], late=self._decided)

    def _decided(self, deployment: Deployment) -> Deployment | None:
        plan = deployment.plan if self.late is None else self.late(deployment.plan)
        return None if plan is None else Deployment.of(plan, self.gpu)


def replicas_of(
    facts: Facts, part: Part, cuts: Iterable[tuple[Plan, Sequence[int]]], gpu: str | None, late: Late | None
) -> Iterator[Replicas]:
    """The branches of some cuts with the numbers of replicas that find room; those that cannot meet the goals counted.

    Parameters
    ----------
    facts : Facts         of the problem they are of
    part : Part           what they are a part of
    cuts : plans of one replica, each with its numbers of replicas
    gpu : str or None     as of `Pool`
    late : callable or None    moves the layers of a plan, where they are yet to be moved
    """
    problem = facts.problem
    for cut, counts in cuts:
        for alike in facts.alike(cut, counts, movable=late is not None):
            bounds, possible = judged(facts.floors(alike), problem.objectives, problem.goals)
            part.out_of_reach += int((~possible).sum())
            order = [int(place) for place in np.lexsort(bounds.T[::-1]) if possible[place]]
            if order:
                yield Replicas(
                    part=part,
                    plan=cut,
                    gpu=gpu,
                    replicas=tuple(alike.replicas[place] for place in order),
                    bounds=[tuple(bounds[place].tolist()) for place in order],
                    late=late,
                )


class Single:
    """The plans of one type of GPU.

    Parameters
    ----------
    facts : Facts              of the problem with that type alone
    formulation : Formulation  enumerates how a replica can be cut
    gpu : str or None          as of `Pool`
    tell : callable            told (what, done, total) along the way
    """

    def __init__(self, facts: Facts, formulation: Formulation, gpu: str | None, tell: Progress) -> None:
        self.facts, self.gpu, self._tell = facts, gpu, tell
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
        for done, (cut, late) in enumerate(every):
            self._tell("bounding plans", done, len(every))
            yield from replicas_of(self.facts, self.part, self.space.repeated(cut), self.gpu, late)

    def plans(self) -> list[Plan]:
        """All feasible plans, with their layers moved."""
        return list(every_plan(self.space, self.moves, self._tell))
