"""What overlap could give at best: resources that add up to the run, and a bound that no run is below."""

from __future__ import annotations

import numpy as np
import pytest
from plan_cases import dense, feasible_plans, make_cluster, make_model, make_problem, random_problem, random_trace

from apex_opt.cost.head_room import HeadRoom
from apex_opt.plans.deployment import Deployment
from apex_opt.search import Scorer

MODEL = make_model((dense(hidden=1024, columns=4096), 6))


def test_the_busiest_resource_and_the_host_are_what_is_left() -> None:
    one = HeadRoom(kind="answers", batches=3, batch_s=10, compute_s=2, memory_s=5, network_s=3, host_s=1)
    assert one.least_s == 6 and one.gain == pytest.approx(0.4)


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 100), marks=pytest.mark.nightly)])
def test_the_time_of_all_batches_is_that_of_the_run_and_none_is_shorter_than_its_resources(seeds: range) -> None:
    kinds = set()
    for seed in seeds:
        problem = random_problem(seed)
        scorer, rng = Scorer(problem), np.random.default_rng(seed)
        plans = feasible_plans(problem)
        if not plans:
            continue
        deployment = Deployment.of(plans[rng.integers(len(plans))])
        plan, found = deployment.plan, scorer.overlap(deployment)[0]
        spent = dict(scorer.simulate(deployment).only.usage.operations_s)
        spent.pop("idle")
        assert sum(one.batches * one.batch_s for one in found) / plan.replicas == pytest.approx(sum(spent.values()))
        host = sum(one.batches * one.host_s for one in found) / plan.replicas
        network = sum(one.batches * one.network_s for one in found) / plan.replicas
        assert host == pytest.approx(spent["engine"])
        assert network == pytest.approx(spent.get("communication", 0.0), abs=1e-9)
        for one in found:
            kinds.add(one.kind)
            # Each operation asks of the resource that bounds it all of its time, and of no other one more.
            assert one.least_s <= one.batch_s + 1e-12
            assert one.compute_s + one.memory_s + one.network_s + one.host_s >= one.batch_s - 1e-12
    assert kinds == {"answers", "prompts"}


def test_prompts_ask_for_arithmetic_and_answers_for_memory() -> None:
    problem = make_problem(MODEL, make_cluster(1), random_trace(1))
    answers, prompts = Scorer(problem).overlap(Deployment.of(feasible_plans(problem)[0]))[0]
    assert answers.memory_s > 3 * answers.compute_s > 0 and answers.network_s == prompts.network_s == 0
    assert prompts.compute_s / prompts.memory_s > 3 * answers.compute_s / answers.memory_s
