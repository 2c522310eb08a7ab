"""Objectives read the right figure and say which way is better."""

from __future__ import annotations

import math

import pytest

from apex_opt.cost import Usage
from apex_opt.errors import UnknownNameError
from apex_opt.search import load_objective
from apex_opt.search.objective import NAMES
from apex_opt.simulator.metrics import STATISTICS, Metrics

LATENCY = {
    metric: {statistic: 100.0 * row + column for column, statistic in enumerate(STATISTICS)}
    for row, metric in enumerate(("ttft", "tpot", "e2e"))
}
METRICS = Metrics(
    latency_s=LATENCY,
    makespan_s=7.0,
    requests_per_s=3.0,
    output_tokens_per_s=11.0,
    total_tokens_per_s=13.0,
    attainment={},
    slo_met={},
)
USAGE = Usage(energy_j=500.0, idle_energy_j=100.0, mfu=0.1, mbu=0.2, operations_s={})


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_reads_its_own_figure(name: str) -> None:
    others = {"makespan": (7.0, "s"), "throughput": (3.0, "requests/s"), "energy": (500.0, "J")}
    metric, _, statistic = name.partition("_")
    value, unit = others[name] if name in others else (LATENCY[metric][statistic], "s")
    objective = load_objective(name)
    assert objective.value(METRICS, USAGE) == value
    assert objective.unit == unit


def test_less_is_better_except_for_throughput() -> None:
    for name in NAMES:
        objective = load_objective(name)
        assert objective.maximise == (name == "throughput")
        assert (objective.cost(2.0) > objective.cost(1.0)) != objective.maximise


def test_a_latency_that_no_request_has_costs_nothing() -> None:
    assert load_objective("tpot_p99").cost(math.nan) == 0.0


@pytest.mark.parametrize("name", ["", "tftt_mean", "ttft", "ttft_p42", "Energy", "throughput_mean"])
def test_an_unknown_objective_is_refused_with_those_near_it(name: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown objective"):
        load_objective(name)
    with pytest.raises(UnknownNameError, match=r"did you mean .*ttft_mean"):
        load_objective("tftt_mean")
