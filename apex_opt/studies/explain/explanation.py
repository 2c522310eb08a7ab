"""Why a problem has no feasible plan, what would give it one, and why a plan loses to the best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from apex_opt.search.scorer import Scorer
from apex_opt.search.search import search, silent
from apex_opt.search.spread import Alone
from apex_opt.studies.explain.clashes import find_clashes
from apex_opt.studies.explain.comparison import compare
from apex_opt.studies.explain.kinds import kinds_of
from apex_opt.studies.explain.relaxations import Tried, relax
from apex_opt.studies.explain.solving import Work

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.cost.head_room import HeadRoom
    from apex_opt.cost.two_batches import TwoBatches
    from apex_opt.plans.deployment import Deployment, Serving
    from apex_opt.search.answer import Answer
    from apex_opt.search.problem import Problem
    from apex_opt.search.search import Progress
    from apex_opt.search.spread import Crew
    from apex_opt.studies.explain.clashes import Clash
    from apex_opt.studies.explain.comparison import Comparison
    from apex_opt.studies.explain.kinds import Diagnosis

TIME_LIMIT_S: Final = 10.0
"""How long clashes of goals and changes are looked for where nothing else was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosed:
    """Why a type of GPU alone has no plan of one kind, and what was tried to give it one.

    Parameters
    ----------
    gpu : str                   the type
    serving : str               "aggregated", "pools" or "shared": the kind, as of `Problem.serving`
    clashes : tuple of Clash    none where it has a plan, or is not asked about, as the time was up
    tried : Tried or None
    """

    gpu: str
    serving: Serving
    clashes: tuple[Clash, ...]
    tried: Tried | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """An answer; where it has no plan why, what was tried to give it one, and within which time.

    Of several types of GPU, and of several ways to serve, each is explained as if it were alone: what gives one of them
    a plan gives one to the whole.
    """

    answer: Answer
    diagnosed: tuple[Diagnosed, ...] = ()
    time_limit_s: float = TIME_LIMIT_S
    comparison: Comparison | None = None
    head_room: tuple[HeadRoom, ...] = ()
    """What overlap could give the best plan, by kind of batches; of several pools it is not told, nor where phases
    share GPUs."""
    two_batches: tuple[TwoBatches, ...] = ()
    """What two batches in place of one would give it, where the engine has them."""

    @property
    def clashes(self) -> tuple[Clash, ...]:
        """Why there is no plan, of all types of GPU."""
        return tuple(clash for one in self.diagnosed for clash in one.clashes)

    @property
    def tried(self) -> Tried | None:
        """What was tried, on all types of GPU, changes that need no more GPUs first."""
        every = [one.tried for one in self.diagnosed if one.tried is not None]
        if not every:
            return None
        found, failed, untried = (tuple(way for tried in every for way in getattr(tried, name)) for name in _TRIED)
        return Tried(found=tuple(sorted(found, key=lambda way: way.more_gpus)), failed=failed, untried=untried)


_TRIED: Final = ("found", "failed", "untried")


def explain(
    problem: Problem,
    formulation: Diagnosis,
    progress: Progress | None = None,
    deployment: Deployment | None = None,
    time_limit_s: float | None = None,
    crew: Callable[[Scorer], Crew] = Alone,
) -> Explanation:
    """Why a problem has no plan and which changes give it one, or how a deployment compares with the best.

    Parameters
    ----------
    problem : Problem
    formulation : Diagnosis              the program that enumerates plans and finds clashes
    progress : callable, optional        told (what, done, total) along the way
    deployment : Deployment, optional    to compare with the best
    time_limit_s : float, optional       of the search, by default none, and again of what `explained` does
    crew : callable                      who bounds and simulates in the search

    Raises
    ------
    CapacityError    a request no engine of this model could serve, whatever the plan
    """
    scorer = Scorer(problem)
    answer = search(problem, formulation, progress, time_limit_s=time_limit_s, scorer=scorer, crew=crew)
    comparison = None if deployment is None else compare(problem, deployment, answer.best, progress)
    found = explained(problem, answer, formulation, progress, time_limit_s, scorer)
    if answer.best is None or problem.several or answer.best.plan.shares is not None:
        return replace(found, comparison=comparison)
    room, two = scorer.overlap(answer.best.deployment)
    return replace(found, comparison=comparison, head_room=room, two_batches=two)


def explained(
    problem: Problem,
    answer: Answer,
    formulation: Diagnosis,
    progress: Progress | None = None,
    time_limit_s: float | None = None,
    scorer: Scorer | None = None,
) -> Explanation:
    """An answer with why it is infeasible, where it is.

    Of clashes that share no constraint all are found. Every relaxation was solved, so it holds by the same proof as a
    plan does.

    Parameters
    ----------
    problem, answer                   as asked and answered
    formulation : Diagnosis
    progress : callable, optional     told (what, done, total) along the way
    time_limit_s : float, optional    after so long nothing further is tried; `TIME_LIMIT_S` where not given. Several
                                      types of GPU share it
    scorer : Scorer, optional         that the answer was found with: its facts are used again
    """
    limit_s = TIME_LIMIT_S if time_limit_s is None else time_limit_s
    if answer.status != "infeasible":
        return Explanation(answer=answer, time_limit_s=limit_s)
    problem = replace(problem, request_slos=problem.per_request)  # what goodput counts stays as asked
    diagnosed = []
    types = [problem.alone(place) for place in range(len(problem.offers))] if problem.mixed else [problem]
    every = [kind for alone in types for kind in kinds_of(alone)]
    for one in every:
        own = scorer if problem.serving == ("aggregated",) and not problem.mixed else None
        work = Work(one, formulation, progress or silent, limit_s / len(every), own)
        clashes, blamed = find_clashes(work)
        tried = relax(clashes, blamed, work)
        diagnosed.append(Diagnosed(gpu=one.offer.name, serving=one.serving[0], clashes=clashes, tried=tried))
    found = Explanation(answer=answer, diagnosed=tuple(diagnosed), time_limit_s=limit_s)
    facts = "; ".join(fact for clash in found.clashes for fact in clash.facts)
    if facts and len(every) == 1:
        return replace(found, answer=replace(answer, reason=f"no plan is feasible: {facts}"))
    return found
