"""No run of pools side by side is better than its bounds, whatever pools are yet to be chosen."""

from __future__ import annotations

from itertools import combinations, permutations, product
from typing import TYPE_CHECKING

import numpy as np
import pytest
from search_cases import ROWS, on_every_figure, pools_of, problem_of

from apex_opt.plans.deployment import Deployment
from apex_opt.search import Scorer
from apex_opt.search.bounds.compose import Compose, Help
from apex_opt.search.facts import judged
from apex_opt.search.option import options_of
from apex_opt.search.search import silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.search import Problem
    from apex_opt.search.option import Option

MIXED = [place for place, row in enumerate(ROWS) if row["shape"] != "single"]
MOST = 30


def options(problem: Problem, scorer: Scorer) -> list[list[Option]]:
    """Every feasible plan of each type of GPU."""
    every = zip(problem.types, pools_of(problem), strict=True)
    return [options_of(scorer.facts(name), pools, silent) for name, pools in every]


def some_of(problem: Problem, sides: Sequence[Sequence[Option]], seed: int) -> list[tuple[Option, ...]]:
    """Some of the deployments with an option of each side."""
    rows = list(product(*sides))
    order = np.random.default_rng(seed).permutation(len(rows))[:MOST].tolist()
    return [rows[place] for place in order]


@pytest.mark.parametrize("place", MIXED)
def test_no_deployment_is_better_by_any_figure_than_bounds_with_all_its_pools_or_with_the_help_of_some(
    place: int,
) -> None:
    problem = on_every_figure(problem_of(place))
    scorer = Scorer(problem)
    compose, every = Compose(problem, scorer.outside_ns), options(problem, scorer)
    for size in range(2, len(every) + 1):
        for sides in combinations(every, size):
            rows = some_of(problem, sides, place)
            if not rows:
                continue
            run, served = compose.of(rows)
            bounds, possible = judged(run, problem.objectives, problem.goals)
            helped = {
                chosen: compose.with_help(
                    [tuple(row[side] for side in chosen) for row in rows],
                    Help.of([sides[side] for side in range(size) if side not in chosen]),
                )
                for count in range(1, size)
                for chosen in permutations(range(size), count)
            }
            loose = [judged(one, problem.objectives, problem.goals) for one in helped.values()]
            for at, row in enumerate(rows):
                pools = tuple(option.pool for option in row)
                if not served[at]:
                    continue
                scored = scorer.simulate(Deployment(pools=pools))
                cost = np.array(problem.costs(scored.metrics))
                short = {
                    one.name: (bound, reached)
                    for one, bound, reached in zip(problem.objectives, bounds[at], cost, strict=True)
                    if bound > reached
                }
                assert not short, (scored.text, short)
                assert possible[at] or not scored.meets_slos
                for lower, holds in loose:
                    # What is helped by more is no tighter, so that none of it is ruled out before its turn.
                    assert (lower[at] <= bounds[at] + 1e-12 * np.abs(bounds[at])).all()
                    assert (lower[at] <= cost).all()
                    assert holds[at] or not possible[at]


@pytest.mark.parametrize("place", MIXED[::3])
def test_the_bounds_of_one_deployment_are_those_it_has_among_others(place: int) -> None:
    problem = problem_of(place)
    scorer = Scorer(problem)
    compose, every = Compose(problem, scorer.outside_ns), options(problem, scorer)
    rows = some_of(problem, every[:2], place)
    together, served = compose.of(rows) if rows else (None, None)
    for at, row in enumerate(rows):
        alone, has = compose.of([row])
        assert together is not None
        assert served is not None
        assert has[0] == served[at]
        ours, its = (judged(run, problem.objectives, ())[0] for run in (together, alone))
        assert ours[at].tolist() == its[0].tolist()


def test_pools_that_share_the_requests_are_bounded_by_the_slowest_and_all_of_them_idle_as_long_as_it_runs() -> None:
    place = next(place for place in MIXED if ROWS[place]["shape"] == "two" and not ROWS[place]["tight"])
    problem = problem_of(place)
    scorer = Scorer(problem)
    compose, (quick, slow) = Compose(problem, scorer.outside_ns), options(problem, scorer)[:2]
    (run, _), pair = compose.of([(quick[0], slow[0])]), (quick[0], slow[0])
    idle_w = sum(option.idle_w for option in pair)
    assert run.joules is not None
    assert run.joules[0] >= idle_w * run.makespan_s[0] * (1 - 1e-9)
    assert run.cost_per_h is not None
    assert run.cost_per_h[0] == sum(option.cost_per_h for option in pair)
    owned = [run.first_ns[0] == option.first_ns for option in pair]
    assert (owned[0] | owned[1]).all()
    assert run.first_ns[0].tolist() != pair[0].first_ns.tolist()
