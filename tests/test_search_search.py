"""The search finds what simulating every deployment finds, whatever its shape, and accounts for all on the way."""

from __future__ import annotations

import os
import secrets
import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from plan_cases import (
    Short,
    dense,
    double_times,
    make_cluster,
    make_model,
    make_problem,
    random_problem,
    random_trace,
    simulated,
)
from search_cases import ROWS, SPACE, answer_of, every, every_of, mixed_problem, pools_of, problem_of, rank

from apex_opt.errors import CapacityError, UsageError
from apex_opt.figures import load_objective, load_objectives, parse_goals
from apex_opt.ir import load_model
from apex_opt.ir.cells import Attention, AttentionCell, JoinedAttention, Mamba2, Matrix
from apex_opt.oracle.space import tally
from apex_opt.plans.deployment import Deployment
from apex_opt.plans.plan import parse_plan
from apex_opt.plans.routing import ROUTINGS
from apex_opt.search import Answer, Problem, Scored, Scorer, judge, search
from apex_opt.workload import load_trace, make_trace

if TYPE_CHECKING:
    from apex_opt.plans.routing import Routing
    from apex_opt.search import Part

PLACES = range(len(ROWS))
BASE = int(os.environ.get("APEX_SEED", secrets.randbits(31)))
"""Another every time; what a failure prints is given as APEX_SEED to see it again."""
MORE = [pytest.param(place, marks=pytest.mark.nightly) for place in range(8, 60)]


def best_of(problem: Problem, good: list[Scored]) -> list[Scored]:
    """Those left to choose from once every objective with a tolerance has chosen, best first."""
    begin = 0
    for end, aim in enumerate(problem.objectives, 1):
        if not aim.tolerance or not good:
            continue
        best = min(good, key=lambda one: rank(by(problem, begin, end), one)[0])
        for part in problem.objectives[begin:end]:
            value, sign = part.value(best.metrics), -1 if part.maximise else 1
            if not np.isnan(value):
                limit = value * (1 + sign * part.tolerance)
                good = [one for one in good if sign * part.value(one.metrics) <= sign * limit]
        begin = end
    return sorted(good, key=lambda one: rank(by(problem, begin, None), one))


def by(problem: Problem, begin: int, end: int | None) -> Problem:
    """The problem with some of its objectives."""
    first, *then = problem.objectives[begin:end]
    return replace(problem, objective=first, then=tuple(then))


def check_best(problem: Problem, answer: Answer, scored: list[Scored], top: int) -> None:
    """An answer has the best of some deployments, as they were scored."""
    good = best_of(problem, [one for one in scored if one.meets_slos])
    if not good:
        assert (answer.status, answer.best, answer.candidates) == ("infeasible", None, ())
        assert answer.reason is not None
        assert "\n" not in answer.reason
        return
    assert (answer.status, answer.reason) == ("optimal", None)
    assert [one.text for one in answer.candidates[:top]] == [one.text for one in good[:top]]
    for found, one in zip(answer.candidates, good[:top], strict=False):
        # What comes near enough to the best by a tolerance is judged by that, too.
        judged = {name: getattr(one.metrics, name) for name in ("attainment", "slo_met")}
        assert replace(found.metrics, **judged) == one.metrics
        assert [use.usage for use in found.pools] == [use.usage for use in one.pools]
        assert found.value == one.value or np.isnan(one.value)
    for found in answer.candidates:
        cost = problem.objective.signed(found.value)
        assert found.bound is None or found.bound <= cost + 1e-12 * abs(cost) or np.isnan(cost)


@pytest.mark.parametrize("place", PLACES)
def test_the_best_are_what_simulating_every_deployment_without_bounds_finds(place: int) -> None:
    check_best(problem_of(place), answer_of(place), list(every_of(place)), ROWS[place]["top"])


@pytest.mark.parametrize("kind", ["joined", "squeezed", "borrowed"])
def test_the_best_with_attention_of_other_kinds_is_what_simulating_every_deployment_finds(kind: str) -> None:
    base = dense(hidden=1024, heads=8, kv=4, columns=2048)
    cells: dict[str, AttentionCell] = {
        "joined": JoinedAttention(
            hidden=1024,
            attention=base.attention,  # type: ignore[arg-type]
            mamba=Mamba2(hidden=1024, heads=16, head_dim=64, groups=1, state=64, kernel=4, gated_norm=False),
        ),
        "squeezed": Attention(hidden=1024, query_heads=8, kv_heads=1, head_dim=64, query_rank=256),
        "borrowed": Attention(hidden=1024, query_heads=8, kv_heads=4, head_dim=64, borrowed=True),
    }
    beside = (Matrix("augmented residual", 32, 1024), Matrix("augmented residual", 1024, 32))
    other = replace(base, attention=cells[kind], norms=4, residuals=6, beside=beside)
    model = make_model((base, 2), (other, 3))
    problem = make_problem(model, make_cluster(2), random_trace(11, 16), objective="e2e_mean")
    answer = search(problem, SPACE)
    check_best(problem, answer, every(problem), 1)
    check_counts(problem, answer)


@pytest.mark.parametrize("place", [*range(8), *MORE])
def test_the_best_of_a_problem_drawn_anew_every_time_is_found(place: int) -> None:
    seed = BASE + place
    print(f"APEX_SEED={BASE}")  # shown where the test fails
    problem = random_problem(seed) if place % 2 else mixed_problem(seed)
    if place % 3 == 0:
        rng = np.random.default_rng(seed)
        aims = [replace(aim, tolerance=float(rng.choice([0.0, 0.001, 0.02, 0.5]))) for aim in problem.objectives]
        others = [name for name in ("e2e_mean", "energy", "cost") if name not in {aim.name for aim in aims}]
        objective, *then = (*aims, load_objective(str(rng.choice(others or ["ttft_p12.5"]))))
        problem = replace(problem, objective=objective, then=tuple(then))
    answer = search(problem, SPACE, top=1 + seed % 2)
    check_best(problem, answer, every(problem), 1 + seed % 2)
    check_counts(problem, answer)


def check_counts(problem: Problem, answer: Answer) -> None:
    """Every part accounts for each deployment of its space once, and those of plain Python are as many."""
    pools = pools_of(problem)
    parts = answer.ledger.parts
    for part in (*parts, *(before for one in parts for before in one.before)):
        counted = part.bounded + part.repeated + part.simulated + part.waiting
        assert part.space == sum(part.infeasible.values()) + counted
        assert part.optimal
        assert len(set(part.seen)) == part.simulated
        assert 0 <= part.missed + part.cut_short <= part.simulated
        assert (part.least is None) == (part.beaten == 0)
        if part.least is not None:
            assert part.last is not None
            assert part.least >= part.last
        places = [problem.types.index(name) for name in part.types]
        if part.shape == "single":
            own = problem.alone(places[0])
            found, clocks = tally(own.instance()), len(own.offer.clocks)
            assert part.space == found.space * clocks
            assert part.infeasible == {name: count * clocks for name, count in found.infeasible.items()}
            assert part.bounded + part.repeated + part.simulated == (len(found.plans) + found.repeated) * clocks
        elif part.shape == "mixed":
            some = [pools[place] for place in places]
            fitting = sum(sum(pool.plan.devices for pool in row) <= problem.max_devices for row in product(*some))
            assert part.bounded + part.simulated + part.infeasible["share"] == fitting


@pytest.mark.parametrize("place", PLACES)
def test_the_ledger_accounts_for_every_deployment_of_the_space(place: int) -> None:
    problem, answer = problem_of(place), answer_of(place)
    check_counts(problem, answer)
    ledger = answer.ledger
    tolerant = sum(aim.tolerance > 0 for aim in problem.objectives)
    assert all(len(part.before) == tolerant for part in ledger.parts)
    assert (ledger.optimal, ledger.gap) == (True, 0.0 if answer.best else None)
    singles, mixed = ledger.of("single"), ledger.of("mixed")
    assert [part.types for part in singles] == [(name,) for name in problem.types]
    for part in mixed:
        assert part.space == np.prod([one.space for one in singles if one.types[0] in part.types], dtype=object)


@pytest.mark.parametrize("place", [place for place in PLACES if ROWS[place]["shape"] != "single"])
def test_the_best_on_each_type_of_gpu_alone_is_told_beside_the_best_of_all(place: int) -> None:
    problem, answer = problem_of(place), answer_of(place)
    assert len(answer.alone) == len(problem.offers)
    for index, alone in enumerate(answer.alone):
        own = search(problem.alone(index), SPACE).best
        if not any(aim.tolerance for aim in problem.objectives):
            assert (own and str(own.plan)) == (alone and str(alone.plan))
        if own is not None:
            assert answer.best is not None
            first = by(problem, 0, 1 + len(problem.then) if not problem.objective.tolerance else 1)
            found, its = (first.costs(one.metrics) for one in (answer.best, own))
            slack = problem.objective.tolerance * abs(its[0])
            assert found <= its or found[0] <= its[0] + slack


def test_these_problems_have_answers_of_every_kind() -> None:
    answers = [answer_of(place) for place in PLACES]
    best = [answer.best for answer in answers if answer.best is not None]
    pools = Counter(len(one.pools) for one in best)
    assert min(pools[1], pools[2], pools[3]) >= 1
    parts = [part for answer in answers for part in answer.ledger.parts]
    for shape in ("single", "mixed", "pipeline"):
        mine = [part for part in parts if part.shape == shape]
        for count in ("beaten", "out_of_reach", "simulated", "cut_short", "missed"):
            assert any(getattr(part, count) for part in mine), (shape, count)
    assert any(part.infeasible["memory"] for part in parts if part.shape == "single")
    assert any(part.infeasible["gpus"] for part in parts if part.shape == "mixed")
    assert any(part.repeated for part in parts)


def test_a_tolerance_lets_the_next_objective_choose_another_deployment_in_some_of_these_problems() -> None:
    changed = 0
    for place in PLACES:
        problem = problem_of(place)
        exact = replace(problem, objective=replace(problem.objective, tolerance=0.0))
        best = answer_of(place).best
        if exact != problem and best is not None:
            changed += best.text != best_of(exact, [one for one in every_of(place) if one.meets_slos])[0].text
    assert changed >= 2


def test_ties_by_the_first_objective_are_decided_by_the_second_in_some_of_these_problems() -> None:
    decided = 0
    for place in PLACES:
        problem = replace(problem_of(place), objective=load_objective("cost"), then=(load_objective("e2e_mean"),))
        good = [one for one in every_of(place) if one.meets_slos]
        first, second = (best_of(one, good)[0] for one in (problem, replace(problem, then=())))
        decided += first.text != second.text
    assert decided >= 4


# ---- more to choose from ----------------------------------------------------------------------------------------


def least(problem: Problem, top: int = 1) -> tuple[float, ...]:
    """What the best costs; infinite where there is none."""
    best = search(problem, SPACE, top=top).best
    return (float("inf"),) if best is None else problem.costs(best.metrics)


def exact(place: int) -> Problem:
    """The problem of a row without tolerances: with one, more to choose from may make what comes first worse."""
    problem = problem_of(place)
    aims = [replace(aim, tolerance=0.0) for aim in problem.objectives]
    return replace(problem, objective=aims[0], then=tuple(aims[1:]))


# That more to choose from never makes the best worse follows where the best are those of simulating everything.
@pytest.mark.parametrize("place", [*PLACES][::6])
def test_a_spare_gpu_never_makes_the_best_worse(place: int) -> None:
    problem = exact(place)
    most = sum(offer.free for offer in problem.offers)
    found = [least(replace(problem, max_devices=gpus)) for gpus in range(1, most + 1)]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("place", [place for place in PLACES if ROWS[place]["shape"] != "single"][::5])
def test_a_further_type_of_gpu_never_makes_the_best_worse(place: int) -> None:
    problem = exact(place)
    found = []
    for count in range(1, len(problem.offers) + 1):
        offers = problem.offers[:count]
        most = min(problem.max_devices, sum(offer.free for offer in offers))
        between = problem.between if count > 1 else None
        found.append(least(replace(problem, offers=offers, max_devices=most, between=between)))
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("place", [place for place in PLACES if ROWS[place]["shape"] != "single"][::6])
def test_the_best_costs_the_same_with_the_types_in_another_order(place: int) -> None:
    # How requests are dealt, and so what pools side by side cost, may depend on their order; here it does not.
    problem = exact(place)
    there, back = (search(replace(problem, offers=offers), SPACE) for offers in (problem.offers, problem.offers[::-1]))
    for one in (there, back):
        assert one.best is not None
        assert one.ledger.optimal
    assert {part.space for part in there.ledger.parts} == {part.space for part in back.ledger.parts}
    assert sorted(map(set, (part.types for part in there.ledger.parts)), key=sorted) == sorted(
        map(set, (part.types for part in back.ledger.parts)), key=sorted
    )


@pytest.mark.parametrize("place", [*PLACES][::8])
def test_the_answer_does_not_depend_on_the_number_of_cores_nor_on_the_run(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [told(answer_of(place))]
    for cores in (1, 7):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        answers.append(told(search(problem_of(place), SPACE, top=ROWS[place]["top"])))
    assert answers[0] == answers[1] == answers[2]


def told(answer: Answer) -> Any:
    """All there is to an answer, in a form that can be compared."""
    parts = [part_told(part) for part in answer.ledger.parts]
    return parts, answer.reason, answer.status, [(one.text, repr(one.value), one.bound) for one in answer.candidates]


def part_told(part: Part) -> Any:
    names = ("shape", "types", "space", "infeasible", "out_of_reach", "beaten", "least", "last", "repeated")
    more = ("simulated", "cut_short", "missed", "left", "best", "complete")
    return [getattr(part, name) for name in (*names, *more)], [part_told(before) for before in part.before]


def only_part(answer: Answer) -> Part:
    """The only part of a ledger."""
    (part,) = answer.ledger.parts
    return part


def test_ties_fall_to_fewer_gpus_and_then_to_the_text_of_the_plan() -> None:
    # One request at a time: every number of replicas serves it alike.
    trace = make_trace(name="one", arrival_ns=[0], prompt=[100], output=[1])
    problem = make_problem(make_model((dense(), 4)), make_cluster(4), trace, objective="ttft_mean")
    answer = search(problem, SPACE)
    assert len({candidate.value for candidate in answer.candidates}) == 1
    single = "attn(tp1) ffn(tp1) bf16"
    assert [str(c.plan) for c in answer.candidates] == [single, *(f"dp{n} {single}" for n in (2, 3, 4))]
    assert told(answer) == told(search(problem, SPACE))


def test_twice_the_times_of_everything_double_the_optimum_and_choose_the_same_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, trace = make_model((dense(hidden=1024, columns=4096), 7)), random_trace(3, 40)
    problem = make_problem(model, make_cluster(4), trace, objective="e2e_p95")
    once = search(problem, SPACE)
    double_times(monkeypatch)
    twice = search(replace(problem, trace=trace.stretched(2)), SPACE)
    assert once.best is not None
    assert twice.best is not None
    assert twice.best.plan == once.best.plan
    # Sums of rates are rounded once a batch, so doubling is exact to a nanosecond or so per batch.
    assert twice.best.value == pytest.approx(2 * once.best.value, rel=1e-5)


def test_progress_is_told_along_the_way() -> None:
    steps: list[tuple[str, int, int]] = []
    search(random_problem(3), SPACE, lambda *step: steps.append(step))
    assert steps[0] == ("enumerating plans", 0, 0)
    assert {what for what, _, _ in steps} <= {
        "enumerating plans",
        "bounding plans",
        "simulating plans",
        "moving layers",
    }
    assert all(0 <= done <= total for _, done, total in steps)


# ---- why not ----------------------------------------------------------------------------------------------------


def test_a_model_too_large_is_answered_with_what_comes_nearest() -> None:
    trace = random_trace(1, 5)
    answer = search(make_problem(load_model("llama-3.1-70b"), "1xh100-sxm", trace), SPACE)
    assert answer.status == "infeasible"
    assert only_part(answer).infeasible["memory"] == only_part(answer).space == 1
    assert answer.reason is not None
    assert "1 x h100-sxm-80gb" in answer.reason
    assert "attn(tp1) ffn(tp1) bf16" in answer.reason
    assert "breaks memory: a GPU needs" in answer.reason
    assert "weights 141.1" in answer.reason


def test_the_nearest_plan_is_the_one_that_lacks_least_not_the_first_by_name() -> None:
    answer = search(make_problem(load_model("llama-3.1-405b"), "8xa100-sxm", random_trace(1, 5)), SPACE)
    assert answer.reason is not None
    assert "breaks memory: a GPU needs" in answer.reason
    assert "weights 10" in answer.reason  # an eighth of 812 GB, not all of it


def test_a_goal_out_of_reach_is_answered_with_what_is_reached() -> None:
    problem = make_problem(load_model("llama-3.1-8b"), "2xh100-sxm", random_trace(1, 10), "tpot_p95<=2.5ms")
    answer = search(problem, SPACE)
    assert answer.status == "infeasible"
    assert only_part(answer).infeasible["bandwidth"] > 0
    assert answer.reason is not None
    assert "tpot_p95<=2.5ms (it reaches " in answer.reason
    assert " ms)" in answer.reason
    best = search(replace(problem, slos=()), SPACE).best
    assert best is not None
    assert problem.slos[0].reached(best.metrics) > 2.5e-3


def test_a_goal_below_what_one_read_of_the_weights_takes_is_charged_to_bandwidth() -> None:
    problem = make_problem(load_model("llama-3.1-8b"), "1xh100-sxm", random_trace(1, 10), "tpot<=3ms@50%")
    answer = search(problem, SPACE)
    assert only_part(answer).infeasible["bandwidth"] == 1
    assert answer.reason is not None
    assert "breaks bandwidth: a token passes through 15.01 GB" in answer.reason


def test_goals_on_tokens_that_nobody_generates_bind_nothing() -> None:
    trace = make_trace(name="one", arrival_ns=[0, 5], prompt=[100, 2047], output=[1, 50])
    problem = make_problem(make_model((dense(), 4)), make_cluster(1), trace, "tpot_max<=1ns")
    # The second request ends at the model's length, with its first token.
    assert problem.instance().tpot_limit_ns is None
    assert search(problem, SPACE).status == "optimal"


def test_a_prompt_as_long_as_the_model_allows_is_refused() -> None:
    trace = make_trace(name="long", arrival_ns=[0, 1], prompt=[5, 2048], output=[1, 1])
    problem = make_problem(make_model((dense(), 4)), make_cluster(1), trace)
    for ask in (
        lambda: search(problem, SPACE),
        lambda: judge(problem, Deployment.of(parse_plan("tp1", problem.model))),
    ):
        with pytest.raises(CapacityError, match="request 1: a prompt of 2048 tokens leaves no room"):
            ask()


# ---- enumerations that are cut short ----------------------------------------------------------------------------


def test_an_enumeration_cut_short_proves_nothing() -> None:
    problem = make_problem(make_model((dense(), 4)), make_cluster(4), random_trace(1, 10))
    answer = search(problem, Short())
    assert answer.status == "feasible"
    assert not answer.ledger.optimal
    assert answer.ledger.gap is None


# ---- a time limit -----------------------------------------------------------------------------------------------


def test_a_time_limit_holds_over_all_searches_and_leaves_nothing_proved() -> None:
    problem = make_problem(make_model((dense(hidden=1024, columns=4096), 4)), make_cluster(4), random_trace(1, 20))
    aims = load_objectives("throughput~5%,e2e_mean")
    problem = replace(problem.offering(clocks=(None, 1200)), objective=aims[0], then=aims[1:])
    answer = search(problem, SPACE, time_limit_s=1e-6)
    assert answer.best is not None
    assert (answer.status, answer.ledger.optimal, answer.ledger.gap) == ("feasible", False, None)
    assert told(search(problem, SPACE, time_limit_s=1e6)) == told(search(problem, SPACE))


@pytest.mark.parametrize("objective", ["e2e_mean", "energy", "throughput"])
@pytest.mark.parametrize("seed", range(3))
def test_where_time_was_up_the_gap_holds_the_optimum_and_every_plan_is_counted(seed: int, objective: str) -> None:
    problem = make_problem(make_model((dense(hidden=1024, columns=4096), 4)), make_cluster(4), random_trace(seed, 20))
    problem = replace(problem.offering(clocks=(None, 1200)), objective=load_objective(objective))
    best = search(problem, SPACE).best
    answer = search(problem, SPACE, time_limit_s=0.0)
    found, part = answer.best, only_part(answer)
    assert best is not None
    assert found is not None
    cost, least = problem.objective.signed(found.value), problem.objective.signed(best.value)
    assert part.gap is not None
    assert cost - least <= part.gap * abs(cost) + 1e-12
    # With energy the first four plans may prove the rest worse; with the others they cannot.
    assert part.waiting > 0 or objective == "energy"
    assert part.optimal == (part.waiting == 0 or part.gap == 0)
    assert answer.status == ("optimal" if part.optimal else "feasible")
    known = part.bounded + part.repeated + part.simulated + part.waiting
    counted = sum(part.infeasible.values()) + known
    assert counted == part.space


def test_an_answer_that_nothing_left_can_better_is_optimal_though_the_time_was_up() -> None:
    proved = open_ = 0
    for place in [*PLACES][::2]:
        problem = exact(place)
        # So many to show that plans are left which cannot be the best.
        answer = search(problem, SPACE, top=1000, time_limit_s=0.0)
        if answer.best is None or not answer.ledger.waiting:
            continue
        gap = answer.ledger.gap
        assert gap is not None
        assert answer.status == ("optimal" if gap == 0 else "feasible")
        assert answer.ledger.optimal == (gap == 0)
        proved += gap == 0
        open_ += gap > 0
        if gap == 0:
            best = search(problem, SPACE).best
            assert best is not None
            assert problem.costs(answer.best.metrics) == problem.costs(best.metrics)
    assert proved >= 1
    assert open_ >= 1


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    problem = make_problem(make_model((dense(), 4)), make_cluster(4), random_trace(1, 10))
    assert told(search(problem, SPACE, time_limit_s=1e6)) == told(search(problem, SPACE))


def test_where_time_was_up_before_a_plan_met_the_goals_the_answer_is_unknown() -> None:
    problem = make_problem(make_model((dense(hidden=1024, columns=4096), 4)), make_cluster(8), random_trace(1, 40))
    # A goal between what plans reach and what their bounds allow.
    value = search(problem, SPACE).best
    assert value is not None
    goal = parse_goals(f"e2e_mean<={value.metrics.latency_s['e2e']['mean'] * 0.999 * 1e3:.9f}ms")
    answer = search(replace(problem, slos=goal, objective=load_objective("energy")), SPACE, time_limit_s=0.0)
    assert (answer.status == "unknown") == (answer.ledger.waiting > 0)
    assert answer.best is None
    assert answer.reason is not None


# ---- clocks to choose from --------------------------------------------------------------------------------------


def test_a_choice_of_clocks_never_makes_the_optimum_worse() -> None:
    problem = make_problem(load_model("llama-3.1-8b"), "2xh100-sxm", random_trace(3, 30))
    problem = replace(problem, objective=load_objective("energy"))
    fixed, free = search(problem, SPACE).best, search(problem.offering(clocks=(None, 1200, 990)), SPACE).best
    assert fixed is not None
    assert free is not None
    assert free.value < fixed.value
    assert free.plan.clock_mhz is not None


# ---- routers to choose from -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [*PLACES[::6], *(pytest.param(p, marks=pytest.mark.nightly) for p in PLACES)])
def test_a_choice_of_routers_is_searched_as_every_other_and_every_plan_is_counted(place: int) -> None:
    problem = replace(problem_of(place), routings=("least_loaded", "round_robin", "pull"))
    answer = search(problem, SPACE, top=ROWS[place]["top"])
    check_best(problem, answer, every(problem), ROWS[place]["top"])
    check_counts(problem, answer)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_a_choice_of_routers_is_the_best_of_each_alone(seed: int) -> None:
    names: tuple[Routing, ...] = ("round_robin", "least_loaded", "power_of_two")
    asked = make_problem(make_model((dense(), 4)), make_cluster(4), random_trace(seed, 30), objective="ttft_p95")
    both = search(replace(asked, routings=names), SPACE).best
    alone = [search(replace(asked, routing=name), SPACE).best for name in names]
    assert both is not None
    assert both.value == min(one.value for one in alone if one is not None)


def test_routers_that_deal_alike_are_told_by_the_first_named() -> None:
    trace = make_trace(name="far", arrival_ns=[0, 10**12], prompt=[64, 64], output=[4, 4])
    problem = make_problem(make_model((dense(), 4)), make_cluster(2), trace)
    for names in (("round_robin", "least_loaded"), ("least_loaded", "round_robin")):
        answer = search(replace(problem, routings=names), SPACE, top=40)
        routed = [one for one in answer.candidates if one.plan.route is not None]
        assert routed
        assert [one.plan.route for one in routed] == [*names] * (len(routed) // 2)


def test_a_router_that_a_plan_names_deals_as_it_does_where_it_is_asked_for() -> None:
    model, trace = load_model("llama-3.1-8b"), load_trace("poisson:rate=60,n=40,prompt=512,output=lognormal(40,1.0)")
    problem = make_problem(model, "4xh100-sxm", trace)
    for name in ROUTINGS:
        named = judge(problem, Deployment.of(parse_plan(f"dp4 tp1 route={name}", model))).best
        asked = judge(replace(problem, routing=name), Deployment.of(parse_plan("dp4 tp1", model))).best
        assert named is not None
        assert asked is not None
        assert named.metrics == asked.metrics


@pytest.mark.parametrize("seed", range(3))
def test_where_turns_wait_for_answers_the_best_is_that_of_simulating_everything(seed: int) -> None:
    trace = load_trace(
        "poisson:rate=400,n=24,prompt=uniform(5,200),output=uniform(1,20),turns=4,delay_ms=uniform(1,9)", seed=seed
    )
    problem = make_problem(make_model((dense(hidden=1024, columns=4096), 4)), make_cluster(3), trace)
    problem = replace(problem, routings=("round_robin", "session"), objective=load_objective(NAMES[seed]))
    answer = search(problem, SPACE, top=3)
    check_best(problem, answer, every(problem), 3)
    check_counts(problem, answer)


NAMES = ("ttft_p95", "makespan", "energy")


def test_turns_that_could_all_come_at_once_are_not_taken_to_queue() -> None:
    trace = load_trace("static:n=24,prompt=20,output=2,turns=24")
    problem = make_problem(make_model((dense(hidden=1024, columns=4096), 4)), make_cluster(2), trace)
    answer = search(replace(problem, objective=load_objective("ttft_mean")), SPACE, top=9)
    assert answer.candidates
    for one in answer.candidates:
        assert one.bound is not None and one.bound <= one.value


# ---- one given plan ---------------------------------------------------------------------------------------------


def judged_plan(text: str, slo: str = "", cluster: str = "4xh100-sxm") -> Answer:
    model = load_model("llama-3.1-8b")
    return judge(make_problem(model, cluster, random_trace(1, 20), slo), Deployment.of(parse_plan(text, model)))


def test_a_given_plan_is_scored_as_the_search_scores_it() -> None:
    answer = judged_plan("dp2 tp2")
    assert answer.status == "feasible"
    assert answer.best is not None
    assert answer.best.meets_slos
    assert only_part(answer).simulated == only_part(answer).space == 1
    problem = make_problem(load_model("llama-3.1-8b"), "4xh100-sxm", random_trace(1, 20))
    assert answer.best.value == simulated(Scorer(problem), answer.best.plan).value


def test_a_given_plan_tells_times_between_tokens_unless_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    known = judged_plan("tp2").best
    monkeypatch.setattr(sys.modules["apex_opt.search.search"], "MOST_GAPS", 10)
    untold = judged_plan("tp2").best
    assert known is not None
    assert untold is not None
    assert "itl" in known.metrics.latency_s and "itl" not in untold.metrics.latency_s
    assert known.value == untold.value


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
    problem = make_problem(model, "2xh200-sxm", trace)
    slower: dict[str, float] = {}
    for clock in (1980, 1700, 1200, 600):
        best = judge(problem, Deployment.of(parse_plan(f"{plan} clock={clock}", model))).best
        assert best is not None
        means = {metric: figures["mean"] for metric, figures in best.metrics.latency_s.items()}
        assert all(means[metric] >= value for metric, value in slower.items())
        slower = means


def test_a_lower_clock_saves_energy_where_memory_binds_and_costs_less_time_than_clock() -> None:
    model, trace = load_model("llama-3.1-70b"), load_trace("static:n=4,prompt=16,output=200")
    problem = make_problem(model, "4xh200-sxm", trace)
    full, low = (judge(problem, Deployment.of(parse_plan(text, model))).best for text in ("tp4", "tp4 clock=1400"))
    assert full is not None
    assert low is not None
    assert low.only.usage.energy_j < 0.97 * full.only.usage.energy_j
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
    problem = make_problem(model, "2xh200-sxm", trace)
    told_ = judge(problem, Deployment.of(parse_plan(f"{plan} {text}", model))).best
    settings = replace(problem.settings, **limits)
    set_so = judge(replace(problem, settings=settings), Deployment.of(parse_plan(plan, model))).best
    free = judge(problem, Deployment.of(parse_plan(plan, model))).best
    assert told_ is not None
    assert set_so is not None
    assert free is not None
    assert (told_.metrics, told_.only.usage, told_.only.batches) == (
        set_so.metrics,
        set_so.only.usage,
        set_so.only.batches,
    )
    assert told_.only.batches != free.only.batches or "32" in text  # as many sequences as there ever are at once


def test_limits_that_do_not_go_with_the_settings_are_refused() -> None:
    model = load_model("llama-3.1-8b")
    problem = make_problem(model, "2xh200-sxm", random_trace(3, 5))
    with pytest.raises(UsageError, match="plan: tokens=8 is below max_num_seqs 16"):
        judge(problem, Deployment.of(parse_plan("tp2 tokens=8", model)))


def test_a_given_plan_at_a_clock_the_gpu_does_not_have_is_refused() -> None:
    model = load_model("llama-3.1-8b")
    with pytest.raises(UsageError, match="clock=2500: h100-sxm-80gb can be held at 495 to 1980 MHz"):
        judge(make_problem(model, "2xh100-sxm", random_trace(3, 5)), Deployment.of(parse_plan("tp2 clock=2500", model)))


def test_a_given_plan_that_misses_a_goal_is_scored_and_the_miss_is_told() -> None:
    answer = judged_plan("tp1", "ttft_p95<=1us")
    assert answer.status == "feasible"
    assert only_part(answer).missed == 1
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
    assert only_part(answer).infeasible[said.split(":")[0]] == 1


def test_a_plan_for_another_model_is_refused() -> None:
    problem = make_problem(load_model("llama-3.1-8b"), "1xh100-sxm", random_trace(1, 5))
    with pytest.raises(UsageError, match=r"llama-3\.1-8b has 32"):
        judge(problem, Deployment.of(parse_plan("tp1", load_model("llama-3.1-70b"))))
