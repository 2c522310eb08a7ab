"""What all requests take together bounds a run, and more tightly the fewer the replicas."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest
from plan_cases import (
    OVERHEAD,
    SMALL,
    bounded,
    dense,
    feasible_plans,
    keeping,
    latent,
    make_cluster,
    make_model,
    make_problem,
    random_trace,
    simulated,
    sparse,
    tight,
    with_window,
)
from simulator_cases import Case, linear, requests

from apex_opt.figures import load_objective
from apex_opt.figures.measure import least_signed
from apex_opt.figures.registry import STATISTICS
from apex_opt.oracle.space import space
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.plan import parse_plan
from apex_opt.plans.routing import Routing
from apex_opt.search import Scorer
from apex_opt.search.bounds import StageFloor
from apex_opt.search.bounds.load import Load, replicas_with_room
from apex_opt.units import NS_PER_S
from apex_opt.workload import make_trace

if TYPE_CHECKING:
    from apex_opt.plans.plan import Plan
    from apex_opt.workload import Trace

BLOCK = dense(hidden=1024, heads=8, kv=4, columns=4096, width=128)
MODELS = {
    "dense": make_model((BLOCK, 6)),
    "sparse": make_model((sparse(hidden=1024, heads=8, kv=2, columns=1024, experts=8, chosen=2), 5)),
    "latent": make_model((latent(dense(hidden=1024, columns=2048)), 4)),
    "windows": make_model((with_window(BLOCK, 100), 3), (BLOCK, 1), (with_window(BLOCK, 700), 2)),
    "states": make_model((keeping(BLOCK, state_bytes=200_000), 4), (BLOCK, 2)),
}
NAMES = ("e2e_mean", "e2e_p50", "e2e_p99.9", "e2e_max", "ttft_mean", "ttft_p95", "makespan", "throughput", "energy")
ROUTINGS = get_args(Routing)
OBJECTIVES = tuple(load_objective(name) for name in NAMES)


def crowd(seed: int, requests: int = 60) -> Trace:
    """Requests that come faster than they can be answered, some with long prompts and some with long answers."""
    rng = np.random.default_rng(seed)
    return make_trace(
        name="crowd",
        arrival_ns=np.sort(rng.integers(0, int(rng.choice([1, 10**7, 10**9])), requests)),
        prompt=rng.choice([5, 300, 1500], requests),
        output=rng.choice([1, 20, 200], requests),
    )


def alone_s(scorer: Scorer, plan: Plan) -> float:
    """Mean time of a request, as if each were the only one."""
    run = scorer.facts().alone(plan)
    return float(least_signed(load_objective("e2e_mean"), run)[0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(8, 80))])
def test_no_plan_beats_its_bounds_under_a_crowd_with_much_or_little_memory(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = make_problem(MODELS[name], make_cluster(4), crowd(seed), routing=ROUTINGS[seed % len(ROUTINGS)])
    problem = replace(problem, objective=OBJECTIVES[0], then=OBJECTIVES[1:])
    problem = tight(problem, (1.0, 0.06, 0.045, 0.04)[seed % 4])
    plans, scorer = feasible_plans(problem), Scorer(problem)
    for index in rng.permutation(len(plans))[:12]:
        candidate = simulated(scorer, plans[index])
        bounds, possible = bounded(scorer, plans[index])
        assert possible
        short = [
            (objective.name, bound, reached)
            for objective, bound, reached in zip(OBJECTIVES, bounds, problem.costs(candidate.metrics), strict=True)
            if bound > reached
        ]
        assert not short, (str(plans[index]), short)


def test_a_crowd_is_bounded_more_tightly_than_its_requests_each_alone_and_less_the_more_replicas_there_are() -> None:
    at_once = make_trace(name="at once", arrival_ns=[0] * 400, prompt=[100] * 400, output=[50] * 400)
    problem = make_problem(MODELS["dense"], make_cluster(4), at_once)
    scorer = Scorer(problem)
    plans = [plan for plan in space(problem.instance()) if plan.stages == plan.stage_devices == 1]
    bounds = [bounded(scorer, plan)[0][0] for plan in sorted(plans, key=lambda plan: plan.replicas)]
    alone = alone_s(scorer, plans[0])
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > 3 * alone
    assert bounds[-1] > alone


def test_where_requests_hardly_meet_the_bound_is_that_of_each_alone() -> None:
    problem = make_problem(MODELS["dense"], make_cluster(1), random_trace(1, 20).stretched(1000))
    scorer = Scorer(problem)
    plan = next(space(problem.instance()))
    alone = alone_s(scorer, plan)
    assert bounded(scorer, plan)[0][0] == pytest.approx(alone, rel=1e-11)


def test_blocks_that_prompts_share_are_held_once() -> None:
    engine = EngineSettings(
        max_num_seqs=4,
        max_num_batched_tokens=512,
        max_model_len=512,
        block_size=16,
        async_scheduling=False,
        prefix_caching=True,
    )
    law = linear(engine, 1000)  # a batch takes as long whatever is in it
    trace = requests(
        [(0, 321, 1), *[(10**6, 321, 64)] * 4], content=[[1] * 20 + [own] for own in range(2, 7)], content_tokens=16
    )
    case = Case(settings=engine, blocks=44, laws=(law,), trace=trace)  # for two of the prompts, if they shared nothing
    run = case.run(log=False)
    assert run.cached_tokens == 4 * 320
    assert int(run.finish_ns.max()) == 10**6 + 64 * 1000
    floor = StageFloor.of(law)
    shared, apart = (
        Load.of(settings, floor, 1, trace, case.blocks, ("max",))
        for settings in (engine, replace(engine, prefix_caching=False))
    )
    assert shared.total_s <= 65 * 1e-6 < apart.total_s


@pytest.mark.parametrize(
    ("stages", "block_size", "tokens", "shape", "blocks"),
    [(4, 1, 18, [(0, 8, 10)] * 2, 31), (4, 4, 19, [(0, 5, 13)] * 5, 6), (4, 2, 9, [(0, 9, 10)] * 2, 19)],
)
def test_where_batches_of_a_sequence_overtake_each_other_its_blocks_are_held_for_less(
    stages: int, block_size: int, tokens: int, shape: list[tuple[int, int, int]], blocks: int
) -> None:
    engine = EngineSettings(max_num_seqs=8, max_num_batched_tokens=tokens, max_model_len=64, block_size=block_size)
    law = linear(engine, 10)
    case = Case(settings=engine, blocks=blocks, laws=(law,) * stages, trace=requests(shape))
    run = case.run(log=False)
    assert run.preemptions > 0
    floor = StageFloor.of(law)
    overtaking, in_turn = (
        Load.of(engine, floor, stages, case.trace, blocks, ("max",), overtaking=overtakes)
        for overtakes in (True, False)
    )
    assert overtaking.total_s <= int(run.finish_ns.max()) / NS_PER_S < in_turn.total_s


def test_a_percentile_between_two_ends_is_bounded_by_the_earlier_one() -> None:
    engine = EngineSettings(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=256, async_scheduling=False)
    law = linear(engine, 1000)
    trace = requests([(0, 8, output) for output in (2, 5, 90, 200)])
    run = Case(settings=engine, blocks=99, laws=(law,), trace=trace).run(log=False)
    statistics = ("p25", "p50", "p60", "p90", "max")
    load = Load.of(engine, StageFloor.of(law), 1, trace, 99, statistics)
    ends_s = run.finish_ns / NS_PER_S
    reached = [float(np.percentile(ends_s, 100.0 if name == "max" else float(name[1:]))) for name in statistics]
    assert all(load.whole_s[name] <= least for name, least in zip(statistics, reached, strict=True))
    # One after the other, shortest first: beside their prompts they take no longer than they must.
    assert load.whole_s["max"] == pytest.approx(reached[-1], rel=0.02)


@pytest.mark.parametrize("seed", range(40))
def test_from_as_many_replicas_as_have_room_the_load_adds_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(float(rng.choice([1e6, 3e7, 3e8])), 40).astype(np.int64))
    trace = make_trace(
        name="mixed", arrival_ns=arrivals, prompt=rng.integers(1, 900, 40), output=rng.integers(1, 90, 40)
    )
    mean = StageFloor(batch_ns=3_000_000, token_ns=20_000.0, decode_token_ns=9_000.0, pair_rate=900, context_rate=700)
    engine = SMALL, mean, int(rng.integers(1, 4)), trace, int(rng.integers(60, 900))
    room = replicas_with_room(*engine)
    load = Load.of(*engine, STATISTICS)
    assert load.total_s / room <= load.last_arrival_s * (1 + 1e-12)
    for seconds in (load.first_s, load.whole_s):
        for statistic, end in seconds.items():
            since = load.mean_arrival_s if statistic == "mean" else load.last_arrival_s
            assert end / room <= since * (1 + 1e-12), statistic


@pytest.mark.parametrize("tdp_w", [130.0, 300.0, 700.0])
@pytest.mark.parametrize("tokens", [256, 2048])
def test_prompts_that_keep_a_board_at_its_limit_take_no_less_than_their_bound(tdp_w: float, tokens: int) -> None:
    # Single kernels draw more than the limit that the board holds over a run, and nothing here lets it rest.
    restless = replace(OVERHEAD, step_s=0.0, blocking_step_s=0.0, sequence_s=0.0, mixed_step_s=0.0, request_s=0.0)
    model = make_model((dense(hidden=8192, heads=64, kv=8, width=128, columns=28672), 8))
    trace = make_trace(name="prompts", arrival_ns=[0] * 16, prompt=[tokens] * 16, output=[1] * 16)
    settings = replace(SMALL, max_num_batched_tokens=tokens, max_model_len=2 * tokens)
    cluster = make_cluster(1, tdp_w=tdp_w)
    scorer = Scorer(make_problem(model, cluster, trace, objective="energy", settings=settings, overhead=restless))
    plan = parse_plan("tp1", model)
    run, (bound, *_) = simulated(scorer, plan).metrics, bounded(scorer, plan)[0]
    assert run.value("energy") == pytest.approx(tdp_w * run.value("makespan"))
    assert 0.9 * run.value("energy") < bound <= run.value("energy")
