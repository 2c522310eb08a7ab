"""Why a question has no feasible plan, what would give it one, and why a plan loses to the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from apex_opt.search.explain.clashes import clashes
from apex_opt.search.explain.comparison import compare
from apex_opt.search.explain.relaxations import relaxations
from apex_opt.search.explain.solving import Work
from apex_opt.search.search import search, silent

if TYPE_CHECKING:
    from apex_opt.plan.plan import Plan
    from apex_opt.search.answer import Answer
    from apex_opt.search.explain.clashes import Clash
    from apex_opt.search.explain.comparison import Comparison
    from apex_opt.search.explain.relaxations import Relaxation
    from apex_opt.search.explain.solving import Diagnosis
    from apex_opt.search.question import Question
    from apex_opt.search.search import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The answer; where there is none the clashes, what would help and what was tried for nothing."""

    answer: Answer
    clashes: tuple[Clash, ...] = ()
    relaxations: tuple[Relaxation, ...] = ()
    failed: tuple[str, ...] = ()
    comparison: Comparison | None = None


def explain(
    question: Question, formulation: Diagnosis, progress: Progress | None = None, plan: Plan | None = None
) -> Explanation:
    """Why a question has no plan and which changes give it one, or how a plan compares with the best.

    Of clashes that share no constraint all are found. Every relaxation was solved, so it holds by the same proof as a
    plan does.

    Parameters
    ----------
    question : Question
    formulation : Diagnosis          the program that enumerates plans and finds clashes
    progress : callable, optional    told (what, done, total) along the way
    plan : Plan, optional            to compare with the best

    Raises
    ------
    CapacityError    a request no engine of this model could serve, whatever the plan
    """
    work = Work(formulation=formulation, tell=progress or silent)
    answer = search(question, formulation, work.tell)
    comparison = None if plan is None else compare(question, plan, answer.best, work.tell)
    if answer.best is not None:
        return Explanation(answer=answer, comparison=comparison)
    found, blamed = clashes(question, work)
    ways, failed = relaxations(question, found, blamed, work)
    return Explanation(answer=answer, clashes=found, relaxations=ways, failed=failed, comparison=comparison)
