"""The best fleet over several types of GPU, with its certificate.

Every type alone is searched as ever, so the best fleet is never worse than the best plan of any one type. What these
searches find is what fleets over several types have to beat: they are bounded, pool by pool and then one by one, and
simulated best bound first until no bound is as good as the last of the fleets to show.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from apex_opt.cost import JointCosts
from apex_opt.search.evaluator import Evaluator
from apex_opt.search.fleet import Fleet, FleetPart
from apex_opt.search.fleet_run import FleetRun
from apex_opt.search.joint import joined, search_joint
from apex_opt.search.search import how_far, search, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.cluster.types import Link
    from apex_opt.plan.plan import Plan
    from apex_opt.search.answer import Answer, Candidate, Certificate, Status
    from apex_opt.search.fleet_run import FleetSpace
    from apex_opt.search.joint import Joint, Splitter
    from apex_opt.search.question import Question
    from apex_opt.search.search import Formulation, Progress

    class Both(Formulation, Splitter, Protocol): ...

    Costs = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetAnswer:
    """The best fleet and the runners-up, or why there is none.

    Parameters
    ----------
    alone : tuple of Fleet or None     the best plan of each type of GPU alone; None where none meets the goals
    certificates : tuple of (places of pools, Certificate)
        of each type alone, then of fleets over several; of these `infeasible` counts "part", those with a plan that is
        infeasible on its GPUs, "gpus", those over the limit on GPUs, and "share", those with a part for which the
        dealing leaves no request or no client, of the fleets that were dealt to
    pipelines : tuple of (places of pools, Certificate)
        of pipelines over two types; of these `infeasible` counts "memory"
    optimal, gap : as in `Certificate`, over all of them
    """

    status: Status
    best: Fleet | None
    candidates: tuple[Fleet, ...]
    alone: tuple[Fleet | None, ...]
    certificates: tuple[tuple[tuple[int, ...], Certificate], ...]
    pipelines: tuple[tuple[tuple[int, ...], Certificate], ...]
    optimal: bool
    gap: float | None
    reason: str | None = None


def search_fleets(
    pools: Sequence[Question],
    formulation: Both,
    progress: Progress | None = None,
    top: int = 1,
    time_limit_s: float | None = None,
    most_gpus: int | None = None,
    between: Link | None = None,
) -> FleetAnswer:
    """The best fleet over some pools, and the next best; objectives with a tolerance are searched for as in `search`.

    Pipelines over two types compete with fleets; they are looked for where `joint.joined` says so.

    Parameters
    ----------
    pools : Question of each             the same but for their GPUs, and formats and clocks that follow from these
    formulation, progress, top : as for `search`
    time_limit_s : float, optional       after so long no further simulation is begun
    most_gpus : int, optional            GPUs a fleet may take in all
    between : Link, optional             between nodes of different types, at worst; without it no pipeline spans types

    Raises
    ------
    CapacityError    a request no engine of this model could serve, whatever the plan
    """
    deadline = inf if time_limit_s is None else monotonic() + time_limit_s
    return _search(tuple(pools), formulation, progress or silent, top, deadline, most_gpus, between)


def fleet_provenance(
    pools: Sequence[Question], fleets: Sequence[Fleet], between: Link | None
) -> dict[str, dict[str, str]]:
    """By type of GPU, where the figures behind the costs of fleets come from."""
    found: dict[str, dict[str, str]] = {}
    # Plans of two types may read alike: a part is told by its pool and its plan.
    parts = dict.fromkeys((part.pool, part.plan) for fleet in fleets for part in fleet.parts)
    for index, pool in enumerate(pools):
        own = [plan for of, plan in parts if of == index and not plan.on]
        found[pool.cluster.gpu.name] = Evaluator(pool).provenance(own)
    for index, plan in parts:
        if plan.on:
            costs = joint_costs(pools, index, plan, between)
            costs.plan_cost(plan)
            for name, model in costs.models.items():
                found[name] |= model.provenance
    return found


def joint_costs(pools: Sequence[Question], first: int, plan: Plan, between: Link | None) -> JointCosts:
    """Costs of a pipeline over two types that was found in a search, one of them that of the pool `first`."""
    one = pools[first]
    (other,) = (pool for pool in pools if pool is not one and pool.cluster.gpu.name in dict(plan.on))
    assert between is not None  # without it there are no such pipelines
    question = joined(one, other, between)
    assert question is not None
    costs = Evaluator(question).costs
    assert isinstance(costs, JointCosts)
    return costs


def _search(
    pools: Sequence[Question],
    formulation: Both,
    tell: Progress,
    top: int,
    deadline: float,
    most_gpus: int | None,
    between: Link | None,
) -> FleetAnswer:
    """As `search_fleets`, until a point in time."""
    question = pools[0]
    split = next((index for index, part in enumerate(question.objectives, 1) if part.tolerance), None)
    if split is not None:
        return _search_near(pools, split, formulation, tell, top, deadline, most_gpus, between)
    evaluators = [Evaluator(pool) for pool in pools]
    answers = []
    for pool, evaluator in zip(pools, evaluators, strict=True):
        left_s = None if deadline == inf else deadline - monotonic()
        answers.append(search(pool, formulation, tell, top, left_s, evaluator))
    alone = [
        _alone(index, pool, candidate)
        for index, (pool, answer) in enumerate(zip(pools, answers, strict=True))
        for candidate in answer.candidates
    ]
    run = FleetRun(
        pools, evaluators, top, deadline, most_gpus, tell, [question.costs(fleet.metrics) for fleet in alone]
    )
    run.queue(formulation, answers)
    run.simulate()
    ranked = sorted([*alone, *run.done], key=lambda fleet: _rank(question, fleet))
    joints: list[tuple[tuple[int, ...], Joint]] = []
    for one, other in combinations(range(len(pools)), 2):
        joint = joined(pools[one], pools[other], between) if between else None
        if joint is not None:
            worst = question.costs(ranked[top - 1].metrics) if len(ranked) >= top else (inf,)
            found = search_joint(joint, formulation, tell, top, deadline, worst, most_gpus)
            joints.append(((one, other), found))
            good = [_alone(one, joint, candidate) for candidate in found.done if candidate.meets_slos]
            ranked = sorted([*ranked, *good], key=lambda fleet: _rank(question, fleet))
    last = question.costs(ranked[top - 1].metrics) if len(ranked) >= top else None
    pipelines = tuple((places, found.certificate(question, last)) for places, found in joints)
    several = [(space.pools, space.certificate(question, last)) for space in run.spaces]
    certificates = (*(((index,), answer.certificate) for index, answer in enumerate(answers)), *several)
    best = ranked[0] if ranked else None
    gap = None if best is None else _gap(question, best, answers, run.spaces, [found for _, found in joints], last)
    optimal = gap == 0 or all(certificate.optimal for _, certificate in (*certificates, *pipelines))
    status: Status = "feasible"
    if best is None:
        status = "infeasible" if optimal else "unknown"
    elif optimal:
        status = "optimal"
    return FleetAnswer(
        status=status,
        best=best,
        candidates=tuple(ranked),
        alone=tuple(
            next((fleet for fleet in alone if fleet.parts[0].pool == index), None) for index in range(len(pools))
        ),
        certificates=certificates,
        pipelines=pipelines,
        optimal=optimal,
        gap=gap,
        reason=_reason(pools, answers, several, pipelines) if best is None else None,
    )


def _search_near(
    pools: Sequence[Question],
    split: int,
    formulation: Both,
    tell: Progress,
    top: int,
    deadline: float,
    most_gpus: int | None,
    between: Link | None,
) -> FleetAnswer:
    """The best by the first objectives, then by the others among the fleets that are as good but for a tolerance."""
    question = pools[0]
    objective, *then = (replace(part, tolerance=0.0) for part in question.objectives[:split])
    aimed = [replace(pool, objective=objective, then=tuple(then)) for pool in pools]
    first = _search(aimed, formulation, tell, 1, deadline, most_gpus, between)
    if first.best is None:
        return first
    metrics = first.best.metrics
    near = [goal for part in question.objectives[:split] for goal in part.near(part.value(metrics))]
    objective, *then = question.objectives[split:]
    nearer = [replace(pool, objective=objective, then=tuple(then), near=(*pool.near, *near)) for pool in pools]
    found = _search(nearer, formulation, tell, top, deadline, most_gpus, between)
    certificates, pipelines = (
        tuple(
            (places, replace(after, before=(before, *after.before)))
            for (places, before), (_, after) in zip(earlier, later, strict=True)
        )
        for earlier, later in (
            (first.certificates, found.certificates),
            (first.pipelines, found.pipelines),
        )
    )
    optimal = first.optimal and found.optimal
    # Values are those of the first objective; a bound of another has nothing to say about them.
    ranked = tuple(
        replace(fleet, value=question.objective.value(fleet.metrics), bound=None)
        for fleet in found.candidates or first.candidates
    )
    alone = tuple(after or before for after, before in zip(found.alone, first.alone, strict=True))
    return replace(
        found,
        status="optimal" if optimal else "feasible",
        best=ranked[0],
        candidates=ranked,
        alone=tuple(fleet and replace(fleet, value=question.objective.value(fleet.metrics)) for fleet in alone),
        certificates=certificates,
        pipelines=pipelines,
        optimal=optimal,
        gap=found.gap if first.optimal else None,
        reason=None,
    )


def _alone(index: int, pool: Question, candidate: Candidate) -> Fleet:
    """A plan of one pool, or a pipeline over several, as a fleet."""
    part = FleetPart(
        pool=index,
        gpu=" + ".join(name for name, _ in candidate.plan.on) or pool.cluster.gpu.name,
        plan=candidate.plan,
        requests=len(pool.trace),
        usage=candidate.usage,
        memory=candidate.memory,
        preemptions=candidate.preemptions,
        batches=candidate.batches,
    )
    return Fleet(
        parts=(part,),
        value=candidate.value,
        metrics=candidate.metrics,
        transient=candidate.transient,
        bound=candidate.bound,
    )


def _rank(question: Question, fleet: Fleet) -> tuple[Costs, int, str]:
    """Better first: the objectives in turn, fewer GPUs, the text form, so that ties fall the same way every time."""
    return question.costs(fleet.metrics), fleet.devices, fleet.text


def _gap(
    question: Question,
    best: Fleet,
    answers: Sequence[Answer],
    spaces: Sequence[FleetSpace],
    joints: Sequence[Joint],
    last: Costs | None,
) -> float | None:
    """How far the best fleet found can be from the best there is, as `how_far`; None where no bound tells."""
    left: list[Costs] = []
    for answer in answers:
        certificate = answer.certificate
        if certificate.optimal:
            continue
        if answer.best is None or certificate.gap is None:
            return None
        own = question.objective.signed(answer.best.value)
        left.append((own - certificate.gap * abs(own), *(-inf for _ in question.then)))
    for space in spaces:
        if not space.complete:
            return None
        left += (bound for bound, _ in space.left(last))
    left += (bound for joint in joints for bound in joint.left(last))
    return how_far(question.costs(best.metrics), left)


def _reason(
    pools: Sequence[Question],
    answers: Sequence[Answer],
    several: Sequence[tuple[tuple[int, ...], Certificate]],
    pipelines: Sequence[tuple[tuple[int, ...], Certificate]],
) -> str:
    """Why there is no answer: that of each pool, and what became of the fleets over several."""
    found = [f"{pool.cluster.gpu.name} alone: {a.reason}" for pool, a in zip(pools, answers, strict=True)]
    fleets = sum(certificate.bounded + certificate.simulated for _, certificate in several)
    if left := sum(certificate.left for _, certificate in several):
        found.append(f"together: the time limit was reached with {left} fleets left")
    elif fleets:
        found.append(f"together: none of {fleets} fleets meets the SLOs")
    joint = sum(certificate.bounded + certificate.simulated for _, certificate in pipelines)
    if left := sum(certificate.left for _, certificate in pipelines):
        found.append(f"pipelines over two types: the time limit was reached with {left} left")
    elif joint:
        found.append(f"pipelines over two types: none of {joint} meets the SLOs")
    elif pipelines:
        found.append("pipelines over two types: none fits the memory")
    return "; ".join(found)
