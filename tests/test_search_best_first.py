"""The tree of every shape: no child is better than what it hangs on, children come in order, and leaves add up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Any

import pytest
from search_cases import ROWS, every_of, problem_of, shapes_of

from apex_opt.search import Part
from apex_opt.search.best_first import ROUND, Leaf, Queue, best_first, side_by_side
from apex_opt.search.incumbent import Incumbent
from apex_opt.search.search import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apex_opt.plans.deployment import Deployment
    from apex_opt.search import Scored
    from apex_opt.search.best_first import Branch
    from apex_opt.search.ledger import Costs

PLACES = range(len(ROWS))


class Everything(Incumbent):
    """An incumbent that nothing is too bad for."""

    def take(self, scored: Scored, part: Part) -> None:
        pass


def ruled_out(part: Part) -> int:
    """Deployments of a part that are accounted for without having been simulated."""
    return part.out_of_reach + part.beaten + sum(part.infeasible.values()) + part.repeated


def walked(branch: Branch, above: Costs | None, leaves: list[Leaf]) -> None:
    """Check a branch and all below it, and gather its leaves."""
    bounds = list(branch.bounds)
    assert all(one <= other for one, other in pairwise(bounds))
    if above is not None:
        # Of every objective, not only of the first that differs: a front needs each.
        assert all(mine >= its for bound in bounds for mine, its in zip(bound, above, strict=True))
    assert branch.leaves(0, len(bounds)) == sum(branch.leaves(place, place + 1) for place in range(len(bounds)))
    for place, bound in enumerate(bounds):
        before = ruled_out(branch.part)
        child = branch.child(place)
        if isinstance(child, Leaf):
            assert child.bound == bound
            assert branch.leaves(place, place + 1) == 1
            leaves.append(child)
            continue
        below = list(child)
        gone = ruled_out(branch.part) - before
        assert branch.leaves(place, place + 1) == gone + sum(one.leaves(0, len(one.bounds)) for one in below)
        for one in below:
            assert one.part is branch.part
            walked(one, bound, leaves)


@pytest.mark.parametrize("place", PLACES)
def test_bounds_rise_down_the_tree_of_every_shape_and_its_leaves_are_every_deployment_that_may_meet_the_goals(
    place: int,
) -> None:
    first, *then = (replace(aim, tolerance=0.0) for aim in problem_of(place).objectives)
    problem = replace(problem_of(place), objective=first, then=tuple(then))
    costs = {one.deployment: problem.costs(one.metrics) for one in every_of(place)}
    good = {one.deployment for one in every_of(place) if one.meets_slos}
    seen: Counter[Deployment] = Counter()
    for shape in shapes_of(problem):
        leaves: list[Leaf] = []
        branches = list(shape.branches())
        for branch in branches:
            assert branch.part is shape.part
            walked(branch, None, leaves)
        assert shape.part.space == ruled_out(shape.part) + len(leaves)
        for leaf in leaves:
            found = leaf.decided()
            if found is None:
                continue
            seen[found.deployment] += 1
            # None of its deployments is better than its bound by any objective, nor than the closer one.
            for early, closer, cost in zip(leaf.bound, found.bound, costs[found.deployment], strict=True):
                assert early <= closer <= cost
    assert set(seen.values()) <= {1}
    assert good <= set(seen) <= set(costs)


# ---- the loop by itself -----------------------------------------------------------------------------------------


@dataclass
class Twigs:
    """A branch written out: bounds and, of each child, how many leaves it has."""

    part: Part
    bounds: Sequence[Costs]
    below: Sequence[Any]
    opened: list[Costs] = field(default_factory=list)

    def leaves(self, first: int, last: int) -> int:
        return sum(
            1 if isinstance(one, str) else sum(twigs.leaves(0, len(twigs.bounds)) for twigs in one)
            for one in self.below[first:last]
        )

    def child(self, place: int) -> Any:
        self.opened.append(self.bounds[place])
        one = self.below[place]
        return Leaf(deployment=one, bound=self.bounds[place]) if isinstance(one, str) else one  # type: ignore[arg-type]


@dataclass(frozen=True)
class Run:
    """A run of a leaf, with its name and cost."""

    name: str
    cost: float
    meets_slos: bool = True


class Least(Everything):
    """The least cost."""

    def __init__(self) -> None:
        self.best = inf

    def admits(self, bound: Costs, part: Part) -> bool:
        return bound <= (self.best,)

    def worst(self, part: Part) -> Costs:
        return (self.best,)

    def take(self, scored: Any, part: Part) -> None:
        self.best = min(self.best, scored.cost)


def part_of(space: int) -> Part:
    objective: Any = None
    return Part(shape="mixed", types=("a", "b"), objective=objective, space=space, infeasible={})


def searched(
    branches: Sequence[Twigs],
    costs: dict[str, float],
    deadline: float = inf,
    cut: Callable[[str], bool] = lambda _: False,
    begun: int = 0,
) -> list[str]:
    """Names of the leaves simulated to their end, in order."""

    def challenge(name: Any, bound: Costs, worst: Costs) -> Any:
        return None if cut(name) or (costs[name],) > worst else Run(name, costs[name])

    found: list[Any] = best_first(
        branches, Least(), side_by_side(challenge), silent, deadline, lambda deployments: None, begun
    )
    return [one.scored.name for one in found]


def tree(part: Part) -> tuple[Twigs, Twigs, Twigs]:
    inner = Twigs(part, [(2.0,), (5.0,), (9.0,)], ["c", "d", "e"])
    late = Twigs(part, [(8.0,), (8.5,)], ["f", "g"])
    return Twigs(part, [(1.0,), (7.0,)], [[inner], [late]]), inner, late


def test_a_branch_is_looked_into_only_when_its_turn_comes_and_all_after_a_child_that_cannot_matter_are_ruled_out() -> (
    None
):
    part = part_of(6)
    outer, inner, _ = tree(part)
    other = Twigs(part, [(3.0,)], ["h"])
    found = searched([outer, other], {"c": 4.0, "h": 3.5, "d": 9.0, "e": 9.0, "f": 9.0, "g": 9.0})
    # A round takes four, in the order of their bounds: c, h and d, whose bound was still good enough, then the rest.
    assert found[:2] == ["c", "h"]
    assert inner.opened[0] == (2.0,)
    assert part.simulated + part.beaten == part.space
    assert part.least is not None
    assert part.least >= (3.5,)
    part.end((3.5,))


def test_rounds_are_of_four_and_later_ones_are_held_against_what_was_found() -> None:
    part = part_of(3 * ROUND)
    names = [f"n{place}" for place in range(3 * ROUND)]
    costs = {name: float(place + 1) for place, name in enumerate(names)}
    branch = Twigs(part, [(float(place),) for place in range(3 * ROUND)], names)
    assert searched([branch], costs) == names[:1] + names[1:ROUND]
    assert (part.simulated, part.beaten, part.least) == (ROUND, 2 * ROUND, (float(ROUND),))
    part.end((1.0,))


def test_what_is_open_when_the_time_is_up_is_left_with_its_bounds_after_one_round() -> None:
    part = part_of(10)
    names = [f"n{place}" for place in range(10)]
    branch = Twigs(part, [(float(place),) for place in range(10)], names)
    searched([branch], dict.fromkeys(names, 100.0), deadline=-inf)
    assert part.simulated >= 1
    assert part.waiting == 10 - part.simulated
    assert [bound for bound, _ in part.left] == [(float(place),) for place in range(part.simulated, 10)]
    part.end(None)
    assert part.waiting == 10 - part.simulated
    closed = replace_left(part, [((1.0,), 2), ((3.0,), 4)])
    closed.end((2.0,))
    assert (closed.waiting, closed.beaten, closed.least) == (2, 4, (3.0,))


def replace_left(part: Part, left: list[tuple[Costs, int]]) -> Part:
    """A part with nothing but some deployments left."""
    return replace(part_of(sum(count for _, count in left)), left=left)


def test_a_run_that_was_cut_short_or_misses_a_goal_is_counted_and_takes_no_place() -> None:
    part = part_of(3)
    branch = Twigs(part, [(1.0,), (2.0,), (3.0,)], ["a", "b", "c"])
    assert searched([branch], {"a": 5.0, "b": 6.0, "c": 4.0}, cut=lambda name: name == "a") == ["b", "c"]
    assert (part.simulated, part.cut_short, part.missed) == (3, 1, 0)
    part.end((4.0,))


def test_no_branch_is_looked_into_after_the_time_is_up_where_something_was_simulated_before() -> None:
    part = part_of(6)
    outer, inner, late = tree(part)
    assert searched([outer], dict.fromkeys("cdefg", 1.0), deadline=-inf, begun=1) == []
    assert (outer.opened, inner.opened, late.opened) == ([], [], [])
    assert [bound for bound, _ in part.left] == [(1.0,), (7.0,)]
    assert searched([tree(part_of(6))[0]], dict.fromkeys("cdefg", 1.0), deadline=-inf)


def test_a_leaf_whose_bound_rises_once_it_is_decided_waits_for_its_turn_and_may_be_ruled_out_or_vanish() -> None:
    risen: dict[str, Costs] = {"a": (6.0,), "c": (3.5,)}

    def leaf(name: Any, bound: float) -> Leaf:
        late = (lambda one: None if one == "d" else one) if name in "acd" else None
        return Leaf(deployment=name, bound=(bound,), late=late, closer=lambda one: risen[str(one)])

    leaves = [leaf("a", 1.0), leaf("c", 1.5), leaf("d", 1.7), leaf("b", 2.0), leaf("e", 5.0), leaf("f", 5.1)]
    part = part_of(len(leaves))
    assert searched([Queue(part, leaves)], {"a": 7.0, "b": 4.0, "c": 5.5, "e": 9.0, "f": 9.0}) == list("bcef")  # type: ignore[list-item]
    assert [str(one) for one in part.seen] == ["b", "c", "e", "f"]
    assert (part.simulated, part.beaten, part.least) == (4, 1, (6.0,))
    part.end((4.0,))
