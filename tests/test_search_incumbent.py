"""The best found so far, and what may still matter beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from search_cases import ROWS, every_of, problem_of

from apex_opt.figures import load_objective
from apex_opt.search.incumbent import FREE, Best
from apex_opt.search.ledger import Part

if TYPE_CHECKING:
    from apex_opt.search import Problem, Scored

PLACE = next(place for place, row in enumerate(ROWS) if row["shape"] == "two" and not row["tight"])


def case() -> tuple[Problem, list[Scored]]:
    problem = replace(problem_of(PLACE), objective=load_objective("e2e_mean"), then=())
    found = sorted(every_of(PLACE), key=lambda one: problem.costs(one.metrics))
    return problem, found


def part(shape: Any = "mixed", *types: str) -> Part:
    return Part(shape=shape, types=types, objective=load_objective("e2e_mean"), space=1, infeasible={})


@pytest.mark.parametrize("top", [1, 3])
def test_what_is_no_worse_than_the_last_to_show_may_matter(top: int) -> None:
    problem, found = case()
    best, mine = Best(problem, top), part()
    for count, one in enumerate(reversed(found[:6]), 1):
        assert (best.last is None) == (count <= top)
        best.take(one, mine)
    costs = [problem.costs(one.metrics) for one in found]
    assert best.last == costs[top - 1] == best.worst(mine)
    assert mine.best == costs[0]
    assert best.admits(costs[top - 1], mine)
    assert not best.admits((costs[top - 1][0] * (1 + 1e-9),), mine)


def test_the_best_on_a_type_alone_is_looked_for_though_others_are_better() -> None:
    problem, found = case()
    best, mixed, single = Best(problem, 1), part(), part("single", "slow")
    best.take(found[0], mixed)
    assert best.worst(mixed) < FREE
    assert best.worst(single) == FREE
    best.take(found[5], single)
    assert best.worst(single) == problem.costs(found[5].metrics) == single.best
    assert best.worst(mixed) == problem.costs(found[0].metrics)
    only = Best(problem.alone(0), 1)
    only.take(found[0], single)
    assert only.worst(part("single", "quick")) == problem.costs(found[0].metrics)


def test_scouts_set_what_the_others_are_held_against_before_they_are_come_across() -> None:
    problem, found = case()
    best, mixed = Best(problem, 2), part()
    best.take(found[4], mixed)
    best.scouted([found[1]])
    assert best.worst(mixed) == problem.costs(found[4].metrics)
    best.scouted([found[1], found[2]])
    assert best.worst(mixed) == problem.costs(found[2].metrics)
    assert best.last is None
