"""Objectives read the right figure and say which way is better."""

from __future__ import annotations

import math

import pytest

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.search import load_latency, load_objective, load_objectives
from apex_opt.search.objective import NAMES
from apex_opt.simulator.metrics import Metrics
from apex_opt.workload.slo import FIGURES, LATENCIES, STATISTICS

LATENCY = {
    metric: {statistic: 100.0 * row + column for column, statistic in enumerate(STATISTICS)}
    for row, metric in enumerate(LATENCIES)
}
METRICS = Metrics(
    latency_s=LATENCY,
    makespan_s=7.0,
    requests_per_s=3.0,
    output_tokens_per_s=11.0,
    total_tokens_per_s=13.0,
    output_tokens=40,
    goodput_per_s=2.0,
    energy_j=500.0,
    cost_per_h=36.0,
    attainment={},
    slo_met={},
)
OTHERS = {
    "makespan": (7.0, "s"),
    "throughput": (3.0, "requests/s"),
    "goodput": (2.0, "requests/s"),
    "energy": (500.0, "J"),
    "energy_per_token": (12.5, "J/token"),
    "cost": (36.0, "$/h"),
    "cost_per_mtoken": (36.0 * 7.0 / 3600 / 40 * 1e6, "$/Mtoken"),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_reads_its_own_figure(name: str) -> None:
    metric, _, statistic = name.partition("_")
    value, unit = OTHERS[name] if name in OTHERS else (LATENCY[metric][statistic], "s")
    objective = load_objective(name)
    assert objective.value(METRICS) == value
    assert objective.unit == unit


def test_less_is_better_except_for_requests_per_second() -> None:
    for name in NAMES:
        objective = load_objective(name)
        assert objective.maximise == (name in ("throughput", "goodput"))
        assert (objective.cost(2.0) > objective.cost(1.0)) != objective.maximise


def test_a_latency_that_no_request_has_costs_nothing() -> None:
    assert load_objective("tpot_p99").cost(math.nan) == 0.0


@pytest.mark.parametrize("name", ["", "tftt_mean", "ttft", "energy_mean", "Energy", "throughput_mean"])
def test_an_unknown_objective_is_refused_with_those_near_it(name: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown objective"):
        load_objective(name)
    with pytest.raises(UnknownNameError, match=r"did you mean .*ttft_mean"):
        load_objective("tftt_mean")


@pytest.mark.parametrize(("name", "statistic"), [("e2e_p99.9", "p99.9"), ("itl_p42", "p42"), ("ttft_p99.50", "p99.5")])
def test_any_percentile_of_a_latency_is_an_objective_with_one_name(name: str, statistic: str) -> None:
    objective = load_objective(name)
    assert objective.name == f"{objective.metric}_{statistic}"
    assert objective.statistic == statistic


@pytest.mark.parametrize("name", ["e2e_p0", "e2e_p100.5", "e2e_q95", "e2e_attain", "itl_p"])
def test_other_statistics_are_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"statistic of .*any percentile above 0 to 100"):
        load_objective(name)


def test_several_objectives_keep_their_order_and_their_tolerances() -> None:
    found = load_objectives("energy~2.5%, cost ,e2e_p95")
    assert [(one.name, one.tolerance) for one in found] == [("energy", 0.025), ("cost", 0.0), ("e2e_p95", 0.0)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cost", "cost,e2e_mean"),
        ("cost_per_mtoken", "cost_per_mtoken,e2e_mean"),
        ("energy,cost", "energy,cost,e2e_mean"),
        ("energy_per_token~2%,cost", "energy_per_token,cost,e2e_mean"),
        ("cost,ttft_p95", "cost,ttft_p95"),
        ("cost,throughput", "cost,throughput"),
        ("throughput", "throughput"),
    ],
)
def test_costs_alone_leave_ties_to_the_latency(text: str, names: str) -> None:
    assert ",".join(objective.name for objective in load_objectives(text)) == names


def test_a_latency_is_no_other_figure() -> None:
    assert load_latency("ttft_p99.9") == load_objective("ttft_p99.9")
    for name in FIGURES:
        with pytest.raises(UsageError, match=f"--latency: {name} is no latency; give one of ttft, tpot, e2e, itl with"):
            load_latency(name)
    with pytest.raises(UnknownNameError):
        load_latency("speed")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("energy,e2e_p95,energy", "names energy twice"),
        ("energy~2%,energy", "names energy twice"),
        ("energy~2%", "has a tolerance and nothing after it"),
        ("energy~2,e2e_p95", "a tolerance is a share above 0% and at most 1000%"),
        ("energy~0%,e2e_p95", "a tolerance is a share"),
        ("energy~1000.1%,e2e_p95", "a tolerance is a share"),
        ("energy~-1%,e2e_p95", "a tolerance is a share"),
        ("energy~x%,e2e_p95", "a tolerance is a share"),
        ("energy~1e1%,e2e_p95", "a tolerance is a share"),
    ],
)
def test_objectives_that_cannot_be_ordered_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_objectives(text)
    assert "\n" not in str(caught.value)


def test_an_empty_part_of_a_list_is_no_objective() -> None:
    with pytest.raises(UnknownNameError, match="unknown objective ''"):
        load_objectives("energy,,e2e_p95")


def test_near_the_best_is_within_the_tolerance_on_the_better_side() -> None:
    energy, rate = load_objectives("energy~2%,throughput~10%,cost")[:2]
    assert [goal.text for goal in energy.near(100.0)] == ["energy<=102J"]
    assert [goal.text for goal in rate.near(100.0)] == ["throughput>=90"]
    exact = load_objective("e2e_p99.9").near(0.1)[0]
    assert exact.limit == 0.1
    # Where nobody has the latency, or the best is nothing at all, every plan is as good.
    assert load_objective("tpot_mean").near(math.nan) == ()
    assert load_objective("goodput").near(0.0) == ()
