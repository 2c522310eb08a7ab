"""Plans with nano-batches: program, bounds and search against plain Python and against simulating everything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plan_cases import (
    ENGINES,
    SMALL,
    dense,
    feasible_plans,
    make_cluster,
    make_model,
    make_problem,
    random_instance,
    random_trace,
    sparse,
)
from search_cases import SPACE, listed_alike, on_every_figure, rank

import formulations.deployment as programs
from apex_opt.cluster.types import Link
from apex_opt.engines.overlap import NANO
from apex_opt.engines.schedulers import SglangScheduling, VllmScheduling
from apex_opt.engines.vllm import VLLM
from apex_opt.oracle.checks import violations
from apex_opt.plans.deployment import Deployment
from apex_opt.plans.plan import Template
from apex_opt.search import Problem, Scorer, search
from apex_opt.studies.check import check


def check_program(seed: int) -> int:
    """The program lists and counts what plain Python does; how many plans there are."""
    instance = replace(random_instance(seed), overlap=NANO)
    if seed % 4:
        instance = replace(instance, settings=replace(instance.settings, runnable=None))
    if seed % 8 == 3:
        instance = replace(instance, settings=replace(instance.settings, scheduler=SglangScheduling()))
    counted = listed_alike(instance)
    assert all(plan.overlap == NANO for plan in counted.plans)
    return len(counted.plans)


@pytest.mark.parametrize("seeds", [range(16), pytest.param(range(16, 120), marks=pytest.mark.nightly)])
def test_program_and_oracle_agree_on_plans_with_nano_batches(seeds: range) -> None:
    assert sum(map(check_program, seeds)) > 0


def question(seed: int, gpus: int = 4) -> Problem:
    """Busy requests on a few GPUs, between which messages take long now and then."""
    rng, trace = np.random.default_rng(seed), random_trace(seed, 30)
    block = dense(hidden=1024, columns=4096) if seed % 3 else sparse(hidden=1024, columns=1024, experts=4)
    settings = replace(
        SMALL,
        max_num_seqs=int(rng.integers(2, 24)),
        max_num_batched_tokens=int(rng.choice([64, 256, 1024])),
        async_scheduling=bool(rng.random() < 0.7),
        prefix_caching=bool(rng.random() < 0.3),
        block_size=int(rng.choice([1, 16])),
        scheduler=VllmScheduling(idle_sleep_us=int(rng.choice([0, 1000]))),
    )
    slow = Link(bytes_per_s=float(rng.choice([4e9, 30e9, 450e9])), latency_s=1e-6, kind="pcie")
    aims = ["e2e_mean", "tpot_p99", "itl_p99", "ttft_p95", "makespan", "energy", "throughput"]
    return make_problem(
        make_model((block, int(rng.integers(2, 7)))),
        replace(make_cluster(gpus, price_per_h=2.0), intra=slow),
        trace,
        str(rng.choice(["ttft_p95<=40ms", "e2e<=9s@1%", "e2e<=9s@1%"])),
        objective=str(rng.choice(aims)),
        settings=settings,
        overhead=ENGINES[rng.integers(len(ENGINES))],
        overlaps=(None, NANO),
    )


def check_bounds(seed: int) -> int:
    """No plan is better by any figure than its bounds; how many there were."""
    problem, rng = on_every_figure(question(seed)), np.random.default_rng(seed)
    scorer, plans = Scorer(problem), feasible_plans(replace(problem, overlaps=(NANO,)))
    for place in rng.permutation(len(plans))[:4]:
        deployment = Deployment.of(plans[place])
        bounds, possible = scorer.bounds(deployment)
        scored = scorer.simulate(deployment)
        for aim, least, cost in zip(problem.objectives, bounds, problem.costs(scored.metrics), strict=True):
            assert np.isnan(cost) or least <= cost + 1e-9 * abs(cost), (str(plans[place]), aim.name, least, cost)
        assert possible or not scored.meets_slos
    return min(len(plans), 4)


@pytest.mark.parametrize("seeds", [range(24), pytest.param(range(24, 600), marks=pytest.mark.nightly)])
def test_no_plan_with_nano_batches_beats_its_bounds(seeds: range) -> None:
    assert sum(map(check_bounds, seeds)) >= 2 * len(seeds)


def check_search(seed: int) -> bool:
    """The search finds the best of all plans, and its ledger holds; whether that has nano-batches."""
    problem = question(seed, 2)
    scorer, plans = Scorer(problem), feasible_plans(replace(problem, overlaps=(NANO,)))
    if seed % 3 == 0:
        problem = replace(problem, overlaps=(NANO,))
    else:
        plans += feasible_plans(replace(problem, overlaps=(None,)))
    every = [scorer.simulate(Deployment.of(plan)) for plan in plans]
    good = sorted((one for one in every if one.meets_slos), key=lambda one: rank(problem, one))
    answer = search(problem, SPACE, top=2)
    assert answer.status == ("optimal" if good else "infeasible")
    assert [one.text for one in answer.candidates[:2]] == [one.text for one in good[:2]]
    found = check(problem, answer, SPACE, programs)
    assert found.holds, found.disagreements
    return any("overlap=" in one.text for one in answer.candidates[:2])


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 120), marks=pytest.mark.nightly)])
def test_the_search_finds_the_best_with_nano_batches_among_the_choices(seeds: range) -> None:
    assert any([check_search(seed) for seed in seeds])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"attention": Template(dp=2)}, "with one attention copy, the plan has 2"),
        ({"layers": (1, 1)}, "on one pipeline stage, the plan has 2"),
    ],
)
def test_they_are_of_one_stage_with_one_attention_copy(changes: dict[str, object], said: str | None) -> None:
    problem = replace(question(1), model=make_model((dense(), 2)), overlaps=(NANO,))
    plan = next(plan for plan in feasible_plans(problem) if plan.attention.tp == 2 and plan.replicas == 1)
    found = [v.text for v in violations(problem.instance(), replace(plan, **changes)) if v.family == "engine"]
    assert found == [] if said is None else any(said in text for text in found)
    assert Scorer(problem).facts().memory(plan) == Scorer(problem).facts().memory(replace(plan, overlap=None))
    ruled = replace(problem.instance(), settings=replace(problem.settings, runnable=VLLM))
    assert any("at one time" in v.text for v in violations(ruled, plan))
