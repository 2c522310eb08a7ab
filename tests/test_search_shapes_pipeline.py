"""Pipelines over two types of GPU: which there are, their layers, costs as those of one type where both are alike."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from plan_cases import beside, dense, make_cluster, make_model, make_problem, random_trace, simulated

from apex_opt.cost import account
from apex_opt.plans.deployment import Deployment
from apex_opt.plans.plan import parse_plan
from apex_opt.search import Scorer, search
from apex_opt.search.facts import judged
from apex_opt.search.search import silent
from apex_opt.search.shapes.pipeline import MOST_JOINT, Pipelines, Splits, faults, joined, pipelines
from apex_opt.units import GIB
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from apex_opt.plans.plan import Plan
    from apex_opt.search import Problem
    from apex_opt.search.facts import Facts

MODEL = make_model((dense(), 8))
SLOW = {"name": "slow", "memory_bytes_per_s": 1.2e12, "flops_per_s": (("bf16", 200e12), ("fp16", 200e12))}
LINK = make_cluster(1, 2).inter


def pair(fast: int, slow: int, objective: str = "e2e_mean", model: Any = MODEL, **changes: Any) -> Problem:
    """So many GPUs of a fast type in one node and of a slow one in another."""
    one = make_problem(model, make_cluster(fast), random_trace(5, 12), objective=objective)
    return beside(one, make_cluster(slow, **SLOW), between=LINK, **changes)


def both(problem: Problem) -> Problem:
    found = joined(problem, 0, 1)
    assert found is not None
    return found


def listed(problem: Problem) -> list[Plan]:
    """Every pipeline over both, with even stages."""
    return [cut.times(count) for cut, counts in pipelines(both(problem)) for count in counts]


def facts_of(problem: Problem) -> Facts:
    return Scorer(problem).facts(*problem.types)


def every(problem: Problem) -> list[Plan]:
    """All pipelines that fit, with their layers."""
    splits = Splits(facts_of(problem), PlanSpace())
    return [plan for plan in map(splits, listed(problem)) if plan is not None]


def test_stages_on_two_types_that_are_alike_cost_what_they_do_on_two_nodes_of_one() -> None:
    trace = random_trace(5, 12)
    one = make_problem(MODEL, make_cluster(4), trace)
    joint = Scorer(beside(one, make_cluster(4, name="twin"), between=LINK))
    plain = Scorer(make_problem(MODEL, make_cluster(4, 2), trace))
    text = "pp2 attn(tp4) ffn(tp4) bf16"
    apart, together = parse_plan(f"{text} on=test-gpu:1+twin:1", MODEL), parse_plan(text, MODEL)
    found, same = simulated(joint, apart), simulated(plain, together)
    assert found.metrics == same.metrics
    assert found.only.usage == same.only.usage
    assert found.only.memory == same.only.memory
    costs = joint.facts("test-gpu", "twin").costs, plain.facts().costs
    for mine, its in zip(costs[0].plan_cost(apart).laws, costs[1].plan_cost(together).laws, strict=True):
        assert np.array_equal(mine.decode_ns, its.decode_ns)
        assert np.array_equal(mine.transfer_ns, its.transfer_ns)


@pytest.mark.parametrize("most", [5, 3])
def test_every_pipeline_keeps_to_the_gpus_of_each_type_and_in_all_and_none_comes_twice(most: int) -> None:
    found = listed(pair(3, 2, max_devices=most))
    assert len(set(found)) == len(found)
    for plan in found:
        taken = {name: plan.replicas * stages * plan.stage_devices for name, stages in plan.on}
        assert taken["test-gpu"] <= 3
        assert taken["slow"] <= 2
        assert len(taken) == 2
    assert {tuple(name for name, _ in plan.on) for plan in found} == {("test-gpu", "slow"), ("slow", "test-gpu")}
    assert max(plan.devices for plan in found) == most
    assert any(plan.replicas > 1 for plan in found) == (most == 5)


def test_stages_on_slower_gpus_get_fewer_layers() -> None:
    deep = make_model((dense(hidden=4096, heads=32, kv=8, columns=14336, width=128), 16), vocab=512)
    found = every(pair(1, 1, model=deep))
    assert found
    for plan in found:
        layers = dict(zip((name for name, _ in plan.on), plan.layers, strict=True))
        assert layers["slow"] < layers["test-gpu"]


@pytest.mark.parametrize("objective", ["e2e_mean", "ttft_p95", "throughput", "energy", "cost_per_mtoken"])
def test_no_pipeline_is_better_than_its_bound_before_its_layers_are_split(objective: str) -> None:
    problem = pair(2, 2, objective)
    shape, scorer = Pipelines(facts_of(problem), PlanSpace(), silent), Scorer(problem)
    seen = 0
    for branch in shape.branches():
        for place, bound in enumerate(branch.bounds):
            leaf = branch.child(place).decided()
            assert leaf is not None
            assert bound <= leaf.bound <= problem.costs(scorer.simulate(leaf.deployment).metrics)
            seen += 1
    assert seen == shape.part.space == len(every(problem))


def test_a_plan_that_is_given_is_bounded_as_its_split_is() -> None:
    problem = pair(2, 2)
    facts, scorer = facts_of(problem), Scorer(problem)
    for plan in every(problem):
        (alike,) = facts.alike(plan.times(1), (plan.replicas,))
        bounds, possible = judged(facts.floors(alike), problem.objectives, ())
        assert (tuple(bounds[0]), bool(possible[0])) == scorer.bounds(Deployment.of(plan))


def test_a_model_too_large_for_either_type_is_served_by_both() -> None:
    large = make_model((dense(hidden=8192, heads=64, kv=8, columns=28672, width=128), 40))
    small = {"memory_bytes": 40 * GIB}
    one = make_problem(large, make_cluster(1, **small), random_trace(5, 4))
    problem = beside(one, make_cluster(1, **SLOW, **small), between=LINK)
    answer = search(problem, PlanSpace())
    assert answer.best is not None
    assert answer.alone == (None, None)
    assert [name for name, _ in answer.best.plan.on] in (["test-gpu", "slow"], ["slow", "test-gpu"])
    apart = search(replace(problem, between=None), PlanSpace())
    assert (apart.best, apart.status) == (None, "infeasible")
    assert apart.reason is not None
    assert "test-gpu alone: " in apart.reason
    assert "slow alone: " in apart.reason


def test_idle_draw_and_price_are_those_of_each_type() -> None:
    problem = beside(
        make_problem(MODEL, make_cluster(1), random_trace(5, 12)),
        make_cluster(2, **SLOW, idle_w=60.0, price_per_h=1.0),
        between=LINK,
    )
    scorer = Scorer(problem)
    plan = parse_plan("pp3[3,3,2] bf16 on=test-gpu:1+slow:2", MODEL)
    outcome, cost = scorer.logged(Deployment.of(plan))
    facts = scorer.facts(*problem.types)
    usage = account(plan, cost, facts.costs, outcome.counts, outcome.makespan_ns)
    seconds = (outcome.makespan_ns + cost.request_ns) / 1e9
    assert usage.idle_energy_j == pytest.approx(seconds * (125.0 + 2 * 60.0))
    assert facts.cost_per_h(plan) == pytest.approx(2.5 + 2 * 1.0)
    assert simulated(scorer, plan).metrics.value("cost") == pytest.approx(4.5)


def test_types_without_a_common_format_or_link_or_with_too_many_gpus_make_no_pipelines() -> None:
    problem = pair(4, 4)
    first, second = problem.offers
    assert joined(problem, 0, 1) is not None
    other = replace(second, weight_formats=("fp8",))
    assert joined(replace(problem, offers=(first, other)), 0, 1) is None
    assert joined(replace(problem, between=None), 0, 1) is None
    many = replace(second, cluster=make_cluster(MOST_JOINT, **SLOW))
    assert joined(replace(problem, offers=(first, many)), 0, 1) is None


def test_only_formats_that_both_types_offer_are_paired_and_only_the_highest_clock_is_taken() -> None:
    first, second = pair(1, 1).offers
    first = replace(first, weight_formats=("bf16", "fp8", "fp8"), kv_formats=("bf16", "bf16", "fp8"), clocks=(900,))
    second = replace(second, weight_formats=("fp8", "bf16"), kv_formats=("fp8", "fp8"))
    found = both(replace(pair(1, 1), offers=(first, second)))
    assert [(offer.weight_formats, offer.kv_formats, offer.clocks) for offer in found.offers] == [
        (("fp8",), ("fp8",), (None,))
    ] * 2


def test_a_pipeline_that_does_not_fit_is_refused_with_the_type_that_lacks_gpus() -> None:
    problem = pair(1, 2)
    plan = parse_plan("dp2 pp2 bf16 on=test-gpu:1+slow:1", MODEL)
    said = [fault.text for fault in faults(facts_of(problem), plan)]
    assert said == ["it takes 2 GPUs of test-gpu, 1 are offered"]


def test_a_pipeline_whose_layers_fit_nowhere_is_counted_as_one_that_memory_rules_out() -> None:
    large = make_model((dense(hidden=8192, heads=64, kv=8, columns=28672, width=128), 40))
    one = make_problem(large, make_cluster(1, memory_bytes=20 * GIB), random_trace(5, 4))
    problem = beside(one, make_cluster(1, **SLOW, memory_bytes=20 * GIB), between=LINK)
    answer = search(problem, PlanSpace())
    (part,) = answer.ledger.of("pipeline")
    assert (part.space, part.infeasible) == (2, {"memory": 2})
    assert answer.reason is not None
    assert answer.reason.endswith("pipelines over two types: none fits the memory")
