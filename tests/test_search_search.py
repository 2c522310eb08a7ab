"""The search finds what simulating every plan finds, and accounts for every plan on the way."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from plan_cases import (
    OVERHEAD,
    Short,
    dense,
    make_cluster,
    make_model,
    make_question,
    random_question,
    random_trace,
)

from apex_opt.cost import CostModel
from apex_opt.errors import CapacityError, UsageError
from apex_opt.evaluate import FAMILIES, space, tally, violations
from apex_opt.figures import load_objective, load_objectives, parse_goals
from apex_opt.figures.registry import names
from apex_opt.ir import load_model
from apex_opt.plan.plan import parse_plan
from apex_opt.search import Answer, Candidate, Evaluator, Question, check, judge, search
from apex_opt.search.search import how_far
from apex_opt.workload import load_trace, make_trace
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from apex_opt.cost import PlanCost
    from apex_opt.plan.plan import Plan

NAMES = names()

SEEDS = range(80)
SPACE = PlanSpace()


@cache
def answer_of(seed: int) -> Answer:
    return search(random_question(seed), SPACE)


def rank(question: Question, candidate: Candidate) -> tuple[list[float], int, str]:
    """By the figures that each objective names, worked out from what the run took and what its requests saw."""
    metrics, usage = candidate.metrics, candidate.usage
    assert question.cluster.gpu.price_per_h is not None
    price = question.cluster.gpu.price_per_h * candidate.plan.devices
    tokens = int(question.trace.generated(question.settings.max_model_len).sum())
    figures = {
        "makespan": metrics.value("makespan"),
        "throughput": -metrics.value("throughput"),
        "goodput": -np.nan_to_num(metrics.value("goodput")),
        "energy": usage.energy_j,
        "energy_per_token": usage.energy_j / tokens,
        "cost": price,
        "cost_per_mtoken": price * metrics.value("makespan") / 3600 / tokens * 1e6,
    }
    costs = []
    for name in (question.objective.name, *(objective.name for objective in question.then)):
        metric, _, statistic = name.partition("_")
        cost = figures[name] if name in figures else metrics.latency_s[metric][statistic]
        costs.append(0.0 if np.isnan(cost) else cost)
    return costs, candidate.plan.devices, str(candidate.plan)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_optimum_is_what_simulating_every_plan_without_bounds_finds(seed: int) -> None:
    question, answer = random_question(seed), answer_of(seed)
    evaluator, instance = Evaluator(question), question.instance()
    scored = [evaluator.simulate(plan) for plan in space(instance) if not violations(instance, plan)]
    good = sorted((c for c in scored if c.meets_slos), key=lambda c: rank(question, c))
    if not good:
        assert (answer.status, answer.best, answer.candidates) == ("infeasible", None, ())
        return
    assert answer.status == "optimal"
    assert answer.best is not None
    assert answer.best.plan == good[0].plan
    assert answer.best.value == good[0].value or np.isnan(good[0].value)
    by_plan = {c.plan: c.value for c in good}
    for candidate in answer.candidates:
        assert candidate.value == by_plan[candidate.plan] or np.isnan(candidate.value)
        assert candidate.bound is not None
        assert (
            candidate.bound
            <= question.objective.signed(candidate.value) * (1 + 1e-12) + 1e-12 * question.objective.maximise
        )
    assert [c.plan for c in answer.candidates] == [
        c.plan for c in sorted(answer.candidates, key=lambda c: rank(question, c))
    ]


def near_question(seed: int) -> Question:
    """A random question whose first objective, or second, or both, have a tolerance."""
    question = random_question(seed)
    rng = np.random.default_rng(seed)
    names = [str(name) for name in rng.choice([n for n in NAMES if n != "cost"], size=2 + seed % 2, replace=False)]
    shares = rng.choice([0.001, 0.02, 0.2, 0.5], size=len(names) - 1)
    aims = [replace(load_objective(n), tolerance=float(s)) for n, s in zip(names, (*shares, 0.0), strict=True)]
    if seed % 4 == 1:
        aims[0] = replace(aims[0], tolerance=0.0)
    return replace(question, objective=aims[0], then=tuple(aims[1:]), request_slos=parse_goals("ttft_max<=20ms"))


def near_by_hand(question: Question, good: list[Candidate]) -> list[Candidate]:
    """The plans left to choose from, objective by objective; of those left the best come first."""
    begin = 0
    for end, aim in enumerate(question.objectives, 1):
        if not aim.tolerance:
            continue
        best = min(good, key=lambda c: rank(replace_objectives(question, begin, end), c)[0])
        for part in question.objectives[begin:end]:
            value = part.value(best.metrics)
            if np.isnan(value):
                continue
            if part.maximise:
                good = [c for c in good if part.value(c.metrics) >= value * (1 - part.tolerance)]
            else:
                good = [c for c in good if part.value(c.metrics) <= value * (1 + part.tolerance)]
        begin = end
    return sorted(good, key=lambda c: rank(replace_objectives(question, begin, None), c))


def replace_objectives(question: Question, begin: int, end: int | None) -> Question:
    first, *then = question.objectives[begin:end]
    return replace(question, objective=first, then=tuple(then))


@pytest.mark.parametrize("seed", range(200, 280))
def test_within_a_tolerance_of_the_best_by_one_objective_the_best_by_the_next_is_found(seed: int) -> None:
    question = near_question(seed)
    answer = search(question, SPACE)
    evaluator, instance = Evaluator(question), question.instance()
    scored = [evaluator.simulate(plan) for plan in space(instance) if not violations(instance, plan)]
    good = [c for c in scored if c.meets_slos]
    if not good:
        assert (answer.status, answer.best) == ("infeasible", None)
        return
    assert answer.best is not None
    assert (answer.status, answer.best.plan) == ("optimal", near_by_hand(question, good)[0].plan)
    assert answer.best.value == question.objective.value(answer.best.metrics) or np.isnan(answer.best.value)
    certificate = answer.certificate
    tolerant = sum(aim.tolerance > 0 for aim in question.objectives)
    assert len(certificate.before) == tolerant
    for each in (certificate, *certificate.before):
        assert each.space == sum(each.infeasible.values()) + each.bounded + each.repeated + each.simulated
        assert each.optimal


def test_a_tolerance_lets_the_next_objective_choose_another_plan_in_some_of_these_questions() -> None:
    changed = 0
    for seed in range(200, 340):
        question = near_question(seed)
        exact = tuple(replace(aim, tolerance=0.0) for aim in question.objectives)
        answers = [search(q, SPACE).best for q in (question, replace(question, objective=exact[0], then=exact[1:]))]
        if answers[0] is not None and answers[1] is not None:
            changed += answers[0].plan != answers[1].plan
    assert changed >= 10


def test_ties_by_the_first_objective_are_decided_by_the_second_in_some_of_these_questions() -> None:
    decided = 0
    for seed in SEEDS:
        question = replace(random_question(seed), objective=load_objective("cost"), then=(load_objective("e2e_mean"),))
        answers = [search(q, SPACE).best for q in (question, replace(question, then=()))]
        if answers[0] is not None and answers[1] is not None:
            assert answers[0].value == answers[1].value
            decided += answers[0].plan != answers[1].plan
    assert decided >= 5


def test_a_time_limit_holds_over_all_searches_and_leaves_nothing_proved() -> None:
    question = make_question(make_model((dense(hidden=1024, columns=4096), 4)), make_cluster(4), random_trace(1, 20))
    aims = load_objectives("throughput~5%,e2e_mean")
    question = replace(question, objective=aims[0], then=aims[1:], clocks=(None, 1200))
    answer = search(question, SPACE, time_limit_s=1e-6)
    assert answer.best is not None
    assert (answer.status, answer.certificate.optimal, answer.certificate.gap) == ("feasible", False, None)
    assert search(question, SPACE, time_limit_s=1e6) == search(question, SPACE)


def test_these_questions_have_answers_of_every_kind() -> None:
    answers = [answer_of(seed) for seed in SEEDS]
    assert sum(a.status == "infeasible" for a in answers) >= 5
    assert sum(a.status == "optimal" for a in answers) >= 20
    assert sum(a.certificate.bounded > 0 for a in answers) >= 15
    assert sum(a.certificate.infeasible["memory"] > 0 for a in answers) >= 8
    assert sum(a.certificate.missed > 0 for a in answers) >= 5


@pytest.mark.parametrize("seed", SEEDS)
def test_the_certificate_accounts_for_every_plan_of_the_space(seed: int) -> None:
    question, certificate = random_question(seed), answer_of(seed).certificate
    counted = tally(question.instance())
    assert (certificate.space, certificate.infeasible) == (counted.space, counted.infeasible)
    assert certificate.repeated <= counted.repeated
    assert certificate.bounded + certificate.repeated + certificate.simulated == len(counted.plans) + counted.repeated
    assert certificate.out_of_reach <= certificate.bounded
    assert (certificate.least_bound is None) == (certificate.out_of_reach == certificate.bounded)
    if certificate.least_bound is not None:
        best = answer_of(seed).best
        assert best is not None
        assert certificate.incumbent is not None
        assert question.objective.signed(certificate.least_bound) >= question.objective.signed(certificate.incumbent)
        assert question.objective.signed(certificate.incumbent) >= question.objective.signed(best.value)
    assert certificate.optimal
    assert certificate.gap == (0.0 if answer_of(seed).best else None)
    assert 0 <= certificate.missed <= certificate.simulated


@pytest.mark.parametrize("seed", SEEDS)
def test_an_infeasible_answer_says_why_with_numbers_in_one_line(seed: int) -> None:
    question, answer = random_question(seed), answer_of(seed)
    if answer.status != "infeasible":
        assert answer.reason is None
        return
    assert answer.reason is not None
    assert "\n" not in answer.reason
    if answer.certificate.bounded + answer.certificate.simulated:
        assert any(slo.text in answer.reason for slo in question.slos)
        assert "reaches" in answer.reason
    else:
        assert any(f"{family}:" in answer.reason for family in FAMILIES)


@pytest.mark.parametrize("seed", range(20))
def test_a_spare_gpu_never_makes_the_optimum_worse(seed: int) -> None:
    question = random_question(seed)
    found = []
    for gpus in range(1, question.cluster.size + 1):
        answer = search(replace(question, max_devices=gpus), SPACE)
        found.append(question.objective.signed(answer.best.value) if answer.best else float("inf"))
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(0, 20, 2))
def test_the_answer_does_not_depend_on_the_number_of_cores_nor_on_the_run(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shape(answer: Answer) -> Any:
        return answer.certificate, answer.reason, [(c.plan, repr(c.value), c.bound) for c in answer.candidates]

    answers = [shape(answer_of(seed))]
    for cores in (1, 7):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        answers.append(shape(search(random_question(seed), SPACE)))
    assert answers[0] == answers[1] == answers[2]


def test_ties_fall_to_fewer_gpus_and_then_to_the_text_of_the_plan() -> None:
    # One request at a time: every number of replicas serves it alike.
    trace = make_trace(name="one", arrival_ns=[0], prompt=[100], output=[1])
    question = make_question(make_model((dense(), 4)), make_cluster(4), trace, objective="ttft_mean")
    answer = search(question, SPACE)
    assert len({candidate.value for candidate in answer.candidates}) == 1
    single = "attn(tp1) ffn(tp1) bf16"
    assert [str(c.plan) for c in answer.candidates] == [single, *(f"dp{n} {single}" for n in (2, 3, 4))]
    assert [c.plan for c in answer.candidates] == [c.plan for c in search(question, SPACE).candidates]


def test_twice_the_times_of_everything_double_the_optimum_and_choose_the_same_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, trace = make_model((dense(hidden=1024, columns=4096), 7)), random_trace(3, 40)
    question = make_question(model, make_cluster(4), trace, objective="e2e_p95")
    once = search(question, SPACE)
    original = CostModel.plan_cost

    def slower(self: CostModel, plan: Plan) -> PlanCost:
        cost = original(self, plan)
        return replace(cost, laws=tuple(law.scaled(2) for law in cost.laws), request_ns=2 * cost.request_ns)

    own_ns = CostModel.request_ns.fget
    monkeypatch.setattr(CostModel, "plan_cost", slower)
    monkeypatch.setattr(CostModel, "request_ns", property(lambda self: 2 * own_ns(self)))
    twice = search(replace(question, trace=trace.stretched(2)), SPACE)
    assert once.best is not None
    assert twice.best is not None
    assert twice.best.plan == once.best.plan
    # Sums of rates are rounded once a batch, so doubling is exact to a nanosecond or so per batch.
    assert twice.best.value == pytest.approx(2 * once.best.value, rel=1e-5)


def test_progress_is_told_along_the_way() -> None:
    told: list[tuple[str, int, int]] = []
    search(random_question(3), SPACE, lambda *step: told.append(step))
    assert told[0] == ("enumerating plans", 0, 0)
    assert {what for what, _, _ in told} <= {"enumerating plans", "bounding plans", "simulating plans"}
    assert all(0 <= done <= total for _, done, total in told)


# ---- why not ----------------------------------------------------------------------------------------------------


def test_a_model_too_large_is_answered_with_what_comes_nearest() -> None:
    trace = random_trace(1, 5)
    answer = search(make_question(load_model("llama-3.1-70b"), "1xh100-sxm", trace), SPACE)
    assert answer.status == "infeasible"
    assert answer.certificate.infeasible["memory"] == answer.certificate.space == 1
    assert answer.reason is not None
    assert "1 x h100-sxm-80gb" in answer.reason
    assert "attn(tp1) ffn(tp1) bf16" in answer.reason
    assert "breaks memory: a GPU needs" in answer.reason
    assert "weights 141.1" in answer.reason


def test_the_nearest_plan_is_the_one_that_lacks_least_not_the_first_by_name() -> None:
    answer = search(make_question(load_model("llama-3.1-405b"), "8xa100-sxm", random_trace(1, 5)), SPACE)
    assert answer.reason is not None
    assert "breaks memory: a GPU needs" in answer.reason
    assert "weights 10" in answer.reason  # an eighth of 812 GB, not all of it


def test_a_goal_out_of_reach_is_answered_with_what_is_reached() -> None:
    question = make_question(load_model("llama-3.1-8b"), "2xh100-sxm", random_trace(1, 10), "tpot_p95<=2.5ms")
    answer = search(question, SPACE)
    assert answer.status == "infeasible"
    assert answer.certificate.infeasible["bandwidth"] > 0
    assert answer.reason is not None
    assert "tpot_p95<=2.5ms (it reaches " in answer.reason
    assert " ms)" in answer.reason
    best = search(replace(question, slos=()), SPACE).best
    assert best is not None
    assert best.metrics.judged(question.slos[0]) > 2.5e-3


def test_a_goal_below_what_one_read_of_the_weights_takes_is_charged_to_bandwidth() -> None:
    question = make_question(load_model("llama-3.1-8b"), "1xh100-sxm", random_trace(1, 10), "tpot<=3ms@50%")
    answer = search(question, SPACE)
    assert answer.certificate.infeasible["bandwidth"] == 1
    assert answer.reason is not None
    assert "breaks bandwidth: a token passes through 15.01 GB" in answer.reason


def test_goals_on_tokens_that_nobody_generates_bind_nothing() -> None:
    trace = make_trace(name="one", arrival_ns=[0, 5], prompt=[100, 2047], output=[1, 50])
    question = make_question(make_model((dense(), 4)), make_cluster(1), trace, "tpot_max<=1ns")
    # The second request ends at the model's length, with its first token.
    assert question.instance().tpot_limit_ns is None
    assert search(question, SPACE).status == "optimal"


def test_a_prompt_as_long_as_the_model_allows_is_refused() -> None:
    trace = make_trace(name="long", arrival_ns=[0, 1], prompt=[5, 2048], output=[1, 1])
    question = make_question(make_model((dense(), 4)), make_cluster(1), trace)
    for ask in (lambda: search(question, SPACE), lambda: judge(question, parse_plan("tp1", question.model))):
        with pytest.raises(CapacityError, match="request 1: a prompt of 2048 tokens leaves no room"):
            ask()


# ---- enumerations that are cut short ----------------------------------------------------------------------------


def test_an_enumeration_cut_short_proves_nothing() -> None:
    question = make_question(make_model((dense(), 4)), make_cluster(4), random_trace(1, 10))
    answer = search(question, Short())
    assert answer.status == "feasible"
    assert not answer.certificate.optimal
    assert answer.certificate.gap is None


# ---- a time limit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["e2e_mean", "energy", "throughput"])
@pytest.mark.parametrize("seed", range(3))
def test_where_time_was_up_the_gap_holds_the_optimum_and_every_plan_is_counted(seed: int, objective: str) -> None:
    question = make_question(make_model((dense(hidden=1024, columns=4096), 4)), make_cluster(4), random_trace(seed, 20))
    question = replace(question, objective=load_objective(objective), clocks=(None, 1200))
    best = search(question, SPACE).best
    answer = search(question, SPACE, time_limit_s=0.0)
    found, certificate = answer.best, answer.certificate
    assert best is not None
    assert found is not None
    cost, least = question.objective.signed(found.value), question.objective.signed(best.value)
    assert certificate.gap is not None
    assert cost - least <= certificate.gap * abs(cost) + 1e-12
    # With energy the first four plans may prove the rest worse; with the others they cannot.
    assert certificate.left > 0 or objective == "energy"
    assert certificate.optimal == (certificate.left == 0 or certificate.gap == 0)
    assert answer.status == ("optimal" if certificate.optimal else "feasible")
    known = certificate.bounded + certificate.repeated + certificate.simulated + certificate.left
    counted = sum(certificate.infeasible.values()) + known
    assert counted == certificate.space


def test_an_answer_that_nothing_left_can_better_is_optimal_though_the_time_was_up() -> None:
    proved = open_ = 0
    for seed in SEEDS:
        question = random_question(seed)
        # So many to show that plans are left which cannot be the best.
        answer = search(question, SPACE, top=1000, time_limit_s=0.0)
        if answer.best is None or not answer.certificate.left:
            continue
        gap = answer.certificate.gap
        assert gap is not None
        assert answer.status == ("optimal" if gap == 0 else "feasible")
        assert answer.certificate.optimal == (gap == 0)
        proved += gap == 0
        open_ += gap > 0
        if gap == 0:
            best = search(question, SPACE).best
            assert best is not None
            assert question.costs(answer.best.metrics) == question.costs(best.metrics)
            assert check(question, answer).holds
    assert proved >= 3
    assert open_ >= 3


@pytest.mark.parametrize(
    ("best", "left", "share"),
    [
        ((10.0,), [], 0.0),
        ((10.0,), [(10.0,), (11.0,)], 0.0),
        ((10.0,), [(10.0 * (1 - 1e-12),)], 0.0),  # what bounds are lowered by
        ((10.0,), [(9.0,), (8.0,), (12.0,)], 0.2),
        ((-10.0,), [(-15.0,)], 0.5),
        ((10.0, 4.0), [(10.0, 4.0), (11.0, 1.0)], 0.0),
        ((10.0, 4.0), [(10.0, 3.0), (11.0, 1.0)], 0.25),  # as good by the first, better by the second
        ((10.0, 4.0), [(10.0 * (1 - 1e-12), 9.0), (10.0, 3.0)], 0.25),
        ((10.0, 4.0), [(9.0, 9.0)], 0.1),
    ],
)
def test_the_gap_is_that_of_the_first_objective_not_settled(
    best: tuple[float, ...], left: list[tuple[float, ...]], share: float
) -> None:
    assert how_far(best, left) == pytest.approx(share, abs=1e-15)
    assert (how_far(best, left) == 0) == (share == 0)


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    question = make_question(make_model((dense(), 4)), make_cluster(4), random_trace(1, 10))
    assert search(question, SPACE, time_limit_s=1e6) == search(question, SPACE)


def test_where_time_was_up_before_a_plan_met_the_goals_the_answer_is_unknown() -> None:
    question = make_question(make_model((dense(hidden=1024, columns=4096), 4)), make_cluster(8), random_trace(1, 40))
    # A goal between what plans reach and what their bounds allow.
    value = search(question, SPACE).best
    assert value is not None
    goal = parse_goals(f"e2e_mean<={value.metrics.latency_s['e2e']['mean'] * 0.999 * 1e3:.9f}ms")
    answer = search(replace(question, slos=goal, objective=load_objective("energy")), SPACE, time_limit_s=0.0)
    assert (answer.status == "unknown") == (answer.certificate.left > 0)
    assert answer.best is None
    assert answer.reason is not None


# ---- clocks to choose from --------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["e2e_mean", "energy"])
def test_the_best_clock_is_what_simulating_every_plan_at_every_clock_finds(objective: str) -> None:
    clocks = (None, 1500, 900)
    model = make_model((dense(hidden=1024, columns=4096), 4))
    question = replace(
        make_question(model, make_cluster(4), random_trace(2, 30)), objective=load_objective(objective), clocks=clocks
    )
    evaluator, instance = Evaluator(question), question.instance()
    feasible = [plan for plan in space(instance) if not violations(instance, plan)]
    every = [evaluator.simulate(replace(plan, clock_mhz=clock)) for plan in feasible for clock in clocks]
    answer = search(question, SPACE)
    assert answer.best is not None
    assert answer.best.value == min(candidate.value for candidate in every)
    assert answer.certificate.space == 3 * search(replace(question, clocks=(None,)), SPACE).certificate.space


def test_a_choice_of_clocks_never_makes_the_optimum_worse() -> None:
    question = make_question(load_model("llama-3.1-8b"), "2xh100-sxm", random_trace(3, 30))
    question = replace(question, objective=load_objective("energy"))
    fixed, free = search(question, SPACE).best, search(replace(question, clocks=(None, 1200, 990)), SPACE).best
    assert fixed is not None
    assert free is not None
    assert free.value < fixed.value
    assert free.plan.clock_mhz is not None


# ---- one given plan ---------------------------------------------------------------------------------------------


def judged_plan(text: str, slo: str = "", cluster: str = "4xh100-sxm") -> Answer:
    model = load_model("llama-3.1-8b")
    return judge(make_question(model, cluster, random_trace(1, 20), slo), parse_plan(text, model))


def test_a_given_plan_is_scored_as_the_search_scores_it() -> None:
    answer = judged_plan("dp2 tp2")
    assert answer.status == "feasible"
    assert answer.best is not None
    assert answer.best.meets_slos
    assert answer.certificate.simulated == answer.certificate.space == 1
    question = make_question(load_model("llama-3.1-8b"), "4xh100-sxm", random_trace(1, 20))
    assert answer.best.value == Evaluator(question).simulate(answer.best.plan).value


def test_a_given_plan_tells_times_between_tokens_unless_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    told = judged_plan("tp2").best
    monkeypatch.setattr(sys.modules["apex_opt.search.search"], "MOST_GAPS", 10)
    untold = judged_plan("tp2").best
    assert told is not None
    assert untold is not None
    assert "itl" in told.metrics.latency_s and "itl" not in untold.metrics.latency_s
    assert told.value == untold.value


def test_a_given_plan_may_split_its_layers_unevenly() -> None:
    uneven, even = judged_plan("pp2[20,12] tp1"), judged_plan("pp2 tp1")
    assert uneven.best is not None
    assert even.best is not None
    assert uneven.best.value > even.best.value
    lopsided = judged_plan("pp2[31,1] tp1")  # out of balance, so not in the space, but it runs
    assert lopsided.status == "feasible"


@pytest.mark.parametrize(("requests", "prompt", "output"), [(2, 32, 200), (40, 600, 2), (60, 300, 39)])
@pytest.mark.parametrize("plan", ["tp1", "tp2", "pp2", "dp2 fp8"])
def test_a_lower_clock_is_never_faster(plan: str, requests: int, prompt: int, output: int) -> None:
    model, trace = load_model("llama-3.1-8b"), load_trace(f"static:n={requests},prompt={prompt},output={output}")
    question = make_question(model, "2xh200-sxm", trace)
    slower: dict[str, float] = {}
    for clock in (1980, 1700, 1200, 600):
        best = judge(question, parse_plan(f"{plan} clock={clock}", model)).best
        assert best is not None
        means = {metric: figures["mean"] for metric, figures in best.metrics.latency_s.items()}
        assert all(means[metric] >= value for metric, value in slower.items())
        slower = means


def test_a_lower_clock_saves_energy_where_memory_binds_and_costs_less_time_than_clock() -> None:
    model, trace = load_model("llama-3.1-70b"), load_trace("static:n=4,prompt=16,output=200")
    question = make_question(model, "4xh200-sxm", trace)
    full, low = (judge(question, parse_plan(text, model)).best for text in ("tp4", "tp4 clock=1400"))
    assert full is not None
    assert low is not None
    assert low.usage.energy_j < 0.97 * full.usage.energy_j
    assert low.metrics.latency_s["tpot"]["mean"] < 1.2 * full.metrics.latency_s["tpot"]["mean"]


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("seqs=3", {"max_num_seqs": 3}),
        ("tokens=64", {"max_num_batched_tokens": 64}),
        ("seqs=5 tokens=100", {"max_num_seqs": 5, "max_num_batched_tokens": 100}),
        ("seqs=32", {"max_num_seqs": 32}),
    ],
)
@pytest.mark.parametrize("plan", ["tp2", "dp2", "pp2"])
def test_limits_of_a_plan_act_as_the_same_settings_do(plan: str, text: str, limits: dict[str, int]) -> None:
    model, trace = load_model("llama-3.1-8b"), random_trace(3, 60)
    question = make_question(model, "2xh200-sxm", trace)
    told = judge(question, parse_plan(f"{plan} {text}", model)).best
    settings = replace(question.settings, **limits)
    set_so = judge(replace(question, settings=settings), parse_plan(plan, model)).best
    free = judge(question, parse_plan(plan, model)).best
    assert told is not None
    assert set_so is not None
    assert free is not None
    assert replace(told, plan=set_so.plan) == set_so
    assert told.batches != free.batches or "32" in text  # as many sequences as there ever are at once


def test_limits_that_do_not_go_with_the_settings_are_refused() -> None:
    model = load_model("llama-3.1-8b")
    question = make_question(model, "2xh200-sxm", random_trace(3, 5))
    with pytest.raises(UsageError, match="max_num_batched_tokens 8 is below max_num_seqs 16"):
        judge(question, parse_plan("tp2 tokens=8", model))


def test_a_given_plan_at_a_clock_the_gpu_does_not_have_is_refused() -> None:
    model = load_model("llama-3.1-8b")
    with pytest.raises(UsageError, match="clock=2500: h100-sxm-80gb can be held at 495 to 1980 MHz"):
        judge(make_question(model, "2xh100-sxm", random_trace(3, 5)), parse_plan("tp2 clock=2500", model))


def test_a_given_plan_that_misses_a_goal_is_scored_and_the_miss_is_told() -> None:
    answer = judged_plan("tp1", "ttft_p95<=1us")
    assert answer.status == "feasible"
    assert answer.certificate.missed == 1
    assert answer.best is not None
    assert not answer.best.meets_slos


@pytest.mark.parametrize(
    ("text", "cluster", "said"),
    [
        ("tp8", "4xh100-sxm", "devices: the plan takes 8 GPUs, 4 are offered"),
        ("attn(tp3) ffn(dp3)", "4xh100-sxm", "divisibility: attention tp3 does not divide 32 query heads"),
        ("tp1 w8a8", "4xb200-sxm", "format: b200-sxm-180gb does not compute in int8, which w8a8 needs"),
        ("tp1 fp16", "1xv100-pcie", "memory: a GPU needs"),
    ],
)
def test_a_given_plan_that_cannot_run_says_which_constraint_it_breaks(text: str, cluster: str, said: str) -> None:
    answer = judged_plan(text, cluster=cluster)
    assert answer.status == "infeasible"
    assert answer.best is None
    assert answer.reason is not None
    assert said in answer.reason
    assert answer.certificate.infeasible[said.split(":")[0]] == 1


def test_a_plan_for_another_model_is_refused() -> None:
    question = make_question(load_model("llama-3.1-8b"), "1xh100-sxm", random_trace(1, 5))
    with pytest.raises(UsageError, match=r"llama-3\.1-8b has 32"):
        judge(question, parse_plan("tp1", load_model("llama-3.1-70b")))


def test_sources_name_what_the_question_uses_and_no_more() -> None:
    question = make_question(load_model("llama-3.1-8b"), "1xh100-sxm", random_trace(1, 5))
    plain = Evaluator(question).provenance([parse_plan("tp1", question.model)])
    attention = {"attention decode", "attention prefill", "memory", "power", "engine (test)"}
    assert set(plain) == attention | {"gemm bf16"}
    moe = make_question(load_model("mixtral-8x7b"), "2x8xh100-sxm", random_trace(1, 5))
    plans = [parse_plan(text, moe.model) for text in ("tp16 fp8", "pp2 attn(dp2) ffn(ep2) fp8")]
    near = {"all_reduce/inter", "all_gather/inter"}
    formats = {"gemm bf16", "gemm fp8", "moe fp8"}
    assert set(Evaluator(moe).provenance(plans[:1])) == attention | formats | near
    far = {"all_to_all/intra", "point_to_point/intra"}
    assert set(Evaluator(moe).provenance(plans)) == attention | formats | near | far
    assert OVERHEAD.source in plain["engine (test)"]
    assert load_objective("energy").name == "energy"
