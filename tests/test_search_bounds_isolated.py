"""No run ever beats what its requests take alone: not a request, not an objective, not a goal."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_cases import (
    ENGINES,
    SMALL,
    bounded,
    dense,
    feasible_plans,
    latent,
    make_cluster,
    make_model,
    make_problem,
    random_trace,
    simulated,
    sparse,
)
from simulator_cases import (
    DRAFTING,
    TRAFFIC,
    Case,
    alone,
    cases,
    floors_of,
    floors_run,
    linear,
    random_law,
    requests,
)

from apex_opt.cost.engine import load_engine
from apex_opt.engines.schedulers import SCHEDULINGS
from apex_opt.figures import load_objective, parse_goals
from apex_opt.figures.measure import each
from apex_opt.figures.registry import figure, names, per_item, per_run
from apex_opt.ir import load_model
from apex_opt.plans.deployment import Deployment
from apex_opt.plans.engine import EngineSettings
from apex_opt.search import Scorer
from apex_opt.search.bounds import StageFloor
from apex_opt.search.facts import judged
from apex_opt.simulator.law import RATE_BITS
from apex_opt.workload import make_trace

if TYPE_CHECKING:
    from apex_opt.plans.plan import Plan
    from apex_opt.simulator import Outcome
    from apex_opt.workload import Trace

NAMES = names()
FIGURES = {one.name: one.unit.name for one in per_run()}
LATENCIES = tuple(one.name for one in per_item())

LOOPS = ("synchronous", "threshold", "asynchronous", "pipeline", "prefix caching", *DRAFTING)


def check_never_beaten(case_settings: EngineSettings, floor: Outcome, run: Outcome, trace: Trace) -> None:
    """Every latency of every request is at least its bound."""
    least, seen = (outcome.as_run(trace, case_settings.max_model_len) for outcome in (floor, run))
    for metric in ("ttft", "tpot", "e2e"):
        low, value = (each(one, figure(metric)) for one in (least, seen))
        short = value < low * (1 - 1e-12)
        assert not short.any(), (metric, np.flatnonzero(short), low[short], value[short])
    assert run.finish_ns.max() >= floor.finish_ns.max()
    assert run.makespan_ns >= floor.makespan_ns


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_no_request_beats_its_bound_under_any_law_engine_and_traffic(
    loop: str, traffic: str, data: st.DataObject
) -> None:
    case = data.draw(cases(loop, traffic, busy=data.draw(st.booleans())))  # type: ignore[arg-type]
    if len(case.laws) > 1:
        # Other sequences fill a pipeline; the next token of one is not formed while its last is under way.
        case = case.having(settings=replace(case.settings, async_scheduling=False))
    floor = alone(case)
    check_never_beaten(case.settings, floor, case.run(log=False), case.trace)


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("policy", ["orca", "static"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_no_request_beats_its_bound_under_other_policies(policy: str, traffic: str, data: st.DataObject) -> None:
    drawn = data.draw(cases(data.draw(st.sampled_from(("synchronous", "asynchronous", "pipeline"))), traffic))  # type: ignore[arg-type]
    longest = drawn.settings.max_model_len
    engine = replace(
        drawn.settings,
        scheduler=SCHEDULINGS[policy](),
        max_num_batched_tokens=max(longest, drawn.settings.max_num_seqs),
    )
    seeds = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=len(drawn.laws), max_size=len(drawn.laws)))
    laws = tuple(
        random_law(engine, seed, zeros=0.3, copies=law.copies) for seed, law in zip(seeds, drawn.laws, strict=True)
    )
    case = drawn.having(settings=engine, laws=laws)
    check_never_beaten(engine, alone(case), case.run(log=False), case.trace)


def test_a_prompt_that_others_share_is_bounded_by_what_is_its_own() -> None:
    engine = EngineSettings(
        max_num_seqs=4,
        max_num_batched_tokens=512,
        max_model_len=2048,
        block_size=16,
        async_scheduling=False,
        prefix_caching=True,
    )
    law = linear(engine, 0, 1000)
    rows = [(0, 320, 1), (10**7, 320, 1), (2 * 10**7, 320, 1), (3 * 10**7, 32, 1)]
    ids = [[1] * 20, [1] * 10 + [2] * 10, [3] * 20, [1] * 2]
    trace = requests(rows, content=ids, content_tokens=16)
    case = Case(settings=engine, blocks=500, laws=(law,), trace=trace)
    floor, run = alone(case), case.run(log=False)
    check_never_beaten(engine, floor, run, trace)
    # The first finds nothing, though it could; the second computes 160 tokens, the third all, the last one block.
    assert (run.first_token_ns - run.arrival_ns).tolist() == [320_000, 160_000, 320_000, 16_000]
    least = (floor.first_token_ns - floor.arrival_ns).tolist()
    assert [round(ns, -3) for ns in least] == [160_000, 160_000, 320_000, 1_000]
    cold = floors_run(replace(engine, prefix_caching=False), floors_of(case.laws), trace)
    assert [round(ns, -3) for ns in (cold.first_token_ns - cold.arrival_ns).tolist()] == [320_000] * 3 + [32_000]


def test_a_preempted_sequence_that_computes_its_tokens_again_for_nothing_does_not_beat_the_bound() -> None:
    # Reading the cache while decoding is dear, a chunk is free: bounding every token by the former would be wrong.
    engine = EngineSettings(
        max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, block_size=1, async_scheduling=False
    )
    free, dear = np.zeros(65, np.int64), np.full(5, 4096 << RATE_BITS, np.int64)
    law = replace(linear(engine, 1000), context_rate=dear, chunk_context_rate=free, pair_rate=free)
    # After the prompts one block is left, and the first sequence takes it.
    case = Case(settings=engine, blocks=40, laws=(law,), trace=requests([(0, 9, 2), (0, 30, 2)]))
    run = case.run(log=False)
    assert run.preemptions == 1
    assert run.finish_ns[1] - run.first_token_ns[1] < 1000 + 4096 * 31
    check_never_beaten(engine, alone(case), run, case.trace)


def test_a_request_alone_on_a_linear_law_takes_its_bound() -> None:
    engine = EngineSettings(
        max_num_seqs=4, max_num_batched_tokens=512, max_model_len=2048, async_scheduling=False, block_size=16
    )
    for base, token, prompt, output in ((1_000_000, 0, 300, 1), (0, 700, 400, 1), (1_000_000, 0, 700, 30)):
        law = linear(engine, base, token)
        case = Case(settings=engine, blocks=500, laws=(law,), trace=requests([(5, prompt, output)]))
        floor, run = alone(case), case.run(log=False)
        if token == 0 and prompt <= 512:
            # A nanosecond may be lost to rounding for every chunk there could have been.
            assert 0 <= run.first_token_ns[0] - floor.first_token_ns[0] <= prompt + 2
        if token:
            assert 0 <= run.first_token_ns[0] - floor.first_token_ns[0] <= prompt + 2
        assert run.finish_ns[0] - run.first_token_ns[0] == floor.finish_ns[0] - floor.first_token_ns[0]


def test_a_floor_is_the_least_entry_whatever_the_order_of_the_tables() -> None:
    engine = EngineSettings(max_num_seqs=4, max_num_batched_tokens=8, max_model_len=64)
    law = linear(engine, 100, 10, 3)
    bumpy = replace(
        law,
        decode_ns=np.array([0, 900, 500, 700, 800]),
        mixed_ns=np.array([0, 1, 900, 800, 700, 600, 450, 650, 640]),
        chunk_ns=np.array([0, 0, 70, 60, 50, 40, 30, 20, 25]),
    )
    floor = StageFloor.of(bumpy)
    assert floor.batch_ns == 450 + 20
    assert floor.token_ns == pytest.approx(min(450 / 6, 640 / 8) + 20 / 7)
    assert StageFloor.of(replace(bumpy, copies=2)).token_ns == pytest.approx(min(450 / 6, 640 / 8) + 20 / 14)
    assert floor.context_rate == 3 << RATE_BITS
    every = replace(bumpy, sequence_ns=np.array([0, 9, 8, 7, 20]), attend_ns=np.array([5, 6, 4, 6, 8]))
    assert StageFloor.of(every).batch_ns == 450 + 20 + 7 + 4
    assert StageFloor.of(every).token_ns == floor.token_ns
    single = EngineSettings(max_num_seqs=1, max_num_batched_tokens=1, max_model_len=64)
    assert StageFloor.of(linear(single, 100, 10, 3)).batch_ns == 110


MODELS = {
    "dense": make_model((dense(hidden=1024, heads=8, kv=4, columns=4096, width=128), 6)),
    "sparse": make_model((sparse(hidden=1024, heads=8, kv=2, columns=1024, experts=8, chosen=2, shared=512), 5)),
    "dense first": make_model((dense(hidden=1024, columns=4096), 2), (sparse(hidden=1024, columns=768), 4), tied=True),
    "latent": make_model((latent(dense(hidden=1024, columns=2048)), 1), (latent(sparse(hidden=1024, shared=512)), 4)),
    "windows": make_model(*[(dense(hidden=1024, columns=2048, window=window), 1) for window in (128, None)] * 3),
}
TRAFFICS = ("round_robin", "least_loaded", "closed")
# Every second in CI, among which every engine still meets every kind of traffic, with some model.
MET = [
    pytest.param(name, seed, traffic, marks=pytest.mark.nightly if (model + seed + kind) % 2 else ())
    for (model, name), seed, (kind, traffic) in itertools.product(enumerate(MODELS), range(3), enumerate(TRAFFICS))
]


def plans_of(model_name: str, gpus: int, **changes: Any) -> tuple[Scorer, list[Plan]]:
    problem = make_problem(MODELS[model_name], make_cluster(gpus), random_trace(0), **changes)
    return Scorer(problem), feasible_plans(problem)


@pytest.mark.parametrize(("name", "seed", "traffic"), MET)
def test_no_plan_beats_its_bound_on_any_objective_request_or_goal(name: str, seed: int, traffic: str) -> None:
    engine_time = ENGINES[(seed + list(MODELS).index(name)) % len(ENGINES)]
    costs, plans = plans_of(name, 8, overhead=engine_time, expert_routing=("uniform", "skewed")[seed % 2])
    rng = np.random.default_rng(seed)
    trace = random_trace(seed + 10, 40, closed=traffic == "closed")
    chosen = [plans[i] for i in rng.permutation(len(plans))[:12]]
    assert any(plan.stages > 1 for plan in chosen)
    assert any(plan.attention.dp > 1 for plan in chosen)
    base = replace(costs.problem, trace=trace, routing="round_robin" if traffic == "closed" else traffic)
    # Limits that some requests keep to and others do not, for goodput.
    usual = simulated(Scorer(base), chosen[0]).metrics.latency_s
    within = parse_goals(f"ttft_max<={usual['ttft']['p50'] * 1.2:.9f}s,tpot_max<={usual['tpot']['p90']:.9f}s")
    everything = [load_objective(objective) for objective in (*NAMES, "itl_p99.9", "ttft_p12.5")]
    asked = replace(base, objective=everything[0], then=tuple(everything[1:]), request_slos=within)
    scorer, facts = Scorer(asked, like=costs), costs.facts()
    goodputs = []
    for plan in chosen:
        engine = base.settings_for(plan)
        candidate = simulated(scorer, plan)
        bounds, possible = bounded(scorer, plan)
        reached = asked.costs(candidate.metrics)
        assert possible
        short = {o.name: (b, r) for o, b, r in zip(everything, bounds, reached, strict=True) if not b <= r}
        assert not short, (str(plan), short)
        goodputs.append(candidate.metrics.value("goodput") / candidate.metrics.value("throughput"))
        # Every request, too, by the floors of the stages as they are split and by those of all splits.
        run, cost = scorer.logged(Deployment.of(plan))
        mean = StageFloor.mean(facts.costs.least(plan), plan.stages, plan.attention.dp)
        for floors in (floors_of(cost.laws), [mean] * plan.stages):
            least = floors_run(engine, floors, trace, overtaking=run.preemptions > 0)
            check_never_beaten(engine, least, run, trace)
    assert any(0 < share < 1 for share in goodputs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_a_goal_that_a_bound_rules_out_is_missed_and_one_that_is_met_is_never_ruled_out(name: str, seed: int) -> None:
    costs, plans = plans_of(name, 4)
    trace = random_trace(seed, 40, closed=seed == 3)
    rng = np.random.default_rng(seed)
    # Goals on both sides of what the first plan reaches, near it and near what is impossible.
    first = make_problem(MODELS[name], make_cluster(4), trace)
    first = replace(first, request_slos=parse_goals("ttft_max<=20ms,tpot_max<=9ms"))
    metrics = simulated(Scorer(first, gaps=True), plans[0]).metrics
    goals = []
    for factor in (0.05, 0.2, 0.5, 0.9, 1.1):
        ttft, tpot = metrics.latency_s["ttft"]["p95"] * factor, metrics.latency_s["tpot"]["mean"] * factor
        e2e, rate = metrics.latency_s["e2e"]["p50"] * factor, metrics.value("throughput") / factor
        goals += [
            f"ttft_p95<={ttft * 1e3:.9f}ms",
            f"tpot_mean<={tpot * 1e3:.9f}ms",
            f"e2e<={e2e:.9f}s@60%",
            f"tpot<={tpot * 1e3:.9f}ms@90%",
            f"throughput>={rate:.9f}",
            f"goodput>={max(metrics.value('goodput'), 1e-3) / factor:.9f}",
            f"makespan<={metrics.value('makespan') * factor:.9f}s",
            f"itl_p90<={metrics.latency_s['itl']['p90'] * factor:.12f}s",
            f"itl<={metrics.latency_s['itl']['p50'] * factor:.12f}s@70%",
            f"energy<={2 * metrics.value('energy') * factor:.9f}J",
            f"energy_per_token<={2 * metrics.value('energy_per_token') * factor:.9f}J",
            f"cost<={4 * metrics.value('cost') * factor:.9f}",
            f"cost_per_mtoken<={4 * metrics.value('cost_per_mtoken') * factor:.9f}",
        ]
    # What a plan cannot beat and what it reaches hang on no goal: all are judged by the same.
    problem = replace(first, slos=tuple(goal for text in goals for goal in parse_goals(text)))
    scorer = Scorer(problem, like=costs)
    ruled_out, met = Counter[str](), Counter[str]()
    for index in rng.permutation(len(plans))[:12]:
        (alike,) = scorer.facts().alike(plans[index].times(1), (plans[index].replicas,))
        floors, run = scorer.facts().floors(alike), simulated(scorer, plans[index])
        for goal in problem.slos:
            possible, holds = bool(judged(floors, (), [goal])[1][0]), run.metrics.slo_met[goal.text]
            assert possible or not holds, (str(plans[index]), goal)
            ruled_out[goal.metric] += not possible
            met[goal.metric] += holds
        assert bounded(scorer, plans[index])[1] == bool(judged(floors, (), problem.slos)[1][0])
    assert set(+ruled_out) == {*LATENCIES, *FIGURES}
    assert len(+met) >= 8


@pytest.mark.parametrize(
    ("name", "cluster"),
    [
        ("llama-3.1-8b", "4xh100-sxm"),
        ("mixtral-8x7b", "8xh200-sxm"),
        ("llama-3.1-70b", "2x4xh100-sxm"),
        ("deepseek-r1", "8xb200-sxm"),
        ("gpt-oss-120b", "4xh200-sxm"),
    ],
)
def test_no_shipped_model_on_a_catalogue_cluster_beats_its_bounds(name: str, cluster: str) -> None:
    model = load_model(name)
    formats = {"weight_formats": (model.weight_format,), "kv_formats": ("fp8",)}
    for closed, engine in ((False, "vllm"), (True, "trtllm")):
        trace = random_trace(5, 25, closed=closed)
        problem = make_problem(model, cluster, trace, objective="energy", overhead=load_engine(engine), **formats)
        plans, scorer = feasible_plans(problem), Scorer(problem)
        for plan in plans[:: max(1, len(plans) // 15)]:
            (bound, *_), _ = bounded(scorer, plan)
            assert bound <= simulated(scorer, plan).value
            laws = scorer.facts().plan_cost(plan).laws
            floor = floors_run(problem.settings_for(plan), floors_of(laws), problem.trace)
            assert (floor.first_token_ns > floor.arrival_ns).all()
            assert (floor.finish_ns >= floor.first_token_ns).all()


def test_bounds_are_worth_having_on_a_plan_that_hardly_waits() -> None:
    problem = make_problem(load_model("llama-3.1-70b"), "8xh100-sxm", random_trace(2, 20).stretched(1000))
    scorer = Scorer(problem)
    plans = [plan for plan in feasible_plans(problem) if plan.replicas == 1]
    shares = [bounded(scorer, plan)[0][0] / simulated(scorer, plan).value for plan in plans]
    assert min(shares) > 0.5
    assert float(np.median(shares)) > 0.8


def test_sizes_near_the_limits_do_not_overflow() -> None:
    engine = replace(SMALL, max_model_len=(1 << 31) - 1)
    law = linear(engine, 10**6, 1000, 50)
    trace = make_trace(name="long", arrival_ns=[0], prompt=[10_000_000], output=[10_000_000])
    floor = floors_run(engine, floors_of([law]), trace)
    assert floor.first_token_ns[0] >= 10_000_000 * 1000 - 10_000_002
    context = sum(range(10_000_001, 20_000_000))
    assert floor.finish_ns[0] - floor.first_token_ns[0] == pytest.approx(50 * context + 9_999_999 * 1_001_000, rel=1e-6)
