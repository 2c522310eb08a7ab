"""How problems are solved on the way to an explanation: each plan of the asked one is simulated at most once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, partial
from time import monotonic
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.figures import load_objective
from apex_opt.figures.measure import can_hold, statistic
from apex_opt.oracle.checks import decode_bytes
from apex_opt.search.best_first import Leaf, Queue, best_first, side_by_side
from apex_opt.search.facts import judged
from apex_opt.search.incumbent import FREE, Best, Incumbent
from apex_opt.search.ledger import Part
from apex_opt.search.scorer import Scorer
from apex_opt.search.search import rank, silent, tell_compiling
from apex_opt.studies.explain.kinds import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from apex_opt.figures import Goal, Objective
    from apex_opt.figures.run import Run
    from apex_opt.oracle.instance import Instance
    from apex_opt.plans.deployment import Deployment
    from apex_opt.search.answer import Scored
    from apex_opt.search.best_first import Simulated
    from apex_opt.search.ledger import Costs
    from apex_opt.search.problem import Problem
    from apex_opt.search.search import Progress
    from apex_opt.studies.explain.kinds import Diagnosis, Floored

    Goals = tuple[Goal, ...]

_PERCENTILES: Final = (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99))
_QUICKEST: Final = load_objective("makespan")


class OutOfTime(Exception):
    """The time limit was reached before what was begun was decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A deployment that a changed problem has: the best, unless the time was up first.

    `value` is its objective, where it was simulated.
    """

    deployment: Deployment
    value: float | None = None
    best: bool = True


class First(Incumbent):
    """What a search is after that asks whether any deployment meets the goals: the first that does."""

    def __init__(self, worst: Costs) -> None:
        self._worst = worst
        self.found: Scored | None = None

    def admits(self, bound: Costs, part: Part) -> bool:
        return self.found is None

    def worst(self, part: Part) -> Costs:
        return self._worst

    def take(self, scored: Scored, part: Part) -> None:
        self.found = self.found or scored


class Least(Incumbent):
    """What a search is after that asks for the least of some figure of runs; ties fall as in a search."""

    def __init__(self, cost: Callable[[Scored], float]) -> None:
        self._cost = cost
        self.found: tuple[float, int, str, Scored] | None = None

    def admits(self, bound: Costs, part: Part) -> bool:
        return self.found is None or bound[0] <= self.found[0]

    def take(self, scored: Scored, part: Part) -> None:
        ranked = self._cost(scored), scored.devices, scored.text, scored
        self.found = ranked if self.found is None or ranked[:3] < self.found[:3] else self.found


class Work:
    """What solves problems of one type of GPU until the time is up, and the runs of the one that was asked.

    Parameters
    ----------
    problem : Problem
    formulation : Diagnosis
    progress : callable            told (what, done, total) along the way
    time_limit_s : float           after so long every step ends in `OutOfTime`
    scorer : Scorer, optional      of the problem, with the facts it already has
    """

    def __init__(
        self,
        problem: Problem,
        formulation: Diagnosis,
        progress: Progress,
        time_limit_s: float = math.inf,
        scorer: Scorer | None = None,
    ) -> None:
        self.problem = problem
        self.formulation = formulation
        self._progress = progress
        self._deadline = monotonic() + time_limit_s
        self._scorer = scorer

    @cached_property
    def runs(self) -> Runs:
        """Runs of the plans of the asked problem."""
        return Runs(self._scorer or Scorer(self.problem), self)

    def tell(self, what: str, done: int = 0, total: int = 0) -> None:
        """Tell of a step, unless the time is up.

        Raises
        ------
        OutOfTime
        """
        if monotonic() > self._deadline:
            raise OutOfTime
        self._progress(what, done, total)

    def plans(self, problem: Problem) -> tuple[Deployment, ...]:
        """Feasible deployments of a problem, at every clock, the highest first."""
        return kind_of(problem).listed(problem, self.formulation, self.tell)

    def fits(self, problem: Problem) -> bool:
        """Whether some deployment satisfies the constraints."""
        self.tell("trying constraints")
        return kind_of(problem).fits(problem, self.formulation, self.tell)

    def some(self, problem: Problem) -> Deployment | None:
        """Some feasible deployment over few GPUs, if there is one."""
        return kind_of(problem).some(problem, self.formulation, silent)

    def solve(self, problem: Problem, plans: tuple[Deployment, ...] | None = None) -> Solved | None:
        """The best deployment, or where there are no goals one that fits; None where there is none.

        Parameters
        ----------
        problem : Problem
        plans : tuple of Deployment, optional    to choose from; by default all that are feasible

        Raises
        ------
        OutOfTime    before a plan was found
        """
        if not problem.slos:
            self.tell("trying constraints")
            found = self.some(problem)
            return None if found is None else Solved(deployment=found)
        plans = self.plans(problem) if plans is None else plans
        scorer = Scorer(problem)
        first = self._first(scorer, plans)
        if first is None:
            return None
        try:
            best = self._best(scorer, plans)
        except OutOfTime:
            return Solved(deployment=first.deployment, value=first.value, best=False)
        return Solved(deployment=best.deployment, value=problem.objective.value(best.metrics))

    def some_meets(self, problem: Problem, plans: Sequence[Deployment]) -> bool:
        """Whether some of these plans meets the goals."""
        return self._first(Scorer(problem), plans) is not None

    def search(
        self,
        scorer: Scorer,
        leaves: Sequence[Leaf],
        incumbent: Incumbent,
        challenge: Callable[[Deployment, Costs, Costs], Scored | None] | None = None,
    ) -> list[Simulated]:
        """Simulate deployments that are listed, as far as they may matter.

        Parameters
        ----------
        scorer
        leaves : sequence of Leaf       deployments with their bounds
        incumbent
        challenge : callable or None    scores a deployment in place of the scorer

        Raises
        ------
        OutOfTime
        """
        problem = scorer.problem
        part = Part(shape="single", types=problem.types, objective=problem.objective, space=len(leaves), infeasible={})
        prepare = partial(tell_compiling, self.tell, problem)
        scores = side_by_side(challenge or scorer.challenge)
        return best_first([Queue(part, leaves)], incumbent, scores, self.tell, math.inf, prepare)

    def _first(self, scorer: Scorer, plans: Sequence[Deployment]) -> Scored | None:
        """A plan that meets the goals: runs end as soon as they are known to miss one, which a search lets run on.

        The least makespan comes first: such plans are the likeliest to.
        """
        incumbent = First(scorer.any_cost)
        try:
            self.search(scorer, self._listed(scorer, plans, (_QUICKEST,)), incumbent)
        except OutOfTime:
            if incumbent.found is None:
                raise
        return incumbent.found

    def _best(self, scorer: Scorer, plans: Sequence[Deployment]) -> Scored:
        """The best of some plans, of which one meets the goals, by the objectives and their tolerances in turn."""
        problem = scorer.problem
        split = next((index for index, part in enumerate(problem.objectives, 1) if part.tolerance), None)
        if split is not None:
            aims = tuple(replace(part, tolerance=0.0) for part in problem.objectives[:split])
            first = self._best(Scorer(replace(problem, objective=aims[0], then=aims[1:]), like=scorer), plans)
            near = (goal for part in problem.objectives[:split] for goal in part.near(part.value(first.metrics)))
            objective, *then = problem.objectives[split:]
            nearer = replace(problem, objective=objective, then=tuple(then), near=(*problem.near, *near))
            return self._best(Scorer(nearer, like=scorer), plans)
        found = self.search(scorer, self._listed(scorer, plans, problem.objectives), Best(problem, 1))
        return min((one.scored for one in found if one.scored.meets_slos), key=lambda one: rank(problem, one))

    def _listed(self, scorer: Scorer, plans: Sequence[Deployment], objectives: Sequence[Objective]) -> list[Leaf]:
        """Deployments that may meet the goals, the least bound first."""
        problem, leaves = scorer.problem, []
        for group in kind_of(problem).floors(scorer, plans, self.tell):
            bounds, possible = judged(group.run, objectives, problem.goals)
            for place in np.flatnonzero(possible).tolist():
                leaves.append(Leaf(deployment=group.deployments[place], bound=tuple(bounds[place].tolist())))
        order = {deployment: place for place, deployment in enumerate(plans)}
        return sorted(leaves, key=lambda leaf: (leaf.bound, order[leaf.deployment]))


class Runs:
    """Deployments of one problem with what they are bounded by and what they reach, to judge any of its goals by.

    A plan that breaks a family other than bandwidth cannot run, and is none of them. Bandwidth is that of the goals
    asked about.
    """

    def __init__(self, scorer: Scorer, work: Work) -> None:
        problem = scorer.problem
        self._problem, self._scorer, self._work = problem, scorer, work
        self._plans = work.plans(replace(problem, slos=()))
        self._order = {plan: place for place, plan in enumerate(self._plans)}
        self._done: dict[Deployment, Scored] = {}
        self._limits: dict[tuple[Deployment, str, float], float] = {}

    @cached_property
    def _floors(self) -> list[Floored]:
        return list(kind_of(self._problem).floors(self._scorer, self._plans, self._work.tell))

    def some_meets(self, goals: Goals) -> bool:
        """Whether some plan meets these goals."""
        known = [leaf.behind(float(leaf.deployment not in self._done)) for leaf in self._queue(goals, _QUICKEST)]
        incumbent = First(FREE)
        self._search(goals, sorted(known, key=lambda leaf: leaf.bound), incumbent)
        return incumbent.found is not None

    def ruled_out(self, goals: Goals) -> bool:
        """Whether every plan misses one of these goals by its lower bound already."""
        return not self._queue(goals, _QUICKEST)

    def best(self, goals: Goals, objective: Objective | None = None) -> Scored | None:
        """The best plan among those that meet some goals; None where none does. By default by the problem's own."""
        objective = objective or self._problem.objective
        return self._least(goals, objective, lambda run: objective.signed(objective.value(run.metrics)))

    def closest(self, goal: Goal, others: Goals) -> tuple[float, Scored] | None:
        """The best limit of a goal that a plan meets beside others, and the plan; None where no plan meets those.

        Of a goal on a share of the requests it is the least limit that so many requests are within.
        """
        objective = load_objective(goal.name)
        if goal.fraction is None:
            run = self.best(others, objective)
            value = math.nan if run is None else objective.value(run.metrics)
        else:
            run = self._least(others, objective, lambda run: self._limit(run, goal), goal)
            value = math.nan if run is None else self._limit(run, goal)
        return None if run is None or math.isnan(value) else (value, run)

    def bound(self, goal: Goal, plan: Deployment) -> float | None:
        """The least that a plan can reach in what a goal is on; None of a goal on a share of the requests."""
        if goal.fraction is not None:
            return None
        (group,) = kind_of(self._problem).floors(self._scorer, [plan], self._work.tell)
        bounds, _ = judged(group.run, (load_objective(goal.name),), ())
        bound = float(bounds[0, 0])
        return None if math.isinf(bound) else abs(bound)

    def _least(
        self, goals: Goals, objective: Objective, cost: Callable[[Scored], float], goal: Goal | None = None
    ) -> Scored | None:
        """The plan that meets some goals at the least cost, least bound first."""
        incumbent = Least(cost)
        self._search(goals, self._queue(goals, objective, goal), incumbent)
        return None if incumbent.found is None else incumbent.found[3]

    def _queue(self, goals: Goals, objective: Objective, goal: Goal | None = None) -> list[Leaf]:
        """Plans that may meet some goals, least bound first: of their cost, or of the limit of a goal on a share."""
        instance, able = replace(self._problem, slos=goals).instance(), []
        for group in self._floors:
            if _too_much(instance, group.deployments[0]):
                continue
            hold = np.ones(len(group.deployments), bool)
            for one in goals:
                hold &= can_hold(one, group.run if one.figure.of_gpus else group.alone)
            bounds, _ = judged(group.run, (objective,), ())
            below = None if goal is None else np.broadcast_to(self._below(group.alone, goal), hold.shape)
            for place in np.flatnonzero(hold).tolist():
                bound = float(bounds[place, 0] if below is None else below[place])
                able.append(Leaf(deployment=group.deployments[place], bound=(bound,)))
        return sorted(able, key=lambda leaf: (leaf.bound, self._order[leaf.deployment]))

    def _search(self, goals: Goals, leaves: Sequence[Leaf], incumbent: Incumbent) -> None:
        """Go through runs of plans to their end, as far as they may matter, judging them by some goals alone."""

        def run(deployment: Deployment, bounds: Costs, worst: Costs) -> Scored | None:
            if deployment not in self._done:
                self._done[deployment] = self._scorer.simulate(deployment)
            found = self._done[deployment]
            met = {goal.text: self._meets(found, goal) for goal in goals}
            return replace(found, metrics=replace(found.metrics, slo_met=met))

        self._work.search(self._scorer, leaves, incumbent, run)

    def _meets(self, run: Scored, goal: Goal) -> bool:
        if goal.text in run.metrics.slo_met:
            return run.metrics.slo_met[goal.text]
        # A share of the requests that was not among those asked for.
        if goal.fraction is not None:
            return self._limit(run, goal) <= goal.limit
        return goal.met(goal.reached(run.metrics))

    def _below(self, alone: Run, goal: Goal) -> NDArray[np.float64]:
        """Latencies that this share of the requests is not within less of: a percentile two requests below it."""
        rows, of = goal.figure.value(alone).shape
        sure = [statistic(alone, goal.figure, p) for p, q in _PERCENTILES if (goal.threshold - q) * of >= 2]
        return np.asarray(np.max([np.zeros(rows), *sure], axis=0))

    def _limit(self, run: Scored, goal: Goal) -> float:
        """The least limit that the share of requests a goal asks for is within; NaN where none has the latency."""
        key = run.deployment, goal.metric, goal.threshold
        if key not in self._limits:
            outcome = self._scorer.run(run.deployment, log=True)
            assert outcome is not None  # nothing to cut it short
            values = np.sort(goal.figure.value(self._scorer.as_run(outcome))[0])
            shares = np.arange(1, len(values) + 1) / max(len(values), 1)
            self._limits[key] = float(values[np.argmax(shares >= goal.threshold)]) if len(values) else math.nan
        return self._limits[key]


def _too_much(instance: Instance, deployment: Deployment) -> bool:
    """Whether a token of one pool that does both phases reads more than the goals leave time for."""
    if deployment.disaggregated:
        return False
    limit = instance.bytes_limit(deployment.plan)
    return limit is not None and decode_bytes(instance.model, deployment.plan, instance.held) > limit
