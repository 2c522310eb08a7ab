"""How far times may be off before another deployment has the highest rate, or is on the fewest GPUs."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from plan_cases import dense, every_deployment, make_cluster, make_model, make_problem, random_trace

from apex_opt.errors import UsageError
from apex_opt.search.scorer import Scorer
from apex_opt.studies import robust as study
from apex_opt.studies.capacity import fewest_gpus, highest_rate
from apex_opt.studies.robust import deciding, scale, slowed
from apex_opt.studies.robust_rates import HIGHEST, robust_rate
from apex_opt.workload.steady import loops_of, rate_of
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apex_opt.plans.deployment import Deployment
    from apex_opt.search import Problem
    from apex_opt.studies.capacity_answer import Capacity, PlanRate

SPACE = PlanSpace()
COARSE = 0.25
MODEL = make_model((dense(hidden=1024, columns=4096), 6))


@pytest.fixture(autouse=True, scope="module")
def _short() -> Iterator[None]:
    """Few factors, and rates held for fewer requests: the study and what it is compared with hold them alike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apex_opt.studies.steady.loops_of", lambda trace: loops_of(trace, 1_000))
        patch.setattr("apex_opt.studies.steady.TOLD", 500)
        patch.setattr(study, "STEP", 1.3)
        patch.setattr(study, "STEPS", 3)
        yield


def problem_of(slo: str, gpus: int = 2, **more: Any) -> Problem:
    return make_problem(MODEL, make_cluster(gpus), random_trace(5, 40), slo, **more)


class Brute:
    """Every deployment asked alone, with its times so much longer."""

    def __init__(self, problem: Problem, answer: Capacity) -> None:
        self.problem, self.answer, self.given = problem, answer, answer.asked_per_s
        self.all = every_deployment(Scorer(problem))
        self.alone = cache(self._alone)

    def _alone(self, one: Deployment, factor: float) -> PlanRate | None:
        problem = slowed(self.problem, factor)
        if self.given is not None:
            found = fewest_gpus(problem, SPACE, self.given * factor, deployment=one)
        else:
            found = highest_rate(problem, SPACE, resolution=COARSE, deployment=one)
        return next(iter(found.plans), None)

    def rank(self, one: PlanRate, factor: float) -> tuple[Any, ...]:
        size = one.deployment.devices, str(one.deployment)
        if self.given is None:
            return -round(one.rate_per_s / factor / rate_of(self.problem.trace), 6), *size
        by, costs = self.problem.objectives, self.problem.costs(one.holds.metrics)
        return size[0], *(c * scale(o.figure, factor) for c, o in zip(costs, by, strict=True)), size[1]

    def ranked(self, factor: float, own: float | None = None) -> list[tuple[Any, ...]]:
        """Better first; the best as computed has times of its own where these are given."""
        best = self.answer.plans[0].deployment
        rows = []
        for one in self.all:
            its = own if own is not None and one == best else factor
            if (found := self.alone(one, its)) is not None:
                rows.append(self.rank(found, its))
        return sorted(rows)

    def wins(self, times: str, factor: float) -> str | None:
        asked = {"all": (factor, None), "best": (1.0, factor), "others": (factor, 1.0)}[times]
        found = self.ranked(*asked)
        return found[0][-1] if found else None


@pytest.mark.parametrize(
    ("slo", "rate"),
    [("ttft_p95<=20ms,tpot_p95<=2ms", None), ("tpot_p95<=1.2ms", None), ("ttft_p95<=20ms,tpot_p95<=2ms", 30.0)],
)
def test_turns_are_where_asking_every_deployment_alone_has_them(slo: str, rate: float | None) -> None:
    problem = problem_of(slo)
    answer = highest_rate(problem, SPACE, resolution=COARSE) if rate is None else fewest_gpus(problem, SPACE, rate)
    found = robust_rate(problem, answer, SPACE)
    brute, best = Brute(problem, answer), str(answer.plans[0].deployment)
    assert brute.wins("all", 1.0) == best
    assert found.deciding == (HIGHEST if rate is None else deciding(problem).name)
    assert found.tied is None
    second = brute.ranked(1.0)[1:2]
    assert (found.runner_up and found.runner_up.text) == (second[0][-1] if second else None)
    assert [turn.times for turn in found.turns] == ["all", "all", "best", "others"]
    for turn in found.turns:
        steps = [study.factor_of(step, turn.slower) for step in range(1, study.STEPS + 1)]
        holds = [brute.wins(turn.times, factor) == best for factor in steps]
        if turn.factor is None:
            assert all(holds)
            continue
        place = steps.index(turn.factor)
        assert turn.loss is not None and not holds[place]
        assert turn.holds == ([1.0, *steps])[place]
        winner = None if turn.loss.winner is None else turn.loss.winner.text
        if turn.times == "all" or winner is not None:
            assert winner == brute.wins(turn.times, turn.factor)


def test_deployments_on_as_few_gpus_within_the_error_are_tied() -> None:
    problem = problem_of("ttft_p95<=40ms", weight_formats=("bf16", "fp8"), kv_formats=("bf16", "bf16"))
    answer = fewest_gpus(problem, SPACE, 4.0, top=20)
    least, *others = answer.plans
    assert others
    by = deciding(problem)
    far = by.value(others[-1].holds.metrics) / by.value(least.holds.metrics) - 1
    assert [one.text for one in robust_rate(problem, answer, SPACE, 1.01 * far).tied or ()] == [
        one.holds.text for one in others
    ]
    assert robust_rate(problem, answer, SPACE, 0.0).tied == ()


def test_a_capacity_without_a_deployment_has_nothing_to_be_held_against() -> None:
    problem = problem_of("ttft_p95<=1us", 1)
    with pytest.raises(UsageError, match="no deployment"):
        robust_rate(problem, highest_rate(problem, SPACE, resolution=COARSE), SPACE)
