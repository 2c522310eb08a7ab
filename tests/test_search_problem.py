"""A problem: its offers, what it asks for, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_cases import beside, dense, make_cluster, make_model, make_problem, random_trace

from apex_opt.cluster.tree import Tree
from apex_opt.errors import UsageError
from apex_opt.figures import load_objective, parse_goals
from apex_opt.plans.plan import parse_plan
from apex_opt.workload import make_trace

MODEL = make_model((dense(), 4))
ONE = make_problem(MODEL, make_cluster(4, name="one"), random_trace(1, 9), "ttft_p95<=1s")


def test_a_type_alone_has_its_own_gpus_and_no_more_than_a_deployment_may_take() -> None:
    link = make_cluster(1, 2).inter
    two = beside(ONE, make_cluster(2, name="other"), max_devices=3, between=link)
    assert (two.mixed, two.types, two.between) == (True, ("one", "other"), link)
    first, second = two.alone(0), two.alone(1)
    assert (first.offers, first.between, first.max_devices, first.mixed) == (two.offers[:1], None, 3, False)
    assert (second.types, second.max_devices, second.instance().max_devices) == (("other",), 2, 2)
    assert second.cluster is two.offers[1].cluster


def test_what_is_offered_is_exchanged_for_the_only_type() -> None:
    changed = ONE.offering(clocks=(None, 900), weight_formats=("fp8",))
    assert (changed.offer.clocks, changed.offer.weight_formats, changed.cluster) == ((None, 900), ("fp8",), ONE.cluster)
    with pytest.raises(ValueError, match="too many values"):
        beside(ONE, make_cluster(1, name="other")).offering(clocks=(None,))


def test_free_gpus_are_those_of_the_tree_where_some_are_taken() -> None:
    assert ONE.offer.free == 4
    tree = Tree.of(make_cluster(3), set())
    assert replace(ONE.offer, tree=tree).free == 3


def test_goods_are_counted_against_goals_that_mean_something_for_a_request() -> None:
    with pytest.raises(UsageError, match="goodput counts requests within their latency goals, and there are none"):
        replace(ONE, slos=parse_goals("energy<=1J"), objective=load_objective("goodput"))
    good = replace(ONE, objective=load_objective("goodput"))
    assert [goal.text for goal in good.per_request] == ["ttft_p95<=1s"]
    asked = replace(good, request_slos=parse_goals("tpot_max<=1s"))
    assert [goal.text for goal in asked.per_request] == ["tpot_max<=1s"]


def test_a_cost_needs_the_price_of_every_type() -> None:
    two = beside(ONE, make_cluster(2, name="other", price_per_h=None))
    with pytest.raises(UsageError, match="no price is stated for other"):
        replace(two, objective=load_objective("cost"))
    assert not two.tells_cost
    assert replace(ONE, objective=load_objective("cost")).tells_cost


def test_times_between_tokens_are_no_objective_where_every_answer_is_one_token() -> None:
    trace = make_trace(name="one token", arrival_ns=[0, 1], prompt=[5, 5], output=[1, 1])
    problem = replace(ONE, trace=trace, slos=parse_goals("tpot_max<=1ms,ttft_max<=1s"))
    assert [goal.text for goal in problem.vacuous] == ["tpot_max<=1ms"]
    assert any("holds whatever the plan" in remark for remark in problem.remarks)
    with pytest.raises(UsageError, match="itl_p99 has no value on one token"):
        replace(problem, objective=load_objective("itl_p99"))


def test_remarks_of_every_type_are_told_once() -> None:
    offers = [replace(ONE.offer, notes=("a note",)), replace(ONE.offer, notes=("a note", "another"))]
    offers[1] = replace(offers[1], cluster=make_cluster(1, name="other", cuda=False))
    problem = replace(ONE, offers=tuple(offers), notes=("first",))
    told = problem.remarks
    assert told[-4:-1] == ("first", "a note", "another")
    assert told[-1].startswith("other does not run CUDA")


def test_settings_of_a_plan_are_its_limits_and_no_asynchronous_batches_in_a_pipeline() -> None:
    assert ONE.settings_for(parse_plan("tp1 seqs=3", MODEL)).max_num_seqs == 3
    settings = replace(ONE, settings=replace(ONE.settings, async_scheduling=True))
    assert settings.settings_for(parse_plan("tp1", MODEL)).async_scheduling
    assert not settings.settings_for(parse_plan("pp2", MODEL)).async_scheduling
