"""A sustained rate is the true limit of queues whose limit is known, and no rate beyond it is ever called one."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from plan_cases import SMALL, dense, make_cluster, make_model, make_problem

from apex_opt.figures import parse_goals
from apex_opt.plans.deployment import Deployment
from apex_opt.plans.plan import parse_plan
from apex_opt.search import Problem, Scorer
from apex_opt.studies.capacity import fewest_gpus, highest_rate
from apex_opt.studies.steady import Steady
from apex_opt.workload import describe_trace, make_trace
from formulations.plan_space import PlanSpace

SPACE = PlanSpace()
MODEL = make_model((dense(), 4))
PLAN = Deployment.of(parse_plan("tp1", MODEL))


def queue(slo: str, kind: str = "poisson:", n: int = 1000, seed: int = 0) -> Problem:
    """One request at a time, each of the same length and of one token: an M/D/1 queue where arrivals are Poisson."""
    trace = describe_trace(f"{kind}rate=1,n={n},prompt=512,output=1", seed)
    settings = replace(SMALL, max_num_seqs=1, async_scheduling=False)
    return make_problem(MODEL, make_cluster(1), trace, slo, settings=settings)


@cache
def service_s() -> float:
    """Time that the server takes for a request, by itself."""
    problem = queue("ttft_p95<=1min", n=1)
    return Scorer(problem).simulate(PLAN).metrics.latency_s["ttft"]["mean"] - outside_s()


def outside_s() -> float:
    return Scorer(queue("ttft_p95<=1min", n=1)).outside_ns / 1e9


def waits_no_longer(load: float, times: float) -> float:
    """Share of the requests of an M/D/1 queue that wait so many service times at most (Erlang)."""
    terms = (
        (load * (k - times)) ** k / math.factorial(k) * math.exp(-load * (k - times)) for k in range(int(times) + 1)
    )
    return (1 - load) * sum(terms)


def p95_wait(load: float) -> float:
    """What 95% of the requests wait at most, in service times."""
    low, high = 0.0, 12.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if waits_no_longer(load, middle) < 0.95 else (low, middle)
    return high


def test_the_formula_is_that_of_the_queue() -> None:
    rng = np.random.default_rng(1)
    arrival, free, waits = np.cumsum(rng.exponential(1 / 0.7, 200_000)), 0.0, []
    for at in arrival.tolist():
        waits.append(max(free - at, 0.0))
        free = max(free, at) + 1.0
    assert np.percentile(waits, 95) == pytest.approx(p95_wait(0.7), rel=0.03)
    assert np.mean(waits) == pytest.approx(0.7 / (2 * 0.3), rel=0.03)


@pytest.mark.parametrize("kind", ["poisson:", "uniform:", "gamma:cv=2,"])
def test_without_a_goal_that_ends_it_the_limit_is_one_request_per_service_time(kind: str) -> None:
    best = highest_rate(queue("ttft_p95<=500min", kind), SPACE).plans[0]
    assert best.evidence.saturated_per_s == pytest.approx(1 / service_s(), rel=1e-3)
    assert 0.8 < best.rate_per_s * service_s() < 1
    if kind == "uniform:":
        assert best.rate_per_s * service_s() > 0.97


def test_the_longer_the_runs_the_nearer_the_limit() -> None:
    loads = [
        highest_rate(queue("ttft_p95<=500min", n=n), SPACE, resolution=0.005).plans[0].rate_per_s * service_s()
        for n in (200, 5_000)
    ]
    assert loads[0] < loads[1] < 1
    assert loads[1] > 0.95


@pytest.mark.parametrize("load", [0.5, 0.8, 0.9])
def test_a_goal_on_the_mean_wait_ends_where_the_formula_says(load: float) -> None:
    wait_s = load / (2 * (1 - load)) * service_s()
    slo = f"ttft_mean<={wait_s + service_s() + outside_s():.12f}s"
    best = highest_rate(queue(slo, n=4000), SPACE).plans[0]
    assert 0.93 * load < best.rate_per_s * service_s() < 1.005 * load


@pytest.mark.parametrize("load", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("form", ["ttft_p95<={}s", "ttft<={}s@95%"])
def test_a_goal_on_the_longest_waits_ends_where_the_formula_says(load: float, form: str) -> None:
    limit_s = p95_wait(load) * service_s() + service_s() + outside_s()
    best = highest_rate(queue(form.format(f"{limit_s:.12f}"), n=4000), SPACE).plans[0]
    assert 0.9 * load < best.rate_per_s * service_s() < 1.01 * load


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("load", [1.0, 1.002, 1.01, 1.1, 3.0])
def test_an_unstable_rate_is_never_called_sustained(seed: int, load: float) -> None:
    problem = queue("ttft_p95<=500min", n=300, seed=seed)
    steady, rate = Steady(problem), load / service_s()
    trial = steady.run(PLAN, rate)
    assert not trial.holds or not steady.confirmed(PLAN, rate, trial).holds
    if seed == 0:
        answer = fewest_gpus(problem, SPACE, rate)
        assert (answer.status, answer.plans) == ("infeasible", ())


@pytest.mark.parametrize("seed", range(4))
def test_the_answer_holds_for_twenty_times_the_requests_with_other_arrivals(seed: int) -> None:
    problem = queue("ttft_p95<=30ms", n=500, seed=seed)
    best = highest_rate(problem, SPACE).plans[0]
    rng = np.random.default_rng(seed + 100)
    for _ in range(5):
        arrival = np.cumsum(rng.exponential(1e9 / best.rate_per_s, 10_000)).astype(np.int64)
        trace = make_trace(name="more", arrival_ns=arrival, prompt=[512] * 10_000, output=[1] * 10_000)
        metrics = Scorer(replace(problem, trace=trace)).simulate(best.deployment).metrics
        assert all(metrics.slo_met.values())


def test_requests_that_are_still_under_way_make_a_run_longer() -> None:
    """All requests of a short run come before the first is answered: nothing of it is steady."""
    trace = describe_trace("poisson:rate=1,n=50,prompt=16,output=2000")
    settings = replace(SMALL, max_model_len=2048, max_num_seqs=64)
    problem = make_problem(MODEL, make_cluster(1), trace, "e2e_p95<=500min", settings=settings)
    best = highest_rate(problem, SPACE).plans[0]
    evidence = best.evidence
    assert evidence.transient.arrivals_s >= 20 * best.holds.metrics.latency_s["e2e"]["mean"]
    assert not evidence.transient.growing
    assert evidence.served_per_s == pytest.approx(best.rate_per_s, rel=0.05)


def test_a_goal_that_could_fail_in_another_run_is_not_called_sustained() -> None:
    wait_s = p95_wait(0.8) * service_s()
    problem = queue(f"ttft_p95<={wait_s + service_s() + outside_s():.12f}s", n=1000)
    best = highest_rate(problem, SPACE, resolution=0.002).plans[0]
    assert best.why == "prediction"
    (text,) = best.evidence.predicted
    assert best.evidence.predicted[text] <= problem.slos[0].limit
    assert best.evidence.whole[text] < problem.slos[0].limit
    assert best.evidence.runs == 6


def test_a_rate_is_judged_by_the_goals_after_the_warm_up_too() -> None:
    problem = queue("ttft_p95<=30ms")
    steady = Steady(problem)
    trial = steady.run(PLAN, 0.5 / service_s())
    assert trial.evidence is not None
    assert trial.evidence.warm_up == 0.2 * trial.evidence.requests
    text = problem.slos[0].text
    rows = slice(trial.evidence.warm_up, None)
    outcome = steady.at(0.5 / service_s()).run(PLAN)
    assert outcome is not None
    waits = (outcome.first_token_ns - outcome.arrival_ns)[rows] / 1e9 + outside_s()
    assert trial.evidence.whole[text] == pytest.approx(np.percentile(waits, 95))
    tight = replace(problem, slos=parse_goals(f"ttft_p95<={trial.evidence.whole[text] - 1e-9:.12f}s"))
    assert Steady(tight).run(PLAN, 0.5 / service_s()).why == "goals"


@pytest.mark.parametrize("n", [2, 7])
def test_a_trace_of_a_few_requests_is_not_held_to_the_chance_in_few_requests(n: int) -> None:
    slo = "ttft_p95<=500min"
    few, many = (highest_rate(queue(slo, n=k), SPACE).plans[0].rate_per_s for k in (n, 500))
    assert few == pytest.approx(many, rel=0.1)
