"""Plans that make drafts: program, bounds and search against plain Python and against simulating everything."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pytest
from drafts_cases import drafters, knowing
from plan_cases import feasible_plans, random_instance, random_problem
from search_cases import SPACE, rank

from apex_opt.engines.schedulers import CAPACITY_POLICIES, SglangScheduling, TrtllmScheduling
from apex_opt.figures import load_objectives
from apex_opt.figures.registry import names
from apex_opt.oracle.checks import FAMILIES, OF_CUTS, violations
from apex_opt.oracle.space import space, tally
from apex_opt.plans.deployment import Deployment
from apex_opt.plans.speculation import MOST_DRAFTS, Drafter
from apex_opt.search import Problem, Scorer, search

if TYPE_CHECKING:
    from apex_opt.oracle.instance import Instance

A = TypeVar("A", "Instance", Problem)


def by_sglang(asked: A, seed: int) -> A:
    """The same asked of SGLang, with limits that all drafts go with."""
    own, most = asked.settings, 1 + MOST_DRAFTS
    seats = int(np.random.default_rng(seed).choice([0, 2, 48]))
    limits = tuple(
        (seqs, None if seqs is None and tokens is None else max(tokens or 0, most * (seqs or own.max_num_seqs)))
        for seqs, tokens in asked.batch_limits
    )
    settings = replace(
        own,
        max_num_batched_tokens=max(own.max_num_batched_tokens, most * own.max_num_seqs),
        scheduler=SglangScheduling(drafting_seats=seats),
        chunked_prefill=True,
        async_scheduling=True,
    )
    return replace(asked, settings=settings, batch_limits=limits)


def drafting_instance(seed: int) -> Instance:
    """A random instance with drafts among the choices, every other one on SGLang."""
    instance, some = random_instance(seed), drafters(seed)
    if seed % 2 == 0:
        instance = by_sglang(instance, seed)
    return replace(instance, drafters=some, settings=knowing(instance.settings, some, seed))


def drafting_problem(seed: int) -> Problem:
    """A random problem with drafts among the choices, every third on TensorRT-LLM, and every third on SGLang."""
    problem, some = random_problem(seed), drafters(seed)
    if seed % 3 == 1:
        problem = by_sglang(problem, seed)
    settings = problem.settings
    if seed % 3 == 2:
        policy = str(np.random.default_rng(seed).choice(CAPACITY_POLICIES))
        settings = replace(settings, scheduler=TrtllmScheduling(capacity_policy=policy))
    return replace(problem, drafters=some, settings=knowing(settings, some, seed))


def check_program(seed: int) -> None:
    """The program lists and counts what plain Python does."""
    instance = drafting_instance(seed)
    found, counted = SPACE.enumerate(instance), tally(instance)
    room = instance.max_devices
    assert {cut.times(n) for cut in found.plans for n in range(1, room // cut.devices + 1)} == {
        plan for plan in counted.plans if plan.even
    }
    assert SPACE.count(instance, ()) == counted.space
    lost = [SPACE.count(instance, OF_CUTS[:place]) for place in range(len(OF_CUTS) + 1)]
    assert [a - b for a, b in itertools.pairwise(lost)] == [counted.infeasible[name] for name in OF_CUTS]
    kept = [plan for plan in space(instance) if plan.replicas == 1 and plan.even]
    broken = {plan: {v.family for v in violations(instance, plan)} for plan in kept}
    for family in FAMILIES:
        # What drafts would take of memory where nothing makes them, in pipelines, neither has to know.
        asked = {p for p in kept if family != "memory" or p.speculation is None or p.stages == 1}
        alone = set(SPACE.enumerate(instance, [family]).plans)
        assert alone & asked == {p for p in asked if family not in broken[p]}, family


@pytest.mark.parametrize("seed", (1, 2, 5, 8))
def test_program_and_oracle_agree_on_plans_that_make_drafts(seed: int) -> None:
    check_program(seed)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(60))
def test_program_and_oracle_agree_on_many_problems_with_drafts(seed: int) -> None:
    check_program(seed)


def test_what_makes_drafts_decides_whether_plans_fit() -> None:
    """Of plans cut alike, some fit without drafts alone."""
    eagle, fewer = Drafter(method="eagle", draft_tokens=5), 0
    for seed in range(16):
        instance = random_instance(seed)
        settings = knowing(instance.settings, (None, eagle), seed)
        instance = replace(instance, drafters=(None, eagle), settings=settings, tpot_limit_ns=None)
        for plan in tally(instance).plans:
            if plan.speculation is None and plan.stages == plan.attention.dp == plan.replicas == 1:
                broken = {v.family for v in violations(instance, replace(plan, speculation=eagle))}
                fewer += broken == {"memory"}
    assert fewer > 0


def check_bounds(seed: int) -> int:
    """No feasible plan is better by any figure than its bounds; how many there were that make drafts."""
    problem = drafting_problem(seed)
    objective, *then = load_objectives(",".join(names()))
    problem = replace(problem, objective=objective, then=tuple(then))
    scorer, drafting = Scorer(problem), 0
    for plan in feasible_plans(problem):
        if plan.speculation is None:
            continue
        drafting += 1
        deployment = Deployment.of(plan)
        bounds, possible = scorer.bounds(deployment)
        scored = scorer.simulate(deployment)
        costs = problem.costs(scored.metrics)
        for aim, least, cost in zip(problem.objectives, bounds, costs, strict=True):
            assert np.isnan(cost) or least <= cost + 1e-9 * abs(cost), (str(plan), aim.name, least, cost)
        assert possible or not scored.meets_slos
    return drafting


@pytest.mark.parametrize("seed", range(10))
def test_no_plan_that_makes_drafts_beats_its_bounds(seed: int) -> None:
    check_bounds(seed)


@pytest.mark.nightly
def test_none_of_thousands_of_plans_that_make_drafts_beats_its_bounds() -> None:
    assert sum(map(check_bounds, range(10, 200))) >= 2000


def check_search(seed: int) -> None:
    """The search finds the best of all plans."""
    problem = drafting_problem(seed)
    scorer = Scorer(problem)
    every = [scorer.simulate(Deployment.of(plan)) for plan in feasible_plans(problem)]
    good = sorted((one for one in every if one.meets_slos), key=lambda one: rank(problem, one))
    answer = search(problem, SPACE, top=2)
    assert answer.status == ("optimal" if good else "infeasible")
    assert [one.text for one in answer.candidates[:2]] == [one.text for one in good[:2]]


@pytest.mark.parametrize("seed", range(10))
def test_the_search_finds_the_best_with_drafts_among_the_choices(seed: int) -> None:
    check_search(seed)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10, 130))
def test_the_search_finds_the_best_of_many_problems_with_drafts_among_the_choices(seed: int) -> None:
    check_search(seed)
