"""The highest rate of requests that deployments sustain within the goals, and the fewest GPUs for a rate.

Whether a deployment sustains a rate is judged by `steady`. Rates form a grid (`rates`), each (1 + resolution) times the
one before, with the trace's own among them. On it the highest rate of a deployment is found by going up or down, in
growing strides, until its first run fails or holds, then by bisection; from there it goes down until the further runs
hold as well. That assumes that goals which fail at a rate fail at all higher ones.
"""

from __future__ import annotations

from functools import partial
from math import inf
from time import monotonic, time
from typing import TYPE_CHECKING, Final

from apex_opt.errors import UsageError
from apex_opt.search.answer import misses
from apex_opt.search.best_first import Unfinished, best_first
from apex_opt.search.incumbent import FREE, Incumbent
from apex_opt.search.ledger import Ledger
from apex_opt.search.search import judge, search, silent, tell_compiling
from apex_opt.studies.capacity_answer import Capacity, PlanRate
from apex_opt.studies.one_rate import Found, highest_of, sustained_by
from apex_opt.studies.rate_space import Space, beside, by_guess
from apex_opt.studies.rates import Grid
from apex_opt.studies.steady import DOUBLINGS, Steady, Trial
from apex_opt.studies.trials import LATE, Here
from apex_opt.workload.steady import rate_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from apex_opt.plans.deployment import Deployment
    from apex_opt.search.answer import Scored
    from apex_opt.search.best_first import Branch, Challenge
    from apex_opt.search.ledger import Costs, Part
    from apex_opt.search.problem import Problem
    from apex_opt.search.scorer import Scorer
    from apex_opt.search.search import Formulations, Progress
    from apex_opt.studies.trials import Trials

ASSUMPTION: Final = "goals that fail at a rate fail at every higher one"


class _Fastest(Incumbent):
    """What a search for the highest rates is after. Bounds: rate that none exceeds, guess of it (negative), GPUs."""

    in_order = False

    def __init__(self, grid: Grid, top: int) -> None:
        self._grid, self._top = grid, top
        self.looked: dict[Deployment, Found] = {}
        self._ranked: list[Found] = []

    @property
    def best(self) -> list[Found]:
        return self._ranked[: self._top]

    @property
    def last(self) -> Found | None:
        """The last of those to show; None where these are fewer."""
        return self._ranked[self._top - 1] if len(self._ranked) >= self._top else None

    def order(self, bound: Costs) -> Costs:
        return bound[1:]

    def admits(self, bound: Costs, part: Part) -> bool:
        if self.last is None:
            return True
        # As fast on no more GPUs it may come first.
        step = self.last.step + (bound[2] > self.last.deployment.devices)
        return step <= self._grid.high and self._grid.rate_per_s(step) <= -bound[0]

    def take(self, scored: Scored, part: Part) -> None:
        self._ranked = sorted([*self._ranked, self.looked[scored.deployment]], key=lambda found: found.rank)


class _Cheapest(Incumbent):
    """What a search at a rate is after: the best by the objectives on so many GPUs. Bounds: GPUs, costs."""

    def __init__(self, problem: Problem, top: int) -> None:
        self._problem, self._top = problem, top
        self.trials: dict[Deployment, Trial] = {}
        self._ranked: list[tuple[Costs, str, Scored]] = []

    @property
    def best(self) -> list[Scored]:
        return [scored for _, _, scored in self._ranked[: self._top]]

    def worst(self, part: Part) -> Costs:
        return self._ranked[self._top - 1][0] if len(self._ranked) >= self._top else FREE

    def take(self, scored: Scored, part: Part) -> None:
        costs = (float(scored.devices), *self._problem.costs(scored.metrics))
        self._ranked = sorted([*self._ranked, (costs, scored.text, scored)], key=lambda ranked: ranked[:2])


def highest_rate(
    problem: Problem,
    formulation: Formulations,
    *,
    deployment: Deployment | None = None,
    resolution: float = 0.02,
    progress: Progress | None = None,
    top: int = 1,
    time_limit_s: float | None = None,
    like: Scorer | None = None,
    trials: Callable[[Steady], Trials] = Here,
) -> Capacity:
    """The deployments that take the highest rates within the goals.

    They are looked at in the order of a guess of their rate, four at a time. The first ones have their highest rate
    found; of the others each must first hold at the rate of the `top`-th best, or at the next one where it is not
    smaller, so that most take one simulation, and none where its least work does not allow that rate.

    Parameters
    ----------
    problem : Problem                    latency goals are required
    formulation : Formulations           the programs that enumerate plans and split layers
    deployment : Deployment, optional    the only one to ask about
    resolution : float                   step of the grid of rates, as a share, above 0
    progress : callable, optional        told (what, done, total) along the way
    top : int                            deployments to find, each exactly
    time_limit_s : float, optional       after so long no simulation is begun, but for those of the first deployment
                                         where none was found by then
    like : Scorer, optional              of the same problem but for its trace and goals, whose costs serve as well
    trials : callable                    who tries deployments at rates for their judge, this process or workers
                                         (`Elsewhere`); it changes nothing in the answer

    Raises
    ------
    UsageError       a trace without rate, no goals, goals on throughput
    CapacityError    a request no engine of this model could serve, whatever the plan
    """
    tell, limit_s = progress or silent, inf if time_limit_s is None else time_limit_s
    deadline, until = monotonic() + limit_s, time() + limit_s
    _check_goals(problem)
    steady = Steady(problem, like)
    try_ = trials(steady)
    longest = len(problem.trace) * steady.loops << DOUBLINGS
    grid = Grid.of(rate_of(problem.trace), resolution, longest)
    space = Space.of(steady, steady.at(grid.rate_per_s(grid.low)), formulation, deployment, tell)
    incumbent = _Fastest(grid, top)

    def scores(runs: Sequence[Challenge], ahead: Iterable[Challenge]) -> Sequence[Scored | Unfinished | None]:
        last = None if incumbent.last is None else incumbent.last.rank

        def asked(run: Challenge, until: float = until) -> tuple[object, ...]:
            return grid, last, run[0], -run[1][1], until

        # Whatever the time, the first is searched to its end until there is one to answer with.
        wanted = [asked(run, until if incumbent.looked or place else inf) for place, run in enumerate(runs)]
        found = try_(highest_of, wanted, map(asked, ahead))
        incumbent.looked |= {run[0]: one for run, one in zip(runs, found, strict=True) if isinstance(one, Found)}
        return [one.trial.run if isinstance(one, Found) else one for one in found]

    prepare = partial(tell_compiling, tell, space.scorer.problem)
    branches: list[Branch] = [by_guess(part, [one for one in space.alone if one.part is part]) for part in space.parts]
    branches += [beside(product, (), incumbent.admits) for product in space.products]
    best_first(branches, incumbent, scores, _saying(tell, "searching rates"), deadline, prepare)
    last, best = incumbent.last, incumbent.best
    space.end(None if last is None else (-grid.rate_per_s(last.step), inf))
    ledger = Ledger(parts=space.parts, best=(-grid.rate_per_s(best[0].step),) if best else None)
    plans = tuple(_ended(steady, grid, found) for found in best)
    reason, told = None, 0
    if not plans:
        one_by_one = steady.at(grid.rate_per_s(grid.low), 1).problem
        reason, told = _why_not("even at one request at a time", one_by_one, formulation, space, ledger)
    return Capacity(
        status=space.status(ledger, bool(plans)),
        asked_per_s=None,
        resolution=resolution,
        plans=plans,
        ledger=ledger,
        larger=(0,) * len(space.parts),
        simulations=space.simulations + steady.simulations + told,
        reason=reason,
    )


def fewest_gpus(
    problem: Problem,
    formulation: Formulations,
    rate_per_s: float,
    *,
    deployment: Deployment | None = None,
    progress: Progress | None = None,
    top: int = 1,
    time_limit_s: float | None = None,
    like: Scorer | None = None,
    aside: Collection[Deployment] = (),
    trials: Callable[[Steady], Trials] = Here,
) -> Capacity:
    """The deployments on the fewest GPUs that take a rate within the goals, the best by the objective first.

    Numbers of GPUs are looked at from the smallest up, until one has a deployment that holds. Where GPUs are of one
    type the fewest also are the cheapest; of several types each counts as one, whatever its price.

    Parameters
    ----------
    rate_per_s : float          requests per second; the others as for `highest_rate`
    aside : set of Deployment   that are left out

    Raises
    ------
    UsageError       a trace without rate, no goals, goals on throughput
    CapacityError    a request no engine of this model could serve, whatever the plan
    """
    tell, limit_s = progress or silent, inf if time_limit_s is None else time_limit_s
    deadline, until = monotonic() + limit_s, time() + limit_s
    _check_goals(problem)
    steady = Steady(problem, like)
    try_, scorer = trials(steady), steady.at(rate_per_s)
    space = Space.of(steady, scorer, formulation, deployment, tell)
    incumbent = _Cheapest(scorer.problem, top)
    asked: list[Deployment] = []

    def scores(runs: Sequence[Challenge], ahead: Iterable[Challenge]) -> Sequence[Scored | Unfinished | None]:
        def asked_of(run: Challenge, until: float = until) -> tuple[object, ...]:
            one, bound, worst = run
            return one, rate_per_s, worst[1:] or FREE, bound[1:], until

        mine = [run for run in runs if run[0] not in aside]
        wanted = [asked_of(run, until if incumbent.trials or place else inf) for place, run in enumerate(mine)]
        found = try_(sustained_by, wanted, (asked_of(run) for run in ahead if run[0] not in aside))
        tried = {run[0]: trial for run, trial in zip(mine, found, strict=True)}
        incumbent.trials |= {one: trial for one, trial in tried.items() if trial is not LATE}
        return [_first_of(tried.get(run[0])) for run in runs]

    def prepare(deployments: Iterable[Deployment]) -> None:
        asked.extend(some := list(deployments))
        tell_compiling(tell, scorer.problem, some)

    sizes = space.sizes(problem.max_devices)
    larger = (0,) * len(space.parts)
    for place, gpus in enumerate(sizes):
        branches = list(space.at(gpus, rate_per_s))
        best_first(branches, incumbent, scores, _saying(tell, "simulating plans"), deadline, prepare)
        late = monotonic() > deadline
        if incumbent.best or late:
            beyond = tuple(space.beyond(part, gpus, problem.max_devices) for part in space.parts)
            for part, count in zip(space.parts, beyond, strict=True):
                if incumbent.best:
                    part.beat((float(gpus + 1),), count)
                elif count:
                    part.left.append(((float(sizes[place + 1]),), count))
            larger = beyond if incumbent.best else larger
            break
    found = incumbent.best
    space.end(incumbent.worst(space.parts[0]) if len(found) == top else None)
    best = (float(found[0].devices), *scorer.problem.costs(found[0].metrics)) if found else None
    ledger = Ledger(parts=space.parts, best=best)
    where = f"at {rate_per_s:.4g} requests/s"
    reason, told = None, 0
    if not found:
        failed = ((one, incumbent.trials[one]) for one in asked if one in incumbent.trials)
        reason = _near_miss(where, failed)
        if reason is None:
            reason, told = _why_not(where, scorer.problem, formulation, space, ledger)
    return Capacity(
        status=space.status(ledger, bool(found)),
        asked_per_s=rate_per_s,
        resolution=None,
        plans=tuple(
            PlanRate(rate_per_s=rate_per_s, holds=scored, evidence=evidence)
            for scored in found
            if (evidence := incumbent.trials[scored.deployment].evidence) is not None
        ),
        ledger=ledger,
        larger=larger,
        simulations=space.simulations + steady.simulations + told,
        reason=reason,
    )


def _saying(tell: Progress, what: str) -> Progress:
    """Tells of every round in the same words."""
    return lambda _, done, total: tell(what, done, total)


def _first_of(trial: Trial | Unfinished | None) -> Scored | Unfinished | None:
    """What a trial that holds is scored by."""
    if isinstance(trial, Trial):
        return trial.first if trial.holds else None
    return trial


def _ended(steady: Steady, grid: Grid, found: Found) -> PlanRate:
    """A deployment with its run at the last rate that it sustains, and what is missed at the next."""
    trial, after = found.trial, found.after
    assert trial.run is not None and trial.evidence is not None, "it holds"
    next_rate, missed = None, dict[str, float]()
    if found.step < grid.high:
        assert after is not None, "the next step was asked about"
        next_rate = grid.rate_per_s(found.step + 1)
        if after.run is None:
            after = Trial(why="goals", run=steady.at(next_rate, after.loops).simulate(found.deployment))
        missed = steady.missed(after)
    return PlanRate(
        rate_per_s=grid.rate_per_s(found.step),
        holds=trial.run,
        evidence=trial.evidence,
        next_rate_per_s=next_rate,
        why="" if after is None else after.why,
        missed=missed,
    )


def _check_goals(problem: Problem) -> None:
    """Refuse what a rate cannot be searched by."""
    rate_of(problem.trace)
    if not problem.slos:
        raise UsageError("--slo: a highest rate needs goals that end it, such as ttft_p95<=500ms,tpot_p95<=50ms")
    if wrong := [slo.text for slo in problem.slos if slo.figure.of == "run" and not slo.figure.exact]:
        raise UsageError(
            f"--slo: {wrong[0]} moves with the rate itself; give goals on ttft, tpot, itl, e2e or cost, and a rate as "
            "--rate"
        )
    if tolerant := [part.name for part in problem.objectives if part.tolerance]:
        raise UsageError(f"--objective: {tolerant[0]} has a tolerance, which capacity does not know; leave it out")


def _near_miss(where: str, failed: Iterable[tuple[Deployment, Trial]]) -> str | None:
    """One sentence on a deployment that meets the goals for a while; None where there is none."""
    for one, trial in failed:
        if trial.why == "queue":
            return f"{where}, {one} meets the goals at first, but its queue grows: lower the rate or offer more GPUs"
        if trial.why == "saturated":
            return f"{where}, {one} meets the goals, but serves hardly more when saturated: lower the rate"
        if trial.why == "prediction":
            return f"{where}, {one} meets the goals in one run and could miss them in another: lower the rate"
    return None


def _why_not(where: str, problem: Problem, formulation: Formulations, space: Space, ledger: Ledger) -> tuple[str, int]:
    """One sentence on why no deployment holds, with the numbers of the one that comes closest; and runs made for it."""
    if ledger.waiting:
        plans = f"{ledger.waiting:,} plan{'s' * (ledger.waiting != 1)}"
        left = f"the time limit was reached with {plans} left, before one was found that holds"
        return f"{where}, {left}", 0
    if space.given is None:
        answer = search(problem, formulation)
        runs = answer.told + sum(part.simulated for part in answer.ledger.parts)
        if answer.reason is None:
            return f"{where}, what meets the goals for a while falls behind: lower the rate or offer more GPUs", runs
        return f"{where}, {answer.reason}" if space.feasible else answer.reason, runs
    if not space.feasible:
        return str(space.reason), 0
    closest = judge(problem, space.given).best
    assert closest is not None, "the plan can run"
    missed = misses(closest.metrics, problem.slos)
    return f"{where}, {space.given} misses {missed}: relax these or ask about another plan", 1
