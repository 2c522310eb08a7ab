"""The highest rate of requests that plans sustain within the goals, and the fewest GPUs for a rate.

Whether a plan sustains a rate is judged by `apex_opt.search.steady`. Rates form a grid (`apex_opt.search.rates`), each
(1 + resolution) times the one before, with the trace's own among them. On it a plan's highest rate is found by going up
or down, in growing strides, until its first run fails or holds, then by bisection; from there it goes down until the
further runs hold as well. That assumes that goals which fail at a rate fail at all higher ones.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.errors import UsageError
from apex_opt.figures.goals import step_limit_s
from apex_opt.plan.memory import kv_blocks, stage_memory
from apex_opt.search.answer import misses
from apex_opt.search.capacity_answer import Capacity, PlanRate, RateCertificate
from apex_opt.search.rates import Grid, highest_step
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
from apex_opt.search.steady import DOUBLINGS, Steady, Trial
from apex_opt.simulator.law import RATE_BITS
from apex_opt.units import NS_PER_S
from apex_opt.workload.steady import rate_of

if TYPE_CHECKING:
    from apex_opt.plan.plan import Plan
    from apex_opt.search.answer import Candidate, Status
    from apex_opt.search.evaluator import Evaluator
    from apex_opt.search.question import Question
    from apex_opt.search.search import Formulation, Progress

ASSUMPTION: Final = "goals that fail at a rate fail at every higher one"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A plan, the last step that it sustains, and why not the next."""

    plan: Plan
    step: int
    trial: Trial
    after: Trial | None

    @property
    def rank(self) -> tuple[int, int, str]:
        """Better first: rate, then fewer GPUs, then the text form, so that ties fall the same way every time."""
        return -self.step, *_size(self.plan)


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
    steady = Steady(question)
    longest = len(question.trace) * steady.loops << DOUBLINGS
    grid = Grid.of(rate_of(question.trace), resolution, longest)
    space = _listed(question, formulation, plan, tell)
    alone = steady.at(grid.rate_per_s(grid.low))
    possible = _possible(alone, space, tell)
    guesses = {plan: _guess(steady.own, plan) for plan in possible}
    queue = sorted(possible, key=lambda plan: (-guesses[plan], *_size(plan)))
    found: list[_Found] = []
    bounded = 0
    tell_compiling(tell, steady.own, queue)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for start in range(0, len(queue), ROUND):
            tell("searching rates", start, len(queue))
            last = sorted(found, key=lambda item: item.rank)[top - 1] if len(found) >= top else None
            batch = queue[start : start + ROUND]
            look = partial(_search_plan, steady, grid, last)
            for result, runs in pool.map(look, batch, [guesses[plan] for plan in batch]):
                bounded += not runs
                if result is not None:
                    found.append(result)
        best = sorted(found, key=lambda item: item.rank)[:top]
        plans = tuple(pool.map(partial(_ended, steady, grid), best))
    certificate = RateCertificate(
        space=space.size,
        infeasible=space.infeasible,
        bounded=len(space.plans) - len(queue) + bounded,
        ruled_out=len(queue) - bounded - len(found),
        found=len(found),
        larger=0,
        simulations=space.simulations + steady.simulations,
        complete=space.complete,
        repeated=space.repeated,
    )
    reason = None
    if not plans:
        one_by_one = steady.at(grid.rate_per_s(grid.low), 1).question
        reason = _why_not("even at one request at a time", one_by_one, formulation, space)
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
    steady = Steady(question)
    evaluator = steady.at(rate_per_s)
    asked = evaluator.question
    space = _listed(asked, formulation, plan, tell)
    possible = _possible(evaluator, space, tell)
    found: list[tuple[Candidate, Trial]] = []
    failed: list[tuple[Plan, Trial]] = []
    bounded = seen = 0
    tell_compiling(tell, evaluator, possible)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for gpus in sorted({plan.devices for plan in possible}):
            bounds = {plan: evaluator.bounds(plan, asked.objectives)[0] for plan in possible if plan.devices == gpus}
            queue = sorted(bounds, key=lambda plan: (bounds[plan], str(plan)))
            for start in range(0, len(queue), ROUND):
                tell("simulating plans", seen, len(possible))
                costs = sorted(asked.costs(candidate.metrics) for candidate, _ in found)
                worst = costs[top - 1] if len(costs) >= top else evaluator.any_cost
                batch = [plan for plan in queue[start : start + ROUND] if bounds[plan] <= worst]
                bounded += len(queue[start : start + ROUND]) - len(batch)
                seen += len(queue[start : start + ROUND])
                trials = pool.map(partial(_sustains, steady, rate_per_s, worst), batch)
                for item, trial in zip(batch, trials, strict=True):
                    if trial.holds and trial.first is not None:
                        found.append((trial.first, trial))
                    else:
                        failed.append((item, trial))
            if found:
                break
    best = sorted(found, key=lambda item: (asked.costs(item[0].metrics), str(item[0].plan)))[:top]
    certificate = RateCertificate(
        space=space.size,
        infeasible=space.infeasible,
        bounded=len(space.plans) - len(possible) + bounded,
        ruled_out=seen - bounded - len(found),
        found=len(found),
        larger=len(possible) - seen,
        simulations=space.simulations + steady.simulations,
        complete=space.complete,
        repeated=space.repeated,
    )
    where = f"at {rate_per_s:.4g} requests/s"
    return Capacity(
        status=space.status(bool(best)),
        asked_per_s=rate_per_s,
        resolution=None,
        plans=tuple(
            PlanRate(plan=first.plan, rate_per_s=rate_per_s, holds=first, evidence=trial.evidence)
            for first, trial in best
            if trial.evidence is not None
        ),
        certificate=certificate,
        reason=None if best else _near_miss(where, failed) or _why_not(where, asked, formulation, space),
    )


def _search_plan(
    steady: Steady, grid: Grid, last: _Found | None, plan: Plan, guess_per_s: float
) -> tuple[_Found | None, int]:
    """The last step that a plan sustains, where it is among the best so far; and the rates looked at."""
    low = grid.low
    if last is not None:
        low = last.step if _size(plan) < _size(last.plan) else last.step + 1
    if low > grid.high:
        return None, 0
    trials: dict[int, Trial] = {}

    def holds(step: int) -> bool:
        if step not in trials:
            trials[step] = steady.run(plan, grid.rate_per_s(step))
        return trials[step].holds

    start = grid.below(guess_per_s) if last is None else low
    step = highest_step(holds, low=low, high=grid.high, start=start)
    while step is not None and step >= low:
        if holds(step):
            trials[step] = steady.confirmed(plan, grid.rate_per_s(step), trials[step])
            if trials[step].holds:
                return _Found(plan=plan, step=step, trial=trials[step], after=trials.get(step + 1)), len(trials)
        step = _lower(grid, trials, step)
    return None, len(trials)


def _lower(grid: Grid, trials: dict[int, Trial], step: int) -> int:
    """The next step to try below one that is not sustained."""
    trial = trials[step]
    evidence = trial.evidence
    if trial.why == "saturated" and evidence is not None and evidence.saturated_per_s is not None:
        lower = grid.below(evidence.saturated_per_s / (1 + evidence.margin))
        if lower < step - 1:
            trials[lower + 1] = trial
            return lower
    return step - 1


def _sustains(steady: Steady, rate_per_s: float, worst: tuple[float, ...], plan: Plan) -> Trial:
    """A plan at a rate, where it costs no more than `worst`."""
    trial = steady.run(plan, rate_per_s, worst)
    return steady.confirmed(plan, rate_per_s, trial) if trial.holds else trial


def _ended(steady: Steady, grid: Grid, found: _Found) -> PlanRate:
    """A plan with its run at the last rate that it sustains, and what is missed at the next."""
    trial, after = found.trial, found.after
    assert trial.run is not None and trial.evidence is not None, "it holds"
    next_rate, missed = None, dict[str, float]()
    if found.step < grid.high:
        assert after is not None, "the next step was asked about"
        next_rate = grid.rate_per_s(found.step + 1)
        if after.run is None:
            after = Trial(why="goals", run=steady.at(next_rate, after.loops).simulate(found.plan))
        missed = steady.missed(after)
    return PlanRate(
        plan=found.plan,
        rate_per_s=grid.rate_per_s(found.step),
        holds=trial.run,
        evidence=trial.evidence,
        next_rate_per_s=next_rate,
        why="" if after is None else after.why,
        missed=missed,
    )


def _check_goals(question: Question) -> None:
    """Refuse what a rate cannot be searched by."""
    rate_of(question.trace)
    if not question.slos:
        raise UsageError("--slo: a highest rate needs goals that end it, such as ttft_p95<=500ms,tpot_p95<=50ms")
    if wrong := [slo.text for slo in question.slos if slo.figure.of == "run" and not slo.figure.exact]:
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

    Prompts fill their batches; as many sequences decode at once as the KV cache and the tightest goal on TPOT allow. In
    a pipeline these gather in one batch, as a batch takes all that are free.
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
    limit_s = step_limit_s(question.slos)
    limit_ns = math.inf if limit_s is None else NS_PER_S * limit_s
    step_ns = np.sum(steps, axis=0)
    last = max(int((step_ns <= limit_ns).sum()) - 1, 0)
    busy_ns = max(
        prompt * law.mixed_ns[-1] / (len(law.mixed_ns) - 1)
        + prompt**2 / 2 * law.pair_rate[-1] / 2**RATE_BITS / law.copies
        for law in laws
    )
    busy_ns += output * step_ns[last] / sequences[last]
    return float(plan.replicas * NS_PER_S / busy_ns)


def _near_miss(where: str, failed: list[tuple[Plan, Trial]]) -> str | None:
    """One sentence on a plan that meets the goals for a while; None where there is none."""
    for plan, trial in failed:
        if trial.why == "queue":
            return f"{where}, {plan} meets the goals at first, but its queue grows: lower the rate or offer more GPUs"
        if trial.why == "saturated":
            return f"{where}, {plan} meets the goals, but serves hardly more when saturated: lower the rate"
        if trial.why == "prediction":
            return f"{where}, {plan} meets the goals in one run and could miss them in another: lower the rate"
    return None


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
