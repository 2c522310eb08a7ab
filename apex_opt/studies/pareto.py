"""The deployments that no other beats in every objective.

One is ruled out where another that was found is at least as good as its bounds in every objective and better in one:
whatever its run gives, the other is better. The rest are simulated to their end, so the front is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Literal

from apex_opt.errors import UsageError
from apex_opt.figures.goals import TIES
from apex_opt.search.incumbent import Incumbent
from apex_opt.search.ledger import Ledger
from apex_opt.search.scorer import Scorer
from apex_opt.search.search import Tree, rank, silent
from apex_opt.search.space import check_lengths
from apex_opt.search.spread import Alone
from apex_opt.units import add_up

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from apex_opt.figures import Objective
    from apex_opt.plans.deployment import Deployment
    from apex_opt.search.answer import Scored
    from apex_opt.search.ledger import Costs, Part
    from apex_opt.search.problem import Problem
    from apex_opt.search.search import Formulations, Progress
    from apex_opt.search.spread import Crew


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """The deployments that no other of the space beats, or why there is none.

    Parameters
    ----------
    status : str                        "optimal": this is the whole front; "feasible": not all were listed
    objectives : tuple of Objective
    candidates : tuple of Scored        the front, best by the first objective first
    beaten : tuple of Scored            others that were simulated and meet the goals
    ledger : Ledger                     why nothing else is on the front
    reason : str or None                why there is none
    """

    status: Literal["optimal", "feasible", "infeasible"]
    objectives: tuple[Objective, ...]
    candidates: tuple[Scored, ...]
    beaten: tuple[Scored, ...]
    ledger: Ledger
    reason: str | None = None


class Unbeaten(Incumbent):
    """What a search for a front is after: everything that nothing found so far beats.

    Parameters
    ----------
    problem : Problem
    aside : set of Deployment    what beats nothing
    """

    in_order = False

    def __init__(self, problem: Problem, aside: Collection[Deployment] = ()) -> None:
        self._problem, self._aside = problem, frozenset(aside)
        self._found: list[Costs] = []
        self._scales: Costs = ()

    def order(self, bound: Costs) -> Costs:
        """Early by every objective first: what is so rules most of the others out."""
        self._scales = self._scales or tuple(abs(cost) or 1.0 for cost in bound)
        return (add_up(cost / scale for cost, scale in zip(bound, self._scales, strict=True)), *bound)

    def admits(self, bound: Costs, part: Part) -> bool:
        return not any(dominates(one, bound) for one in self._found)

    def scouted(self, scouts: Sequence[Scored]) -> None:
        for scored in scouts:
            self._note(scored)

    def take(self, scored: Scored, part: Part) -> None:
        self._note(scored)

    def _note(self, scored: Scored) -> None:
        if scored.deployment in self._aside:
            return
        costs = self._problem.costs(scored.metrics)
        if not any(one == costs or dominates(one, costs) for one in self._found):
            self._found = [*(one for one in self._found if not dominates(costs, one)), costs]


def pareto(
    problem: Problem,
    objectives: Sequence[Objective],
    formulation: Formulations,
    progress: Progress | None = None,
    crew: Callable[[Scorer], Crew] = Alone,
    *,
    like: Scorer | None = None,
    aside: Collection[Deployment] = (),
) -> Front:
    """The exact front of two or three objectives over the deployments that meet the goals.

    Of some alike in every objective the one with the least latency is on the front, then the one with fewer GPUs, then
    the first by its text.

    Parameters
    ----------
    problem : Problem
    objectives : of the front
    formulation : Formulations       the programs that enumerate plans and split layers
    progress : callable, optional    told (what, done, total) along the way
    crew : callable                  who bounds and simulates for a scorer, as of `search`
    like : Scorer, optional          of the same problem but for its trace and goals, whose costs serve as well
    aside : set of Deployment        that are left out: the front is that of the others

    Raises
    ------
    UsageError       other than two or three objectives, or one given twice
    CapacityError    a request no engine of this model could serve, whatever the plan
    """
    names = [objective.name for objective in objectives]
    if not 2 <= len(names) <= 3 or len(set(names)) < len(names):
        raise UsageError(f"--objective: {','.join(names)}: a front is of two or three objectives, each named once")
    problem = replace(problem, objective=objectives[0], then=tuple(objectives[1:]))
    check_lengths(problem)
    tree = Tree(problem, Scorer(problem, like=like), formulation, progress or silent, crew)
    found = tree.simulated(Unbeaten(problem, aside), inf)
    good = [one.scored for one in found if one.scored.meets_slos and one.scored.deployment not in aside]
    # Of a front no objective is the first, so none of its bounds is told.
    front = [replace(one, bound=None) for one in _front(problem, good)]
    for part in tree.parts:
        part.best = problem.costs(front[0].metrics) if front else None
    tree.end(None)
    complete = all(part.complete for part in tree.parts)
    chosen = {scored.deployment for scored in front}
    return Front(
        status="infeasible" if not front else "optimal" if complete else "feasible",
        objectives=tuple(objectives),
        candidates=tuple(front),
        beaten=tuple(scored for scored in good if scored.deployment not in chosen),
        ledger=Ledger(parts=tree.parts, best=problem.costs(front[0].metrics) if front else None),
        reason=None if front else tree.why_not(found),
    )


def dominates(one: Costs, other: Costs) -> bool:
    """At least as good in every objective and better in one."""
    return one != other and all(mine <= theirs for mine, theirs in zip(one, other, strict=True))


def _front(problem: Problem, scored: Iterable[Scored]) -> list[Scored]:
    """Those that no other dominates, one of each kind, best by the first objective first."""
    first: dict[Costs, Scored] = {}
    for one in sorted(scored, key=lambda one: (TIES.value(one.metrics), *rank(problem, one)[1:])):
        first.setdefault(problem.costs(one.metrics), one)
    kept = sorted(costs for costs in first if not any(dominates(other, costs) for other in first))
    return [first[costs] for costs in kept]
