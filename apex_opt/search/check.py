"""The certificate replayed: the space counted by plain Python, every feasible plan simulated to its end.

It shares with the search the simulator and the costs that plans are scored with, and nothing of what makes the search
quick: not the constraint program, not the bounds, not the early ends, not the order.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from apex_opt.evaluate import FAMILIES, tally
from apex_opt.search.evaluator import Evaluator
from apex_opt.search.search import rank, silent, tell_compiling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apex_opt.plan.plan import Plan
    from apex_opt.search.answer import Answer, Candidate
    from apex_opt.search.question import Question
    from apex_opt.search.search import Progress

ROUNDING: Final = 1e-12
"""Share by which sums of floats taken in another order may differ."""


_LEFT_EQUAL: Final = 10 * ROUNDING


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What the replay found.

    Parameters
    ----------
    space : int                    plans counted
    infeasible : mapping           plans that break a constraint family, charged to the first in order
    repeated : int                 plans that are others with their layers moved, for these stay even
    simulated : int                feasible plans, each simulated to its end
    meeting : int                  those that meet the goals
    disagreements : tuple of str   what the certificate claims and the replay does not bear out
    """

    space: int
    infeasible: dict[str, int]
    repeated: int
    simulated: int
    meeting: int
    disagreements: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.disagreements


def check(question: Question, answer: Answer, progress: Progress | None = None) -> Check:
    """Replay the certificate of an answer to a question.

    It takes the time of simulating every feasible plan, which the search is there to save.
    """
    tell = progress or silent
    instance = question.instance()
    tell("checking constraints", 0, 0)
    counted, clocks = tally(instance), len(question.clocks)
    every = [replace(plan, clock_mhz=clock) for clock in question.clocks for plan in counted.plans]
    infeasible = {family: count * clocks for family, count in counted.infeasible.items()}
    repeated, size = counted.repeated * clocks, counted.space * clocks
    scored = _scored(question, every, tell)
    meeting = [c for c in scored if c.meets_slos]
    certificate = answer.certificate
    disagreements: list[str] = []
    if certificate.space != size:
        disagreements.append(f"the space has {size} plans, not {certificate.space}")
    for family in FAMILIES:
        if certificate.infeasible[family] != infeasible[family]:
            disagreements.append(
                f"{infeasible[family]} plans break {family} first, not {certificate.infeasible[family]}"
            )
    accounted = certificate.bounded + certificate.repeated + certificate.simulated + certificate.left
    listed = len(every) + repeated
    if accounted != listed:
        disagreements.append(f"{listed} plans are feasible, {accounted} are accounted for")
    if certificate.repeated > repeated:
        disagreements.append(f"{repeated} plans have even stages once moved, not {certificate.repeated}")
    disagreements += _optimum(question, answer, meeting)
    disagreements += _bounds(question, scored)
    return Check(
        space=size,
        infeasible=infeasible,
        repeated=repeated,
        simulated=len(every),
        meeting=len(meeting),
        disagreements=tuple(disagreements),
    )


def _scored(question: Question, plans: list[Plan], tell: Progress) -> list[Candidate]:
    """Every plan simulated to its end, with its bound beside."""
    evaluator = Evaluator(question)
    bounds = []
    for index, plan in enumerate(plans):
        tell("bounding plans", index, len(plans))
        bounds.append(evaluator.bound(plan))
    tell_compiling(tell, evaluator, plans)
    scored = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        # A plan that its bound says misses a goal has an endless one: it may be no better than anything.
        least = [bound if possible else math.inf for bound, possible in bounds]
        for candidate in pool.map(evaluator.simulate, plans, least):
            scored.append(candidate)
            tell("simulating every plan", len(scored), len(plans))
    return scored


def _in_order(question: Question, meeting: list[Candidate]) -> list[Candidate]:
    """The plans that can be the answer, best first: near enough by objectives with a tolerance, then by the others."""
    kept, begin = meeting, 0
    for end, part in enumerate(question.objectives, 1):
        if part.tolerance and kept:
            aims = question.objectives[begin:end]
            best = min(kept, key=lambda c: question.costs(c.metrics)[begin:end])
            goals = [goal for aim in aims for goal in aim.near(aim.value(best.metrics))]
            kept = [c for c in kept if all(goal.met(c.metrics.judged(goal)) for goal in goals)]
            begin = end
    return sorted(kept, key=lambda c: (question.costs(c.metrics)[begin:], *rank(question, c)[1:]))


def _optimum(question: Question, answer: Answer, meeting: list[Candidate]) -> Iterator[str]:
    """What contradicts the plan that is answered, or that there is none."""
    best, gap = answer.best, answer.certificate.gap
    if best is None:
        if meeting and answer.status == "infeasible":
            yield f"{_in_order(question, meeting)[0].plan} meets the goals, though no plan is said to"
        return
    if best.plan not in {candidate.plan for candidate in meeting}:
        yield f"{best.plan} is not among the plans that meet the goals"
        return
    first = _in_order(question, meeting)[0]
    parts = question.objectives
    aim = next(part for index, part in enumerate(parts) if not any(later.tolerance for later in parts[index:]))
    said = f"{aim.value(first.metrics):.6g} against {aim.value(best.metrics):.6g}"
    # Where the time was up, plans left that can be no better than the best may yet be as good, and come before it.
    equal = answer.certificate.left and all(
        math.isclose(one, other, rel_tol=_LEFT_EQUAL)
        for one, other in zip(*(question.costs(c.metrics)[parts.index(aim) :] for c in (first, best)), strict=True)
    )
    if answer.status == "optimal" and first.plan != best.plan and not equal:
        yield f"{first.plan} comes before {best.plan}: {said}"
    cost, least = aim.signed(aim.value(best.metrics)), aim.signed(aim.value(first.metrics))
    if gap is not None and least < cost - (gap + ROUNDING) * abs(cost):
        yield f"{first.plan} is better by more than the gap of {gap:.1%}: {said}"


def _bounds(question: Question, scored: list[Candidate]) -> Iterator[str]:
    """Plans that are better than a bound allows."""
    for candidate in scored:
        cost, bound = question.objective.signed(candidate.value), candidate.bound
        if bound == math.inf and candidate.meets_slos:
            yield f"{candidate.plan} meets the goals, which its bound rules out"
        elif bound is not None and bound != math.inf and cost < bound - ROUNDING * abs(bound):
            yield f"{candidate.plan} costs {cost:.6g}, less than its bound {bound:.6g}"
