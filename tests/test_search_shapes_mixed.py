"""A pool on each of several types of GPU: when they beat one type, what limits them, and what they are dealt."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from plan_cases import SMALL, beside, dense, make_cluster, make_model, make_problem
from search_cases import GPUS, SPACE, deployments, every, pools_of, rank

from apex_opt.engines.schedulers import SCHEDULINGS
from apex_opt.figures import load_objective
from apex_opt.search import Scorer, search
from apex_opt.search.best_first import ROUND
from apex_opt.search.incumbent import Best
from apex_opt.search.option import options_of
from apex_opt.search.search import silent
from apex_opt.search.shapes import Single, mixed
from apex_opt.workload import make_trace

if TYPE_CHECKING:
    from apex_opt.search import Problem


def busy(**changes: Any) -> Problem:
    """Two GPUs each of two types that are busy with their requests."""
    rng = np.random.default_rng(5)
    trace = make_trace(
        name="test",
        arrival_ns=np.cumsum(rng.exponential(2e6, 60)).astype(np.int64),
        prompt=rng.integers(1, 700, 60),
        output=rng.integers(2, 40, 60),
    )
    fields = {"trace": trace} | changes
    one = make_problem(make_model((dense(hidden=1024, columns=4096), 6)), make_cluster(2, name="quick"), **fields)
    return beside(one, make_cluster(2, **GPUS["slow"] | {"name": "slow", "idle_w": 60.0}))


def test_busy_pools_side_by_side_beat_the_best_plan_of_one_type() -> None:
    answer = search(busy(), SPACE)
    assert answer.best is not None
    assert len(answer.best.pools) == 2
    assert all(alone is not None and answer.best.value < alone.value for alone in answer.alone)


def test_gpus_in_all_bind_the_deployment_and_not_its_pools() -> None:
    for most in (1, 2, 3):
        problem = replace(busy(), max_devices=most)
        answer = search(problem, SPACE, top=20)
        assert answer.ledger.optimal
        assert {one.devices for one in answer.candidates} <= set(range(1, most + 1))
        (part,) = answer.ledger.of("mixed")
        assert (part.simulated == 0) == (most == 1)


def test_deployments_over_three_types_are_searched_in_every_choice_of_them() -> None:
    problem = beside(busy(), make_cluster(1, **GPUS["frugal"] | {"name": "frugal", "memory_bytes_per_s": 3e12}))
    answer = search(problem, SPACE, top=3)
    assert [part.types for part in answer.ledger.parts] == [
        *(("quick",), ("slow",), ("frugal",)),
        *(("quick", "slow"), ("quick", "frugal"), ("slow", "frugal")),
        ("quick", "slow", "frugal"),
    ]
    good = sorted(every(problem), key=lambda one: rank(problem, one))
    assert [one.text for one in answer.candidates[:3]] == [one.text for one in good[:3]]
    assert len(good[0].pools) == 3


@pytest.mark.parametrize("policy", ["vllm", "orca", "static", "trtllm"])
def test_the_best_is_found_where_prompts_share_what_they_say_and_batches_are_formed_otherwise(policy: str) -> None:
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
    settings = replace(
        SMALL, scheduler=SCHEDULINGS[policy](), prefix_caching=policy in ("vllm", "trtllm"), max_model_len=256
    )
    problem = busy(trace=trace, settings=settings, objective="e2e_p90")
    good = sorted(every(problem), key=lambda one: rank(problem, one))
    answer = search(problem, SPACE, top=4)
    assert [one.text for one in answer.candidates[:4]] == [one.text for one in good[:4]]
    assert any(len(one.pools) == 2 for one in good[:4])


def test_a_closed_loop_keeps_a_client_in_each_pool_and_drops_what_has_none() -> None:
    rng = np.random.default_rng(3)
    fields = {"arrival_ns": [0] * 20, "prompt": rng.integers(1, 400, 20), "output": rng.integers(2, 30, 20)}
    for clients, both in ((1, False), (2, True), (7, True)):
        trace = make_trace(name="test", **fields, concurrency=clients)
        answer = search(busy(trace=trace, objective="makespan"), SPACE, top=100)
        assert bool([one for one in answer.candidates if len(one.pools) == 2]) == both
        (part,) = answer.ledger.of("mixed")
        assert (part.infeasible["share"] > 0) >= (not both)
        assert answer.ledger.optimal


def test_requests_without_later_tokens_and_goals_on_them_are_no_obstacle() -> None:
    trace = make_trace(name="one token", arrival_ns=[0] * 8, prompt=[100] * 8, output=[1] * 8)
    answer = search(busy(trace=trace, slo="tpot_p95<=1ms,itl_p99<=1ms", objective="ttft_mean"), SPACE)
    assert answer.best is not None
    assert answer.ledger.optimal


def test_a_time_limit_leaves_deployments_and_their_gap() -> None:
    problem = busy(objective="e2e_p95")
    exact, answer = search(problem, SPACE), search(problem, SPACE, time_limit_s=1e-6)
    assert answer.best is not None
    assert exact.best is not None
    assert (answer.status, answer.ledger.optimal) == ("feasible", False)
    assert answer.ledger.gap is not None
    assert answer.best.value * (1 - answer.ledger.gap) <= exact.best.value <= answer.best.value
    assert answer.ledger.waiting > 0


def test_fleets_are_left_unseen_where_the_time_is_up_before_layers_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = busy(objective="e2e_p95")
    whole = search(problem, SPACE)
    monkeypatch.setattr("apex_opt.search.space.MOVED", 1)
    answer = search(problem, SPACE, time_limit_s=0.0)
    assert answer.best is not None
    assert whole.best is not None and answer.best.value >= whole.best.value
    (fleets,) = answer.ledger.of("mixed")
    assert (answer.status, answer.ledger.gap, fleets.complete) == ("feasible", None, False)
    assert fleets.waiting > 0
    assert fleets.space == sum(fleets.infeasible.values()) + fleets.waiting
    assert search(problem, SPACE, time_limit_s=1e6).best == whole.best


def test_scouts_are_the_best_of_each_type_side_by_side_within_the_gpus_there_are() -> None:
    problem = replace(busy(), max_devices=3)
    scorer = Scorer(problem)
    singles = [Single(scorer.facts(name), SPACE, name, silent) for name in problem.types]
    options = [
        options_of(single.facts, pools, silent) for single, pools in zip(singles, pools_of(problem), strict=True)
    ]
    shape = mixed(problem, singles, options, Best(problem, 1).admits, silent)
    alone = [search(problem.alone(place), SPACE, top=6).candidates for place in range(2)]
    found = shape.scouts(alone)
    texts = {tuple(str(pool.plan) for pool in deployment.pools) for deployment, _ in found}
    pairs = list(product(*(good[:ROUND] for good in alone)))
    small = [pair for pair in pairs if sum(one.devices for one in pair) <= 3]
    assert texts == {tuple(str(one.plan) for one in pair) for pair in small}
    assert 0 < len(small) < len(pairs) < len(alone[0]) * len(alone[1])
    for deployment, bound in found:
        assert deployment.devices <= 3
        assert bound <= problem.costs(scorer.simulate(deployment).metrics)
    single = [one for one in search(problem.alone(1), SPACE, top=9).candidates if one.devices == 1]
    heaviest = shape.scouts([[], single])
    assert max(options[0], key=lambda option: option.weight).pool in {one.pools[0] for one, _ in heaviest}


def test_what_is_dealt_to_no_pool_is_no_deployment() -> None:
    # Two requests and three pools: one is left without.
    trace = make_trace(name="two", arrival_ns=[0, 1], prompt=[100, 100], output=[2, 2])
    problem = beside(busy(trace=trace), make_cluster(1, **GPUS["frugal"] | {"name": "frugal"}))
    answer = search(replace(problem, objective=load_objective("e2e_mean")), SPACE)
    part = answer.ledger.parts[-1]
    assert len(part.types) == 3
    assert part.simulated == 0
    assert all(len(one.pools) < 3 for one in deployments(problem))
