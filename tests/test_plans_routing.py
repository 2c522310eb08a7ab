"""apex_opt.plans.routing: routers by name, and the plans that there are with a choice of them."""

from __future__ import annotations

import pytest
from plan_cases import dense, make_cluster, make_model, make_problem, random_trace

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.oracle.checks import OF_CUTS
from apex_opt.oracle.space import space, tally
from apex_opt.plans.plan import parse_plan, repeated
from apex_opt.plans.routing import ROUTINGS, Routing, count_repeated, parse_routings, parse_sides
from formulations.plan_space import PlanSpace

CHOICE: tuple[Routing, ...] = ("pull", "least_loaded", "session")


def test_routers_are_read_by_their_names_and_none_twice() -> None:
    assert parse_routings(",".join(ROUTINGS)) == ROUTINGS
    assert parse_routings(" pull , session") == ("pull", "session")
    for name in ("best", "nope"):  # the latter looks like dynamo, which it is not
        with pytest.raises(UnknownNameError, match=rf"unknown routing '{name}'; known: cache_aware, .*, vllm_dp"):
            parse_routings(f"pull,{name}")
    with pytest.raises(UsageError, match="names a router twice"):
        parse_routings("pull,pull")


def test_routers_of_two_sides_are_the_same_or_have_a_stroke_between_them() -> None:
    assert parse_sides("pull,session") == (("pull", "session"), ("pull", "session"))
    assert parse_sides("vllm_dp/pull, session") == (("vllm_dp",), ("pull", "session"))
    for text in ("vllm_dp", "pull/vllm_dp"):
        with pytest.raises(UsageError, match="name another router for the decode instances"):
            parse_sides(text)
    for text in ("pull/pull/pull", "pull/b/c", "pull/", "/pull", "/"):
        with pytest.raises(UsageError, match=f"routing '{text}' is not of two sides; name routers before prefill and"):
            parse_sides(text)


@pytest.mark.parametrize("routings", [(), CHOICE])
@pytest.mark.parametrize("most", range(5))
def test_one_replica_has_no_router_and_several_have_each(most: int, routings: tuple[Routing, ...]) -> None:
    cut = parse_plan("tp2", make_model((dense(), 4)))
    found = [routed.times(count) for routed, counts in repeated(cut, most, routings) for count in counts]
    expected = {(1, None)} if most else set()
    expected |= {(count, route) for count in range(2, most + 1) for route in routings or (None,)}
    assert len(found) == len(expected) == count_repeated(most, routings)
    assert {(plan.replicas, plan.route) for plan in found} == expected
    assert sum("route=" in str(plan) for plan in found) == (len(found) - 1 if routings and most else 0)


def test_the_space_with_a_choice_of_routers_is_counted_as_it_is_listed() -> None:
    problem = make_problem(make_model((dense(), 6)), make_cluster(4), random_trace(0, 8), routings=CHOICE)
    instance = problem.instance()
    listed = list(space(instance))
    assert len(set(listed)) == len(listed)
    assert {plan.route for plan in listed} == {None, *CHOICE}
    counted = tally(instance)
    assert counted.space == PlanSpace().count(instance, ())
    assert counted.infeasible["divisibility"] == counted.space - PlanSpace().count(instance, OF_CUTS[:1])
