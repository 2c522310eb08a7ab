"""The highest rate is the last of its grid at which the goals hold; the fewest GPUs are those that hold at a rate."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_cases import Short, dense, make_cluster, make_model, make_question, random_model, random_trace

from apex_opt.cost import CostModel
from apex_opt.errors import CapacityError, UsageError
from apex_opt.evaluate import space, tally, violations
from apex_opt.plan.plan import parse_plan
from apex_opt.search import Evaluator, Question
from apex_opt.search.capacity import (
    FASTEST_PER_S,
    SLOWEST_PER_S,
    Capacity,
    at_rate,
    fewest_gpus,
    highest_rate,
    highest_step,
    own_rate,
)
from apex_opt.workload import make_trace, parse_slos
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from apex_opt.cost import PlanCost
    from apex_opt.plan.plan import Plan

SPACE = PlanSpace()
SEEDS = range(12)
COARSE = 0.5


@cache
def asked(seed: int) -> Question:
    """A small question; its goals are those that some plan reaches at some rate, made tighter or wider."""
    rng = np.random.default_rng(seed + 5000)
    gpus = int(rng.choice([1, 2, 3, 4, 4]))
    question = make_question(
        random_model(rng),
        make_cluster(gpus),
        random_trace(seed, 40),
        routing="least_loaded" if rng.random() < 0.3 else "round_robin",
    )
    plans = feasible(question)
    plan = plans[rng.integers(len(plans))]
    metrics = Evaluator(at_rate(question, float(rng.choice([0.01, 1, 8])))).simulate(plan).metrics
    factor = 0.2 if rng.random() < 0.15 else float(rng.choice([1.01, 1.5]))
    ttft, tpot = (metrics.latency_s[name]["p95"] * factor for name in ("ttft", "tpot"))
    goals = [f"ttft_p95<={ttft:.12f}s", f"tpot_mean<={tpot:.12f}s", f"ttft<={ttft:.12f}s@80%"]
    return replace(question, slos=parse_slos(",".join(goals[int(rng.integers(3)) :])))


def feasible(question: Question) -> list[Plan]:
    instance = question.instance()
    return [plan for plan in space(instance) if not violations(instance, plan)]


@cache
def answer_of(seed: int) -> Capacity:
    return highest_rate(asked(seed), SPACE, resolution=COARSE, top=2)


@cache
def grid(seed: int) -> dict[int, Evaluator]:
    """Scores at every rate of the grid."""
    question, step = asked(seed), np.log1p(COARSE)
    own = own_rate(question.trace)
    low, high = np.ceil(np.log(SLOWEST_PER_S / own) / step), np.floor(np.log(FASTEST_PER_S / own) / step)
    evaluators = {k: Evaluator(at_rate(question, (1 + COARSE) ** k)) for k in range(int(low), int(high) + 1)}
    for evaluator in evaluators.values():
        evaluator.costs = evaluators[0].costs
    return evaluators


@cache
def holding(seed: int) -> dict[Plan, list[bool]]:
    """Whether every plan holds at every rate of the grid, slowest first, without bounds or stops."""
    return {
        plan: [evaluator.simulate(plan).meets_slos for evaluator in grid(seed).values()]
        for plan in feasible(asked(seed))
    }


def monotone(seed: int) -> bool:
    return all(held == sorted(held, reverse=True) for held in holding(seed).values())


# ---- the highest rate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_plans_and_rates_are_what_simulating_every_plan_at_every_rate_finds(seed: int) -> None:
    if not monotone(seed):
        pytest.skip("goals come and go with the rate; test_the_rate_found_holds... covers it")
    answer, rates = answer_of(seed), [own_rate(e.question.trace) for e in grid(seed).values()]
    found = sorted((-sum(held), plan.devices, str(plan)) for plan, held in holding(seed).items() if any(held))
    assert [(str(item.plan), item.rate_per_s) for item in answer.plans] == [
        (text, rates[-steps - 1]) for steps, _, text in found[:2]
    ]
    assert (answer.status == "infeasible") == (not found)


def test_these_questions_have_answers_of_every_kind() -> None:
    answers = [answer_of(seed) for seed in SEEDS]
    assert sum(monotone(seed) for seed in SEEDS) >= 8
    assert sum(answer.status == "optimal" for answer in answers) >= 7
    assert sum(answer.status == "infeasible" for answer in answers) >= 2
    assert sum(answer.certificate.ruled_out > 0 for answer in answers) >= 5
    assert sum(answer.certificate.bounded > 0 for answer in answers) >= 2
    assert len({round(item.rate_per_s / own_rate(asked(s).trace), 2) for s in SEEDS for item in answer_of(s).plans}) > 5


@pytest.mark.parametrize("seed", SEEDS)
def test_the_rate_found_holds_and_the_next_one_of_the_grid_does_not(seed: int) -> None:
    question = asked(seed)
    for item in highest_rate(question, SPACE, resolution=0.02, top=2).plans:
        own = own_rate(question.trace)
        run = Evaluator(at_rate(question, item.rate_per_s / own)).simulate(item.plan)
        assert run.meets_slos
        assert item.holds.meets_slos
        if item.fails is None or item.next_rate_per_s is None:
            assert item.rate_per_s * 1.02 > FASTEST_PER_S * (1 - 1e-6)
            continue
        assert item.next_rate_per_s == pytest.approx(1.02 * item.rate_per_s, rel=1e-4)
        assert not item.fails.meets_slos
        assert not Evaluator(at_rate(question, item.next_rate_per_s / own)).simulate(item.plan).meets_slos
        assert len(item.near) == 10
        assert [rate for rate, _ in item.near] == sorted({rate for rate, _ in item.near} - {item.rate_per_s})
        for rate, held in item.near[::3]:
            assert Evaluator(at_rate(question, rate / own)).simulate(item.plan).meets_slos == held


@pytest.mark.parametrize("seed", SEEDS)
def test_the_certificate_accounts_for_every_plan_of_the_space(seed: int) -> None:
    question, certificate = asked(seed), answer_of(seed).certificate
    counted = tally(question.instance())
    assert (certificate.space, certificate.infeasible) == (counted.space, counted.infeasible)
    assert certificate.repeated == counted.repeated
    assert certificate.bounded + certificate.ruled_out + certificate.found == len(counted.plans)
    assert certificate.larger == 0
    assert certificate.complete
    assert certificate.simulations >= certificate.ruled_out + certificate.found


@pytest.mark.parametrize("seed", SEEDS)
def test_more_gpus_never_lower_the_highest_rate(seed: int) -> None:
    question = asked(seed)
    found = [highest_rate(replace(question, max_devices=n), SPACE) for n in range(1, question.cluster.size + 1)]
    rates = [answer.plans[0].rate_per_s if answer.plans else 0.0 for answer in found]
    assert rates == sorted(rates)


@pytest.mark.parametrize("seed", [0, 2, 5, 10])
def test_the_answer_does_not_depend_on_the_number_of_cores(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def shape(answer: Capacity) -> Any:
        return answer.certificate, answer.reason, [(item.plan, item.rate_per_s) for item in answer.plans]

    answers = [shape(answer_of(seed))]
    for cores in (1, 7):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        answers.append(shape(highest_rate(asked(seed), SPACE, resolution=COARSE, top=2)))
    assert answers[0] == answers[1] == answers[2]


def test_twice_the_times_of_everything_halve_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, trace = make_model((dense(hidden=1024, columns=4096), 7)), random_trace(3, 80)
    question = make_question(model, make_cluster(4), trace, "ttft_p95<=12ms,tpot_mean<=0.9ms")
    once = highest_rate(question, SPACE)
    original = CostModel.plan_cost

    def slower(self: CostModel, plan: Plan) -> PlanCost:
        cost = original(self, plan)
        return replace(cost, laws=tuple(law.scaled(2) for law in cost.laws), request_ns=2 * cost.request_ns)

    own_ns = CostModel.request_ns.fget
    monkeypatch.setattr(CostModel, "plan_cost", slower)
    monkeypatch.setattr(CostModel, "request_ns", property(lambda self: 2 * own_ns(self)))
    goals = parse_slos("ttft_p95<=24ms,tpot_mean<=1.8ms")
    twice = highest_rate(replace(question, trace=trace.stretched(2), slos=goals), SPACE)
    assert once.plans[0].next_rate_per_s is not None
    assert twice.plans[0].plan == once.plans[0].plan
    assert twice.plans[0].rate_per_s == pytest.approx(once.plans[0].rate_per_s / 2, rel=1e-4)


def test_most_plans_of_a_larger_space_take_one_simulation() -> None:
    model = make_model((dense(heads=32, kv=8, hidden=4096, width=128, columns=14336), 32))
    question = make_question(model, make_cluster(8), random_trace(2, 300), "ttft_p95<=100ms,tpot_p95<=20ms")
    certificate = highest_rate(question, SPACE).certificate
    assert certificate.ruled_out > 3 * certificate.found
    assert certificate.simulations < 2 * (certificate.ruled_out + certificate.found)


def test_a_finer_grid_brackets_the_coarser_answer() -> None:
    question = asked(8)
    plan = answer_of(8).plans[0].plan
    coarse, fine = (highest_rate(question, SPACE, plan=plan, resolution=r).plans[0] for r in (0.21, 0.1))
    assert coarse.rate_per_s <= fine.rate_per_s * (1 + 1e-6)  # 1.1 ** 2 = 1.21: every rate of one grid is in the other
    assert coarse.next_rate_per_s is None or fine.rate_per_s < coarse.next_rate_per_s


def test_goals_that_no_rate_breaks_end_with_the_grid() -> None:
    question = make_question(make_model((dense(), 4)), make_cluster(2), random_trace(1, 10), "e2e_max<=1min")
    best = highest_rate(question, SPACE).plans[0]
    assert (best.next_rate_per_s, best.fails) == (None, None)
    assert FASTEST_PER_S / 1.02 * (1 - 1e-4) < best.rate_per_s <= FASTEST_PER_S * (1 + 1e-4)
    assert best.plan.devices == 1  # of equal rates the plan on fewer GPUs


def test_goals_that_no_rate_meets_are_told_with_what_is_reached_by_requests_alone() -> None:
    question = make_question(make_model((dense(), 4)), make_cluster(2), random_trace(1, 10), "ttft_p95<=5ms")
    answer = highest_rate(question, SPACE)
    assert (answer.status, answer.plans) == ("infeasible", ())
    assert answer.reason is not None
    assert answer.reason.startswith("even at one request at a time, no feasible plan meets the SLOs; the closest, ")
    assert "misses ttft_p95<=5ms (it reaches " in answer.reason
    assert answer.certificate.found == 0


def test_a_model_too_large_is_answered_with_what_comes_nearest() -> None:
    model = make_model((dense(hidden=8192, heads=64, kv=8, width=128, columns=28672), 80))
    answer = highest_rate(make_question(model, make_cluster(1), random_trace(1, 5), "ttft_p95<=1s"), SPACE)
    assert answer.status == "infeasible"
    assert answer.reason is not None
    assert "breaks memory: a GPU needs" in answer.reason
    assert "at a time" not in answer.reason


def test_the_clock_asked_for_is_the_one_that_is_searched() -> None:
    for seed in range(40):
        question = asked(seed)
        free = highest_rate(question, SPACE, resolution=COARSE)
        low = highest_rate(replace(question, clocks=(600,)), SPACE, resolution=COARSE)
        both = highest_rate(replace(question, clocks=(None, 600)), SPACE, resolution=COARSE)
        assert {item.plan.clock_mhz for item in low.plans} <= {600}
        assert both.certificate.space == 2 * free.certificate.space
        if low.plans and free.plans[0].rate_per_s > low.plans[0].rate_per_s:
            assert both.plans[0].plan.clock_mhz is None
            return
    pytest.fail("no rate here depends on the clock")


def test_progress_is_told_along_the_way() -> None:
    told: list[tuple[str, int, int]] = []
    highest_rate(asked(7), SPACE, progress=lambda *step: told.append(step))
    assert told[0] == ("enumerating plans", 0, 0)
    assert "searching rates" in {what for what, _, _ in told}
    assert all(0 <= done <= total for _, done, total in told)


def test_an_enumeration_cut_short_proves_nothing() -> None:
    question = make_question(make_model((dense(), 4)), make_cluster(4), random_trace(1, 10), "ttft_p95<=1s")
    answer = highest_rate(question, Short())
    assert answer.status == "feasible"
    assert not answer.certificate.complete


# ---- one plan ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_one_plan_alone_has_the_rate_it_has_among_all(seed: int) -> None:
    for item in answer_of(seed).plans:
        alone = highest_rate(asked(seed), SPACE, plan=item.plan, resolution=COARSE)
        assert alone.status == "feasible"
        assert alone.certificate.space == alone.certificate.found == 1
        # Where goals come and go with the rate, the answer depends on where the search begins.
        assert alone.plans[0].rate_per_s == item.rate_per_s or not monotone(seed)


@pytest.mark.parametrize(("text", "part"), [("tp4", "devices: the plan takes 4 GPUs"), ("attn(tp1) ffn(ep1) fp8", "")])
def test_a_plan_that_cannot_run_says_which_constraint_it_breaks(text: str, part: str) -> None:
    model = make_model((dense(), 4))
    cluster = make_cluster(2, flops_per_s=(("bf16", 1e15),))
    answer = highest_rate(
        make_question(model, cluster, random_trace(1, 10), "ttft_p95<=1s"), SPACE, plan=parse_plan(text, model)
    )
    assert answer.status == "infeasible"
    assert answer.reason is not None
    assert (part or "format: test-gpu does not compute in fp8") in answer.reason


def test_a_plan_that_misses_at_any_rate_says_what_it_reaches() -> None:
    model = make_model((dense(), 4))
    question = make_question(model, make_cluster(2), random_trace(1, 10), "ttft_p95<=5ms")
    answer = highest_rate(question, SPACE, plan=parse_plan("tp2", model))
    assert answer.status == "infeasible"
    assert answer.reason is not None
    assert "attn(tp2) ffn(tp2) bf16 misses ttft_p95<=5ms (it reaches " in answer.reason


# ---- the fewest GPUs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_fewest_gpus_are_those_of_simulating_every_plan_and_the_best_of_them_is_first(seed: int) -> None:
    question = asked(seed)
    for factor in (0.1, 2.0, 20.0):
        rate = own_rate(question.trace) * factor
        answer = fewest_gpus(question, SPACE, rate, top=2)
        evaluator = Evaluator(at_rate(question, rate / own_rate(question.trace)))
        runs = [run for plan in feasible(question) if (run := evaluator.simulate(plan)).meets_slos]
        least = min((run.plan.devices for run in runs), default=0)
        best = sorted((run.value, str(run.plan)) for run in runs if run.plan.devices == least)
        assert [(item.holds.value, str(item.plan)) for item in answer.plans] == best[:2]
        certificate = answer.certificate
        known = (
            certificate.bounded + certificate.ruled_out + certificate.found + certificate.larger + certificate.repeated
        )
        assert known + sum(certificate.infeasible.values()) == certificate.space
        assert (answer.reason is None) == bool(runs)
        if not runs:
            assert answer.reason is not None
            assert "requests/s" in answer.reason


@pytest.mark.parametrize("seed", SEEDS)
def test_the_fewest_gpus_agree_with_the_highest_rates(seed: int) -> None:
    if not monotone(seed):
        pytest.skip("goals come and go with the rate")
    question = asked(seed)
    highest = {
        n: highest_rate(replace(question, max_devices=n), SPACE, resolution=COARSE)
        for n in range(1, question.cluster.size + 1)
    }
    for answer in highest.values():
        for item in answer.plans:
            enough = min(
                n for n, other in highest.items() if other.plans and other.plans[0].rate_per_s >= item.rate_per_s
            )
            fewest = fewest_gpus(question, SPACE, item.rate_per_s)
            assert fewest.plans[0].plan.devices == enough
            if item.next_rate_per_s is not None:
                more = fewest_gpus(question, SPACE, item.next_rate_per_s).plans
                assert not more or more[0].plan.devices > enough


@pytest.mark.parametrize("objective", ["throughput", "energy", "ttft_p99"])
def test_any_objective_chooses_among_the_plans_on_the_fewest_gpus(objective: str) -> None:
    question = make_question(
        make_model((dense(), 4)), make_cluster(4), random_trace(4, 40), "ttft_p95<=40ms", objective=objective
    )
    rate = 20 * own_rate(question.trace)
    answer = fewest_gpus(question, SPACE, rate)
    evaluator = Evaluator(at_rate(question, 20))
    runs = [run for plan in feasible(question) if (run := evaluator.simulate(plan)).meets_slos]
    least = min(run.plan.devices for run in runs)
    costs = [question.objective.cost(run.value) for run in runs if run.plan.devices == least]
    assert question.objective.cost(answer.plans[0].holds.value) == min(costs)


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("trace", "slo", "said"),
    [
        (random_trace(1, 10, closed=True), "ttft_p95<=1s", "is a closed loop, so there is no rate"),
        (make_trace(name="s", arrival_ns=[5, 5], prompt=[9, 9], output=[9, 9]), "ttft_p95<=1s", "arrive at once"),
        (make_trace(name="s", arrival_ns=[5], prompt=[9], output=[9]), "ttft_p95<=1s", "arrive at once"),
        (random_trace(1, 10), "ttft_p95<=1s,throughput>=3", "throughput>=3 moves with the rate itself"),
        (random_trace(1, 10), "ttft_p95<=1s,energy<=3kJ", "energy<=3kJ moves with the rate itself"),
        (random_trace(1, 10), "", "needs goals that end it"),
    ],
)
def test_what_has_no_rate_or_no_goal_is_refused_in_one_line(trace: Any, slo: str, said: str, inverse: bool) -> None:
    question = make_question(make_model((dense(), 4)), make_cluster(1), trace, slo)
    with pytest.raises(UsageError, match=said) as caught:
        fewest_gpus(question, SPACE, 2.0) if inverse else highest_rate(question, SPACE)
    assert "\n" not in str(caught.value)


def test_a_prompt_as_long_as_the_model_allows_is_refused() -> None:
    trace = make_trace(name="long", arrival_ns=[0, 1], prompt=[5, 2048], output=[1, 1])
    question = make_question(make_model((dense(), 4)), make_cluster(1), trace, "ttft_p95<=1s")
    with pytest.raises(CapacityError, match="request 1: a prompt of 2048 tokens leaves no room"):
        highest_rate(question, SPACE)


# ---- bisection --------------------------------------------------------------------------------------------------


@given(
    low=st.integers(-40, 0),
    high=st.integers(0, 40),
    place=st.floats(0, 1),
    last=st.integers(-45, 45),
    doubling=st.integers(1, 30),
)
def test_bisection_finds_the_last_step_and_asks_about_it_and_the_next(
    low: int, high: int, place: float, last: int, doubling: int
) -> None:
    start = round(low + place * (high - low))
    told: list[int] = []

    def holds(step: int) -> bool:
        told.append(step)
        return step <= last

    found = highest_step(holds, low=low, high=high, start=start, doubling=doubling)
    assert told[0] == start
    assert all(low <= step <= high for step in told)
    assert found == (None if last < low else min(last, high))
    if found is not None:
        assert {found, min(found + 1, high)} <= set(told)
    else:
        assert len(told) <= 2


@given(factor=st.floats(1e-3, 1e3))
def test_a_trace_at_another_rate_has_the_same_requests_in_the_same_order(factor: float) -> None:
    question = make_question(make_model((dense(), 4)), make_cluster(1), random_trace(7, 20), "ttft_p95<=1s")
    before, after = question.trace, at_rate(question, factor).trace
    assert after.prompt.tolist() == before.prompt.tolist()
    assert after.output.tolist() == before.output.tolist()
    assert np.abs(after.arrival_ns - before.arrival_ns / factor).max() <= 0.5 + 1e-6
    assert own_rate(after) == pytest.approx(factor * own_rate(before), rel=1e-2)
