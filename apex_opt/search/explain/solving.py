"""How questions are solved on the way to an explanation: each plan of the asked one is simulated at most once."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import numpy as np

from apex_opt.evaluate import FAMILIES, decode_bytes
from apex_opt.figures import load_objective
from apex_opt.figures.measure import can_hold, statistic
from apex_opt.search.evaluator import Evaluator
from apex_opt.search.nearest import feasible
from apex_opt.search.search import ROUND, Formulation, bound_plans, search, settled, tell_compiling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from apex_opt.evaluate import Instance
    from apex_opt.figures import Goal, Objective
    from apex_opt.figures.measure import Metrics
    from apex_opt.figures.run import Run
    from apex_opt.plan.plan import Plan
    from apex_opt.search.answer import Candidate
    from apex_opt.search.question import Question
    from apex_opt.search.search import Progress

    Goals = tuple[Goal, ...]

_PERCENTILES: Final = (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99))


Scored = TypeVar("Scored", bound="Candidate | None")


class Diagnosis(Formulation, Protocol):
    """What an explanation asks of a plan-space program."""

    def clash(self, instance: Instance, families: Sequence[str] = ...) -> tuple[str, ...]: ...


class OutOfTime(Exception):
    """The time limit was reached before what was begun was decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A plan that a changed question has: the best, unless the time was up first.

    `value` is its objective, where it was simulated.
    """

    plan: Plan
    value: float | None = None
    best: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """A formulation whose plans are known."""

    plans: tuple[Plan, ...]
    movable: tuple[Plan, ...] = ()
    complete: bool = True

    def count(self, instance: Instance, families: Sequence[str]) -> int:
        return len(self.plans)

    def enumerate(self, instance: Instance, families: Sequence[str] = FAMILIES) -> _Known:
        return self

    def moved(self, instance: Instance, plan: Plan) -> Plan | None:
        return None


class Work:
    """What solves questions until the time is up, and the runs of the one that was asked.

    Parameters
    ----------
    question : Question
    formulation : Diagnosis
    progress : callable               told (what, done, total) along the way
    time_limit_s : float              after so long every step ends in `OutOfTime`
    evaluator : Evaluator, optional   of the question, with the floors it already has
    """

    def __init__(
        self,
        question: Question,
        formulation: Diagnosis,
        progress: Progress,
        time_limit_s: float = math.inf,
        evaluator: Evaluator | None = None,
    ) -> None:
        self.question = question
        self.formulation = formulation
        self._progress = progress
        self._deadline = monotonic() + time_limit_s
        self._evaluator = evaluator

    @cached_property
    def runs(self) -> Runs:
        """Runs of the plans of the asked question."""
        return Runs(self._evaluator or Evaluator(self.question), self)

    def tell(self, what: str, done: int = 0, total: int = 0) -> None:
        """Tell of a step, unless the time is up.

        Raises
        ------
        OutOfTime
        """
        if monotonic() > self._deadline:
            raise OutOfTime
        self._progress(what, done, total)

    def plans(self, question: Question) -> tuple[Plan, ...]:
        """Feasible plans of a question, at the highest clock."""
        self.tell("enumerating plans")
        return settled(question, self.formulation, self.formulation.enumerate(question.instance()), self.tell)[0]

    def fits(self, question: Question) -> bool:
        """Whether some plan satisfies the constraints."""
        self.tell("trying constraints")
        return not self.formulation.clash(question.instance())

    def solve(self, question: Question, plans: tuple[Plan, ...] | None = None) -> Solved | None:
        """The best plan, or where there are no goals a plan that fits; None where there is none.

        Parameters
        ----------
        question : Question
        plans : tuple of Plan, optional    to choose from; by default all that are feasible

        Raises
        ------
        OutOfTime    before a plan was found
        """
        if not question.slos:
            self.tell("trying constraints")
            plan = feasible(question.instance())
            return None if plan is None else Solved(plan=plan)
        plans = self.plans(question) if plans is None else plans
        evaluator = Evaluator(question)
        first = self._first(evaluator, plans)
        if first is None:
            return None
        try:
            best = search(question, _Known(plans=plans), self.tell, evaluator=evaluator).best
        except OutOfTime:
            return Solved(plan=first.plan, value=first.value, best=False)
        assert best is not None, "a plan meets the goals"
        return Solved(plan=best.plan, value=best.value)

    def some_meets(self, question: Question, plans: Sequence[Plan]) -> bool:
        """Whether some of these plans meets the goals."""
        return self._first(Evaluator(question), plans) is not None

    def _first(self, evaluator: Evaluator, plans: Sequence[Plan]) -> Candidate | None:
        """A plan that meets the goals: runs end as soon as they are known to miss one, which a search lets run on."""
        worst = evaluator.any_cost
        clocked = [replace(plan, clock_mhz=clock) for clock in evaluator.question.clocks for plan in plans]
        for batch in rounds(self._quickest(evaluator, clocked)):
            tell_compiling(self.tell, evaluator, batch)
            for run in in_parallel(lambda plan: evaluator.challenge(plan, None, worst), batch):
                if run is not None and run.meets_slos:
                    return run
            self.tell("simulating plans")
        return None

    def _quickest(self, evaluator: Evaluator, plans: Sequence[Plan]) -> list[Plan]:
        """Plans that may meet the goals, least makespan first: those are the likeliest to."""
        bounds = bound_plans(evaluator, plans, (load_objective("makespan"),), self.tell)
        hopeful = [(bound, index) for index, ((bound,), possible) in enumerate(bounds) if possible]
        return [plans[index] for _, index in sorted(hopeful)]


class Runs:
    """Plans of one question with what they are bounded by and what they reach, to judge any of its goals by.

    A plan that breaks a family other than bandwidth cannot run, and is none of them. Bandwidth is that of the goals
    asked about.
    """

    def __init__(self, evaluator: Evaluator, work: Work) -> None:
        question = evaluator.question
        plans = work.plans(replace(question, slos=()))
        self._question, self._evaluator, self._work = question, evaluator, work
        self._plans = [replace(plan, clock_mhz=clock) for clock in question.clocks for plan in plans]
        self._done: dict[Plan, Candidate] = {}
        self._limits: dict[tuple[Plan, str, float], float] = {}

    def some_meets(self, goals: Goals) -> bool:
        """Whether some plan meets these goals."""
        queue = self._queue(goals, load_objective("makespan"))
        known = [plan for _, plan in queue if plan in self._done]
        others = [plan for _, plan in queue if plan not in self._done]
        return any(self._meets(run, goals) for plans in (known, others) for run in self._run(plans))

    def ruled_out(self, goals: Goals) -> bool:
        """Whether every plan misses one of these goals by its lower bound already."""
        return not self._queue(goals, load_objective("makespan"))

    def best(self, goals: Goals, objective: Objective | None = None) -> Candidate | None:
        """The best plan among those that meet some goals; None where none does. By default by the question's own."""
        objective = objective or self._question.objective
        return self._least(goals, objective, lambda run: objective.signed(_value(run, objective)))

    def closest(self, goal: Goal, others: Goals) -> tuple[float, Candidate] | None:
        """The best limit of a goal that a plan meets beside others, and the plan; None where no plan meets those.

        Of a goal on a share of the requests it is the least limit that so many requests are within.
        """
        objective = _objective(goal)
        if goal.fraction is None:
            run = self.best(others, objective)
            value = math.nan if run is None else _value(run, objective)
        else:
            run = self._least(others, objective, lambda run: self._limit(run, goal), goal)
            value = math.nan if run is None else self._limit(run, goal)
        return None if run is None or math.isnan(value) else (value, run)

    def bound(self, goal: Goal, plan: Plan) -> float | None:
        """The least a plan can reach in what a goal is on; None of a share of the requests, or if nothing is known."""
        if goal.fraction is not None:
            return None
        (bound,), _ = self._evaluator.bounds(plan, (_objective(goal),))
        return None if math.isinf(bound) else abs(bound)

    def _least(
        self, goals: Goals, objective: Objective, cost: Callable[[Candidate], float], goal: Goal | None = None
    ) -> Candidate | None:
        """The plan that meets some goals at the least cost, least bound first; ties fall as in a search."""
        best: tuple[float, int, str, Candidate] | None = None
        queue = self._queue(goals, objective, goal)
        for start in range(0, len(queue), ROUND):
            batch = [plan for bound, plan in queue[start : start + ROUND] if best is None or bound <= best[0]]
            if not batch:
                break
            for run in self._run(batch):
                if self._meets(run, goals):
                    ranked = cost(run), run.plan.devices, str(run.plan), run
                    best = ranked if best is None or ranked[:3] < best[:3] else best
        return None if best is None else best[3]

    def _queue(self, goals: Goals, objective: Objective, goal: Goal | None = None) -> list[tuple[float, Plan]]:
        """Plans that may meet some goals, least bound first: of their cost, or of the limit of a goal on a share."""
        instance = replace(self._question, slos=goals).instance()
        limit, model, held = instance.decode_bytes_limit, instance.model, instance.held
        plans = [p for p in self._plans if limit is None or decode_bytes(model, p, held) <= limit]
        bounds = bound_plans(self._evaluator, plans, (objective,), self._work.tell)
        able = []
        for index, (plan, ((bound,), _)) in enumerate(zip(plans, bounds, strict=True)):
            floor = self._evaluator.floor(plan)
            if all(one.figure.of_gpus or can_hold(one, floor)[0] for one in goals):
                able.append((bound if goal is None else self._below(floor, goal), index))
        return [(bound, plans[index]) for bound, index in sorted(able)]

    def _run(self, plans: Sequence[Plan]) -> Iterator[Candidate]:
        """Runs of some plans, to their end."""
        for batch in rounds(plans):
            new = [plan for plan in batch if plan not in self._done]
            if new:
                self._work.tell("simulating plans", len(self._done), len(self._plans))
                tell_compiling(self._work.tell, self._evaluator, new)
                self._done |= zip(new, in_parallel(self._evaluator.simulate, new), strict=True)
            yield from (self._done[plan] for plan in batch)

    def _meets(self, run: Candidate, goals: Goals) -> bool:
        for goal in goals:
            met = self._met(run.metrics, goal)
            if not (self._limit(run, goal) <= goal.limit if met is None else met):
                return False
        return True

    def _met(self, metrics: Metrics, goal: Goal) -> bool | None:
        """Whether figures meet a goal; None of one on a share of the requests that was not among those asked."""
        if goal.text in metrics.slo_met:
            return metrics.slo_met[goal.text]
        return None if goal.fraction is not None else goal.met(metrics.judged(goal))

    def _below(self, floor: Run, goal: Goal) -> float:
        """A latency that this share of the requests is not within less of: a percentile two requests below it."""
        of = goal.figure.value(floor).shape[1]
        sure = (p for p, q in _PERCENTILES if (goal.threshold - q) * of >= 2)
        return max((float(statistic(floor, goal.figure, p)[0]) for p in sure), default=0.0)

    def _limit(self, run: Candidate, goal: Goal) -> float:
        """The least limit that the share of requests a goal asks for is within; NaN where none has the latency."""
        key = run.plan, goal.metric, goal.threshold
        if key not in self._limits:
            outcome, _ = self._evaluator.batches(run.plan)
            values = np.sort(goal.figure.value(self._evaluator.as_run(outcome))[0])
            shares = np.arange(1, len(values) + 1) / max(len(values), 1)
            self._limits[key] = float(values[np.argmax(shares >= goal.threshold)]) if len(values) else math.nan
        return self._limits[key]


def rounds(plans: Sequence[Plan]) -> Iterator[Sequence[Plan]]:
    """Plans to simulate side by side."""
    return (plans[start : start + ROUND] for start in range(0, len(plans), ROUND))


def in_parallel(work: Callable[[Plan], Scored], plans: Sequence[Plan]) -> list[Scored]:
    """Work on some plans side by side."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(work, plans))


def _objective(goal: Goal) -> Objective:
    """What a goal is on, as an objective; of a share of the requests their mean."""
    return load_objective(goal.name)


def _value(run: Candidate, objective: Objective) -> float:
    return objective.value(run.metrics)
