"""A run is cut short only where it would have missed a goal or been worse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from plan_cases import make_cluster, make_question, random_trace

from apex_opt.evaluate import space, violations
from apex_opt.ir import load_model
from apex_opt.search import Candidate, Evaluator, Question, load_objective
from apex_opt.search.objective import NAMES
from apex_opt.search.stops import Passing
from apex_opt.workload import Slo, parse_slos
from apex_opt.workload.slo import FIGURES

FACTORS = (0.3, 0.9, 1 - 1e-13, 1.0, 1 + 1e-13, 1.1, 3.0)
STOPPED = ("makespan", "throughput", "goodput", "energy", "energy_per_token", "cost_per_mtoken")


def runs(seed: int) -> tuple[Question, list[Candidate]]:
    """A question on every figure, and what some plans give."""
    everything = tuple(load_objective(name) for name in NAMES)
    trace = random_trace(seed, 30, closed=seed % 2 == 1)
    question = make_question(load_model("llama-3.1-8b"), make_cluster(4), trace)
    question = replace(
        question, objective=everything[0], then=everything[1:], request_slos=parse_slos("ttft_max<=30ms,tpot_max<=12ms")
    )
    plans = [plan for plan in space(question.instance()) if not violations(question.instance(), plan)]
    evaluator = Evaluator(question)
    return question, [evaluator.simulate(plan) for plan in plans[:: max(1, len(plans) // 8)]]


@pytest.mark.parametrize("seed", range(4))
def test_a_run_cut_short_by_a_goal_misses_it_and_one_that_is_not_is_judged_as_it_is(seed: int) -> None:
    question, candidates = runs(seed)
    cut = dict.fromkeys(FIGURES, 0)
    for candidate in candidates:
        for name in FIGURES:
            for factor in FACTORS:
                limit = candidate.metrics.value(name) * factor
                if limit <= 0:
                    continue
                goal = Slo(metric=name, statistic="mean", limit=limit)
                asked = replace(question, slos=(goal,), objective=load_objective("ttft_mean"), then=())
                found = Evaluator(asked).challenge(candidate.plan, None, (1e9,))
                met = goal.met(candidate.metrics.value(name))
                if found is None:
                    assert not met, (name, factor)
                    cut[name] += 1
                else:
                    assert found.meets_slos == met
    # Limits that are missed by far are seen early, but for the cost, which no run moves.
    assert all(cut[name] > 0 for name in STOPPED)
    assert cut["cost"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_run_cut_short_by_an_objective_is_worse_than_the_cost_given(seed: int) -> None:
    question, candidates = runs(seed)
    cut = dict.fromkeys(NAMES, 0)
    for candidate in candidates:
        for name in NAMES:
            asked = replace(question, objective=load_objective(name), then=())
            (cost,) = asked.costs(candidate.metrics)
            for factor in FACTORS:
                found = Evaluator(asked).challenge(candidate.plan, None, (cost * factor,))
                if found is None:
                    assert cost > cost * factor, (name, factor)
                    cut[name] += 1
                else:
                    assert found.value == candidate.metrics.value(*_parts(name)) or math.isnan(found.value)
    assert all(cut[name] > 0 for name in NAMES if name in STOPPED or name.startswith(("ttft", "tpot", "e2e")))
    assert not any(cut[name] for name in NAMES if name.startswith(("itl", "cost")) and name not in STOPPED)


def test_a_run_as_good_by_the_cost_of_its_gpus_is_cut_short_by_what_comes_after() -> None:
    question, candidates = runs(0)
    for candidate in candidates:
        asked = replace(question, objective=load_objective("cost"), then=(load_objective("e2e_mean"),))
        cost, mean = asked.costs(candidate.metrics)
        evaluator = Evaluator(asked)
        assert evaluator.challenge(candidate.plan, None, (cost, mean * 0.5)) is None
        assert evaluator.challenge(candidate.plan, None, (cost, mean)) is not None
        # Cheaper than what it is held against, it may be as slow as it is.
        assert evaluator.challenge(candidate.plan, None, (cost * 2, mean * 0.5)) is not None


def test_energy_is_passed_once_the_idle_draw_and_every_tokens_least_are_beyond_it() -> None:
    passing = Passing(
        requests=10,
        decoding=9,
        output_tokens=100,
        request_s=0.0,
        least_j=400.0,
        idle_w=50.0,
        limit_w=700.0,
        cost_per_h=None,
    )

    def longest_ns(metric: str, limit: float) -> int:
        (stop,) = passing.limit(metric, "mean", limit)
        return stop.limit_ns

    assert longest_ns("energy", 1400.0) == pytest.approx(20e9)  # (1400 - 400) / 50
    assert longest_ns("energy", 350.0) == pytest.approx(0.5e9)  # all that may be drawn
    assert longest_ns("energy_per_token", 14.0) == pytest.approx(20e9)
    assert longest_ns("throughput", 5.0) == longest_ns("goodput", 5.0) == pytest.approx(2e9)
    assert passing.limit("cost_per_mtoken", "mean", 1.0) == []  # without a price
    paid = replace(passing, cost_per_h=36.0)
    (stop,) = paid.limit("cost_per_mtoken", "mean", 1000.0)
    assert stop.limit_ns == pytest.approx(10e9)  # 0.1 $ for 100 tokens, 0.01 $ a second
    assert replace(passing, idle_w=0.0).limit("energy", "mean", 1400.0) == []
    assert passing.limit("itl", "p95", 1e-9) == passing.limit("cost", "mean", 1e-9) == []


def _parts(name: str) -> tuple[str, str]:
    metric, _, statistic = name.partition("_")
    return (name, "mean") if name in FIGURES else (metric, statistic)
