"""The highest rate is the last of its grid at which the goals hold; the fewest GPUs are those that hold at a rate."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from plan_cases import Short, dense, make_cluster, make_model, make_question, random_model, random_trace

from apex_opt.cost import CostModel
from apex_opt.errors import CapacityError, UsageError
from apex_opt.evaluate import space, tally, violations
from apex_opt.figures import parse_goals
from apex_opt.plan.plan import parse_plan
from apex_opt.search import Evaluator, Question
from apex_opt.search.capacity import fewest_gpus, highest_rate
from apex_opt.search.rates import Grid
from apex_opt.search.steady import DOUBLINGS, Steady
from apex_opt.workload import make_trace
from apex_opt.workload.steady import rate_of
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from apex_opt.cost import PlanCost
    from apex_opt.plan.plan import Plan
    from apex_opt.search.capacity_answer import Capacity

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
    factor = float(rng.choice([0.01, 1, 8]))
    metrics = Evaluator(replace(question, trace=question.trace.stretched(1 / factor))).simulate(plan).metrics
    factor = 0.2 if rng.random() < 0.15 else float(rng.choice([1.01, 1.5]))
    ttft, tpot = (metrics.latency_s[name]["p95"] * factor for name in ("ttft", "tpot"))
    goals = [f"ttft_p95<={ttft:.12f}s", f"tpot_mean<={tpot:.12f}s", f"ttft<={ttft:.12f}s@80%"]
    return replace(question, slos=parse_goals(",".join(goals[int(rng.integers(3)) :])))


def feasible(question: Question) -> list[Plan]:
    instance = question.instance()
    return [plan for plan in space(instance) if not violations(instance, plan)]


@cache
def answer_of(seed: int) -> Capacity:
    return highest_rate(asked(seed), SPACE, resolution=COARSE, top=2)


def sustains(steady: Steady, plan: Plan, rate_per_s: float) -> bool:
    """Whether a plan sustains a rate, without bounds and whatever others do."""
    trial = steady.run(plan, rate_per_s)
    return trial.holds and steady.confirmed(plan, rate_per_s, trial).holds


# ---- the highest rate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_no_plan_of_the_space_sustains_the_rate_after_the_best(seed: int) -> None:
    answer, question = answer_of(seed), asked(seed)
    steady, plans = Steady(question), feasible(question)
    slowest = Grid.of(rate_of(question.trace), COARSE, len(question.trace) * steady.loops << DOUBLINGS)
    if not answer.plans:
        assert not any(sustains(steady, plan, slowest.rate_per_s(slowest.low)) for plan in plans)
        return
    best = answer.plans[0]
    assert sustains(steady, best.plan, best.rate_per_s)
    assert best.next_rate_per_s is not None
    assert [str(plan) for plan in plans if sustains(steady, plan, best.next_rate_per_s)] == []
    if len(answer.plans) > 1 and (second := answer.plans[1]).next_rate_per_s is not None:
        above = {plan for plan in plans if sustains(steady, plan, second.next_rate_per_s)}
        assert above <= {best.plan}


def test_these_questions_have_answers_of_every_kind() -> None:
    answers = [answer_of(seed) for seed in SEEDS]
    assert sum(answer.status == "optimal" for answer in answers) >= 5
    assert sum(answer.status == "infeasible" for answer in answers) >= 2
    assert sum(answer.certificate.ruled_out > 0 for answer in answers) >= 3
    assert sum(answer.certificate.bounded > 0 for answer in answers) >= 2


@pytest.mark.parametrize("seed", [1, 6, 9, 10])
def test_the_rate_found_is_sustained_and_the_next_one_of_the_grid_is_not(seed: int) -> None:
    question = asked(seed)
    for item in highest_rate(question, SPACE, resolution=0.02, top=1).plans:
        assert item.holds.meets_slos
        assert item.next_rate_per_s == pytest.approx(1.02 * item.rate_per_s, rel=1e-9)
        assert item.why
        steady = Steady(question)
        assert sustains(steady, item.plan, item.rate_per_s)
        assert not sustains(steady, item.plan, item.next_rate_per_s)
        run = steady.at(item.rate_per_s, item.evidence.requests // len(question.trace)).simulate(item.plan)
        assert run.metrics == item.holds.metrics
        if item.why == "goals":
            assert item.missed
            assert all(not slo.met(item.missed[slo.text]) for slo in question.slos if slo.text in item.missed)


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


@pytest.mark.parametrize("seed", [1, 5, 10])
def test_more_gpus_never_lower_the_highest_rate(seed: int) -> None:
    question = asked(seed)
    found = [
        highest_rate(replace(question, max_devices=n), SPACE, resolution=COARSE)
        for n in range(1, question.cluster.size + 1)
    ]
    rates = [answer.plans[0].rate_per_s if answer.plans else 0.0 for answer in found]
    assert rates == sorted(rates)


@pytest.mark.parametrize("seed", [0, 5, 10])
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
    goals = parse_goals("ttft_p95<=24ms,tpot_mean<=1.8ms")
    twice = highest_rate(replace(question, trace=trace.stretched(2), slos=goals), SPACE)
    assert once.plans[0].next_rate_per_s is not None
    assert twice.plans[0].plan == once.plans[0].plan
    assert twice.plans[0].rate_per_s == pytest.approx(once.plans[0].rate_per_s / 2, rel=1e-4)


def test_most_plans_of_a_larger_space_take_one_simulation() -> None:
    model = make_model((dense(heads=32, kv=8, hidden=4096, width=128, columns=14336), 32))
    question = make_question(model, make_cluster(8), random_trace(2, 300), "ttft_p95<=100ms,tpot_p95<=20ms")
    certificate = highest_rate(question, SPACE).certificate
    assert certificate.ruled_out > 3 * certificate.found
    assert certificate.ruled_out > 0


def test_a_finer_grid_brackets_the_coarser_answer() -> None:
    question = asked(8)
    plan = answer_of(8).plans[0].plan
    coarse, fine = (highest_rate(question, SPACE, plan=plan, resolution=r).plans[0] for r in (0.21, 0.1))
    assert coarse.rate_per_s <= fine.rate_per_s * (1 + 1e-6)  # 1.1 ** 2 = 1.21: every rate of one grid is in the other
    assert coarse.next_rate_per_s is None or fine.rate_per_s < coarse.next_rate_per_s


def test_goals_that_no_rate_breaks_end_with_what_a_plan_serves() -> None:
    question = make_question(make_model((dense(), 4)), make_cluster(2), random_trace(1, 10), "e2e_max<=1000min")
    best = highest_rate(question, SPACE).plans[0]
    assert best.why in ("saturated", "queue")
    assert best.missed == {}
    assert best.evidence.saturated_per_s is not None
    assert 0.5 * best.evidence.saturated_per_s < best.rate_per_s < best.evidence.saturated_per_s


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
        # Bursts fall on other replicas with other arrivals, so that rates need not hold in order.
        assert alone.plans[0].rate_per_s == pytest.approx(item.rate_per_s, rel=COARSE + 0.01)


@pytest.mark.parametrize(("text", "part"), [("tp4", "devices: the plan takes 4 GPUs"), ("attn(tp1) ffn(ep1) w8a8", "")])
def test_a_plan_that_cannot_run_says_which_constraint_it_breaks(text: str, part: str) -> None:
    model = make_model((dense(), 4))
    cluster = make_cluster(2, flops_per_s=(("bf16", 1e15),))
    answer = highest_rate(
        make_question(model, cluster, random_trace(1, 10), "ttft_p95<=1s"), SPACE, plan=parse_plan(text, model)
    )
    assert answer.status == "infeasible"
    assert answer.reason is not None
    assert (part or "format: test-gpu does not compute in int8, which w8a8 needs") in answer.reason


def test_a_plan_that_misses_at_any_rate_says_what_it_reaches() -> None:
    model = make_model((dense(), 4))
    question = make_question(model, make_cluster(2), random_trace(1, 10), "ttft_p95<=5ms")
    answer = highest_rate(question, SPACE, plan=parse_plan("tp2", model))
    assert answer.status == "infeasible"
    assert answer.reason is not None
    assert "attn(tp2) ffn(tp2) bf16 misses ttft_p95<=5ms (it reaches " in answer.reason


# ---- the fewest GPUs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 5, 6, 8, 9, 10])
def test_the_fewest_gpus_are_those_of_judging_every_plan_and_the_best_of_them_is_first(seed: int) -> None:
    question = asked(seed)
    for factor in (0.1, 20.0):
        rate = rate_of(question.trace) * factor
        answer = fewest_gpus(question, SPACE, rate, top=2)
        steady = Steady(question)
        evaluator = steady.at(rate)
        good = [plan for plan in feasible(question) if sustains(steady, plan, rate)]
        least = min((plan.devices for plan in good), default=0)
        runs = [evaluator.simulate(plan) for plan in good if plan.devices == least]
        best = sorted((run.value, str(run.plan)) for run in runs)
        assert [(item.holds.value, str(item.plan)) for item in answer.plans] == best[:2]
        certificate = answer.certificate
        known = (
            certificate.bounded + certificate.ruled_out + certificate.found + certificate.larger + certificate.repeated
        )
        assert known + sum(certificate.infeasible.values()) == certificate.space
        assert (answer.reason is None) == bool(good)
        if not good:
            assert answer.reason is not None
            assert "requests/s" in answer.reason


def test_a_rate_that_is_met_for_a_while_only_says_so() -> None:
    question = make_question(
        make_model((dense(), 4)), make_cluster(1), random_trace(3, 40), "ttft_p95<=30min", objective="throughput"
    )
    answer = fewest_gpus(question, SPACE, 3000.0)
    assert answer.status == "infeasible"
    assert answer.reason is not None
    assert "at 3000 requests/s, attn(tp1) ffn(tp1) bf16 meets the goals at first, but its queue grows" in answer.reason


@pytest.mark.parametrize("objective", ["throughput", "energy", "ttft_p99"])
def test_any_objective_chooses_among_the_plans_on_the_fewest_gpus(objective: str) -> None:
    question = make_question(
        make_model((dense(), 4)), make_cluster(4), random_trace(4, 40), "ttft_p95<=40ms", objective=objective
    )
    rate = 20 * rate_of(question.trace)
    answer = fewest_gpus(question, SPACE, rate)
    steady = Steady(question)
    good = [plan for plan in feasible(question) if sustains(steady, plan, rate)]
    least = min(plan.devices for plan in good)
    runs = [steady.at(rate).simulate(plan) for plan in good if plan.devices == least]
    costs = [question.objective.signed(run.value) for run in runs]
    assert question.objective.signed(answer.plans[0].holds.value) == min(costs)


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
