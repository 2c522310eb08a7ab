"""Pipelines over two types of GPU: costs as those of one type where both are alike, bounds, and the search."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from plan_cases import dense, make_cluster, make_model, make_question, random_trace

from apex_opt.cost import account
from apex_opt.plan.plan import even_split, parse_plan
from apex_opt.search import Evaluator
from apex_opt.search.joint import MOST_JOINT, Splits, joined, pipelines, search_joint
from apex_opt.search.search import silent
from apex_opt.units import GIB
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from apex_opt.plan.plan import Plan
    from apex_opt.search import Question

MODEL = make_model((dense(), 8))
SLOW = {"name": "slow", "memory_bytes_per_s": 1.2e12, "flops_per_s": (("bf16", 200e12), ("fp16", 200e12))}
FREE = float("inf")


def pair(fast: int, slow: int, objective: str = "e2e_mean", model: Any = MODEL, **changes: Any) -> Question:
    """So many GPUs of a fast type in one node and of a slow one in another."""
    trace = random_trace(5, 12)
    one, other = (
        make_question(model, make_cluster(gpus, **figures), trace, objective=objective, **changes)
        for gpus, figures in ((fast, {}), (slow, SLOW))
    )
    between = make_cluster(1, 2).inter
    assert between is not None
    found = joined(one, other, between)
    assert found is not None
    return found


def test_stages_on_two_types_that_are_alike_cost_what_they_do_on_two_nodes_of_one() -> None:
    trace = random_trace(5, 12)
    ours, twins, whole = (
        make_question(MODEL, make_cluster(4, nodes, name=name), trace)
        for nodes, name in ((1, "test-gpu"), (1, "twin"), (2, "test-gpu"))
    )
    between = make_cluster(1, 2).inter
    assert between is not None
    question = joined(ours, twins, between)
    assert question is not None
    joint, plain = Evaluator(question), Evaluator(whole)
    text = "pp2 attn(tp4) ffn(tp4) bf16"
    apart, together = parse_plan(f"{text} on=test-gpu:1+twin:1", MODEL), parse_plan(text, MODEL)
    found, same = joint.simulate(apart), plain.simulate(together)
    assert found.metrics == same.metrics
    assert found.usage == same.usage
    assert found.memory == same.memory
    for mine, its in zip(joint.costs.plan_cost(apart).laws, plain.costs.plan_cost(together).laws, strict=True):
        assert np.array_equal(mine.decode_ns, its.decode_ns)
        assert np.array_equal(mine.transfer_ns, its.transfer_ns)


def test_every_pipeline_keeps_to_the_gpus_of_each_type_and_none_comes_twice() -> None:
    question = pair(3, 2)
    found = list(pipelines(question))
    assert len(set(found)) == len(found)
    for plan in found:
        taken = {name: plan.replicas * stages * plan.stage_devices for name, stages in plan.on}
        assert taken["test-gpu"] <= 3
        assert taken["slow"] <= 2
        assert len(taken) == 2
    orders = {tuple(name for name, _ in plan.on) for plan in found}
    assert orders == {("test-gpu", "slow"), ("slow", "test-gpu")}
    assert max(plan.devices for plan in found) == 5
    assert max(plan.devices for plan in pipelines(question, 3)) == 3


def every(question: Question) -> list[Plan]:
    """All pipelines that fit, with their layers."""
    splits = Splits(Evaluator(question), PlanSpace())
    return [plan for plan in map(splits, pipelines(question)) if plan is not None]


def test_stages_on_slower_gpus_get_fewer_layers() -> None:
    deep = make_model((dense(hidden=4096, heads=32, kv=8, columns=14336, width=128), 16), vocab=512)
    question = pair(1, 1, model=deep)
    splits = Splits(Evaluator(question), PlanSpace())
    for plan in pipelines(question):
        found = splits(plan)
        assert found is not None
        layers = dict(zip((name for name, _ in found.on), found.layers, strict=True))
        assert layers["slow"] < layers["test-gpu"]


@pytest.mark.parametrize("objective", ["e2e_mean", "ttft_p95", "throughput", "energy", "cost_per_mtoken"])
def test_no_pipeline_is_better_than_its_bound_and_the_search_finds_the_best(objective: str) -> None:
    question = pair(2, 2, objective)
    evaluator = Evaluator(question)
    scored = []
    for plan in every(question):
        even = replace(plan, layers=even_split(MODEL.layers, plan.stages))
        bounds, possible = evaluator.bounds(even, question.objectives, movable=True)
        candidate = evaluator.simulate(plan)
        assert possible
        assert bounds <= question.costs(candidate.metrics)
        scored.append(question.costs(candidate.metrics))
    found = search_joint(question, PlanSpace(), silent, 1, FREE, (FREE,))
    assert min(question.costs(c.metrics) for c in found.done) == min(scored)
    proof = found.certificate(question, min(scored))
    assert proof.optimal
    assert proof.space == found.infeasible + proof.bounded + proof.simulated
    none = search_joint(question, PlanSpace(), silent, 1, FREE, (-FREE,))
    assert none.certificate(question, (-FREE,)).bounded == found.space


def test_a_model_too_large_for_either_type_is_served_by_both() -> None:
    large = make_model((dense(hidden=8192, heads=64, kv=8, columns=28672, width=128), 40))
    small = {"memory_bytes": 40 * GIB}
    one, other = (
        make_question(large, make_cluster(1, **figures, **small), random_trace(5, 4)) for figures in ({}, SLOW)
    )
    assert not PlanSpace().enumerate(one.instance()).plans
    assert not PlanSpace().enumerate(other.instance()).plans
    between = make_cluster(1, 2).inter
    assert between is not None
    question = joined(one, other, between)
    assert question is not None
    found = search_joint(question, PlanSpace(), silent, 1, FREE, (FREE,))
    assert found.done


def test_idle_draw_and_price_are_those_of_each_type() -> None:
    question = pair(1, 2)
    evaluator = Evaluator(question)
    plan = parse_plan("pp3[3,3,2] bf16 on=test-gpu:1+slow:2", MODEL)
    cost = evaluator.costs.plan_cost(plan)
    outcome, _ = evaluator.batches(plan)
    usage = account(plan, cost, evaluator.costs, outcome.counts, outcome.makespan_ns)
    assert usage.idle_energy_j == pytest.approx((outcome.makespan_ns + cost.request_ns) / 1e9 * 3 * 125.0)
    assert question.cost_per_h(plan) == pytest.approx(3 * 2.5)


def test_types_without_a_common_format_or_with_too_many_gpus_make_no_pipelines() -> None:
    one, other = (make_question(MODEL, make_cluster(4, name=name), random_trace(5, 4)) for name in ("a", "b"))
    between = make_cluster(1, 2).inter
    assert between is not None
    assert joined(one, replace(other, weight_formats=("fp8",)), between) is None
    many = replace(other, cluster=make_cluster(MOST_JOINT))
    assert joined(one, many, between) is None
