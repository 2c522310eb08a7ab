"""The highest rate of requests that plans take within the goals, and the fewest GPUs for a rate.

A trace is brought to a rate by dividing its arrival times; lengths and order stay. Rates form a grid, each
(1 + resolution) times the one before, with the trace's own among them. On it a plan's highest rate is found by doubling
or halving until the goals fail or hold, then by bisection. That assumes that goals which fail at a rate fail at all
higher ones. They need not: batches fall differently at every rate, and a percentile of few requests moves with them. So
what is stated is simulated: the rate found, where the goals hold, the next one, where they do not, and `NEAR` rates on
either side, which show how sharp the limit is.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.errors import UsageError
from apex_opt.plan.memory import kv_blocks, stage_memory
from apex_opt.search.answer import misses
from apex_opt.search.evaluator import Evaluator
from apex_opt.search.search import (
    ROUND,
    bound_plans,
    check_lengths,
    judge,
    list_plans,
    search,
    settled,
    silent,
    tell_compiling,
)
from apex_opt.simulator.law import RATE_BITS
from apex_opt.units import NS_PER_S
from apex_opt.workload.slo import LATENCIES
from apex_opt.workload.trace import MAX_ARRIVAL_NS

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.plan.plan import Plan
    from apex_opt.search.answer import Candidate, Status
    from apex_opt.search.question import Question
    from apex_opt.search.search import Formulation, Progress
    from apex_opt.workload.trace import Trace

SLOWEST_PER_S: Final = 1e-6
FASTEST_PER_S: Final = 1e6
"""Rates that are looked at: far below, requests are alone; far above, all have arrived before the first is answered."""

NEAR: Final = 5
"""Rates simulated on either side of the one found."""

ASSUMPTION: Final = "goals that fail at a rate fail at every higher one"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRate:
    """A plan at a rate at which the goals hold.

    Parameters
    ----------
    plan : Plan
    rate_per_s : float                 requests per second
    holds : Candidate                  its run at this rate
    next_rate_per_s : float or None    next rate of the grid; None at its end, or where a rate was given
    fails : Candidate or None          its run at the next rate, which misses a goal
    near : tuple of (float, bool)      rates of the grid on either side, slowest first, and whether the goals hold there
    """

    plan: Plan
    rate_per_s: float
    holds: Candidate
    next_rate_per_s: float | None = None
    fails: Candidate | None = None
    near: tuple[tuple[float, bool], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCertificate:
    """How every plan of the space was accounted for.

    Parameters
    ----------
    space : int              plans there are
    infeasible : mapping     plans that break a constraint family, charged to the first in order
    bounded : int            plans that a lower bound ruled out: they miss a goal at any rate, or are no better
    ruled_out : int          plans that missed a goal, or the objective of those found, at the rate they had to reach
    repeated : int           plans whose layers, moved to lighten the heaviest stage, stay even: listed already
    found : int              plans whose highest rate was found or, where a rate was given, that hold at it
    larger : int             plans on more GPUs than were needed for the rate given
    simulations : int        runs of all plans together
    complete : bool          every plan is accounted for
    """

    space: int
    infeasible: dict[str, int]
    bounded: int
    ruled_out: int
    found: int
    larger: int
    simulations: int
    complete: bool
    repeated: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Plans with the highest rate, or on the fewest GPUs for a rate, best first; or why there is none.

    Parameters
    ----------
    status : "optimal", "infeasible", or "feasible" where one plan was asked about or not all were seen
    asked_per_s : float or None        the rate given; None where the highest was asked for
    resolution : float or None         step of the grid of rates, as a share
    plans : tuple of PlanRate
    certificate : RateCertificate
    reason : str or None               why there is no plan
    """

    status: Status
    asked_per_s: float | None
    resolution: float | None
    plans: tuple[PlanRate, ...]
    certificate: RateCertificate
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Space:
    """Plans to choose from, and those that cannot run."""

    size: int
    infeasible: dict[str, int]
    plans: tuple[Plan, ...]
    complete: bool
    given: bool
    repeated: int = 0
    simulations: int = 0
    reason: str | None = None

    def status(self, found: bool) -> Status:
        if not found:
            return "infeasible"
        return "feasible" if self.given or not self.complete else "optimal"


class _Rates:
    """A question at every rate of a grid; costs do not depend on the rate and are shared."""

    def __init__(self, question: Question, resolution: float) -> None:
        own = own_rate(question.trace)
        step = math.log1p(resolution)
        slowest = max(SLOWEST_PER_S / own, int(question.trace.arrival_ns[-1]) / MAX_ARRIVAL_NS)
        self.ratio = 1 + resolution
        self.doubling = max(1, round(math.log(2) / step))
        self.low = min(0, math.ceil(math.log(slowest) / step))
        self.high = max(0, math.floor(math.log(FASTEST_PER_S / own) / step))
        self._at = {0: Evaluator(question)}

    def at(self, step: int) -> Evaluator:
        """Scores of plans at a step; 0 is the trace's own rate."""
        if step not in self._at:
            own = self._at[0]
            evaluator = Evaluator(at_rate(own.question, self.ratio**step))
            evaluator.costs = own.costs
            self._at[step] = evaluator
        return self._at[step]

    def run(self, plan: Plan, step: int) -> Candidate | None:
        """The run of a plan at a step, where the goals hold; else cut short."""
        evaluator = self.at(step)
        candidate = evaluator.challenge(plan, None, evaluator.any_cost)
        return candidate if candidate is not None and candidate.meets_slos else None

    def rate_per_s(self, step: int) -> float:
        return own_rate(self.at(step).question.trace)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A plan and the last step at which it holds."""

    plan: Plan
    step: int
    holds: Candidate

    @property
    def rank(self) -> tuple[int, int, str]:
        """Better first: rate, then fewer GPUs, then the text form, so that ties fall the same way every time."""
        return -self.step, *_size(self.plan)


def own_rate(trace: Trace) -> float:
    """Requests per second of a trace.

    Raises
    ------
    UsageError    a trace that has none
    """
    if trace.rate_per_s is None:
        kind = "is a closed loop" if trace.concurrency is not None else "has all its requests arrive at once"
        raise UsageError(
            f"--trace: {trace.name} {kind}, so there is no rate to change; give one with arrival times, such as "
            "poisson:rate=2,n=500"
        )
    return trace.rate_per_s


def at_rate(question: Question, factor: float) -> Question:
    """The question with its requests coming `factor` times as fast, in whole nanoseconds."""
    return question if factor == 1 else replace(question, trace=question.trace.stretched(1 / factor))


def highest_rate(
    question: Question,
    formulation: Formulation,
    *,
    plan: Plan | None = None,
    resolution: float = 0.02,
    progress: Progress | None = None,
    top: int = 1,
) -> Capacity:
    """The plans that take the highest rates within the goals.

    Plans are looked at in the order of a guess of their rate, four at a time. The first ones have their highest rate
    found; of the others each must first hold at the rate of the `top`-th best, or at the next one where it is not
    smaller, so that most take one simulation.

    Parameters
    ----------
    question : Question                latency goals are required
    formulation : Formulation          the program that enumerates feasible plans
    plan : Plan, optional              the only one to ask about
    resolution : float                 step of the grid of rates, as a share, above 0
    progress : callable, optional      told (what, done, total) along the way
    top : int                          plans to find, each exactly

    Raises
    ------
    UsageError       a trace without rate, no goals, goals on throughput
    CapacityError    a request no engine of this model could serve, whatever the plan
    """
    tell = progress or silent
    _check_goals(question)
    rates = _Rates(question, resolution)
    space = _listed(question, formulation, plan, tell)
    possible = _possible(rates.at(0), space, tell)
    queue = sorted(possible, key=lambda plan: (-_guess(rates.at(0), plan), *_size(plan)))
    found: list[_Found] = []
    bounded, simulations = 0, space.simulations
    tell_compiling(tell, rates.at(0), queue)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for start in range(0, len(queue), ROUND):
            tell("searching rates", start, len(queue))
            last = sorted(found, key=lambda item: item.rank)[top - 1] if len(found) >= top else None
            for result, runs in pool.map(partial(_search_plan, rates, last), queue[start : start + ROUND]):
                simulations += runs
                bounded += not runs
                if result is not None:
                    found.append(result)
        best = sorted(found, key=lambda item: item.rank)[:top]
        plans = tuple(pool.map(partial(_both_ends, rates), best))
    certificate = RateCertificate(
        space=space.size,
        infeasible=space.infeasible,
        bounded=len(space.plans) - len(queue) + bounded,
        ruled_out=len(queue) - bounded - len(found),
        found=len(found),
        larger=0,
        simulations=simulations + sum(len(item.near) for item in plans),
        complete=space.complete,
        repeated=space.repeated,
    )
    reason = None
    if not plans:
        reason = _why_not("even at one request at a time", rates.at(rates.low).question, formulation, space)
    return Capacity(
        status=space.status(bool(plans)),
        asked_per_s=None,
        resolution=resolution,
        plans=plans,
        certificate=certificate,
        reason=reason,
    )


def fewest_gpus(
    question: Question,
    formulation: Formulation,
    rate_per_s: float,
    *,
    plan: Plan | None = None,
    progress: Progress | None = None,
    top: int = 1,
) -> Capacity:
    """The plans on the fewest GPUs that take a rate within the goals, the best by the objective first.

    Numbers of GPUs are looked at from the smallest up, until one has a plan that holds. GPUs of a cluster are alike, so
    the fewest also are the cheapest.

    Parameters
    ----------
    rate_per_s : float    requests per second; the others as for `highest_rate`

    Raises
    ------
    UsageError       a trace without rate, no goals, goals on throughput
    CapacityError    a request no engine of this model could serve, whatever the plan
    """
    tell = progress or silent
    _check_goals(question)
    asked = at_rate(question, rate_per_s / own_rate(question.trace))
    space = _listed(asked, formulation, plan, tell)
    evaluator = Evaluator(asked)
    possible = _possible(evaluator, space, tell)
    found: list[Candidate] = []
    bounded = seen = 0
    simulations = space.simulations
    tell_compiling(tell, evaluator, possible)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for gpus in sorted({plan.devices for plan in possible}):
            bounds = {plan: evaluator.bounds(plan, asked.objectives)[0] for plan in possible if plan.devices == gpus}
            queue = sorted(bounds, key=lambda plan: (bounds[plan], str(plan)))
            for start in range(0, len(queue), ROUND):
                tell("simulating plans", seen, len(possible))
                costs = sorted(asked.costs(candidate.metrics) for candidate in found)
                worst = costs[top - 1] if len(costs) >= top else evaluator.any_cost
                batch = [plan for plan in queue[start : start + ROUND] if bounds[plan] <= worst]
                bounded += len(queue[start : start + ROUND]) - len(batch)
                seen += len(queue[start : start + ROUND])
                simulations += len(batch)
                challenge = partial(evaluator.challenge, worst=worst)
                for candidate in pool.map(challenge, batch, [bounds[plan][0] for plan in batch]):
                    if candidate is not None and candidate.meets_slos:
                        found.append(candidate)
            if found:
                break
    best = sorted(found, key=lambda item: (asked.costs(item.metrics), str(item.plan)))[:top]
    certificate = RateCertificate(
        space=space.size,
        infeasible=space.infeasible,
        bounded=len(space.plans) - len(possible) + bounded,
        ruled_out=seen - bounded - len(found),
        found=len(found),
        larger=len(possible) - seen,
        simulations=simulations,
        complete=space.complete,
        repeated=space.repeated,
    )
    return Capacity(
        status=space.status(bool(best)),
        asked_per_s=rate_per_s,
        resolution=None,
        plans=tuple(PlanRate(plan=item.plan, rate_per_s=rate_per_s, holds=item) for item in best),
        certificate=certificate,
        reason=None if best else _why_not(f"at {rate_per_s:.4g} requests/s", asked, formulation, space),
    )


def highest_step(holds: Callable[[int], bool], *, low: int, high: int, start: int, doubling: int) -> int | None:
    """The last step from `low` to `high` that holds, or None, if none holds after one that does not.

    Parameters
    ----------
    holds : callable    asked about `start` first, and in the end about the step found and the next
    doubling : int      steps by which to go up or down until the answer changes
    """
    if holds(start):
        good = start
        while (bad := min(good + doubling, high)) > good and holds(bad):
            good = bad
        if good == high:
            return high
    else:
        if start == low or not holds(low):
            return None
        bad = start
        while (good := max(bad - doubling, low)) > low and not holds(good):
            bad = good
    while bad - good > 1:
        middle = (good + bad) // 2
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good


def _search_plan(rates: _Rates, last: _Found | None, plan: Plan) -> tuple[_Found | None, int]:
    """The last step at which a plan holds, where it is among the best so far; and the simulations that took."""
    low = rates.low
    if last is not None:
        low = last.step if _size(plan) < _size(last.plan) else last.step + 1
    if low > rates.high:
        return None, 0
    runs: dict[int, Candidate | None] = {}

    def holds(step: int) -> bool:
        if step not in runs:
            runs[step] = rates.run(plan, step)
        return runs[step] is not None

    start = 0 if last is None else low
    step = highest_step(holds, low=low, high=rates.high, start=start, doubling=rates.doubling)
    if step is None or (candidate := runs[step]) is None:
        return None, len(runs)
    return _Found(plan=plan, step=step, holds=candidate), len(runs)


def _both_ends(rates: _Rates, found: _Found) -> PlanRate:
    """A plan with its run at the last rate that holds, a whole one at the next, and what holds around."""
    fails = next_rate = None
    near = range(max(found.step - NEAR, rates.low), min(found.step + NEAR, rates.high) + 1)
    if found.step < rates.high:
        next_rate = rates.rate_per_s(found.step + 1)
        fails = rates.at(found.step + 1).simulate(found.plan)
        assert not fails.meets_slos, "a run was cut short without reason"
    return PlanRate(
        plan=found.plan,
        rate_per_s=rates.rate_per_s(found.step),
        holds=found.holds,
        next_rate_per_s=next_rate,
        fails=fails,
        near=tuple(
            (rates.rate_per_s(step), step != found.step + 1 and rates.run(found.plan, step) is not None)
            for step in near
            if step != found.step
        ),
    )


def _check_goals(question: Question) -> None:
    """Refuse what a rate cannot be searched by."""
    own_rate(question.trace)
    if not question.slos:
        raise UsageError("--slo: a highest rate needs goals that end it, such as ttft_p95<=500ms,tpot_p95<=50ms")
    if wrong := [slo.text for slo in question.slos if slo.metric not in (*LATENCIES, "cost")]:
        raise UsageError(
            f"--slo: {wrong[0]} moves with the rate itself; give goals on ttft, tpot, itl, e2e or cost, and a rate as "
            "--rate"
        )
    if tolerant := [part.name for part in question.objectives if part.tolerance]:
        raise UsageError(f"--objective: {tolerant[0]} has a tolerance, which capacity does not know; leave it out")


def _listed(question: Question, formulation: Formulation, plan: Plan | None, tell: Progress) -> _Space:
    """Feasible plans of the space, or the one asked about."""
    if plan is not None:
        answer = judge(question, plan, tell)
        return _Space(
            size=1,
            infeasible=answer.certificate.infeasible,
            plans=() if answer.best is None else (plan,),
            complete=True,
            given=True,
            simulations=answer.certificate.simulated,
            reason=answer.reason,
        )
    check_lengths(question)
    listed = list_plans(question, formulation, tell)
    plans, repeated = settled(question, formulation, listed, tell)
    return _Space(
        size=listed.space,
        infeasible=listed.counts,
        repeated=repeated,
        plans=plans,
        complete=listed.complete,
        given=False,
    )


def _possible(evaluator: Evaluator, space: _Space, tell: Progress) -> list[Plan]:
    """Plans that meet the goals at least where every request is alone."""
    bounds = bound_plans(evaluator, space.plans, (), tell)
    return [plan for plan, (_, possible) in zip(space.plans, bounds, strict=True) if possible]


def _guess(evaluator: Evaluator, plan: Plan) -> float:
    """Requests per second that would keep the busiest stage of a plan busy: no bound, for the order alone.

    Prompts fill their batches; as many sequences decode at once as the KV cache and the tightest goal on TPOT allow.
    """
    question = evaluator.question
    settings, trace = question.settings_for(plan), question.trace
    laws = evaluator.costs.plan_cost(plan).laws
    prompt = float(trace.prompt.mean())
    output = float(trace.generated(settings.max_model_len).mean())
    held = prompt + output / 2
    blocks = kv_blocks(stage_memory(question.model, question.cluster.gpu, plan, settings)) * plan.attention.dp
    most = int(blocks * settings.block_size / held / plan.stages)
    sequences = np.arange(1, min(max(most, 1), settings.max_num_seqs) + 1)
    steps = [law.decode_ns[sequences] + sequences * held * law.context_rate[sequences] / 2**RATE_BITS for law in laws]
    limit_ns = NS_PER_S * min((slo.limit for slo in question.slos if slo.metric == "tpot"), default=math.inf)
    last = max(int((np.sum(steps, axis=0) <= limit_ns).sum()) - 1, 0)
    busy_ns = max(
        prompt * law.mixed_ns[-1] / (len(law.mixed_ns) - 1)
        + prompt**2 / 2 * law.pair_rate[-1] / 2**RATE_BITS / law.copies
        + output * step[last] / sequences[last]
        for law, step in zip(laws, steps, strict=True)
    )
    return float(plan.replicas * NS_PER_S / busy_ns)


def _why_not(where: str, question: Question, formulation: Formulation, space: _Space) -> str:
    """One sentence on why no plan holds, with the numbers of the one that comes closest."""
    if not space.given:
        reason = str(search(question, formulation).reason)
        return f"{where}, {reason}" if space.plans else reason
    if not space.plans:
        return str(space.reason)
    (plan,) = space.plans
    closest = judge(question, plan).best
    assert closest is not None, "the plan can run"
    return f"{where}, {plan} misses {misses(closest.metrics, question.slos)}: relax these or ask about another plan"


def _size(plan: Plan) -> tuple[int, str]:
    return plan.devices, str(plan)
