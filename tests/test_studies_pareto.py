"""The front is what simulating every plan and comparing all pairs gives."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from plan_cases import every_deployment, make_cluster, make_problem, random_mixed, random_problem, random_trace

from apex_opt.errors import CapacityError, UsageError
from apex_opt.figures import Objective, load_objective
from apex_opt.figures.registry import names
from apex_opt.ir import load_model
from apex_opt.search import Problem, Scored, Scorer, search
from apex_opt.studies.pareto import Front, dominates, pareto
from apex_opt.workload import make_trace
from formulations.plan_space import PlanSpace

NAMES = names()

SEEDS = range(312, 324)
MORE = [pytest.param(seed, marks=pytest.mark.nightly) for seed in (*range(300, 312), *range(324, 460))]
MORE_MIXED = [pytest.param(seed, marks=pytest.mark.nightly) for seed in range(4, 60)]
SPACE = PlanSpace()


def some_objectives(seed: int) -> tuple[Objective, ...]:
    rng = np.random.default_rng(seed)
    return tuple(load_objective(str(name)) for name in rng.choice(NAMES, size=2 + seed % 2, replace=False))


def vector(scored: Scored, objectives: tuple[Objective, ...]) -> tuple[float, ...]:
    return tuple(o.signed(o.value(scored.metrics)) for o in objectives)


def brute_force(problem: Problem, objectives: tuple[Objective, ...]) -> list[tuple[float, ...]]:
    scorer = Scorer(replace(problem, objective=objectives[0], then=objectives[1:]))
    runs = [scorer.simulate(deployment) for deployment in every_deployment(scorer)]
    vectors = {vector(run, objectives) for run in runs if run.meets_slos}
    return sorted(
        one
        for one in vectors
        if not any(other != one and all(a <= b for a, b in zip(other, one, strict=True)) for other in vectors)
    )


@cache
def front_by(seed: int) -> tuple[Problem, tuple[Objective, ...], Front]:
    """A random problem by some objectives, and its front."""
    objectives = some_objectives(seed)
    problem = replace(random_problem(seed), objective=objectives[0], then=objectives[1:])
    return problem, objectives, pareto(problem, objectives, SPACE)


@pytest.mark.parametrize("seed", [*SEEDS, *MORE])
def test_the_front_is_what_comparing_every_plan_with_every_other_gives(seed: int) -> None:
    problem, objectives, front = front_by(seed)
    assert [vector(candidate, objectives) for candidate in front.candidates] == brute_force(problem, objectives)
    assert front.status == ("optimal" if front.candidates else "infeasible")
    assert (front.reason is None) == bool(front.candidates)
    (part,) = front.ledger.parts
    known = part.bounded + part.repeated + part.simulated
    assert part.space == sum(part.infeasible.values()) + known
    assert len(front.candidates) + len(front.beaten) + part.missed == part.simulated
    for loser in front.beaten:
        mine = vector(loser, objectives)
        winners = [vector(candidate, objectives) for candidate in front.candidates]
        assert any(dominates(winner, mine) or winner == mine for winner in winners)


@pytest.mark.parametrize("seed", [*range(4), *MORE_MIXED])
def test_the_front_over_two_types_of_gpu_is_what_comparing_every_deployment_gives(seed: int) -> None:
    objectives, problem = some_objectives(seed), random_mixed(seed)
    front = pareto(problem, objectives, SPACE)
    assert [vector(scored, objectives) for scored in front.candidates] == brute_force(problem, objectives)
    assert front.status == ("optimal" if front.candidates else "infeasible")
    for part in front.ledger.parts:
        assert part.space == sum(part.infeasible.values()) + part.bounded + part.repeated + part.simulated


def test_bounds_spare_simulations_in_some_of_these_problems() -> None:
    fronts = [front_by(seed)[2] for seed in SEEDS]
    assert sum(front.ledger.parts[0].bounded > front.ledger.parts[0].missed for front in fronts) >= 6
    assert sum(len(front.candidates) > 1 for front in fronts) >= 3
    assert sum(front.status == "infeasible" for front in fronts) >= 1


def dense_problem(slo: str = "") -> Problem:
    return make_problem(load_model("llama-3.1-8b"), make_cluster(4), random_trace(5, 30), slo)


def front_of(problem: Problem, *names: str) -> Front:
    return pareto(problem, [load_objective(name) for name in names], SPACE)


def test_clocks_are_part_of_the_space() -> None:
    problem = dense_problem().offering(clocks=(None, 1500, 900))
    objectives = (load_objective("e2e_mean"), load_objective("energy"))
    front = pareto(problem, objectives, SPACE)
    assert [vector(candidate, objectives) for candidate in front.candidates] == brute_force(problem, objectives)
    assert len({candidate.plan.clock_mhz for candidate in front.candidates}) > 1


@pytest.mark.parametrize(
    "names", [("e2e_mean", "energy"), ("ttft_p95", "throughput"), ("tpot_p99", "energy", "makespan")]
)
def test_the_best_plan_by_each_objective_is_an_end_of_the_front(names: tuple[str, ...]) -> None:
    problem = dense_problem()
    front = front_of(problem, *names)
    for objective in front.objectives:
        best = search(replace(problem, objective=objective), SPACE).best
        assert best is not None
        costs = [objective.signed(objective.value(c.metrics)) for c in front.candidates]
        assert min(costs) == objective.signed(best.value)


def test_the_order_of_objectives_changes_the_order_of_the_front_only() -> None:
    problem = dense_problem()
    one, other = front_of(problem, "e2e_mean", "energy"), front_of(problem, "energy", "e2e_mean")
    assert [c.plan for c in one.candidates] == [c.plan for c in reversed(other.candidates)]


def test_goals_out_of_reach_are_answered_with_what_is_reached() -> None:
    front = front_of(dense_problem("ttft_p95<=1us"), "e2e_mean", "energy")
    assert (front.status, front.candidates, front.ledger.gap) == ("infeasible", (), None)
    assert "ttft_p95<=1us (it reaches" in str(front.reason)


@pytest.mark.parametrize(
    "names", [("energy",), ("energy", "energy"), ("energy", "e2e_mean", "ttft_mean", "makespan"), ()]
)
def test_other_than_two_or_three_different_objectives_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="two or three objectives, each named once"):
        front_of(dense_problem(), *names)


def test_a_prompt_as_long_as_the_model_allows_is_refused() -> None:
    problem = dense_problem()
    long = make_trace(name="long", arrival_ns=[0], prompt=[problem.settings.max_model_len], output=[5])
    with pytest.raises(CapacityError, match="leaves no room to answer"):
        front_of(replace(problem, trace=long), "e2e_mean", "energy")
