"""Plans whose phases share GPUs: program, bounds and search against plain Python and against simulating everything."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from plan_cases import dense, feasible_plans, make_cluster, make_model, make_problem, random_instance, random_trace
from search_cases import SPACE, listed_alike, rank

import formulations.deployment as programs
from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.engines.sglang import SGLANG
from apex_opt.figures import load_objectives
from apex_opt.figures.registry import names
from apex_opt.oracle.checks import violations
from apex_opt.plans.deployment import Deployment
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.shares import Shares, parse_shares
from apex_opt.search import Problem, Scorer, search
from apex_opt.studies.check import check

if TYPE_CHECKING:
    from apex_opt.oracle.instance import Instance
    from apex_opt.plans.plan import Plan

MULTIPLEXED = ("pdmux", "pdmux:72/60", "pdmux:112/20")


def shared_instance(seed: int) -> Instance:
    """A random instance whose plans share their GPUs, now by one rule and now by another."""
    rng, instance = np.random.default_rng(seed), random_instance(seed)
    wanted = parse_shares(str(rng.choice([*MULTIPLEXED, "50/50", "80/100", "80/100"])))
    gpu = replace(instance.cluster.gpu, multiprocessors=int(rng.choice([132, 132, 132, 108])))
    settings = replace(instance.settings, chunked_prefill=True, max_model_len=1000, scheduler=SglangScheduling())
    if instance.settings.runnable is not None and rng.random() < 0.7:
        settings = replace(settings, runnable=replace(instance.settings.runnable, multiplexes=True))
    return replace(instance, shares=wanted, settings=settings, cluster=replace(instance.cluster, gpu=gpu))


def check_program(seed: int) -> int:
    """The program lists and counts what plain Python does; how many plans there are."""
    instance = shared_instance(seed)
    counted = listed_alike(instance)
    assert all(plan.shares == instance.shares for plan in counted.plans)
    return len(counted.plans)


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 80), marks=pytest.mark.nightly)])
def test_program_and_oracle_agree_on_plans_whose_phases_share_gpus(seeds: range) -> None:
    assert sum(map(check_program, seeds)) > 0


def question(seed: int, gpus: int = 3) -> Problem:
    """Busy requests on a few GPUs, which phases may share; blocks are few now and then, so that requests give way."""
    rng = np.random.default_rng(seed)
    multiplexing, tight = seed % 2 == 1, rng.random() < 0.6
    some = [*MULTIPLEXED, "50/50"] if multiplexing else ["50/50", "80/100", "30/70", "100/60"]
    chosen = tuple(parse_shares(str(name)) for name in rng.choice(some, 2, replace=False))
    trace = random_trace(seed, 20)
    model = make_model((dense(hidden=1024, columns=4096), 6))
    cluster = make_cluster(gpus, multiprocessors=132, capability=9.0, price_per_h=2.0)
    longest = int((trace.prompt + trace.output).max()) + 40
    settings = EngineSettings(
        max_num_seqs=int(rng.integers(2, 24)),
        max_num_batched_tokens=int(rng.choice([64, 256, 1024])),
        max_model_len=1000,
        scheduler=SglangScheduling(schedule_conservativeness=0.3) if multiplexing else EngineSettings().scheduler,
    )
    slo = str(rng.choice(["ttft_p95<=40ms", "e2e<=9s@1%", "e2e<=9s@1%", "e2e<=9s@1%"]))
    aims = ["e2e_mean", "tpot_p99", "itl_p99", "ttft_p95", "makespan", "energy", "throughput"]
    given = {"objective": str(rng.choice(aims)), "settings": settings, "serving": ("aggregated", "shared")}
    problem = make_problem(model, cluster, trace, slo, **given)
    problem = replace(problem, shares=(None, *chosen))
    if tight:
        blocks = -(-longest // settings.block_size) + int(rng.integers(2, 30))
        wanted = max(plans_of(problem), key=lambda plan: plan.attention.tp, default=None)
        if wanted is not None:
            (stage,) = Scorer(problem).facts().memory(wanted)
            need = stage.beside_bytes + blocks * stage.kv_block_bytes
            problem = problem.offering(cluster=replace(cluster, gpu=replace(cluster.gpu, memory_bytes=int(need / 0.9))))
    return problem


def plans_of(problem: Problem) -> list[Plan]:
    """Every plan whose phases share GPUs, by plain Python."""
    found = []
    for shares in problem.shares:
        alike = replace(problem, shares=(shares,))
        found += [plan for plan in feasible_plans(alike) if plan.shares is not None]
    return found


def check_bounds(seed: int) -> tuple[int, int]:
    """No plan is better by any figure than its bounds; how many there were, and in how many somebody gave way."""
    problem, rng = question(seed), np.random.default_rng(seed)
    objective, *then = load_objectives(",".join(names()))
    problem = replace(problem, objective=objective, then=tuple(then))
    scorer, lost, plans = Scorer(problem), 0, plans_of(problem)
    for place in rng.permutation(len(plans))[:6]:
        deployment = Deployment.of(plans[place])
        bounds, possible = scorer.bounds(deployment)
        scored = scorer.simulate(deployment)
        lost += scored.only.preemptions > 0
        for aim, least, cost in zip(problem.objectives, bounds, problem.costs(scored.metrics), strict=True):
            assert np.isnan(cost) or least <= cost + 1e-9 * abs(cost), (str(plans[place]), aim.name, least, cost)
        assert possible or not scored.meets_slos
    return min(len(plans), 6), lost


@pytest.mark.parametrize("seeds", [range(24), pytest.param(range(24, 500), marks=pytest.mark.nightly)])
def test_no_plan_whose_phases_share_gpus_beats_its_bounds(seeds: range) -> None:
    plans, lost = map(sum, zip(*map(check_bounds, seeds), strict=True))
    assert plans > 3 * len(seeds) and lost > 0


def check_search(seed: int) -> None:
    """The search finds the best of all plans, and its ledger holds."""
    problem = question(seed, 2)
    scorer = Scorer(problem)
    plans = [*feasible_plans(replace(problem, shares=(None,))), *plans_of(problem)]
    every = [scorer.simulate(Deployment.of(plan)) for plan in plans]
    good = sorted((one for one in every if one.meets_slos), key=lambda one: rank(problem, one))
    answer = search(problem, SPACE, top=2)
    assert answer.status == ("optimal" if good else "infeasible")
    assert [one.text for one in answer.candidates[:2]] == [one.text for one in good[:2]]
    found = check(problem, answer, SPACE, programs)
    assert found.holds, found.disagreements


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 80), marks=pytest.mark.nightly)])
def test_the_search_finds_the_best_with_shares_among_the_choices(seeds: range) -> None:
    for seed in seeds:
        check_search(seed)


def test_a_second_process_costs_memory_and_multiplexing_a_second_workspace_alone() -> None:
    multiplexed = Shares(prefill=0, decode=0, multiplexed=True)
    problem = replace(question(1), shares=(None, Shares(prefill=50, decode=50), multiplexed))
    plan = feasible_plans(replace(problem, shares=(None,)))[0]
    facts = Scorer(problem).facts()
    (whole,), (apart,) = (facts.memory(replace(plan, shares=shares)) for shares in problem.shares[:2])
    assert (apart.weights_bytes, apart.kv_block_bytes) == (whole.weights_bytes, whole.kv_block_bytes)
    assert (apart.workspace_bytes, apart.runtime_bytes) == (2 * whole.workspace_bytes, 2 * whole.runtime_bytes)
    (one,) = facts.memory(replace(plan, shares=multiplexed))
    assert one.runtime_bytes == whole.runtime_bytes and one.workspace_bytes > whole.workspace_bytes


def test_an_engine_runs_the_shares_that_it_has() -> None:
    problem = replace(question(1), shares=(None,))
    plan = next(plan for plan in feasible_plans(problem) if plan.stages == plan.attention.dp == 1)
    instance = replace(problem.instance(), settings=replace(problem.settings, runnable=SGLANG))
    said = {
        text: [v.text for v in violations(instance, replace(plan, shares=parse_shares(text))) if v.family == "engine"]
        for text in ("pdmux", "pdmux:72/60", "pdmux:72/72", "pdmux:70/62", "50/50")
    }
    assert said["pdmux"] == said["pdmux:72/60"] == []
    assert "are not the 132 multiprocessors" in said["pdmux:72/72"][0] and "multiple of 8" in said["pdmux:70/62"][0]
    assert "but by its own multiplexing" in said["50/50"][0]
    assert replace(plan, shares=None) in feasible_plans(problem)
    routed = replace(plan, shares=parse_shares("pdmux"), route="least_loaded")
    assert any("in turn" in v.text for v in violations(instance, routed))
