"""Which constraints clash, in words and with numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from apex_opt.evaluate import FAMILIES
from apex_opt.search.advice import nearest
from apex_opt.search.explain.solving import Known, amount
from apex_opt.search.search import search

if TYPE_CHECKING:
    from apex_opt.evaluate import Instance
    from apex_opt.search.explain.solving import Goals, Work
    from apex_opt.search.question import Question

Proof = Literal["constraints", "bound", "simulation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clash:
    """Constraints that no plan satisfies together, though some plan satisfies any of them but one.

    Parameters
    ----------
    of : tuple of str       constraint families, or goals as they were said
    proof : str             shown by the constraints, by a lower bound of every plan, or by simulating the plans
    facts : tuple of str    in words, with the numbers of the plans that come nearest
    """

    of: tuple[str, ...]
    proof: Proof
    facts: tuple[str, ...]


def clashes(question: Question, work: Work) -> tuple[tuple[Clash, ...], Goals]:
    """Irreducible clashes, each beside what the ones before it leave, and the goals that have part in them.

    A plan that breaks a family other than bandwidth cannot run. So goals are judged among the plans that can.
    """
    found: list[Clash] = []
    families, goals = tuple(FAMILIES), question.slos
    while core := work.formulation.clash(replace(question, slos=goals).instance(), families):
        tight = _tightest(goals) if "bandwidth" in core else ()
        found.append(_of_families(replace(question, slos=goals).instance(), core, tight, work))
        if tight:
            goals = tuple(goal for goal in goals if goal not in tight)
        else:
            families = tuple(name for name in families if name not in core)
    while families == FAMILIES and goals and not work.meets(question, goals):
        kept = goals
        for goal in goals:
            fewer = tuple(other for other in kept if other != goal)
            kept = fewer if fewer and not work.meets(question, fewer) else kept
        found.append(_of_goals(question, kept, work))
        goals = tuple(goal for goal in goals if goal not in kept)
    return tuple(found), tuple(goal for goal in question.slos if goal not in goals)


def _tightest(goals: Goals) -> Goals:
    """The goals that the bandwidth family stands for."""
    limits = [goal.limit for goal in goals if goal.metric == "tpot"]
    return tuple(goal for goal in goals if goal.metric == "tpot" and goal.limit == min(limits))


def _of_families(instance: Instance, core: tuple[str, ...], tight: Goals, work: Work) -> Clash:
    """A clash of families: for each the plan that comes nearest while it keeps to the others."""
    parts = []
    for name in core:
        others = tuple(other for other in core if other != name)
        plan, broken = nearest(instance, others)
        text = next(v.text for v in broken if v.family == name)
        keeps = f", which keeps to {' and '.join(others)}" if others else ", which comes nearest"
        goal = f" ({', '.join(goal.text for goal in tight)})" if name == "bandwidth" else ""
        parts.append(f"{name}{goal}: with {plan}{keeps}, {text}")
    if "memory" in core:
        alone = work.formulation.clash(replace(instance, longest_tokens=1), core)
        held = f"the longest request holds {instance.longest_tokens:,} tokens"
        parts.append(f"{held}; one of a single token would {'not fit either' if alone else 'fit'}")
    return Clash(of=core, proof="constraints", facts=tuple(parts))


def _of_goals(question: Question, goals: Goals, work: Work) -> Clash:
    """A clash of goals: the best value of each while the others are met."""
    asked = replace(question, slos=goals)
    certificate = search(asked, Known(plans=work.formulation.enumerate(asked.instance()).plans), work.tell).certificate
    by_bound = certificate.simulated == 0
    parts = []
    for goal in goals:
        others = tuple(other for other in goals if other != goal)
        best = work.best(question, goal, others)
        if best is None:  # the other goals are on tokens that nobody generates
            continue
        value, candidate = best
        among = f"of the plans that meet {' and '.join(o.text for o in others)}" if others else "of all plans"
        part = f"{goal.text}: {among} {candidate.plan} comes closest and reaches {amount(goal, value)}"
        if by_bound and goal.fraction is None and candidate.bound is not None:
            part += f", its lower bound, as if no other request were there, is {amount(goal, abs(candidate.bound))}"
        parts.append(part)
    proof: Proof = "bound" if by_bound else "simulation"
    return Clash(of=tuple(goal.text for goal in goals), proof=proof, facts=tuple(parts))
