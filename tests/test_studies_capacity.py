"""The highest rate is the last of its grid at which the goals hold; the fewest GPUs are those that hold at a rate."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from plan_cases import (
    OTHERS,
    Short,
    dense,
    double_times,
    every_deployment,
    make_cluster,
    make_model,
    make_problem,
    random_model,
    random_trace,
)

from apex_opt.errors import CapacityError, UsageError
from apex_opt.figures import parse_goals
from apex_opt.oracle.space import tally
from apex_opt.plans.deployment import Deployment
from apex_opt.plans.plan import parse_plan
from apex_opt.search.scorer import Scorer
from apex_opt.studies.candidates import Rater
from apex_opt.studies.capacity import fewest_gpus, highest_rate
from apex_opt.studies.rates import Grid
from apex_opt.studies.steady import DOUBLINGS, Steady
from apex_opt.workload import make_trace
from apex_opt.workload.steady import rate_of
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from apex_opt.search import Problem
    from apex_opt.search.ledger import Part
    from apex_opt.studies.capacity_answer import Capacity

SPACE = PlanSpace()
SEEDS = range(8)
COARSE = 0.5

pytestmark = pytest.mark.usefixtures("short_rates")


@cache
def asked(seed: int) -> Problem:
    """A small problem; its goals are those that some plan reaches at some rate, made tighter or wider."""
    rng = np.random.default_rng(seed + 5000)
    gpus = int(rng.choice([1, 2, 3, 4, 4]))
    problem = make_problem(
        random_model(rng),
        make_cluster(gpus),
        random_trace(seed, 40),
        routing="least_loaded" if rng.random() < 0.3 else "round_robin",
    )
    while not (plans := feasible(problem)):
        problem = replace(problem, model=random_model(rng))
    plan = plans[rng.integers(len(plans))]
    factor = float(rng.choice([0.01, 1, 8]))
    metrics = Scorer(replace(problem, trace=problem.trace.stretched(1 / factor))).simulate(plan).metrics
    factor = 0.2 if rng.random() < 0.15 else float(rng.choice([1.01, 1.5]))
    ttft, tpot = (metrics.latency_s[name]["p95"] * factor for name in ("ttft", "tpot"))
    goals = [f"ttft_p95<={ttft:.12f}s", f"tpot_mean<={tpot:.12f}s", f"ttft<={ttft:.12f}s@80%"]
    return replace(problem, slos=parse_goals(",".join(goals[int(rng.integers(3)) :])))


def feasible(problem: Problem) -> list[Deployment]:
    return every_deployment(Scorer(problem))


def part_of(answer: Capacity) -> Part:
    """The only part of a ledger."""
    (part,) = answer.ledger.parts
    return part


def able(steady: Steady, rate_per_s: float) -> list[Deployment]:
    """Plans that meet the goals by their bounds."""
    scorer = steady.at(rate_per_s)
    return [one for one in feasible(scorer.problem) if scorer.bounds(one)[1]]


def found(part: Part) -> int:
    """Deployments that sustain the rate given, or whose highest rate was found."""
    return part.simulated - ruled_out(part)


def ruled_out(part: Part) -> int:
    return part.cut_short + part.missed


@cache
def answer_of(seed: int) -> Capacity:
    return highest_rate(asked(seed), SPACE, resolution=COARSE, top=2)


def sustains(steady: Steady, plan: Deployment, rate_per_s: float) -> bool:
    """Whether a plan sustains a rate, without bounds and whatever others do."""
    trial = steady.run(plan, rate_per_s)
    return trial.holds and steady.confirmed(plan, rate_per_s, trial).holds


# ---- the highest rate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_no_plan_of_the_space_sustains_the_rate_after_the_best(seed: int) -> None:
    answer, problem = answer_of(seed), asked(seed)
    steady, plans = Steady(problem), feasible(problem)
    slowest = Grid.of(rate_of(problem.trace), COARSE, len(problem.trace) * steady.loops << DOUBLINGS)
    if not answer.plans:
        assert not any(sustains(steady, plan, slowest.rate_per_s(slowest.low)) for plan in plans)
        return
    best = answer.plans[0]
    assert sustains(steady, best.deployment, best.rate_per_s)
    assert best.next_rate_per_s is not None
    assert [str(plan) for plan in plans if sustains(steady, plan, best.next_rate_per_s)] == []
    if len(answer.plans) > 1 and (second := answer.plans[1]).next_rate_per_s is not None:
        above = {plan for plan in plans if sustains(steady, plan, second.next_rate_per_s)}
        assert above <= {best.deployment}


def test_these_problems_have_answers_of_every_kind() -> None:
    answers = [answer_of(seed) for seed in SEEDS]
    assert sum(answer.status == "optimal" for answer in answers) >= 5
    assert sum(answer.status == "infeasible" for answer in answers) >= 2
    assert sum(ruled_out(part_of(answer)) > 0 for answer in answers) >= 3
    assert sum(part_of(answer).bounded > 0 for answer in answers) >= 2


@pytest.mark.parametrize("seed", [1, 6, 9, 10])
def test_the_rate_found_is_sustained_and_the_next_one_of_the_grid_is_not(seed: int) -> None:
    problem = asked(seed)
    for item in highest_rate(problem, SPACE, resolution=0.02, top=1).plans:
        assert item.holds.meets_slos
        assert item.next_rate_per_s == pytest.approx(1.02 * item.rate_per_s, rel=1e-9)
        assert item.why
        steady = Steady(problem)
        assert sustains(steady, item.deployment, item.rate_per_s)
        assert not sustains(steady, item.deployment, item.next_rate_per_s)
        run = steady.at(item.rate_per_s, item.evidence.requests // len(problem.trace)).simulate(item.deployment)
        assert run.metrics == item.holds.metrics
        if item.why == "goals":
            assert item.missed
            assert all(not slo.met(item.missed[slo.text]) for slo in problem.slos if slo.text in item.missed)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_certificate_accounts_for_every_plan_of_the_space(seed: int) -> None:
    problem, answer = asked(seed), answer_of(seed)
    part, counted = part_of(answer), tally(problem.instance())
    assert (part.space, part.infeasible) == (counted.space, counted.infeasible)
    assert part.repeated == counted.repeated
    assert part.bounded + part.simulated == len(counted.plans)
    assert answer.larger == (0,)
    assert part.complete
    assert answer.simulations >= part.simulated


@pytest.mark.parametrize("seed", [1, 5, 10])
def test_more_gpus_never_lower_the_highest_rate(seed: int) -> None:
    problem = asked(seed)
    found = [
        highest_rate(replace(problem, max_devices=n), SPACE, resolution=COARSE)
        for n in range(1, problem.cluster.size + 1)
    ]
    rates = [answer.plans[0].rate_per_s if answer.plans else 0.0 for answer in found]
    assert rates == sorted(rates)


@pytest.mark.parametrize("seed", [0, 5, 10])
def test_the_answer_does_not_depend_on_the_number_of_cores(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def shape(answer: Capacity) -> Any:
        part = part_of(answer)
        counts = part.bounded, part.simulated, part.cut_short, answer.simulations
        return counts, answer.reason, [(item.deployment, item.rate_per_s) for item in answer.plans]

    answers = [shape(answer_of(seed))]
    for cores in (1, 7):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        answers.append(shape(highest_rate(asked(seed), SPACE, resolution=COARSE, top=2)))
    assert answers[0] == answers[1] == answers[2]


def test_twice_the_times_of_everything_halve_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, trace = make_model((dense(hidden=1024, columns=4096), 7)), random_trace(3, 80)
    problem = make_problem(model, make_cluster(4), trace, "ttft_p95<=12ms,tpot_mean<=0.9ms")
    once = highest_rate(problem, SPACE)
    double_times(monkeypatch)
    goals = parse_goals("ttft_p95<=24ms,tpot_mean<=1.8ms")
    twice = highest_rate(replace(problem, trace=trace.stretched(2), slos=goals), SPACE)
    assert once.plans[0].next_rate_per_s is not None
    assert twice.plans[0].deployment == once.plans[0].deployment
    assert twice.plans[0].rate_per_s == pytest.approx(once.plans[0].rate_per_s / 2, rel=1e-4)


def test_most_plans_of_a_larger_space_take_one_simulation_or_none() -> None:
    model = make_model((dense(heads=32, kv=8, hidden=4096, width=128, columns=14336), 32))
    problem = make_problem(model, make_cluster(8), random_trace(2, 300), "ttft_p95<=100ms,tpot_p95<=20ms")
    part = part_of(highest_rate(problem, SPACE))
    assert part.bounded + ruled_out(part) > 3 * found(part)
    assert part.bounded > found(part)


def test_a_finer_grid_brackets_the_coarser_answer() -> None:
    problem = asked(8)
    plan = answer_of(8).plans[0].deployment
    coarse, fine = (highest_rate(problem, SPACE, deployment=plan, resolution=r).plans[0] for r in (0.21, 0.1))
    assert coarse.rate_per_s <= fine.rate_per_s * (1 + 1e-6)  # 1.1 ** 2 = 1.21: every rate of one grid is in the other
    assert coarse.next_rate_per_s is None or fine.rate_per_s < coarse.next_rate_per_s


def test_goals_that_no_rate_breaks_end_with_what_a_plan_serves() -> None:
    problem = make_problem(make_model((dense(), 4)), make_cluster(2), random_trace(1, 10), "e2e_max<=1000min")
    best = highest_rate(problem, SPACE).plans[0]
    assert best.why in ("saturated", "queue")
    assert best.missed == {}
    assert best.evidence.saturated_per_s is not None
    assert 0.5 * best.evidence.saturated_per_s < best.rate_per_s < best.evidence.saturated_per_s


def test_goals_that_no_rate_meets_are_told_with_what_is_reached_by_requests_alone() -> None:
    problem = make_problem(make_model((dense(), 4)), make_cluster(2), random_trace(1, 10), "ttft_p95<=5ms")
    answer = highest_rate(problem, SPACE)
    assert (answer.status, answer.plans) == ("infeasible", ())
    assert answer.reason is not None
    assert answer.reason.startswith("even at one request at a time, no feasible plan meets the SLOs; the closest, ")
    assert "misses ttft_p95<=5ms (it reaches " in answer.reason
    assert found(part_of(answer)) == 0


def test_a_model_too_large_is_answered_with_what_comes_nearest() -> None:
    model = make_model((dense(hidden=8192, heads=64, kv=8, width=128, columns=28672), 80))
    answer = highest_rate(make_problem(model, make_cluster(1), random_trace(1, 5), "ttft_p95<=1s"), SPACE)
    assert answer.status == "infeasible"
    assert answer.reason is not None
    assert "breaks memory: a GPU needs" in answer.reason
    assert "at a time" not in answer.reason


def test_the_clock_asked_for_is_the_one_that_is_searched() -> None:
    for seed in range(40):
        problem = asked(seed)
        free = highest_rate(problem, SPACE, resolution=COARSE)
        low = highest_rate(problem.offering(clocks=(600,)), SPACE, resolution=COARSE)
        both = highest_rate(problem.offering(clocks=(None, 600)), SPACE, resolution=COARSE)
        assert {item.deployment.plan.clock_mhz for item in low.plans} <= {600}
        assert part_of(both).space == 2 * part_of(free).space
        if low.plans and free.plans[0].rate_per_s > low.plans[0].rate_per_s:
            assert both.plans[0].deployment.plan.clock_mhz is None
            return
    pytest.fail("no rate here depends on the clock")


def test_progress_is_told_along_the_way() -> None:
    told: list[tuple[str, int, int]] = []
    highest_rate(asked(7), SPACE, progress=lambda *step: told.append(step))
    assert told[0] == ("enumerating plans", 0, 0)
    assert "searching rates" in {what for what, _, _ in told}
    assert all(0 <= done <= total for _, done, total in told)


def test_an_enumeration_cut_short_proves_nothing() -> None:
    problem = make_problem(make_model((dense(), 4)), make_cluster(4), random_trace(1, 10), "ttft_p95<=1s")
    answer = highest_rate(problem, Short())
    assert answer.status == "feasible"
    assert not part_of(answer).complete


# ---- one plan ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_one_plan_alone_has_the_rate_it_has_among_all(seed: int) -> None:
    for item in answer_of(seed).plans:
        alone = highest_rate(asked(seed), SPACE, deployment=item.deployment, resolution=COARSE)
        assert alone.status == "feasible"
        assert part_of(alone).space == found(part_of(alone)) == 1
        # Bursts fall on other replicas with other arrivals, so that rates need not hold in order.
        assert alone.plans[0].rate_per_s == pytest.approx(item.rate_per_s, rel=COARSE + 0.01)


@pytest.mark.parametrize(("text", "part"), [("tp4", "devices: the plan takes 4 GPUs"), ("attn(tp1) ffn(ep1) w8a8", "")])
def test_a_plan_that_cannot_run_says_which_constraint_it_breaks(text: str, part: str) -> None:
    model = make_model((dense(), 4))
    cluster = make_cluster(2, flops_per_s=(("bf16", 1e15),))
    answer = highest_rate(
        make_problem(model, cluster, random_trace(1, 10), "ttft_p95<=1s"),
        SPACE,
        deployment=Deployment.of(parse_plan(text, model)),
    )
    assert answer.status == "infeasible"
    assert answer.reason is not None
    assert (part or "format: test-gpu does not compute in int8, which w8a8 needs") in answer.reason


def test_runs_that_tell_how_far_off_a_plan_is_are_counted() -> None:
    problem = make_problem(make_model((dense(), 4)), make_cluster(2), random_trace(1, 10), "ttft_p95<=1us")
    answer = highest_rate(problem, SPACE)
    assert answer.reason is not None and "as bounds show; by these the closest, " in answer.reason
    assert answer.simulations == 1
    given = highest_rate(problem, SPACE, deployment=Deployment.of(parse_plan("tp2", problem.model)))
    assert given.simulations == 2  # one to see that it can run, one by single requests


def test_a_plan_that_misses_at_any_rate_says_what_it_reaches() -> None:
    model = make_model((dense(), 4))
    problem = make_problem(model, make_cluster(2), random_trace(1, 10), "ttft_p95<=5ms")
    answer = highest_rate(problem, SPACE, deployment=Deployment.of(parse_plan("tp2", model)))
    assert answer.status == "infeasible"
    assert answer.reason is not None
    assert "attn(tp2) ffn(tp2) bf16 misses ttft_p95<=5ms (it reaches " in answer.reason


# ---- the fewest GPUs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 5, 6, 8, 9, 10])
def test_the_fewest_gpus_are_those_of_judging_every_plan_and_the_best_of_them_is_first(seed: int) -> None:
    problem = asked(seed)
    for factor in (0.1, 20.0):
        rate = rate_of(problem.trace) * factor
        answer = fewest_gpus(problem, SPACE, rate, top=2)
        steady = Steady(problem)
        evaluator = steady.at(rate)
        good = [plan for plan in feasible(problem) if sustains(steady, plan, rate)]
        least = min((plan.devices for plan in good), default=0)
        runs = [evaluator.simulate(plan) for plan in good if plan.devices == least]
        best = sorted((run.value, run.text) for run in runs)
        assert [(item.holds.value, str(item.deployment)) for item in answer.plans] == best[:2]
        part = part_of(answer)
        known = part.bounded + part.simulated + part.repeated
        assert known + sum(part.infeasible.values()) == part.space
        assert answer.larger[0] <= part.beaten
        assert not good or answer.larger[0] == sum(plan.devices > least for plan in able(steady, rate))
        assert (answer.reason is None) == bool(good)
        if not good:
            assert answer.reason is not None
            assert "requests/s" in answer.reason


def test_a_rate_that_is_met_for_a_while_only_says_so() -> None:
    problem = make_problem(
        make_model((dense(), 4)), make_cluster(1), random_trace(3, 40), "ttft_p95<=30min", objective="throughput"
    )
    answer = fewest_gpus(problem, SPACE, 3000.0)
    assert answer.status == "infeasible"
    assert answer.reason is not None
    assert "at 3000 requests/s, attn(tp1) ffn(tp1) bf16 meets the goals at first, but its queue grows" in answer.reason


@pytest.mark.parametrize("objective", ["throughput", "energy", "ttft_p99"])
def test_any_objective_chooses_among_the_plans_on_the_fewest_gpus(objective: str) -> None:
    problem = make_problem(
        make_model((dense(), 4)), make_cluster(4), random_trace(4, 40), "ttft_p95<=40ms", objective=objective
    )
    rate = 20 * rate_of(problem.trace)
    answer = fewest_gpus(problem, SPACE, rate)
    steady = Steady(problem)
    good = [plan for plan in feasible(problem) if sustains(steady, plan, rate)]
    least = min(plan.devices for plan in good)
    runs = [steady.at(rate).simulate(plan) for plan in good if plan.devices == least]
    costs = [problem.objective.signed(run.value) for run in runs]
    assert problem.objective.signed(answer.plans[0].holds.value) == min(costs)


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
    problem = make_problem(make_model((dense(), 4)), make_cluster(1), trace, slo)
    with pytest.raises(UsageError, match=said) as caught:
        fewest_gpus(problem, SPACE, 2.0) if inverse else highest_rate(problem, SPACE)
    assert "\n" not in str(caught.value)


def test_a_prompt_as_long_as_the_model_allows_is_refused() -> None:
    trace = make_trace(name="long", arrival_ns=[0, 1], prompt=[5, 2048], output=[1, 1])
    problem = make_problem(make_model((dense(), 4)), make_cluster(1), trace, "ttft_p95<=1s")
    with pytest.raises(CapacityError, match="request 1: a prompt of 2048 tokens leaves no room"):
        highest_rate(problem, SPACE)


# ---- several types of GPU ---------------------------------------------------------------------------------------


@cache
def mixed(seed: int) -> Problem:
    """A small problem on two types of GPU, with goals about what some deployment reaches at some rate."""
    rng = np.random.default_rng(seed + 6000)
    model = make_model((dense(hidden=1024, columns=4096), 4))
    clusters = make_cluster(1 + seed % 2), make_cluster(1 + seed // 2 % 2, **OTHERS[seed % len(OTHERS)])
    between = make_cluster(1, 2).inter if seed % 3 else None
    problem = make_problem(model, clusters, random_trace(seed, 40), between=between)
    every = feasible(problem)
    fast = replace(problem, trace=problem.trace.stretched(0.02))
    metrics = Scorer(fast).simulate(every[rng.integers(len(every))]).metrics
    ttft, tpot = (metrics.latency_s[name]["p95"] * float(rng.choice([1.01, 1.5])) for name in ("ttft", "tpot"))
    return replace(problem, slos=parse_goals(f"ttft_p95<={ttft:.12f}s,tpot_mean<={tpot:.12f}s"))


MIXED = range(6)


@cache
def mixed_answer(seed: int) -> Capacity:
    return highest_rate(mixed(seed), SPACE, resolution=COARSE, top=2)


@pytest.mark.parametrize("seed", MIXED)
def test_no_deployment_over_two_types_sustains_the_rate_after_the_best(seed: int) -> None:
    answer, problem = mixed_answer(seed), mixed(seed)
    steady, every = Steady(problem), feasible(problem)
    best, second = answer.plans
    assert answer.status == "optimal"
    assert sustains(steady, best.deployment, best.rate_per_s)
    assert best.next_rate_per_s is not None
    assert [str(one) for one in every if sustains(steady, one, best.next_rate_per_s)] == []
    assert second.next_rate_per_s is not None
    above = {one for one in every if sustains(steady, one, second.next_rate_per_s)}
    assert above <= {best.deployment}


def test_these_deployments_take_rates_alone_and_side_by_side() -> None:
    pools = [len(item.deployment.pools) for seed in MIXED for item in mixed_answer(seed).plans]
    assert {1, 2} <= set(pools)
    parts = [part for seed in MIXED for part in mixed_answer(seed).ledger.parts]
    assert sum(part.bounded for part in parts) > 0
    assert any(part.shape == "pipeline" for part in parts)


@pytest.mark.parametrize("seed", MIXED)
def test_the_parts_of_a_ledger_account_for_every_deployment_over_two_types(seed: int) -> None:
    answer, problem = mixed_answer(seed), mixed(seed)
    every = feasible(problem)
    assert sum(part.bounded + part.simulated + part.infeasible.get("share", 0) for part in answer.ledger.parts) == len(
        every
    )
    for part in answer.ledger.parts:
        known = part.bounded + part.simulated + part.repeated + part.waiting
        assert part.space == sum(part.infeasible.values()) + known
    # What no schedule takes no run sustains: neither of those that were bounded nor of any other.
    steady, rater = Steady(problem), Rater(Scorer(problem))
    for one in every:
        _, most_per_s = rater.together([rater.rated(pool, beside=True) for pool in one.pools])
        assert not sustains(steady, one, 1.001 * most_per_s)


@pytest.mark.parametrize("seed", MIXED)
def test_the_fewest_gpus_of_two_types_are_those_of_judging_every_deployment(seed: int) -> None:
    problem, best = mixed(seed), mixed_answer(seed).plans[0]
    for share in (0.4, 1.0):
        rate = share * best.rate_per_s
        answer, steady = fewest_gpus(problem, SPACE, rate, top=2), Steady(problem)
        good = [one for one in feasible(problem) if sustains(steady, one, rate)]
        least = min(one.devices for one in good)
        runs = [steady.at(rate).simulate(one) for one in good if one.devices == least]
        ranked = sorted((run.value, run.text) for run in runs)
        assert [(item.holds.value, item.holds.text) for item in answer.plans] == ranked[:2]
        for part, larger in zip(answer.ledger.parts, answer.larger, strict=True):
            known = part.bounded + part.simulated + part.repeated
            assert part.space == sum(part.infeasible.values()) + known
            assert larger <= part.beaten


def test_a_given_deployment_of_two_pools_has_the_rate_it_has_among_all() -> None:
    for seed in MIXED:
        for item in mixed_answer(seed).plans:
            alone = highest_rate(mixed(seed), SPACE, deployment=item.deployment, resolution=COARSE)
            assert alone.status == "feasible"
            assert alone.plans[0].rate_per_s == pytest.approx(item.rate_per_s, rel=COARSE + 0.01)


@pytest.mark.parametrize("inverse", [False, True])
def test_what_is_left_when_the_time_is_up_is_told_and_how_much_better_it_can_be(inverse: bool) -> None:
    problem = mixed(3)
    if inverse:
        answer = fewest_gpus(problem, SPACE, mixed_answer(3).plans[0].rate_per_s, time_limit_s=0.0)
    else:
        answer = highest_rate(problem, SPACE, resolution=COARSE, time_limit_s=0.0)
    assert answer.status in ("feasible", "unknown")
    assert answer.ledger.waiting > 0
    assert not answer.ledger.optimal
    if answer.plans and not inverse:
        assert answer.ledger.gap is not None
        best = mixed_answer(3).plans[0].rate_per_s
        assert best <= answer.plans[0].rate_per_s * (1 + answer.ledger.gap)


def test_a_rate_that_is_too_much_work_for_every_deployment_is_told_as_one() -> None:
    model = make_model((dense(hidden=1024, columns=4096), 4))
    clusters = make_cluster(1), make_cluster(1, **OTHERS[0])
    problem = make_problem(model, clusters, random_trace(3, 40), "ttft_p95<=30min")
    answer = fewest_gpus(problem, SPACE, 30_000.0)
    assert (answer.status, answer.plans) == ("infeasible", ())
    assert answer.reason is not None
    assert answer.reason.startswith("at 3e+04 requests/s, ")
    assert "None" not in answer.reason
    (mixed,) = answer.ledger.of("mixed")
    assert (mixed.simulated, mixed.bounded) == (0, mixed.space)
