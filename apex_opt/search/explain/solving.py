"""How questions are solved on the way to an explanation."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from apex_opt.evaluate import FAMILIES
from apex_opt.search.advice import feasible
from apex_opt.search.evaluator import Evaluator
from apex_opt.search.objective import load_objective
from apex_opt.search.search import ROUND, Formulation, search
from apex_opt.simulator.metrics import per_request_s

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.evaluate import Instance
    from apex_opt.plan.plan import Plan
    from apex_opt.search.answer import Candidate
    from apex_opt.search.question import Question
    from apex_opt.search.search import Progress
    from apex_opt.workload.slo import Slo

    Goals = tuple[Slo, ...]

_EVERY: Final = 1_000_000
_LONGEST_S: Final = 1e9
_PERCENTILES: Final = (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99))


class Diagnosis(Formulation, Protocol):
    """What an explanation asks of a plan-space program."""

    def clash(self, instance: Instance, families: Sequence[str] = ...) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A formulation whose plans are known."""

    plans: tuple[Plan, ...]
    complete: bool = True

    def count(self, instance: Instance, families: Sequence[str]) -> int:
        return len(self.plans)

    def enumerate(self, instance: Instance, families: Sequence[str] = FAMILIES) -> Known:
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How questions are solved on the way, and what was found for goals."""

    formulation: Diagnosis
    tell: Progress
    least: dict[tuple[Slo, Goals], tuple[float, Candidate] | None] = field(default_factory=dict)

    def solve(self, question: Question, above: int = 0) -> tuple[Plan, float | None] | None:
        """The best plan and its objective, or where there are no goals a plan that fits; None where there is none.

        Plans over at most `above` GPUs are passed over.
        """
        instance = question.instance()
        if not question.slos:
            plan = feasible(instance)
            return None if plan is None else (plan, None)
        plans = tuple(plan for plan in self.formulation.enumerate(instance).plans if plan.devices > above)
        if not plans or (question.clocks == (None,) and not _some_meets(question, plans)):
            return None
        best = search(question, Known(plans=plans), self.tell).best
        return None if best is None else (best.plan, best.value)

    def meets(self, question: Question, goals: Goals) -> bool:
        """Whether some plan meets these goals."""
        return self.solve(replace(question, slos=goals)) is not None

    def best(self, question: Question, goal: Slo, others: Goals) -> tuple[float, Candidate] | None:
        """The best value of a goal among plans that meet the others, and a plan that has it; None without such a plan.

        Of a goal on a share of the requests, the value is the least limit that so many requests are within.
        """
        key = goal, others
        if key not in self.least:
            self.least[key] = self._best(replace(question, slos=others), goal)
        return self.least[key]

    def _best(self, question: Question, goal: Slo) -> tuple[float, Candidate] | None:
        plans = self.formulation.enumerate(question.instance()).plans
        if not plans:
            return None
        statistic = "mean" if goal.fraction is not None else goal.statistic
        name = goal.metric if goal.metric == "throughput" else f"{goal.metric}_{statistic}"
        asked = replace(question, objective=load_objective(name))
        answer = search(asked, Known(plans=plans), self.tell, 1 if goal.fraction is None else _EVERY)
        if answer.best is None or np.isnan(answer.best.value):
            return None
        if goal.fraction is None:
            return answer.best.value, answer.best
        return _least_limit(asked, answer.candidates, goal)


def _least_limit(question: Question, candidates: Sequence[Candidate], goal: Slo) -> tuple[float, Candidate]:
    """The least limit that the share of requests a goal asks for is within, over some plans, and a plan that has it."""
    evaluator = Evaluator(question)
    queue = sorted(candidates, key=lambda candidate: _below(question, candidate, goal))
    best = _limit(question, evaluator, queue[0].plan, goal), queue[0]
    for candidate in queue[1:]:
        if _below(question, candidate, goal) >= best[0]:
            break
        best = min(best, (_limit(question, evaluator, candidate.plan, goal), candidate), key=lambda pair: pair[0])
    return best


def _below(question: Question, candidate: Candidate, goal: Slo) -> float:
    """A latency that this share of the requests is not within less of: a percentile two requests below the share."""
    generated = question.trace.generated(question.settings.max_model_len)
    requests = int((generated > 1).sum()) if goal.metric == "tpot" else len(question.trace)
    latency = candidate.metrics.latency_s[goal.metric]
    return max((latency[p] for p, q in _PERCENTILES if (goal.threshold - q) * requests >= 2), default=0.0)


def _some_meets(question: Question, plans: Sequence[Plan]) -> bool:
    """Whether some plan meets the goals: runs end as soon as they are known to miss one, which a search lets run on."""
    evaluator = Evaluator(replace(question, objective=load_objective("makespan")))
    bounds = {plan: evaluator.bound(plan) for plan in plans}
    hopeful = sorted((plan for plan in plans if bounds[plan][1]), key=lambda plan: bounds[plan][0])
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for start in range(0, len(hopeful), ROUND):
            runs = pool.map(lambda plan: evaluator.challenge(plan, None, _LONGEST_S), hopeful[start : start + ROUND])
            if any([run is not None and run.meets_slos for run in runs]):
                return True
    return False


def _limit(question: Question, evaluator: Evaluator, plan: Plan, goal: Slo) -> float:
    """The least limit that the share of requests a goal asks for is within."""
    outcome, cost = evaluator.batches(plan)
    generated = question.trace.generated(question.settings.max_model_len)
    values = per_request_s(outcome, generated, cost.request_ns)[goal.metric]
    values = np.sort(values[~np.isnan(values)])
    shares = np.arange(1, len(values) + 1) / len(values)
    return float(values[np.argmax(shares >= goal.threshold)])


def amount(goal: Slo, value: float) -> str:
    return f"{value:.4g} requests/s" if goal.metric == "throughput" else f"{value * 1e3:.4g} ms"
