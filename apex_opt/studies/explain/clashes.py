"""Which constraints clash, in words and with numbers."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from apex_opt.figures.goals import step_limit_s
from apex_opt.oracle.checks import FAMILIES
from apex_opt.plans.deployment import ROLES
from apex_opt.search.nearest import nearest
from apex_opt.search.scorer import Scorer
from apex_opt.search.shapes import Sides
from apex_opt.search.shapes.disaggregated import no_pair
from apex_opt.studies.explain.solving import OutOfTime

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.oracle.instance import Instance
    from apex_opt.search.problem import Problem
    from apex_opt.studies.explain.solving import Goals, Work

Proof = Literal["constraints", "bound", "simulation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clash:
    """Constraints that no plan satisfies together: the fewest such, the first in order of several such sets.

    Parameters
    ----------
    of : tuple of str       constraint families, or goals as they were said
    proof : str             shown by the constraints, by a lower bound of every plan, or by simulating the plans
    facts : tuple of str    in words, with the numbers of the plans that come nearest
    smallest : bool         whether that is shown too; not where the time was up first
    """

    of: tuple[str, ...]
    proof: Proof
    facts: tuple[str, ...]
    smallest: bool = True


def find_clashes(work: Work) -> tuple[tuple[Clash, ...], Goals]:
    """Smallest clashes, each beside what the ones before it leave, and the goals that have part in them.

    A plan that breaks a family other than bandwidth cannot run. So goals are judged among the plans that can.
    """
    problem = work.problem
    found, goals, some = (_of_pools if problem.serving == ("pools",) else _of_constraints)(problem, work)
    try:
        while goals and some and (clashing := smallest_clash(goals, work.runs.some_meets)):
            found.append(_of_goals(clashing, work))
            goals = tuple(goal for goal in goals if goal not in clashing)
    except OutOfTime:
        if not found:
            found.append(Clash(of=tuple(g.text for g in goals), proof="simulation", facts=(), smallest=False))
            goals = ()
    return tuple(found), tuple(goal for goal in problem.slos if goal not in goals)


def _of_constraints(problem: Problem, work: Work) -> tuple[list[Clash], Goals, bool]:
    """Clashes of families, the goals that have no part in them, and whether any plan can run."""
    found: list[Clash] = []
    families, goals = tuple(FAMILIES), problem.slos
    while core := work.formulation.clash(replace(problem, slos=goals).instance(), families):
        tight = _tightest(goals) if "bandwidth" in core else ()
        found.append(_of_families(replace(problem, slos=goals).instance(), core, tight, work))
        if tight:
            goals = tuple(goal for goal in goals if goal not in tight)
        else:
            families = tuple(name for name in families if name not in core)
    return found, goals, families == FAMILIES


def _of_pools(problem: Problem, work: Work) -> tuple[list[Clash], Goals, bool]:
    """The same of pools that compute prompts and those that answer, each by itself, then of both together."""
    found, goals, able = list[Clash](), problem.slos, True
    for role in ROLES:
        side = problem.side(role, 0)
        clashes, left, some = _of_constraints(side, work)
        found += [replace(one, facts=tuple(f"{role}: {fact}" for fact in one.facts)) for one in clashes]
        able &= some
        goals = left if side.slos else goals
    if able and not work.plans(replace(problem, slos=())):
        sides = [Sides(Scorer(replace(problem, slos=())), work.formulation, 0, work.tell)]
        found.append(Clash(of=("pools",), proof="constraints", facts=(no_pair(problem, sides),)))
        able = False
    return found, goals, able


def smallest_clash(goals: Goals, some_meets: Callable[[Goals], bool]) -> Goals:
    """The fewest goals that no plan meets together, of several such sets the first; none where a plan meets all."""
    subsets = (itertools.combinations(goals, size) for size in range(1, len(goals) + 1))
    every = itertools.chain.from_iterable(subsets)
    return () if some_meets(goals) else next(some for some in every if not some_meets(some))


def _tightest(goals: Goals) -> Goals:
    """The goals that the bandwidth family stands for."""
    limit_s = step_limit_s(goals)
    return tuple(goal for goal in goals if goal.figure.time == "step" and goal.limit == limit_s)


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
        held = f"{instance.longest} holds {instance.longest_tokens:,} tokens"
        parts.append(f"{held}; one of a single token would {'not fit either' if alone else 'fit'}")
    return Clash(of=core, proof="constraints", facts=tuple(parts))


def _of_goals(goals: Goals, work: Work) -> Clash:
    """A clash of goals: the best value of each while the others are met, as far as the time allows."""
    by_bound = work.runs.ruled_out(goals)
    parts = []
    with suppress(OutOfTime):
        for goal in goals:
            others = tuple(other for other in goals if other != goal)
            closest = work.runs.closest(goal, others)
            if closest is None:  # the other goals are on tokens that nobody generates
                continue
            value, run = closest
            among = f"of the plans that meet {' and '.join(o.text for o in others)}" if others else "of all plans"
            part = f"{goal.text}: {among} {run.text} comes closest and reaches {goal.told(value)}"
            if by_bound and (bound := work.runs.bound(goal, run.deployment)) is not None:
                lonely = "" if goal.figure.of_gpus else ", as if no other request were there,"
                part += f", its bound{lonely} is {goal.told(bound)}"
            parts.append(part)
    return Clash(of=tuple(goal.text for goal in goals), proof="bound" if by_bound else "simulation", facts=tuple(parts))
