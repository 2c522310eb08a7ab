"""The plans that no other beats in every objective.

A plan is ruled out where a plan found is at least as good as its bounds in every objective and better in one: whatever
its run gives, the other is better. The rest are simulated to their end, so the front is exact.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from apex_opt.errors import UsageError
from apex_opt.figures.goals import TIES
from apex_opt.search.answer import Certificate
from apex_opt.search.evaluator import Evaluator
from apex_opt.search.search import (
    ROUND,
    bound_plans,
    check_lengths,
    list_plans,
    settled,
    silent,
    tell_compiling,
    why_not,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from apex_opt.figures import Objective
    from apex_opt.plan.plan import Plan
    from apex_opt.search.answer import Candidate
    from apex_opt.search.question import Question
    from apex_opt.search.search import Formulation, Progress

    Costs = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """The plans that no other of the space beats, or why there is none.

    Parameters
    ----------
    status : str                        "optimal": this is the whole front; "feasible": not all plans were listed
    objectives : tuple of Objective
    plans : tuple of Candidate          the front, best by the first objective first
    beaten : tuple of Candidate         others that were simulated and meet the goals
    certificate : Certificate           gap 0 where every plan is accounted for
    reason : str or None                why there is no plan
    """

    status: Literal["optimal", "feasible", "infeasible"]
    objectives: tuple[Objective, ...]
    plans: tuple[Candidate, ...]
    beaten: tuple[Candidate, ...]
    certificate: Certificate
    reason: str | None = None


def pareto(
    question: Question, objectives: Sequence[Objective], formulation: Formulation, progress: Progress | None = None
) -> Front:
    """The exact front of two or three objectives over the plans that meet the goals.

    Of plans alike in every objective the one with the least latency is on the front, then the one with fewer GPUs, then
    the first by its text.

    Raises
    ------
    UsageError       other than two or three objectives, or one given twice
    CapacityError    a request no engine of this model could serve, whatever the plan
    """
    names = [objective.name for objective in objectives]
    if not 2 <= len(names) <= 3 or len(set(names)) < len(names):
        raise UsageError(f"--objective: {','.join(names)}: a front is of two or three objectives, each named once")
    tell = progress or silent
    question = replace(question, objective=objectives[0], then=tuple(objectives[1:]))
    check_lengths(question)
    listed = list_plans(question, formulation, tell)
    evaluator = Evaluator(question)
    plans, repeated = settled(question, formulation, listed, tell)
    bounds = bound_plans(evaluator, plans, objectives, tell)
    queue = [(least, index, plans[index]) for index, (least, possible) in enumerate(bounds) if possible]
    missing = len(plans) - len(queue)
    done, beaten = _simulate(_from_all_sides(queue), evaluator, objectives, tell)
    good = [candidate for candidate in done if candidate.meets_slos]
    front = _front(good, objectives)
    certificate = Certificate(
        space=listed.space,
        infeasible=listed.counts,
        bounded=missing + beaten,
        repeated=repeated,
        simulated=len(done),
        cut_short=0,
        missed=len(done) - len(good),
        optimal=listed.complete,
        gap=0.0 if front and listed.complete else None,
    )
    chosen = {candidate.plan for candidate in front}
    return Front(
        status="infeasible" if not front else "optimal" if listed.complete else "feasible",
        objectives=tuple(objectives),
        plans=tuple(front),
        beaten=tuple(candidate for candidate in good if candidate.plan not in chosen),
        certificate=certificate,
        reason=None if front else why_not(evaluator, plans, done),
    )


def costs(candidate: Candidate, objectives: Iterable[Objective]) -> Costs:
    """The figures of a run by each objective, signed such that less is better."""
    return tuple(o.signed(o.value(candidate.metrics)) for o in objectives)


def dominates(one: Costs, other: Costs) -> bool:
    """At least as good in every objective and better in one."""
    return one != other and all(mine <= theirs for mine, theirs in zip(one, other, strict=True))


def _from_all_sides(queue: list[tuple[Costs, int, Plan]]) -> list[tuple[Costs, Plan]]:
    """Plans that are early by every objective first: those rule most of the others out."""
    places = dict.fromkeys((index for _, index, _ in queue), 0)
    for side in range(len(queue[0][0]) if queue else 0):
        for place, (_, index, _) in enumerate(sorted(queue, key=lambda item: (item[0][side], item[1]))):
            places[index] += place
    return [(bounds, plan) for bounds, index, plan in sorted(queue, key=lambda item: (places[item[1]], item[1]))]


def _simulate(
    queue: Sequence[tuple[Costs, Plan]], evaluator: Evaluator, objectives: Sequence[Objective], tell: Progress
) -> tuple[list[Candidate], int]:
    """Score plans a round at a time, leaving out those that one found beats; they are counted."""
    done: list[Candidate] = []
    found: list[Costs] = []
    beaten = 0
    waiting = list(queue)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        while waiting:
            left = [item for item in waiting if not any(dominates(one, item[0]) for one in found)]
            beaten += len(waiting) - len(left)
            batch, waiting = [plan for _, plan in left[:ROUND]], left[ROUND:]
            tell_compiling(tell, evaluator, batch)
            for candidate in pool.map(evaluator.simulate, batch):
                done.append(candidate)
                if candidate.meets_slos:
                    found.append(costs(candidate, objectives))
            found = [one for one in found if not any(dominates(other, one) for other in found)]
            tell("simulating plans", len(queue) - len(waiting), len(queue))
    return done, beaten


def _front(candidates: Iterable[Candidate], objectives: Sequence[Objective]) -> list[Candidate]:
    """Candidates that no other dominates, one of each kind, best by the first objective first."""
    first: dict[Costs, Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: (TIES.value(c.metrics), c.plan.devices, str(c.plan))):
        first.setdefault(costs(candidate, objectives), candidate)
    kept = sorted(one for one in first if not any(dominates(other, one) for other in first))
    return [first[one] for one in kept]
