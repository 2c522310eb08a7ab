"""Why a question has no feasible plan, what would give it one, and why a plan loses to the best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from apex_opt.search.evaluator import Evaluator
from apex_opt.search.explain.clashes import find_clashes
from apex_opt.search.explain.comparison import compare
from apex_opt.search.explain.relaxations import Tried, relax
from apex_opt.search.explain.solving import Work
from apex_opt.search.search import search, silent

if TYPE_CHECKING:
    from apex_opt.plan.plan import Plan
    from apex_opt.search.answer import Answer
    from apex_opt.search.explain.clashes import Clash
    from apex_opt.search.explain.comparison import Comparison
    from apex_opt.search.explain.solving import Diagnosis
    from apex_opt.search.question import Question
    from apex_opt.search.search import Progress

TIME_LIMIT_S: Final = 10.0
"""How long clashes of goals and changes are looked for where nothing else was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """An answer; where it has no plan why, what was tried to give it one, and within which time."""

    answer: Answer
    clashes: tuple[Clash, ...] = ()
    tried: Tried | None = None
    time_limit_s: float = TIME_LIMIT_S
    comparison: Comparison | None = None


def explain(
    question: Question,
    formulation: Diagnosis,
    progress: Progress | None = None,
    plan: Plan | None = None,
    time_limit_s: float | None = None,
) -> Explanation:
    """Why a question has no plan and which changes give it one, or how a plan compares with the best.

    Parameters
    ----------
    question : Question
    formulation : Diagnosis          the program that enumerates plans and finds clashes
    progress : callable, optional    told (what, done, total) along the way
    plan : Plan, optional            to compare with the best
    time_limit_s : float, optional   of the search, by default none, and again of what `explained` does

    Raises
    ------
    CapacityError    a request no engine of this model could serve, whatever the plan
    """
    evaluator = Evaluator(question)
    answer = search(question, formulation, progress, time_limit_s=time_limit_s, evaluator=evaluator)
    comparison = None if plan is None else compare(question, plan, answer.best, progress)
    found = explained(question, answer, formulation, progress, time_limit_s, evaluator)
    return replace(found, comparison=comparison)


def explained(
    question: Question,
    answer: Answer,
    formulation: Diagnosis,
    progress: Progress | None = None,
    time_limit_s: float | None = None,
    evaluator: Evaluator | None = None,
) -> Explanation:
    """An answer with why it is infeasible, where it is.

    Of clashes that share no constraint all are found. Every relaxation was solved, so it holds by the same proof as a
    plan does.

    Parameters
    ----------
    question, answer                  as asked and answered
    time_limit_s : float, optional    after so long nothing further is tried; `TIME_LIMIT_S` where not given
    evaluator : Evaluator, optional   that the answer was found with: its floors are used again
    """
    limit_s = TIME_LIMIT_S if time_limit_s is None else time_limit_s
    if answer.status != "infeasible":
        return Explanation(answer=answer, time_limit_s=limit_s)
    question = replace(question, request_slos=question.per_request)  # what goodput counts stays as asked
    work = Work(question, formulation, progress or silent, limit_s, evaluator)
    clashes, blamed = find_clashes(work)
    facts = "; ".join(fact for clash in clashes for fact in clash.facts)
    return Explanation(
        answer=replace(answer, reason=f"no plan is feasible: {facts}") if facts else answer,
        clashes=clashes,
        tried=relax(clashes, blamed, work),
        time_limit_s=limit_s,
    )
