"""The parts of a ledger add up, and the gap is what is left to be won."""

from __future__ import annotations

from typing import Any

import pytest
from search_cases import ROWS, SPACE, every_of, problem_of

from apex_opt.errors import FormulationError
from apex_opt.figures import load_objective
from apex_opt.search import Ledger, Part, search
from apex_opt.search.ledger import how_far

AIM = load_objective("e2e_mean")


def part(*, simulated: int = 0, **changes: Any) -> Part:
    """A part of which so many are simulated."""
    fields: dict[str, Any] = {"shape": "single", "types": ("a",), "objective": AIM, "space": 10, "infeasible": {}}
    fields["seen"] = [f"plan {place}" for place in range(simulated)]
    return Part(**(fields | changes))


@pytest.mark.parametrize(
    ("best", "left", "share"),
    [
        ((10.0,), [], 0.0),
        ((10.0,), [(10.0,), (11.0,)], 0.0),
        ((10.0,), [(10.0 * (1 - 1e-12),)], 0.0),  # what bounds are lowered by
        ((10.0,), [(9.0,), (8.0,), (12.0,)], 0.2),
        ((-10.0,), [(-15.0,)], 0.5),
        ((10.0, 4.0), [(10.0, 4.0), (11.0, 1.0)], 0.0),
        ((10.0, 4.0), [(10.0, 3.0), (11.0, 1.0)], 0.25),  # as good by the first, better by the second
        ((10.0, 4.0), [(10.0 * (1 - 1e-12), 9.0), (10.0, 3.0)], 0.25),
        ((10.0, 4.0), [(9.0, 9.0)], 0.1),
    ],
)
def test_the_gap_is_that_of_the_first_objective_not_settled(
    best: tuple[float, ...], left: list[tuple[float, ...]], share: float
) -> None:
    assert how_far(best, left) == pytest.approx(share, abs=1e-15)
    assert (how_far(best, left) == 0) == (share == 0)


def test_a_part_that_does_not_add_up_is_refused() -> None:
    whole: dict[str, Any] = {
        "infeasible": {"memory": 2},
        "out_of_reach": 1,
        "beaten": 3,
        "least": (5.0,),
        "repeated": 1,
    }
    part(**whole, simulated=2, cut_short=1, missed=1, left=[((1.0,), 1)]).end((4.0,))
    for wrong in (1, 3):
        with pytest.raises(FormulationError, match=r"single on a: 10 deployments, (9|11) accounted for"):
            part(**whole, simulated=wrong, left=[((1.0,), 1)]).end((4.0,))


def test_what_is_left_and_no_better_than_the_last_to_show_is_ruled_out_by_its_bound() -> None:
    one = part(space=6, simulated=1, left=[((3.0,), 2), ((4.0,), 1), ((9.0,), 2)])
    one.end((4.0,))
    assert (one.left, one.waiting, one.beaten, one.least, one.last) == (
        [((3.0,), 2), ((4.0,), 1)],
        3,
        2,
        (9.0,),
        (4.0,),
    )


def test_a_deployment_that_turns_out_to_be_another_or_none_is_counted_as_such() -> None:
    one, pipe = part(space=1), part(space=1, shape="pipeline", infeasible={"memory": 0})
    one.vanish()
    pipe.vanish()
    assert (one.repeated, one.infeasible, pipe.repeated, pipe.infeasible) == (1, {}, 0, {"memory": 1})


def test_the_least_bound_of_those_ruled_out_is_kept() -> None:
    one = part()
    one.beat((5.0, 1.0), 2)
    one.beat((4.0, 9.0), 3)
    one.beat((1.0, 1.0), 0)
    assert (one.beaten, one.least, one.bounded) == (5, (4.0, 9.0), 5)


def test_a_ledger_is_optimal_where_nothing_left_of_any_part_can_be_better() -> None:
    done, open_ = part(space=1, simulated=1, best=(5.0,)), part(space=1, left=[((4.0,), 1)], best=(6.0,))
    assert Ledger(parts=(done,), best=(5.0,)).optimal
    ledger = Ledger(parts=(done, open_), best=(5.0,))
    assert (ledger.optimal, ledger.waiting) == (False, 1)
    assert ledger.gap == pytest.approx(0.2)
    assert open_.gap == pytest.approx(1 / 3)
    even = Ledger(parts=(done, part(space=1, left=[((5.0,), 1)], best=(6.0,))), best=(5.0,))
    assert (even.optimal, even.gap) == (True, 0.0)
    short = Ledger(parts=(done, part(space=1, simulated=1, complete=False)), best=(5.0,))
    assert (short.optimal, short.gap) == (False, None)
    none = Ledger(parts=(part(space=1, infeasible={"memory": 1}),))
    assert (none.optimal, none.gap) == (True, None)
    before = part(space=1, simulated=1, before=(part(space=1, left=[((1.0,), 1)], best=(2.0,)),), best=(5.0,))
    assert not Ledger(parts=(before,), best=(5.0,)).optimal


@pytest.mark.parametrize("place", [*range(len(ROWS))][::2])
@pytest.mark.parametrize("time_limit_s", [0.0, 0.02])
def test_where_time_was_up_every_deployment_is_counted_and_the_gap_holds_the_best(
    place: int, time_limit_s: float
) -> None:
    problem = problem_of(place)
    answer = search(problem, SPACE, time_limit_s=time_limit_s)
    ledger = answer.ledger
    for one in ledger.parts:
        counted = one.bounded + one.repeated + one.simulated + one.waiting
        assert one.space == sum(one.infeasible.values()) + counted
    assert ledger.waiting == sum(one.waiting for one in ledger.parts)
    if any(aim.tolerance for aim in problem.objectives):
        return
    costs = [problem.costs(one.metrics) for one in every_of(place) if one.meets_slos]
    if answer.best is None:
        assert (answer.status == "unknown") == (ledger.waiting > 0)
        assert ledger.waiting or not costs
        return
    assert answer.status == ("optimal" if ledger.optimal else "feasible")
    found = problem.costs(answer.best.metrics)
    assert ledger.gap is not None
    if ledger.gap == 0:
        assert found == min(costs)
    else:
        assert found[0] - min(costs)[0] <= ledger.gap * abs(found[0]) * (1 + 1e-9) or found[0] == min(costs)[0]
