"""What answers say of their load: whether a transient is measured, and whether the arrivals are all that limits it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from plan_cases import dense, make_cluster, make_model, make_problem

from apex_opt.errors import UsageError
from apex_opt.figures import load_objectives
from apex_opt.report.document import answer_document
from apex_opt.report.load import loaded
from apex_opt.report.tables import rendered
from apex_opt.schema import to_plain
from apex_opt.search import Problem, search
from apex_opt.simulator.transient import Transient
from apex_opt.workload import describe_trace
from formulations.plan_space import PlanSpace

MODEL = make_model((dense(), 4))


def problem(trace: str, slo: str = "", objective: str = "e2e_mean") -> Problem:
    return make_problem(MODEL, make_cluster(1), describe_trace(trace), slo, objective=objective)


def answer(*given: str) -> dict[str, Any]:
    asked = problem(*given)
    document = to_plain(answer_document("plan", asked, search(asked, PlanSpace()), {}))
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    return document


LIGHT = "poisson:rate=2,n=400,prompt=64,output=8"
BURST = "poisson:rate=50000,n=400,prompt=64,output=64"


def test_a_light_load_is_steady_and_no_transient() -> None:
    shown = answer(LIGHT)
    assert shown["steady"] is True
    transient = shown["transient"]
    assert transient == shown["best"]["metrics"]["transient"] | {"said": []}
    assert not transient["measured"]
    assert transient["arrivals_s"] == pytest.approx(shown["question"]["trace"]["duration_s"])
    assert transient["arrivals_s"] + transient["drain_s"] == pytest.approx(shown["best"]["metrics"]["makespan_s"])
    assert "transient" not in rendered(shown)


def test_a_burst_is_told_in_the_table_and_in_the_document() -> None:
    shown = answer(BURST)
    transient = shown["transient"]
    assert shown["steady"] is False
    assert transient["measured"]
    assert transient["backlog_growing"]
    assert transient["unfinished_at_last_arrival"] >= transient["waiting_at_last_arrival"] > 300
    flat = " ".join(rendered(shown).split())
    left = f"at the last arrival {transient['unfinished_at_last_arrival']} of 400 are unfinished, more than earlier on"
    assert "note: a transient is measured: requests come for " in flat
    assert left in flat
    assert "whether such a rate lasts is for --rate to say" in flat


@pytest.mark.parametrize(
    ("requests", "after", "said"),
    [
        (19_999, 1350.0, "whether such a rate lasts is for --rate to say"),
        (20_000, 1350.0, "too short to say that such a rate lasts: solve.py capacity finds one that does"),
        (20_000, 2700.0, "the queue grows, such a rate does not last"),
    ],
)
def test_a_trace_as_long_as_those_at_a_rate_is_not_sent_to_rate_again(requests: int, after: float, said: str) -> None:
    asked = problem(f"poisson:rate=60,n={requests},prompt=16,output=1")
    best = search(asked, PlanSpace()).best
    assert best is not None
    ends = Transient(arrivals_s=332.0, drain_s=45.0, waiting=17, unfinished=1399, before=1300.0, after=after)
    (told,) = loaded(asked, replace(best, transient=ends))["transient"].said
    assert said in told
    assert ("--rate" in told) is (requests < 20_000)


def test_requests_that_come_at_once_are_told_as_such() -> None:
    shown = answer("static:n=40,prompt=64,output=8")
    assert shown["steady"] is False
    assert shown["transient"]["said"][0].startswith("a transient is measured: 40 requests at once, answered in ")


def test_a_closed_loop_is_neither_steady_nor_not() -> None:
    shown = answer("closed:concurrency=4,n=400,prompt=64,output=8")
    assert shown["steady"] is None
    assert shown["transient"]["said"] == []


@pytest.mark.parametrize(
    ("clients", "requests", "matters"), [(4, 40, False), (1, 10, False), (1, 2, False), (4, 12, True)]
)
def test_the_end_of_a_closed_loop_is_told_where_it_is_much_of_the_loop(
    clients: int, requests: int, *, matters: bool
) -> None:
    transient = answer(f"closed:concurrency={clients},n={requests},prompt=64,output=8")["transient"]
    assert (transient["measured"], bool(transient["said"])) == (matters, matters)


@pytest.mark.parametrize("objective", ["throughput", "goodput"])
def test_a_throughput_limited_by_the_arrivals_points_to_capacity(objective: str) -> None:
    slo = "ttft_p95<=1s"
    shown = answer(LIGHT, slo, objective)
    assert shown["limited_by_arrivals"] is True
    assert f"note: {objective} is limited by the arrivals" in rendered(shown)
    assert "solve.py capacity" in " ".join(rendered(shown).split())
    assert answer(BURST, "ttft_p95<=100s", objective)["limited_by_arrivals"] is False
    assert answer(LIGHT, slo)["limited_by_arrivals"] is False
    assert answer("closed:concurrency=4,n=40,prompt=64,output=8", slo, objective)["limited_by_arrivals"] is False


def test_an_answer_without_a_plan_says_nothing_of_its_load() -> None:
    shown = answer(LIGHT, "ttft_p95<=1us")
    assert (shown["steady"], shown["transient"], shown["limited_by_arrivals"]) == (None, None, None)
    assert "transient" not in rendered(shown)


ONE_TOKEN = "poisson:rate=2,n=20,prompt=64,output=1"


@pytest.mark.parametrize("name", ["tpot_mean", "itl_p95", "itl_max", "e2e_mean,tpot_p95"])
def test_an_objective_without_a_value_on_the_trace_is_refused_in_one_line(name: str) -> None:
    first, *then = load_objectives(name)
    asked = problem(ONE_TOKEN)
    with pytest.raises(
        UsageError, match=r"--objective: \w+ has no value on .*, where every answer is one token"
    ) as caught:
        replace(asked, objective=first, then=tuple(then))
    assert "\n" not in str(caught.value)
    assert replace(problem(LIGHT), objective=first, then=tuple(then))


def test_goals_without_a_value_on_the_trace_are_said_to_be_vacuous() -> None:
    shown = answer(ONE_TOKEN, "ttft_p95<=1s,tpot_p95<=1us,itl<=1us@99%")
    assert shown["question"]["vacuous_slo"] == ["tpot_p95<=1us", "itl<=1us@99%"]
    flat = " ".join(rendered(shown).split())
    assert "note: tpot_p95<=1us, itl<=1us@99%: holds whatever the plan, as every answer is one token" in flat
    assert answer(LIGHT, "tpot_p95<=1s")["question"]["vacuous_slo"] == []
