"""From a question to the best plan and its certificate: enumerate, bound, simulate, prove."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from apex_opt.errors import CapacityError
from apex_opt.evaluate import FAMILIES, Instance, violations
from apex_opt.figures.measure import ROUNDING
from apex_opt.search.answer import Answer, Candidate, Certificate, Status, misses
from apex_opt.search.evaluator import Evaluator
from apex_opt.search.nearest import nearest_violation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from apex_opt.figures import Objective
    from apex_opt.plan.plan import Plan
    from apex_opt.search.question import Question

    Costs = tuple[float, ...]
    Progress = Callable[[str, int, int], None]

ROUND: Final = 4
"""Plans simulated side by side before the incumbent is updated; fixed, so that results do not depend on the cores."""

MOST_GAPS: Final = 20_000_000
"""Tokens up to which a given plan's times between tokens are told without being asked for: a log takes 24 B each."""

_COUNTED: Final = ("divisibility", "format", "engine", "balance")


class Enumeration(Protocol):
    """Plans, those whose layers are yet to be moved, and whether they are all."""

    @property
    def plans(self) -> tuple[Plan, ...]: ...
    @property
    def movable(self) -> tuple[Plan, ...]: ...
    @property
    def complete(self) -> bool: ...


class Formulation(Protocol):
    """What the search asks of a plan-space program."""

    def count(self, instance: Instance, families: Sequence[str]) -> int: ...

    def enumerate(self, instance: Instance, families: Sequence[str] = ...) -> Enumeration: ...

    def moved(self, instance: Instance, plan: Plan) -> Plan | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """The space of a question: how many plans there are, and those that are feasible, at every clock.

    Parameters
    ----------
    space : int                  plans there are
    counts : mapping             plans that break a constraint family, charged to the first in order
    plans : tuple of Plan        feasible plans
    movable : tuple of Plan      feasible plans whose layers are yet to be moved, with even stages
    complete : bool              whether these are all
    """

    space: int
    counts: dict[str, int]
    plans: tuple[Plan, ...]
    movable: tuple[Plan, ...]
    complete: bool


def list_plans(question: Question, formulation: Formulation, tell: Progress) -> Listed:
    """Enumerate the feasible plans and count the others."""
    tell("enumerating plans", 0, 0)
    counts, enumeration = _enumerate(question.instance(), formulation)
    counts = {name: count * len(question.clocks) for name, count in counts.items()}  # no constraint binds the clock
    plans, movable = (
        tuple(plan if clock is None else replace(plan, clock_mhz=clock) for clock in question.clocks for plan in some)
        for some in (enumeration.plans, enumeration.movable)
    )
    return Listed(space=counts.pop("space"), counts=counts, plans=plans, movable=movable, complete=enumeration.complete)


class Moves:
    """Layers moved, once for all plans that cut the model alike."""

    def __init__(self, question: Question, formulation: Formulation) -> None:
        self._instance, self._formulation = question.instance(), formulation
        self._found: dict[tuple[Any, ...], Plan | None] = {}

    def __call__(self, plan: Plan) -> Plan | None:
        """A movable plan with its layers moved; None where its stages stay even, and so it is a plan already."""
        cut = replace(plan, replicas=1, clock_mhz=None)
        key = cut.cut, cut.stages
        if key not in self._found:
            self._found[key] = self._formulation.moved(self._instance, cut)
        moved = self._found[key]
        return None if moved is None else replace(plan, layers=moved.layers)


def settled(
    question: Question, formulation: Formulation, found: Listed | Enumeration, tell: Progress
) -> tuple[tuple[Plan, ...], int]:
    """All feasible plans with the layers of the movable ones moved, and how many of these stay even: no new plans."""
    moves, moved = Moves(question, formulation), []
    for index, movable in enumerate(found.movable):
        tell("moving layers", index, len(found.movable))
        if (plan := moves(movable)) is not None:
            moved.append(plan)
    return (*found.plans, *moved), len(found.movable) - len(moved)


def bound_plans(
    evaluator: Evaluator,
    plans: Sequence[Plan],
    objectives: Sequence[Objective],
    tell: Progress,
    movable: int | None = None,
) -> list[tuple[tuple[float, ...], bool]]:
    """Of each plan its lower bounds by some objectives, and whether it can still meet the goals.

    The layers of those from the `movable`-th on are yet to be moved.
    """
    first = len(plans) if movable is None else movable
    found: dict[int, tuple[tuple[float, ...], bool]] = {}
    # Plans of the same cut share their tables while these are still there.
    for index in sorted(range(len(plans)), key=lambda index: (plans[index].cut, plans[index].stages)):
        tell("bounding plans", len(found), len(plans))
        found[index] = evaluator.bounds(plans[index], objectives, index >= first)
    return [found[index] for index in range(len(plans))]


def search(
    question: Question,
    formulation: Formulation,
    progress: Progress | None = None,
    top: int = 1,
    time_limit_s: float | None = None,
    evaluator: Evaluator | None = None,
) -> Answer:
    """The best plan for a question, with its certificate, and the next best.

    Where an objective has a tolerance, the best by it is searched for first, and then, among the plans that come as
    near to it as that, the best by those after it.

    All feasible plans are enumerated, bounded and simulated best bound first, until the next bound is no better than
    the `top`-th best plan found. So the answer is the optimum of the space, unless the enumeration was cut short.

    Parameters
    ----------
    question : Question
    formulation : Formulation        the program that enumerates feasible plans
    progress : callable, optional    told (what, done, total) along the way
    top : int                        best plans to find, each exactly
    time_limit_s : float, optional   after so long no further simulation is begun; what is open then makes the gap
    evaluator : Evaluator, optional  of this question, with the costs and floors it already has, for others to share

    Raises
    ------
    CapacityError    a request no engine of this model could serve, whatever the plan
    """
    deadline = float("inf") if time_limit_s is None else monotonic() + time_limit_s
    tell = progress or silent
    check_lengths(question)
    return _search(question, formulation, tell, top, deadline, evaluator)


def _search(
    question: Question,
    formulation: Formulation,
    tell: Progress,
    top: int,
    deadline: float,
    evaluator: Evaluator | None = None,
) -> Answer:
    """As `search`, until a point in time."""
    split = next((index for index, part in enumerate(question.objectives, 1) if part.tolerance), None)
    if split is not None:
        return _search_near(question, split, formulation, tell, top, deadline)
    listed = list_plans(question, formulation, tell)
    evaluator = evaluator or Evaluator(question)
    feasible = (*listed.plans, *listed.movable)
    bounds = bound_plans(evaluator, feasible, question.objectives, tell, len(listed.plans))
    queue = [
        Queued(bound, index, feasible[index], index >= len(listed.plans))
        for index, (bound, possible) in enumerate(bounds)
        if possible
    ]
    queue.sort(key=lambda item: (item.bound, item.place))
    run = simulate_queue(queue, evaluator, Moves(question, formulation), tell, top, deadline)
    done, cut_short, repeated = run.done, run.cut_short, run.repeated
    ranked = sorted((c for c in done if c.meets_slos), key=lambda c: rank(question, c))
    best = ranked[0] if ranked else None
    rest = [item.bound for item in queue[len(done) + cut_short + repeated :]]
    # Where the search ran to its end, no bound of the rest is as good as the last of the plans to show.
    last = question.costs(ranked[top - 1].metrics) if len(ranked) >= top else None
    left = [bound for bound in rest if last is None or bound <= last]
    beaten = [bound for bound in rest if last is not None and bound > last]
    gap = how_far(question.costs(best.metrics), left) if best and listed.complete else None
    # What is left when the time is up may be worth no more than what is found.
    proved = listed.complete and (not left or gap == 0)
    certificate = Certificate(
        space=listed.space,
        infeasible=listed.counts,
        bounded=len(feasible) - len(queue) + len(beaten),
        out_of_reach=len(feasible) - len(queue),
        least_bound=question.objective.signed(min(beaten)[0]) if beaten else None,
        incumbent=ranked[top - 1].value if beaten else None,
        repeated=repeated,
        simulated=len(done) + cut_short,
        cut_short=cut_short,
        missed=sum(not c.meets_slos for c in done),
        left=len(left),
        optimal=proved,
        gap=gap,
    )
    if best is None and left:
        reason = f"the time limit was reached with {len(left)} plans left, before one was found that meets the goals"
        return Answer(status="unknown", best=None, candidates=(), certificate=certificate, reason=reason)
    if best is None:
        reason = why_not(evaluator, listed.plans or settled(question, formulation, listed, tell)[0], done)
        return Answer(status="infeasible", best=None, candidates=(), certificate=certificate, reason=reason)
    status: Status = "optimal" if proved else "feasible"
    return Answer(status=status, best=ranked[0], candidates=tuple(ranked), certificate=certificate)


def _search_near(
    question: Question, split: int, formulation: Formulation, tell: Progress, top: int, deadline: float
) -> Answer:
    """The best by the first objectives, then by the others among the plans that are as good but for a tolerance."""
    aims = tuple(replace(part, tolerance=0.0) for part in question.objectives[:split])
    first = _search(replace(question, objective=aims[0], then=aims[1:]), formulation, tell, 1, deadline)
    if first.best is None:
        return first
    near = (goal for part in question.objectives[:split] for goal in part.near(part.value(first.best.metrics)))
    objective, *then = question.objectives[split:]
    nearer = replace(question, objective=objective, then=tuple(then), near=(*question.near, *near))
    found = _search(nearer, formulation, tell, top, deadline)
    proved = first.certificate.optimal and found.certificate.optimal
    certificate = replace(
        found.certificate,
        before=(first.certificate, *found.certificate.before),
        optimal=proved,
        gap=found.certificate.gap if first.certificate.optimal else None,
    )
    evaluator = Evaluator(question)
    ranked = tuple(
        replace(c, value=question.objective.value(c.metrics), bound=evaluator.bound(c.plan)[0])
        for c in found.candidates or first.candidates
    )
    return Answer(
        status="optimal" if proved else "feasible", best=ranked[0], candidates=ranked, certificate=certificate
    )


def judge(question: Question, plan: Plan, progress: Progress | None = None) -> Answer:
    """Score one given plan; infeasible where it cannot run, feasible otherwise, with the SLOs it misses.

    Raises
    ------
    CapacityError    a request that no plan of this model could serve
    """
    check_lengths(question)
    broken = violations(question.instance(), plan)
    # Balance and bandwidth keep hopeless plans out of a search; a plan that is asked for is simulated all the same.
    fatal = [v for v in broken if v.family not in ("balance", "bandwidth")]
    nothing = Certificate(
        space=1,
        infeasible=dict.fromkeys(FAMILIES, 0),
        bounded=0,
        simulated=0,
        cut_short=0,
        missed=0,
        optimal=True,
        gap=None,
    )
    if fatal:
        infeasible = {**nothing.infeasible, fatal[0].family: 1}
        reason = f"{plan} cannot run: " + "; ".join(f"{v.family}: {v.text}" for v in fatal)
        return Answer(
            status="infeasible",
            best=None,
            candidates=(),
            certificate=replace(nothing, infeasible=infeasible),
            reason=reason,
        )
    tell = progress or silent
    evaluator = Evaluator(question, gaps=int(question.trace.output.sum()) <= MOST_GAPS)
    tell_compiling(tell, evaluator, [plan])
    tell("simulating the plan", 0, 1)
    candidate = evaluator.simulate(plan, evaluator.bound(plan)[0])
    certificate = replace(nothing, simulated=1, missed=int(not candidate.meets_slos), gap=0.0)
    return Answer(status="feasible", best=candidate, candidates=(candidate,), certificate=certificate)


class Queued(NamedTuple):
    """A plan to simulate: its bounds, its place among equals, and whether its layers are yet to be moved."""

    bound: Costs
    place: int
    plan: Plan
    movable: bool


class Simulated(NamedTuple):
    """Plans with a score, how many were cut short, and how many turned out to be others with their layers even."""

    done: list[Candidate]
    cut_short: int
    repeated: int


def simulate_queue(
    queue: Sequence[Queued],
    evaluator: Evaluator,
    moves: Callable[[Plan], Plan | None],
    tell: Progress,
    top: int,
    deadline: float,
    worst: Costs = (float("inf"),),
) -> Simulated:
    """Score plans best bound first, a round at a time, until no bound can beat the `top`-th best or time is up.

    None is scored that is worse than `worst` from the beginning.
    """
    question = evaluator.question
    done: list[Candidate] = []
    cut_short = repeated = position = 0
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        while position < len(queue):
            items = [item for item in queue[position : position + ROUND] if item.bound <= worst]
            if not items or (position and monotonic() > deadline):
                break
            position += len(items)
            moved = [moves(item.plan) if item.movable else item.plan for item in items]
            batch = [(item.bound, plan) for item, plan in zip(items, moved, strict=True) if plan is not None]
            repeated += len(items) - len(batch)
            tell_compiling(tell, evaluator, (plan for _, plan in batch))
            for candidate in pool.map(partial(_challenge, evaluator, worst), batch):
                if candidate is None:
                    cut_short += 1
                else:
                    done.append(candidate)
                tell("simulating plans", len(done) + cut_short, len(queue))
            good = sorted(question.costs(c.metrics) for c in done if c.meets_slos)
            worst = min(worst, good[top - 1]) if len(good) >= top else worst
    return Simulated(done, cut_short, repeated)


def how_far(best: Costs, left: Iterable[Costs]) -> float:
    """How far the best found can be from the best there is, as a share, where what is left has these bounds.

    It is that by the first objective in which any of what is left, being as good by those before, can be better; 0
    where none can.
    """
    equal = list(left)
    for place, cost in enumerate(best):
        slack = 4 * ROUNDING * abs(cost)  # bounds are lowered by what rounding may have added
        least = min((bound[place] for bound in equal), default=cost)
        if least < cost - slack:
            return (cost - least) / abs(cost)
        equal = [bound for bound in equal if bound[place] <= cost + slack]
    return 0.0


def _challenge(evaluator: Evaluator, worst: Costs, item: tuple[Costs, Plan]) -> Candidate | None:
    bound, plan = item
    return evaluator.challenge(plan, bound[0], worst)


def _enumerate(instance: Instance, formulation: Formulation) -> tuple[dict[str, int], Enumeration]:
    """Feasible plans, and how many of the space each constraint family takes away in turn."""
    left = formulation.count(instance, ())
    counts = {"space": left}
    for index, family in enumerate(_COUNTED):
        after = formulation.count(instance, _COUNTED[: index + 1])
        counts[family] = left - after
        left = after
    feasible = formulation.enumerate(instance)
    held = feasible
    if instance.tpot_limit_ns is not None:
        held = formulation.enumerate(instance, [f for f in FAMILIES if f != "bandwidth"])
    listed, fast = (len(found.plans) + len(found.movable) for found in (held, feasible))
    counts["memory"], counts["bandwidth"] = left - listed, listed - fast
    return counts, feasible


def check_lengths(question: Question) -> None:
    """Refuse a prompt that fills the model's length by itself: no plan helps."""
    longest = int(question.trace.prompt.max())
    if longest >= question.settings.max_model_len:
        raise CapacityError(
            f"request {int(question.trace.prompt.argmax())}: a prompt of {longest} tokens leaves no room to answer "
            f"within max_model_len {question.settings.max_model_len}; {question.model.name} is made for "
            f"{question.model.max_position} tokens: raise max_model_len, or use another model or a trace with shorter "
            "prompts"
        )


def rank(question: Question, candidate: Candidate) -> tuple[Costs, int, str]:
    """Better first: the objectives in turn, fewer GPUs, the text form, so that ties fall the same way every time."""
    return question.costs(candidate.metrics), candidate.plan.devices, str(candidate.plan)


def _miss(question: Question, candidate: Candidate) -> float:
    """How far a plan is from the goals it misses: the worst relative excess."""
    missed = (slo for slo in question.slos if not candidate.metrics.slo_met[slo.text])
    return max((-slo.margin(candidate.metrics.judged(slo)) for slo in missed), default=0.0)


def why_not(evaluator: Evaluator, plans: Sequence[Plan], done: Sequence[Candidate]) -> str:
    """One sentence on why none of the feasible plans is an answer, with the numbers of the one that comes closest."""
    question = evaluator.question
    if not plans:
        return nearest_violation(question.instance())
    closest = min(done, key=lambda c: _miss(question, c), default=None)
    if closest is None:
        # Every plan was ruled out by a bound; the one with the least bound shows by how much.
        first = min(plans, key=lambda plan: evaluator.bound(plan)[0])
        closest = evaluator.simulate(first)
    return (
        f"no feasible plan meets the SLOs; the closest, {closest.plan}, misses "
        f"{misses(closest.metrics, question.slos)}: relax these, offer more or faster GPUs, or lighten the trace"
    )


def tell_compiling(tell: Progress, evaluator: Evaluator, plans: Iterable[Plan]) -> None:
    """Say that the next simulations will take longer, where they will."""
    from apex_opt.simulator.pack import needs_compiling

    if any(needs_compiling(evaluator.question.settings_for(plan), plan.stages) for plan in plans):
        tell("compiling the simulator, once on this machine: a few seconds", 0, 0)


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""
