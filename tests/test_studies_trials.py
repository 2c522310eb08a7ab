"""Rates tried by workers are those of one process, and no run is begun when the time is up but for the first answer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from plan_cases import dense, make_cluster, make_model, make_problem, random_trace
from test_search_spread import Shuffled

from apex_opt.search.scorer import Scorer
from apex_opt.search.search import search
from apex_opt.search.spread import Spread
from apex_opt.studies import robust as study
from apex_opt.studies import steady as judging
from apex_opt.studies.capacity import fewest_gpus, highest_rate
from apex_opt.studies.robust import Course, robust
from apex_opt.studies.robust_rates import robust_rate
from apex_opt.studies.trials import Elsewhere
from apex_opt.workload.steady import loops_of
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apex_opt.search import Problem
    from apex_opt.studies.capacity_answer import Capacity

SPACE = PlanSpace()
COARSE = 0.25
MODEL = make_model((dense(hidden=1024, columns=4096), 6))
SLO = "ttft_p95<=40ms"


@pytest.fixture(autouse=True, scope="module")
def _short() -> Iterator[None]:
    """Rates held for fewer requests, and few factors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apex_opt.studies.steady.loops_of", lambda trace: loops_of(trace, 1_000))
        patch.setattr("apex_opt.studies.steady.TOLD", 500)
        patch.setattr(study, "STEP", 1.3)
        patch.setattr(study, "STEPS", 3)
        yield


def problem_of(seed: int, gpus: int = 4) -> Problem:
    return make_problem(MODEL, make_cluster(gpus), random_trace(seed, 40), SLO)


def asked(problem: Problem, rate: float | None, **more: Any) -> Capacity:
    if rate is None:
        return highest_rate(problem, SPACE, resolution=COARSE, **more)
    return fewest_gpus(problem, SPACE, rate, **more)


@pytest.mark.parametrize("rate", [None, 60.0, 500.0])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_every_part_of_an_answer_is_that_of_one_process(count: int, rate: float | None) -> None:
    problem, workers = problem_of(count), Shuffled(count)
    spread = asked(problem, rate, top=2, trials=partial(Elsewhere, workers=workers))
    assert repr(spread) == repr(asked(problem, rate, top=2))
    assert workers.begun > 0


@pytest.mark.parametrize("rate", [None, 60.0])
def test_how_far_times_may_be_off_is_found_alike(rate: float | None) -> None:
    problem = problem_of(3, 2)
    answer = asked(problem, rate)
    spread = robust_rate(problem, answer, SPACE, 0.1, trials=partial(Elsewhere, workers=Shuffled(3)))
    assert repr(spread) == repr(robust_rate(problem, answer, SPACE, 0.1))


def test_searches_with_other_times_are_spread_too() -> None:
    problem, workers = problem_of(4, 2), Shuffled(3)
    answer, scorer = search(problem, SPACE, top=2), Scorer(problem)
    spread = robust(problem, answer, SPACE, scorer, crew=partial(Spread, workers=workers))
    assert repr(spread) == repr(robust(problem, answer, SPACE, scorer))
    assert workers.begun > 0


@pytest.mark.parametrize("rate", [None, 60.0, 500.0])
def test_when_the_time_is_up_runs_are_begun_of_the_first_deployment_alone(
    rate: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: set[str] = set()

    class Noted(Scorer):
        def run(self, deployment: Any, *args: Any) -> Any:
            tried.add(str(deployment))
            return super().run(deployment, *args)

    monkeypatch.setattr(judging, "Scorer", Noted)
    problem = problem_of(1)
    answer = asked(problem, rate, time_limit_s=0.0)
    assert len(tried) == 1
    assert [str(one.deployment) for one in answer.plans] == (list(tried) if rate != 500.0 else [])
    whole = asked(problem, rate)
    assert answer.status == {None: "feasible", 60.0: "optimal", 500.0: "unknown"}[rate]
    assert bool(answer.ledger.waiting) == (answer.status != "optimal")
    if rate is None:
        assert answer.ledger.gap is not None
        assert whole.plans[0].rate_per_s <= answer.plans[0].rate_per_s * (1 + answer.ledger.gap)
    elif answer.plans:
        assert whole.plans[0].deployment == answer.plans[0].deployment


def test_a_study_tells_how_much_is_to_be_asked_at_most_and_asks_no_more() -> None:
    for loses_at in (1.2, 1.5, 2.0, 9.0):
        told: list[tuple[int, int]] = []

        def tell(what: str, done: int, total: int, told: list[tuple[int, int]] = told) -> None:
            told.append((done, total))

        def lost(factor: float, most: float = loses_at) -> float | None:
            return None if 1 / most < factor < most else factor

        course = Course(tell, 2)
        for slower in (True, False):
            course.last_before(lost, slower=slower)
        assert [done for done, _ in told] == list(range(len(told)))
        assert [total for _, total in told] == sorted((total for _, total in told), reverse=True)
        assert told[-1][1] >= len(told)
