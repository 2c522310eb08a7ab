"""Requests that come at a rate force batches to be large: no mean time is below what batches so large take."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from plan_cases import (
    EAGER,
    OVERHEAD,
    SMALL,
    bounded,
    dense,
    feasible_plans,
    keeping,
    latent,
    linear,
    make_cluster,
    make_model,
    make_problem,
    simulated,
    sparse,
    tight,
    with_window,
)
from simulator_cases import Case
from simulator_cases import linear as linear_law

from apex_opt.cost.least import SIZES, Least
from apex_opt.engines.schedulers import SCHEDULINGS
from apex_opt.plans.plan import parse_plan
from apex_opt.search import Scorer
from apex_opt.search.bounds import StageFloor, fewest_to_fill, isolated
from apex_opt.search.bounds.crowding import PRICES, Batches, Crowd, Crowding, least_waited_ns, shared_ns
from apex_opt.units import NS_PER_S
from apex_opt.workload import make_trace

if TYPE_CHECKING:
    from apex_opt.workload.trace import Trace

MANY = sparse(hidden=4096, heads=8, kv=4, columns=2048, experts=64, chosen=2)
GATED, KIMI, MAMBA = (replace(MANY, attention=cell) for cell in linear(np.random.default_rng(3), 4096))
MODELS = {
    "experts": make_model((MANY, 6)),
    "dense first": make_model((dense(hidden=4096, columns=8192), 2), (MANY, 4)),
    "gated delta": make_model((GATED, 3), (MANY, 1), (GATED, 3), (MANY, 1)),
    "kimi delta": make_model((KIMI, 2), (latent(MANY), 1), (KIMI, 2), (latent(MANY), 1)),
    "mamba": make_model((MAMBA, 4), (MANY, 2)),
    "states": make_model((keeping(MANY, state_bytes=200_000), 4), (MANY, 2)),
    "windows": make_model((with_window(MANY, 100), 4), (MANY, 2)),
    "dense": make_model((dense(hidden=4096, columns=8192), 6)),
}
SEEDS = [range(6), pytest.param(range(6, 80), marks=pytest.mark.nightly)]


def arriving(seed: int, requests: int = 80) -> Trace:
    """Requests one after the other, so that a few of them are there at a time or many."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(float(rng.choice([2e6, 6e6, 2e7])), requests).astype(np.int64)
    return make_trace(
        name="arriving",
        arrival_ns=np.cumsum(gaps),
        prompt=rng.choice([5, 60, 700], requests),
        output=rng.choice([1, 20, 60], requests),
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seeds", SEEDS)
def test_no_plan_of_any_kind_of_model_has_a_mean_time_below_its_bound(name: str, seeds: range) -> None:
    sharper = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        engine = ("vllm", "sglang", "trtllm", "orca", "static")[seed % 5]
        scheduler = SCHEDULINGS[engine]()
        tokens = 2048 if scheduler.whole_length else 256
        settings = replace(SMALL, scheduler=scheduler, max_num_batched_tokens=tokens, async_scheduling=bool(seed % 2))
        problem = make_problem(
            MODELS[name],
            make_cluster(4),
            arriving(seed),
            settings=settings,
            overhead=EAGER if seed % 3 == 2 else OVERHEAD,
            routing=("round_robin", "least_loaded", "pull")[seed % 3],
        )
        plans, scorer = feasible_plans(problem), Scorer(problem)
        for index in rng.permutation(len(plans))[:8]:
            plan = plans[index]
            (bound,), possible = bounded(scorer, plan)
            reached = simulated(scorer, plan).value
            assert possible
            assert bound <= reached, (str(plan), bound, reached)
            sharper += bound > float(scorer.facts().alone(plan).whole_s.mean()) * (1 + 1e-9)
    assert sharper > len(seeds) // 2 or name == "dense"


def test_no_pipeline_with_little_memory_has_a_mean_time_below_its_bound_though_batches_may_overtake() -> None:
    sharper = 0
    for seed in range(18):
        rng = np.random.default_rng(seed)
        heavy = make_model((keeping(MANY, state_bytes=int(rng.choice([20, 60])) * 10**6), 4), (MANY, 2))
        problem = make_problem(
            heavy,
            make_cluster(4),
            arriving(seed),
            settings=replace(SMALL, max_num_seqs=48),
            routing=("round_robin", "least_loaded")[seed % 2],
        )
        problem = tight(problem, (0.2, 0.12, 0.1)[seed % 3])
        plans = [plan for plan in feasible_plans(problem) if plan.stages > 1]
        scorer = Scorer(problem)
        for index in rng.permutation(len(plans))[:8]:
            plan, facts = plans[index], scorer.facts()
            (bound,), _ = bounded(scorer, plan)
            scored = simulated(scorer, plan)
            assert bound <= scored.value, (seed, str(plan), bound, scored.value)
            alone, calm = (float(facts.alone(plan, calm=calm).whole_s.mean()) for calm in (False, True))
            sharper += alone < calm and bound > alone * (1 + 1e-9)
        assert sharper > 3


def test_caps_make_bounds_of_pipelines_hold_where_sequences_overtake_themselves() -> None:
    held = sharper = 0
    for seed in range(600):
        rng = np.random.default_rng(seed)
        stages, replicas, base = int(rng.integers(2, 7)), int(rng.integers(1, 4)), int(rng.integers(1, 30)) * 100
        token = int(rng.integers(0, 100))
        settings = replace(SMALL, max_num_seqs=32, max_num_batched_tokens=128, async_scheduling=False)
        law = linear_law(settings, base, token)
        gap = int(rng.choice([1, 20, 200])) * base * stages // replicas
        trace = make_trace(
            name="random",
            arrival_ns=np.cumsum(rng.exponential(gap, 90).astype(np.int64)),
            prompt=rng.choice([1, 40, 100], 90),
            output=rng.choice([2, 30, 90], 90),
        )
        blocks = int(rng.integers(12, 80))
        run = Case(settings=settings, blocks=blocks, laws=(law,) * stages, trace=trace, replicas=replicas).run(
            log=False
        )
        reached = float((run.finish_ns - run.arrival_ns).mean()) / NS_PER_S
        floors, some = [StageFloor.of(law)] * stages, np.array([replicas])
        alone = isolated(settings, floors, trace)
        filling = fewest_to_fill(settings, blocks, trace)
        caps = np.array([shared_ns(trace, filling, replicas, dealt=True)])
        given = settings, sized(base * stages, token * stages), floors[0], stages, trace, alone, some
        bound = float(Crowding.of(Crowd.of(*given), caps).mean_s(some)[0])
        assert bound <= reached, (seed, bound, reached)
        held += run.preemptions > 0
        overtaken = isolated(settings, floors, trace, overtaking=True)
        sharper += caps[0] < np.inf and bound > float(sum(overtaken).mean()) / NS_PER_S
    assert held > 100
    assert sharper > 50


def test_what_requests_wait_for_the_last_of_them_is_the_least_of_all_that_may_be_there_at_once() -> None:
    rng = np.random.default_rng(7)
    for _ in range(60):
        trace = arriving(int(rng.integers(1000)), requests=int(rng.integers(1, 30)))
        arrival, count, apart = trace.arrival_ns.tolist(), int(rng.integers(1, 12)), int(rng.integers(1, 6))
        waited = [
            sum(own[last] - arrived for arrived in own[last - count + 1 : last + 1])
            for own in (arrival[replica::apart] for replica in range(apart))
            for last in range(count - 1, len(own))
        ]
        assert least_waited_ns(trace, count, apart) == min(waited, default=np.inf)
        each = least_waited_ns(trace, count, apart) / max(len(arrival[replica::apart]) for replica in range(apart))
        assert shared_ns(trace, count, apart, dealt=True) == each


def test_a_request_counts_for_no_more_than_its_part_of_what_those_wait_that_fill_the_memory() -> None:
    settings = replace(SMALL, max_num_seqs=64, max_num_batched_tokens=64, async_scheduling=False)
    trace, replicas = stream(400, 12_000, 64), np.array([1, 2])
    floor = StageFloor.of(linear_law(settings, 1000, 100))
    given = settings, sized(1000, 100), floor, 1, trace, isolated(settings, [floor], trace), replicas
    free, whole = Crowding.of(Crowd.of(*given)), Crowding.of(Crowd.of(*given), np.array([np.inf, np.inf]))
    assert whole.mean_s(replicas) == pytest.approx(free.mean_s(replicas), rel=1e-8)
    cap = float(free.mean_s(replicas)[0]) * NS_PER_S / 3
    capped = Crowding.of(Crowd.of(*given), np.array([cap, np.inf])).mean_s(replicas)
    assert capped[0] <= cap / NS_PER_S < free.mean_s(replicas)[0]
    assert capped[1] == whole.mean_s(replicas)[1]


def stream(requests: int, gap_ns: int, output: int) -> Trace:
    return make_trace(
        name="stream",
        arrival_ns=np.arange(requests) * gap_ns,
        prompt=np.ones(requests, np.int64),
        output=np.full(requests, output),
    )


def sized(base_ns: float, token_ns: float) -> Batches:
    """Batches of a linear law, by the sizes that are told apart."""
    times = base_ns + token_ns * SIZES.astype(np.float64)
    return Batches(decode_ns=times, mixed_ns=times + base_ns)


def test_a_long_stream_is_bounded_by_batches_that_are_just_large_enough_to_keep_up() -> None:
    base, token, output, gap = 1000, 100, 64, 11_000
    settings = replace(SMALL, max_num_seqs=64, max_num_batched_tokens=64, async_scheduling=False)
    law = linear_law(settings, base, token)
    trace = stream(4000, gap, output)
    floor = StageFloor.of(law)
    alone = isolated(settings, [floor], trace)
    crowding = Crowding.of(Crowd.of(settings, sized(base, token), floor, 1, trace, alone, np.array([1, 2])))
    # Batches of n tokens serve n of them in base + token x n, and so many come: n = base / (gap / output - token).
    size = base / (gap / output - token)
    wanted = output * (base + token * size) / NS_PER_S
    run = Case(settings=settings, blocks=10**6, laws=(law,), trace=trace).run(log=False)
    reached = float((run.finish_ns - run.arrival_ns).mean()) / NS_PER_S
    one, two = crowding.mean_s(np.array([1, 2]))
    assert two < one <= reached
    assert one == pytest.approx(wanted, rel=0.03)
    assert one == pytest.approx(reached, rel=0.03)
    assert one > 2 * float(sum(alone).mean()) / NS_PER_S


@pytest.mark.parametrize("replicas", [1, 3, 40])
def test_no_price_makes_a_bound_that_a_run_beats(replicas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base, token, output = 1000, 100, 64
    settings = replace(SMALL, max_num_seqs=64, max_num_batched_tokens=64, async_scheduling=False)
    law = linear_law(settings, base, token)
    trace = stream(600, 12_000 // replicas, output)
    floor = StageFloor.of(law)
    alone = isolated(settings, [floor], trace)
    run = Case(settings=settings, blocks=10**6, laws=(law,), trace=trace, replicas=replicas).run(log=False)
    reached = float((run.finish_ns - run.arrival_ns).mean()) / NS_PER_S
    for price in PRICES:
        monkeypatch.setattr("apex_opt.search.bounds.crowding.PRICES", np.array([price]))
        crowding = Crowding.of(Crowd.of(settings, sized(base, token), floor, 1, trace, alone, np.array([replicas])))
        assert crowding.mean_s(np.array([replicas])) <= reached


def test_least_times_by_size_lie_below_every_batch_of_that_size_or_more_and_grow_with_it() -> None:
    for name, text in (("experts", "tp2"), ("gated delta", "pp2 tp2"), ("dense first", "pp4"), ("windows", "tp4")):
        problem = make_problem(MODELS[name], make_cluster(4), arriving(0))
        scorer = Scorer(problem)
        plan = parse_plan(text, problem.model)
        facts = scorer.facts()
        batches = Batches.of(facts.least_cost(plan), plan.stages, count=1, in_step=False)
        laws = facts.plan_cost(plan).laws
        decode, mixed = (sum(getattr(law, table) for law in laws) for table in ("decode_ns", "mixed_ns"))
        for size, alone, beside in zip(SIZES, batches.decode_ns, batches.mixed_ns, strict=True):
            assert alone == np.inf if size >= len(decode) else alone <= decode[size:].min()
            assert beside == np.inf if size >= len(mixed) else beside <= mixed[max(size, 2) :].min()
        assert batches.decode_ns[0] > 0.9 * decode[1]
        assert batches.decode_ns[7] > 0.9 * decode[8]
        assert (np.diff(batches.decode_ns[np.isfinite(batches.decode_ns)]) >= 0).all()


def test_a_rank_that_only_decodes_may_be_beside_one_with_a_prompt() -> None:
    sizes = len(SIZES)
    own = Least(decode_by=np.full(sizes, 1.0), mixed_by=np.full(sizes, 3.0))
    own.decode_by[5:] = np.inf
    assert own.of_a_rank(4).mixed_by.tolist() == [1.0] * 5 + [3.0] * (sizes - 5)


def test_nothing_is_said_of_arrivals_that_depend_on_the_run_nor_of_other_figures() -> None:
    trace = arriving(1)
    for some in (
        make_problem(MODELS["experts"], make_cluster(2), trace, objective="e2e_p95"),
        make_problem(
            MODELS["experts"],
            make_cluster(2),
            make_trace(
                name="closed", arrival_ns=0 * trace.prompt, prompt=trace.prompt, output=trace.output, concurrency=4
            ),
        ),
    ):
        scorer = Scorer(some)
        for plan in feasible_plans(some)[:4]:
            facts = scorer.facts()
            (alike,) = facts.alike(plan.times(1), (plan.replicas,))
            assert "mean" not in facts.floors(alike).least.get("whole", {})
            assert bounded(scorer, plan)[0][0] <= simulated(scorer, plan).value
