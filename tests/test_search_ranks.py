"""Questions with attention ranks and drafts among the choices: the search against simulating every plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from drafts_cases import drafters, knowing
from plan_cases import SMALL, dense, feasible_plans, make_cluster, make_model, make_problem, random_trace, sparse
from search_cases import SPACE, rank

from apex_opt.engines.schedulers import (
    CAPACITY_POLICIES,
    CHUNKING_POLICIES,
    LOAD_BALANCES,
    SglangScheduling,
    TrtllmScheduling,
    VllmScheduling,
)
from apex_opt.figures import load_objective, parse_goals
from apex_opt.figures.registry import names
from apex_opt.plans.deployment import Deployment
from apex_opt.plans.engine import has_ranks
from apex_opt.plans.speculation import MOST_DRAFTS
from apex_opt.search import Problem, Scored, Scorer, search
from apex_opt.studies.check import check
from formulations import deployment

MEAN = "e2e_mean"


def ranks_problem(seed: int) -> Problem:
    """A mixture of experts on two or three GPUs, with other settings each time; drafts among the choices of most."""
    rng = np.random.default_rng(seed + 9000)
    block = sparse(
        hidden=int(rng.choice([256, 1024])),
        columns=int(rng.choice([384, 1024])),
        experts=int(rng.choice([4, 6, 8])),
        chosen=int(rng.integers(1, 3)),
        shared=int(rng.choice([0, 512])),
    )
    settings = replace(
        SMALL,
        max_num_seqs=int(rng.choice([1, 4, 16])),
        max_num_batched_tokens=int(rng.choice([32, 256])),
        block_size=int(rng.choice([1, 16])),
        async_scheduling=bool(rng.random() < 0.7),
        scheduler=VllmScheduling(idle_sleep_us=int(rng.choice([0, 1000]))),
    )
    if seed % 4 == 3:
        balance = {"adp_balance": bool(rng.random() < 0.5), "adp_timeout_iters": int(rng.choice([2, 50]))}
        capacity = str(rng.choice(CAPACITY_POLICIES))
        chunking = str(rng.choice(CHUNKING_POLICIES))
        own = TrtllmScheduling(capacity_policy=capacity, context_chunking_policy=chunking, **balance)
        own = replace(own, batch_wait_timeout_ms=float(rng.choice([0.0, 0.0, 2.0])))
        settings = replace(settings, scheduler=own, max_num_batched_tokens=256, block_size=int(rng.choice([8, 32])))
    mixes = False
    if seed % 4 == 2:
        ways = {"mixed_chunk": bool(rng.random() < 0.3), "load_balance_method": str(rng.choice(LOAD_BALANCES))}
        settings = replace(settings, scheduler=SglangScheduling(**ways), block_size=int(rng.choice([1, 4])))
        block = block if rng.random() < 0.7 else dense(hidden=512, columns=2048)
        mixes, most = settings.scheduler.mixed_chunk, 1 + MOST_DRAFTS  # type: ignore[attr-defined]
        if not mixes:
            settings = replace(settings, max_num_batched_tokens=max(256, most * settings.max_num_seqs))
    some = drafters(seed) if seed % 4 < 3 and rng.random() < 0.9 and not mixes else (None,)
    some = (None, *(drafter for drafter in some if drafter is not None and drafter.method != "draft"))
    objective = str(rng.choice([*names(), MEAN, MEAN]))
    clocks = (None, 1200) if rng.random() < 0.2 else (None,)
    problem = make_problem(
        make_model((block, int(rng.integers(1, 7)))),
        make_cluster(int(rng.choice([2, 2, 3]))),
        random_trace(seed, 20, closed=rng.random() < 0.3),
        objective=objective,
        then=() if objective == MEAN else (load_objective(MEAN),),
        request_slos=parse_goals("ttft_max<=20ms,tpot_max<=9ms"),
        settings=knowing(settings, some, seed),
        drafters=some,
        clocks=clocks,
        routing=str(rng.choice(["round_robin", "least_loaded"])),
        expert_routing=str(rng.choice(["uniform", "skewed"])),
    )
    if rng.random() < 0.5:
        metrics = Scorer(problem).simulate(Deployment.of(feasible_plans(problem)[0])).metrics
        ttft = metrics.latency_s["ttft"]["p95"] * float(rng.choice([0.1, 1.0, 2.0]))
        problem = replace(problem, slos=parse_goals(f"ttft_p95<={ttft:.12f}s"))
    return problem


def brute_force(problem: Problem) -> list[Scored]:
    """Every plan that meets the goals, best first, found without bounds and early ends."""
    scorer = Scorer(problem)
    every = (scorer.simulate(Deployment.of(plan)) for plan in feasible_plans(problem))
    return sorted((one for one in every if one.meets_slos), key=lambda one: rank(problem, one))


def check_question(seed: int) -> None:
    """The search finds what simulating every plan finds, and its ledger holds when replayed."""
    problem = ranks_problem(seed)
    good, answer = brute_force(problem), search(problem, SPACE, top=2)
    assert answer.status == ("optimal" if good else "infeasible")
    assert [one.text for one in answer.candidates[:2]] == [one.text for one in good[:2]]
    assert check(problem, answer, SPACE, deployment).disagreements == ()


@pytest.mark.parametrize(
    "seed", [*range(20), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(20, 140))]
)
def test_the_search_finds_the_best_with_ranks_and_drafts_among_the_choices(seed: int) -> None:
    check_question(seed)


def test_ranks_and_drafts_are_among_the_choices_of_these_questions() -> None:
    problems = [ranks_problem(seed) for seed in range(20)]
    with_ranks = sum(any(has_ranks(p.settings, plan) for plan in feasible_plans(p)) for p in problems)
    assert with_ranks == len(problems)
    assert sum(any(problem.drafters) for problem in problems) > 7
