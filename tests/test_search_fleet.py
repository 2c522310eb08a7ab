"""Fleets over several types of GPU: the best is what simulating every one of them finds, and all are accounted for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from plan_cases import OVERHEAD, SMALL, dense, make_cluster, make_model, make_question, random_question

from apex_opt.evaluate import space, violations
from apex_opt.figures import load_objectives
from apex_opt.figures.measure import measure
from apex_opt.plan.memory import kv_blocks, stage_memory
from apex_opt.search import Evaluator, Question, search
from apex_opt.search.dealing import clients_of, dealt, merged, tokens_per_s
from apex_opt.search.fleet import Fleet, FleetEvaluator
from apex_opt.search.fleet_bounds import FleetBounds
from apex_opt.search.fleet_parts import Part, parts_of
from apex_opt.search.fleet_search import FleetAnswer, search_fleets
from apex_opt.search.search import list_plans, settled, silent
from apex_opt.simulator import simulate
from apex_opt.simulator.law import linear_law
from apex_opt.workload import make_trace
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from apex_opt.workload.trace import Trace

SPACE = PlanSpace()
SEEDS = range(40)
OTHERS: tuple[dict[str, Any], ...] = (
    {"name": "slow", "memory_bytes_per_s": 1.5e12, "flops_per_s": (("bf16", 300e12),), "price_per_h": 1.1},
    {"name": "frugal", "tdp_w": 300.0, "idle_w": 20.0, "memory_bytes_per_s": 2e12, "price_per_h": 0.9},
    {"name": "fast", "memory_bytes_per_s": 8e12, "flops_per_s": (("bf16", 2000e12),), "price_per_h": 6.0},
)


def question_of(seed: int) -> Question:
    """A random question on one GPU or two."""
    question = random_question(seed)
    gpus = 1 + seed % 2
    cluster = make_cluster(gpus, memory_bytes=question.cluster.gpu.memory_bytes)
    return replace(question, cluster=cluster, max_devices=gpus)


@cache
def pools_of(seed: int) -> tuple[Question, ...]:
    """The question on its GPUs, and on those of another type."""
    one = question_of(seed)
    rng = np.random.default_rng(seed)
    gpus = int(rng.choice([1, 2]))
    gpu = {"memory_bytes": one.cluster.gpu.memory_bytes, **OTHERS[seed % len(OTHERS)]}
    other = replace(one, cluster=make_cluster(gpus, **gpu), max_devices=gpus)
    return (one, other) if seed % 2 else (other, one)


def limit_of(seed: int) -> int | None:
    """GPUs of a fleet in all: in some questions fewer than there are."""
    return 2 if seed % 5 == 4 else None


@cache
def answer_of(seed: int) -> FleetAnswer:
    pools = tuple(replace(pool, max_devices=min(pool.max_devices, limit_of(seed) or 99)) for pool in pools_of(seed))
    return search_fleets(pools, SPACE, top=2, most_gpus=limit_of(seed))


@cache
def parts(seed: int) -> list[list[Part]]:
    """Every feasible plan of each pool."""
    found = []
    for pool in pools_of(seed):
        plans, _ = settled(pool, SPACE, list_plans(pool, SPACE, silent), silent)
        instance = pool.instance()
        assert set(plans) == {plan for plan in space(instance) if not violations(instance, plan)}
        found.append(parts_of(Evaluator(pool), plans, silent))
    return found


def served(trace: Trace, fleet: tuple[Part, ...]) -> bool:
    """Whether the dealing leaves something for each part."""
    owner = dealt(np.array([[part.weight for part in fleet]]), len(trace))[0]
    return set(owner.tolist()) == set(range(len(fleet))) and (trace.concurrency or 99) >= len(fleet)


@cache
def every(seed: int) -> list[Fleet]:
    """Every fleet over both pools, simulated to its end."""
    pools = pools_of(seed)
    scorer = FleetEvaluator([Evaluator(pool) for pool in pools])
    return [scorer.simulate((0, 1), fleet) for fleet in product(*parts(seed)) if served(pools[0].trace, fleet)]


def key(question: Question, fleet: Fleet) -> tuple[tuple[float, ...], int, str]:
    return question.costs(fleet.metrics), fleet.devices, fleet.text


@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_fleet_is_what_simulating_every_plan_and_every_fleet_finds(seed: int) -> None:
    answer, question, most = answer_of(seed), pools_of(seed)[0], limit_of(seed) or 99
    good = [fleet for fleet in every(seed) if fleet.meets_slos and fleet.devices <= most]
    # Those of one type are given in the same form by a search that has nothing else.
    for index, (pool, mine) in enumerate(zip(pools_of(seed), parts(seed), strict=True)):
        evaluator = Evaluator(pool)
        for part in mine:
            candidate = evaluator.simulate(part.plan)
            if candidate.meets_slos and part.plan.devices <= most:
                alone = FleetEvaluator([evaluator]).simulate((0,), (part,))
                assert alone.metrics == candidate.metrics
                assert alone.parts[0].usage == candidate.usage
                good.append(replace(alone, parts=(replace(alone.parts[0], pool=index),)))
    good.sort(key=lambda fleet: key(question, fleet))
    if not good:
        assert (answer.status, answer.best, answer.candidates) == ("infeasible", None, ())
        assert answer.reason is not None
        assert "\n" not in answer.reason
        assert all(f"{pool.cluster.gpu.name} alone: " in answer.reason for pool in pools_of(seed))
        return
    assert (answer.status, answer.optimal, answer.gap, answer.reason) == ("optimal", True, 0.0, None)
    assert [fleet.text for fleet in answer.candidates[:2]] == [fleet.text for fleet in good[:2]]
    for fleet, found in zip(good[:2], answer.candidates, strict=False):
        assert fleet.metrics == found.metrics
        assert [part.usage for part in fleet.parts] == [part.usage for part in found.parts]


def test_these_questions_have_answers_of_every_kind() -> None:
    answers = [answer_of(seed) for seed in SEEDS]
    best = [answer.best for answer in answers if answer.best is not None]
    assert sum(len(fleet.parts) == 2 for fleet in best) >= 5
    assert sum(len(fleet.parts) == 1 for fleet in best) >= 5
    assert len(answers) - len(best) >= 3
    several = [certificate for answer in answers for places, certificate in answer.certificates if len(places) == 2]
    for count in ("bounded", "out_of_reach", "simulated", "cut_short", "repeated"):
        assert any(getattr(certificate, count) for certificate in several), count
    for family in ("part", "gpus"):
        assert any(certificate.infeasible[family] for certificate in several), family
    assert sum(pools_of(seed)[0].trace.concurrency is not None for seed in SEEDS) >= 5


@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_fleet_is_never_worse_than_the_best_plan_of_one_type(seed: int) -> None:
    answer, question = answer_of(seed), pools_of(seed)[0]
    assert len(answer.alone) == 2
    for pool, alone in zip(pools_of(seed), answer.alone, strict=True):
        most = min(pool.max_devices, limit_of(seed) or 99)
        found = search(replace(pool, max_devices=most), SPACE).best
        assert (found is None) == (alone is None)
        if found is not None and alone is not None:
            assert alone.parts[0].plan == found.plan
            assert answer.best is not None
            assert question.costs(answer.best.metrics) <= question.costs(found.metrics)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_certificates_account_for_every_fleet(seed: int) -> None:
    answer, most = answer_of(seed), limit_of(seed) or 99
    assert [places for places, _ in answer.certificates] == [(0,), (1,), (0, 1)]
    for _, certificate in answer.certificates:
        counted = certificate.bounded + certificate.simulated + certificate.repeated + certificate.left
        assert certificate.space == sum(certificate.infeasible.values()) + counted
        assert certificate.optimal
        assert certificate.out_of_reach <= certificate.bounded
        assert (certificate.least_bound is None) == (certificate.out_of_reach == certificate.bounded)
        if certificate.least_bound is not None:
            objective = pools_of(seed)[0].objective
            assert certificate.incumbent is not None
            assert objective.signed(certificate.least_bound) >= objective.signed(certificate.incumbent)
    one, other, both = (certificate for _, certificate in answer.certificates)
    assert both.space == one.space * other.space
    if limit_of(seed) is None:
        fitting = len(parts(seed)[0]) * len(parts(seed)[1])
    else:
        fitting = sum(a.plan.devices + b.plan.devices <= most for a, b in product(*parts(seed)))
    assert both.bounded + both.simulated + both.infeasible["share"] == fitting


@pytest.mark.parametrize("seed", SEEDS)
def test_no_fleet_is_better_than_its_bounds_and_none_meets_goals_that_they_rule_out(seed: int) -> None:
    pools = pools_of(seed)
    question, bounds = pools[0], FleetBounds(Evaluator(pools[0]))
    fleets = list(product(*parts(seed)))
    if not fleets:
        return
    lower, possible, has = bounds.of(fleets)
    assert has.tolist() == [served(question.trace, fleet) for fleet in fleets]
    helped = [bounds.with_any(*pair) for pair in (parts(seed), parts(seed)[::-1])]
    runs = iter(every(seed))
    for index, (a, b) in enumerate(product(*(range(len(some)) for some in parts(seed)))):
        if not has[index]:
            continue
        fleet = next(runs)
        for cost, bound, *loose in zip(
            question.costs(fleet.metrics), lower[index], helped[0][0][a], helped[1][0][b], strict=True
        ):
            assert bound <= cost
            assert max(loose) <= bound + 1e-9 * abs(bound)
        if fleet.meets_slos:
            assert possible[index]
            assert helped[0][1][a]
            assert helped[1][1][b]


def brute_near(question: Question, good: list[Fleet]) -> Fleet:
    """The best within a tolerance of the best by the first objective."""
    first, second = question.objectives
    best = min(first.signed(first.value(fleet.metrics)) for fleet in good)
    limit = best + abs(best) * first.tolerance
    near = [fleet for fleet in good if first.signed(first.value(fleet.metrics)) <= limit]
    return min(near, key=lambda f: (second.signed(second.value(f.metrics)), f.devices, f.text))


@pytest.mark.parametrize("text", ["energy~20%,e2e_mean", "e2e_p95~10%,energy", "throughput~5%,cost"])
def test_within_a_tolerance_of_the_best_fleet_by_one_objective_the_best_by_the_next_is_found(text: str) -> None:
    objective, *then = load_objectives(text)
    pools = [replace(pool, objective=objective, then=tuple(then), slos=()) for pool in mixed()]
    evaluators = [Evaluator(pool) for pool in pools]
    every_part = [
        parts_of(evaluator, settled(pool, SPACE, list_plans(pool, SPACE, silent), silent)[0], silent)
        for pool, evaluator in zip(pools, evaluators, strict=True)
    ]
    scorer = FleetEvaluator(evaluators)
    good = [scorer.simulate((place,), (part,)) for place in (0, 1) for part in every_part[place]]
    good += [scorer.simulate((0, 1), fleet) for fleet in product(*every_part)]
    answer = search_fleets(pools, SPACE)
    assert answer.best is not None
    assert (answer.status, answer.best.text) == ("optimal", brute_near(pools[0], good).text)
    assert answer.best.value == objective.value(answer.best.metrics)
    assert all(len(certificate.before) == 1 for _, certificate in answer.certificates)


def mixed(**changes: Any) -> list[Question]:
    """Two types of GPU that are busy with their requests."""
    rng = np.random.default_rng(5)
    trace = make_trace(
        name="test",
        arrival_ns=np.cumsum(rng.exponential(2e6, 60)).astype(np.int64),
        prompt=rng.integers(1, 700, 60),
        output=rng.integers(2, 40, 60),
    )
    model = make_model((dense(hidden=1024, columns=4096), 6))
    fields = {"trace": trace} | changes
    return [
        make_question(model, make_cluster(2, **gpu), **fields)
        for gpu in ({"name": "quick"}, {**OTHERS[0], "idle_w": 60.0})
    ]


@pytest.mark.parametrize("policy", ["vllm", "orca", "static"])
def test_the_best_fleet_is_found_where_prompts_share_what_they_say_and_batches_are_formed_otherwise(
    policy: str,
) -> None:
    rng = np.random.default_rng(11)
    prompt = rng.integers(20, 200, 40)
    trace = make_trace(
        name="shared",
        arrival_ns=np.cumsum(rng.exponential(2e6, 40)).astype(np.int64),
        prompt=prompt,
        output=rng.integers(2, 40, 40),
        content=[[int(rng.integers(2)), *range(100, 99 + -(-int(n) // 16))] for n in prompt],
        content_tokens=16,
    )
    settings = replace(SMALL, policy=policy, prefix_caching=policy == "vllm", max_model_len=256)
    pools = mixed(trace=trace, settings=settings, objective="e2e_p90")
    some, scorer = parts_for(pools), FleetEvaluator([Evaluator(pool) for pool in pools])
    good = [scorer.simulate((place,), (part,)) for place in (0, 1) for part in some[place]]
    good += [scorer.simulate((0, 1), fleet) for fleet in product(*some) if served(trace, fleet)]
    good.sort(key=lambda fleet: key(pools[0], fleet))
    answer = search_fleets(pools, SPACE, top=4)
    assert [fleet.text for fleet in answer.candidates[:4]] == [fleet.text for fleet in good[:4]]
    assert any(len(fleet.parts) == 2 for fleet in good[:4])


def test_a_fleet_is_what_its_parts_do_on_their_own_share_of_the_requests() -> None:
    pools = mixed(slo="e2e_p95<=10s,itl_p99<=1s", objective="energy")
    fleets = [fleet for fleet in product(*parts_for(pools)) if sum(part.plan.devices for part in fleet) == 3]
    (fleet, *_) = fleets
    found = FleetEvaluator([Evaluator(pool) for pool in pools]).simulate((0, 1), fleet)
    trace, settings = pools[0].trace, pools[0].settings
    owner = dealt(np.array([[part.weight for part in fleet]]), len(trace))[0]
    runs, joules = [], 0.0
    for place, (pool, part) in enumerate(zip(pools, fleet, strict=True)):
        rows = np.flatnonzero(owner == place)
        own = make_trace(
            name="part", arrival_ns=trace.arrival_ns[rows], prompt=trace.prompt[rows], output=trace.output[rows]
        )
        evaluator, plan = Evaluator(pool), part.plan
        memory = stage_memory(pool.model, pool.cluster.gpu, plan, pool.settings_for(plan))
        laws = evaluator.costs.plan_cost(plan).laws
        blocks = kv_blocks(memory) * plan.attention.dp
        run = simulate(pool.settings_for(plan), blocks, laws, own, replicas=plan.replicas, gaps=True)
        runs.append((rows, run))
        # Energy above the idle draw is that of the part's own run; idle are its GPUs for as long as the fleet runs.
        usage = Evaluator(replace(pool, trace=own)).simulate(plan).usage
        joules += usage.energy_j - usage.idle_energy_j
        assert part.weight == tokens_per_s(pool.settings_for(plan), blocks, laws, trace, plan.replicas)
    arrival, finish = (np.empty(len(trace), np.int64) for _ in range(2))
    for rows, run in runs:
        arrival[rows], finish[rows] = run.arrival_ns, run.finish_ns
    makespan_s = (finish.max() - arrival.min()) / 1e9 + OVERHEAD.request_s
    idle_w = sum(p.cluster.gpu.idle_w * part.plan.devices for p, part in zip(pools, fleet, strict=True))
    assert found.metrics.value("makespan") == pytest.approx(makespan_s, rel=1e-12)
    assert found.metrics.value("energy") == pytest.approx(joules + idle_w * makespan_s, rel=1e-9)
    assert found.metrics.latency_s["e2e"]["mean"] == pytest.approx(
        (finish - arrival).mean() / 1e9 + OVERHEAD.request_s, rel=1e-9
    )
    prices = [pool.cluster.gpu.price_per_h or 0.0 for pool in pools]
    assert found.metrics.value("cost") == sum(p * part.plan.devices for p, part in zip(prices, fleet, strict=True))
    assert [part.requests for part in found.parts] == [len(rows) for rows, _ in runs]
    assert sum(part.batches for part in found.parts) == sum(run.batches for _, run in runs)
    whole = merged(settings, trace, runs)
    assert whole.gaps_ns is not None
    assert (whole.preemptions, whole.batches) == tuple(
        sum(getattr(r, of) for _, r in runs) for of in ("preemptions", "batches")
    )
    first = np.cumsum(trace.output - 1) - (trace.output - 1)
    sums = np.add.reduceat(whole.gaps_ns, first)
    assert np.array_equal(sums, whole.finish_ns - whole.first_token_ns)
    assert (
        measure(whole.as_run(trace, settings.max_model_len)).latency_s["itl"]["p99"]
        == (found.metrics.latency_s["itl"]["p99"])
    )


def parts_for(pools: list[Question]) -> list[list[Part]]:
    return [
        parts_of(Evaluator(pool), settled(pool, SPACE, list_plans(pool, SPACE, silent), silent)[0], silent)
        for pool in pools
    ]


def test_a_busy_fleet_beats_the_best_plan_of_one_type() -> None:
    pools = mixed()
    answer = search_fleets(pools, SPACE)
    assert answer.best is not None
    assert len(answer.best.parts) == 2
    assert all(alone is not None and answer.best.value < alone.value for alone in answer.alone)


def test_the_answer_is_the_same_with_and_without_room_for_more_and_with_the_types_in_another_order() -> None:
    pools = mixed()
    there, back = search_fleets(pools, SPACE, top=3), search_fleets(pools[::-1], SPACE, top=3)
    assert there == search_fleets(pools, SPACE, top=3, most_gpus=4, time_limit_s=1e6)
    assert there.best is not None
    assert back.best is not None
    assert {part.gpu for part in there.best.parts} == {part.gpu for part in back.best.parts}


def test_fewer_gpus_in_all_bind_the_fleet_and_not_its_parts() -> None:
    for most in (1, 2, 3):
        answer = search_fleets(
            [replace(pool, max_devices=min(most, 2)) for pool in mixed()], SPACE, top=20, most_gpus=most
        )
        assert answer.optimal
        assert {fleet.devices for fleet in answer.candidates} <= set(range(1, most + 1))
        assert (answer.certificates[2][1].simulated == 0) == (most == 1)


def test_a_time_limit_leaves_fleets_and_their_gap() -> None:
    pools = mixed(objective="e2e_p95")
    exact, answer = search_fleets(pools, SPACE), search_fleets(pools, SPACE, time_limit_s=1e-6)
    assert answer.best is not None
    assert exact.best is not None
    assert (answer.status, answer.optimal) == ("feasible", False)
    assert answer.gap is not None
    assert answer.best.value * (1 - answer.gap) <= exact.best.value <= answer.best.value
    _, both = answer.certificates[2]
    assert both.left > 0
    assert both.simulated == 0
    assert sum(both.infeasible.values()) + both.bounded + both.repeated + both.left == both.space


def test_fleets_over_three_types_are_searched_in_every_choice_of_them() -> None:
    pools = mixed()
    cluster = make_cluster(1, **OTHERS[2] | {"memory_bytes_per_s": 3e12})
    pools.append(replace(pools[0], cluster=cluster, max_devices=1))
    answer, some = search_fleets(pools, SPACE, top=3), parts_for(pools)
    assert [places for places, _ in answer.certificates] == [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    scorer = FleetEvaluator([Evaluator(pool) for pool in pools])
    good = [
        scorer.simulate(places, fleet)
        for places, _ in answer.certificates
        for fleet in product(*(some[place] for place in places))
        if served(pools[0].trace, fleet)
    ]
    good.sort(key=lambda fleet: key(pools[0], fleet))
    assert [fleet.text for fleet in answer.candidates[:3]] == [fleet.text for fleet in good[:3]]


# ---- dealing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_of_the_first_requests_each_part_has_its_share_but_for_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 10 ** rng.integers(1, 8), (5, 2 + seed % 3))
    requests = int(rng.integers(1, 400))
    owner = dealt(weights, requests)
    assert owner.shape == (5, requests)
    for row, some in zip(owner, weights.tolist(), strict=True):
        for part, weight in enumerate(some):
            dealt_to = np.cumsum(row == part)
            due = np.arange(1, requests + 1) * weight / sum(some)
            # To the nearest where there are two; every further part is dealt what rounding has left.
            assert np.abs(dealt_to - due).max() <= 0.5 * max(1, len(some) - 1) + 1e-9
        for length in (1, requests // 2):
            assert np.array_equal(dealt(np.array([some]), max(1, length))[0], row[: max(1, length)])


def test_equal_parts_take_turns_and_weights_that_are_multiples_deal_alike() -> None:
    assert dealt(np.array([[7, 7]]), 6)[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert dealt(np.array([[1, 1, 1]]), 6)[0].tolist()[:3] in ([0, 1, 2], [1, 0, 2], [2, 0, 1], [1, 2, 0])
    assert np.array_equal(dealt(np.array([[2, 3]]), 50), dealt(np.array([[2000, 3000]]), 50))
    assert np.bincount(dealt(np.array([[1, 3]]), 400)[0]).tolist() == [100, 300]


def test_clients_are_dealt_in_proportion_and_none_goes_without() -> None:
    assert clients_of([1, 3], 8) == [2, 6]
    assert clients_of([1, 1000], 8) == [1, 7]
    assert clients_of([1, 1000, 1], 3) == [1, 1, 1]
    for clients in range(3, 20):
        counts = clients_of([5, 2, 9], clients)
        assert sum(counts) == clients
        assert min(counts) >= 1


def test_the_weight_is_what_full_batches_of_the_slowest_stage_compute() -> None:
    pool = mixed()[0]
    settings = replace(pool.settings, max_num_seqs=4, max_num_batched_tokens=100)
    trace = make_trace(name="even", arrival_ns=[0] * 10, prompt=[50] * 10, output=[11] * 10)
    law = linear_law(base_ns=10_000, token_ns=100, context_ns=1, max_num_seqs=4, max_num_batched_tokens=100)
    # Two prompts a batch: 10,000 + 2 (50 x 100 + 50) ns for 100 tokens; four sequences: 10,000 + 4 (100 + 61) ns.
    prompts_ns, later_ns = 500 * 20_100 / 100, 100 * 10_644 / 4
    assert tokens_per_s(settings, 1000, [law], trace, 1) == int(610 * 1e9 / (prompts_ns + later_ns))
    assert tokens_per_s(settings, 1000, [law], trace, 3) == int(3 * 610 * 1e9 / (prompts_ns + later_ns))
    # The slower of two stages counts, and sequences are spread over both.
    slower_ns = 3 * (prompts_ns + 100 * (10_000 + 2 * 161) / 2)
    assert tokens_per_s(settings, 1000, [law, law.scaled(3)], trace, 1) == int(610 * 1e9 / slower_ns)
    # Room in the cache for two sequences of 61 tokens.
    few_ns = prompts_ns + 100 * (10_000 + 2 * 161) / 2
    assert tokens_per_s(settings, 2 * 4, [law], trace, 1) == int(610 * 1e9 / few_ns)


def test_a_closed_loop_keeps_its_clients_in_both_parts_and_drops_fleets_without() -> None:
    rng = np.random.default_rng(3)
    fields = {
        "name": "test",
        "arrival_ns": [0] * 20,
        "prompt": rng.integers(1, 400, 20),
        "output": rng.integers(2, 30, 20),
    }
    for clients, both in ((1, False), (2, True), (7, True)):
        trace = make_trace(**fields, concurrency=clients)
        answer = search_fleets(mixed(trace=trace, objective="makespan"), SPACE, top=100)
        found = [fleet for fleet in answer.candidates if len(fleet.parts) == 2]
        assert bool(found) == both
        assert answer.optimal


def test_a_part_of_a_trace_keeps_what_its_prompts_say() -> None:
    trace = make_trace(
        name="said",
        arrival_ns=[0, 5, 9],
        prompt=[40, 10, 33],
        output=[1, 2, 3],
        content=[[1, 2, 3], [7], [1, 2, 9]],
        content_tokens=16,
    )
    part = trace.picked(np.array([0, 2]))
    assert part.content is not None
    assert part.content_starts is not None
    assert (part.content.tolist(), part.content_starts.tolist()) == ([1, 2, 3, 1, 2, 9], [0, 3, 6])
    assert (part.arrival_ns.tolist(), part.prompt.tolist(), part.output.tolist()) == ([0, 9], [40, 33], [1, 3])


def test_requests_without_later_tokens_and_goals_on_them_are_no_obstacle() -> None:
    trace = make_trace(name="one token", arrival_ns=[0] * 8, prompt=[100] * 8, output=[1] * 8)
    pools = mixed(trace=trace, slo="tpot_p95<=1ms,itl_p99<=1ms", objective="ttft_mean")
    answer = search_fleets(pools, SPACE)
    assert answer.best is not None
    assert answer.optimal
