"""Deployments are scored exactly: pools on their own share of the requests, and none ends early unproved."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from plan_cases import OVERHEAD, beside, dense, make_cluster, make_model, make_problem, random_trace
from search_cases import GPUS, ROWS, every_of, pools_of, problem_of

from apex_opt.figures import load_objective
from apex_opt.figures.registry import names
from apex_opt.ir import load_model
from apex_opt.plans.deployment import Deployment
from apex_opt.plans.memory import kv_blocks, stage_memory
from apex_opt.plans.plan import parse_plan
from apex_opt.search import Scorer, judge
from apex_opt.search.dealing import dealt, tokens_per_s
from apex_opt.search.facts import Facts
from apex_opt.simulator import simulate
from apex_opt.workload import make_trace


def test_a_deployment_is_what_its_pools_do_on_their_own_share_of_the_requests() -> None:
    one = make_problem(
        make_model((dense(hidden=1024, columns=4096), 6)),
        make_cluster(2, name="quick"),
        random_trace(5, 60),
        "e2e_p95<=10s,itl_p99<=1s",
        objective="energy",
    )
    problem = beside(one, make_cluster(2, **GPUS["slow"] | {"name": "slow", "idle_w": 60.0}))
    pools = next(row for row in product(*pools_of(problem)) if sum(pool.plan.devices for pool in row) == 3)
    scorer, trace = Scorer(problem), problem.trace
    found = scorer.simulate(Deployment(pools=pools))
    weights, runs, joules = [], [], 0.0
    for pool, offer in zip(pools, problem.offers, strict=True):
        facts, plan = Facts(problem.alone(problem.types.index(offer.name))), pool.plan
        memory = stage_memory(problem.model, offer.cluster.gpu, plan, problem.settings_for(plan))
        blocks = kv_blocks(memory) * plan.attention.dp
        laws = facts.plan_cost(plan).laws
        weights.append(tokens_per_s(problem.settings_for(plan), blocks, laws, trace, plan.replicas))
    owner = dealt(np.array([weights]), len(trace))[0]
    for place, pool in enumerate(pools):
        rows, plan = np.flatnonzero(owner == place), pool.plan
        own = make_trace(
            name="part", arrival_ns=trace.arrival_ns[rows], prompt=trace.prompt[rows], output=trace.output[rows]
        )
        alone = Scorer(replace(problem.alone(place), trace=own))
        facts = alone.facts()
        laws, blocks = facts.plan_cost(plan).laws, facts.blocks(plan)
        run = simulate(problem.settings_for(plan), blocks, laws, own, replicas=plan.replicas, gaps=True)
        runs.append((rows, run))
        # Energy above the idle draw is that of the pool's own run; idle are its GPUs for as long as all of it runs.
        usage = alone.simulate(Deployment.of(plan)).only.usage
        joules += usage.energy_j - usage.idle_energy_j
    arrival, finish = (np.empty(len(trace), np.int64) for _ in range(2))
    for rows, run in runs:
        arrival[rows], finish[rows] = run.arrival_ns, run.finish_ns
    makespan_s = (finish.max() - arrival.min()) / 1e9 + OVERHEAD.request_s
    gpus = [offer.cluster.gpu for offer in problem.offers]
    idle_w = sum(gpu.idle_w * pool.plan.devices for gpu, pool in zip(gpus, pools, strict=True))
    assert found.metrics.value("makespan") == pytest.approx(makespan_s, rel=1e-12)
    assert found.metrics.value("energy") == pytest.approx(joules + idle_w * makespan_s, rel=1e-9)
    e2e = found.metrics.latency_s["e2e"]["mean"]
    assert e2e == pytest.approx((finish - arrival).mean() / 1e9 + OVERHEAD.request_s, rel=1e-9)
    prices = [(gpu.price_per_h or 0.0) * pool.plan.devices for gpu, pool in zip(gpus, pools, strict=True)]
    assert found.metrics.value("cost") == sum(prices)
    assert [use.requests for use in found.pools] == [len(rows) for rows, _ in runs]
    assert sum(use.batches for use in found.pools) == sum(run.batches for _, run in runs)
    whole = scorer.run(Deployment(pools=pools))
    assert whole is not None
    assert (whole.preemptions, whole.batches) == tuple(
        sum(getattr(run, of) for _, run in runs) for of in ("preemptions", "batches")
    )
    assert (whole.finish_ns.tolist(), whole.arrival_ns.tolist()) == (finish.tolist(), arrival.tolist())
    later = trace.generated(problem.settings.max_model_len) - 1
    apart: dict[int, list[int]] = {}
    for rows, run in runs:
        assert run.gaps_ns is not None
        every = np.split(run.gaps_ns, np.cumsum(later[rows])[:-1])
        apart |= {int(row): gaps.tolist() for row, gaps in zip(rows, every, strict=True)}
    assert whole.gaps_ns is not None
    assert whole.gaps_ns.tolist() == [gap for row in sorted(apart) for gap in apart[row]]
    assert found.metrics.latency_s["itl"]["p99"] == pytest.approx(np.quantile(whole.gaps_ns, 0.99) / 1e9, rel=1e-9)


@pytest.mark.parametrize("place", [*range(len(ROWS))][::3])
def test_a_deployment_that_is_held_against_costs_is_cut_short_only_where_it_is_worse_or_misses_a_goal(
    place: int,
) -> None:
    problem = problem_of(place)
    for name in sorted(set(names()) - {"cost"})[::5]:
        asked = replace(problem, objective=load_objective(name), then=())
        scorer = Scorer(asked)
        for one in every_of(place)[:: max(1, len(every_of(place)) // 8)]:
            whole = scorer.simulate(one.deployment)
            (cost,) = asked.costs(whole.metrics)
            for factor in (0.5, 1.0, 1.5):
                worst = cost * (factor if cost >= 0 else 2 - factor)
                found = scorer.challenge(one.deployment, (-np.inf,), (worst,))
                if found is None:
                    assert cost > worst or not whole.meets_slos, (name, factor)
                else:
                    assert found.metrics == whole.metrics
            free = scorer.challenge(one.deployment, (-np.inf,), scorer.any_cost)
            assert (free is not None) or not whole.meets_slos


def test_faults_of_a_deployment_are_those_of_its_pools_and_of_the_gpus_in_all() -> None:
    model = make_model((dense(), 4))
    problem = beside(make_problem(model, make_cluster(2, name="quick"), random_trace(1, 5)), make_cluster(2, name="b"))
    problem = replace(problem, max_devices=3)
    two = tuple(pools[-1] for pools in ([p for p in some if p.plan.devices == 2] for some in pools_of(problem)))
    found = list(Scorer(problem).faults(Deployment(pools=two)))
    assert [(fault.family, fault.text) for fault in found] == [("devices", "it takes 4 GPUs, 3 are offered")]
    alone = Deployment.of(parse_plan("tp4 bf16", model), "b")
    assert [fault.family for fault in Scorer(problem).faults(alone)] == ["devices"]


def test_facts_of_a_type_are_kept_and_costs_are_shared_with_another_trace() -> None:
    problem = problem_of(next(place for place, row in enumerate(ROWS) if row["shape"] == "two"))
    scorer = Scorer(problem)
    assert scorer.facts("quick") is scorer.facts("quick")
    assert scorer.facts() is scorer.facts("quick")
    other = Scorer(replace(problem, trace=random_trace(3, 9)), like=scorer)
    assert other.facts("slow").costs is scorer.facts("slow").costs
    assert other.facts("slow") is not scorer.facts("slow")


def test_sources_name_what_the_problem_uses_and_no_more() -> None:
    problem = make_problem(load_model("llama-3.1-8b"), "1xh100-sxm", random_trace(1, 5))
    plain = Scorer(problem).facts().provenance([parse_plan("tp1", problem.model)])
    attention = {"attention decode", "attention prefill", "memory", "power", "engine (test)"}
    assert set(plain) == attention | {"gemm bf16"}
    moe = make_problem(load_model("mixtral-8x7b"), "2x8xh100-sxm", random_trace(1, 5))
    plans = [parse_plan(text, moe.model) for text in ("tp16 fp8", "pp2 attn(dp2) ffn(ep2) fp8")]
    near = {"all_reduce/inter", "all_gather/inter"}
    formats = {"gemm bf16", "gemm fp8", "moe fp8"}
    assert set(Scorer(moe).facts().provenance(plans[:1])) == attention | formats | near
    far = {"all_to_all/intra", "point_to_point/intra"}
    assert set(Scorer(moe).facts().provenance(plans)) == attention | formats | near | far
    assert OVERHEAD.source in plain["engine (test)"]


@pytest.mark.parametrize(
    ("loop", "said"), [({"concurrency": 1}, "1 client for 2 pools"), ({}, "gets none of 1 requests")]
)
def test_pools_that_have_nothing_to_do_are_told_before_anything_runs(loop: dict[str, int], said: str) -> None:
    requests = 5 if loop else 1
    trace = make_trace(name="few", arrival_ns=[0] * requests, prompt=[100] * requests, output=[20] * requests, **loop)
    one = make_problem(make_model((dense(hidden=1024, columns=4096), 6)), make_cluster(1, name="quick"), trace)
    problem = beside(one, make_cluster(1, **GPUS["slow"] | {"name": "slow"}))
    pools = next(product(*pools_of(problem)))
    answer = judge(problem, Deployment(pools=pools))
    assert (answer.status, answer.ledger.parts[0].infeasible["share"]) == ("infeasible", 1)
    assert said in str(answer.reason)


def test_what_requests_of_each_priority_saw_adds_up_to_what_all_saw() -> None:
    trace = random_trace(3, 40)
    levels = np.arange(40) % 3 == 0
    told = make_trace(
        name="told",
        arrival_ns=trace.arrival_ns,
        prompt=trace.prompt,
        output=trace.output,
        priority=levels.astype(np.int64),
    )
    model = make_model((dense(), 4))
    problem, plan = make_problem(model, make_cluster(2), told), Deployment.of(parse_plan("dp2", model))
    found = judge(problem, plan).best
    plain = judge(replace(problem, trace=trace), plan).best
    assert found is not None and plain is not None
    assert found.metrics == plain.metrics
    assert plain.priorities == ()
    normal, high = found.priorities
    assert (normal.name, normal.requests, high.name, high.requests) == ("normal", 26, "high", 14)
    mean = sum(one.requests * one.latency_s["e2e"]["mean"] for one in found.priorities) / 40
    assert mean == pytest.approx(found.metrics.latency_s["e2e"]["mean"])
    assert sum(one.preemptions or 0 for one in found.priorities) == sum(use.preemptions for use in found.pools)
