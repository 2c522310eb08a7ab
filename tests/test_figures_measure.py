"""apex_opt.figures.measure: what requests saw, against a few lines of arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from apex_opt.figures import Goal, parse_goals
from apex_opt.figures.measure import each, measure
from apex_opt.figures.registry import STATISTICS, figure
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator.outcome import BatchCounts, Outcome
from apex_opt.workload import Trace, make_trace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.figures.metrics import Metrics

MS = 1_000_000
# (arrival, first, finish) in ms, prompt and output tokens.
ROWS = [(1000, 1010, 1050, 7, 5), (1020, 1050, 1050, 3, 1), (1030, 1100, 1400, 9, 4), (1040, 1080, 1100, 2, 3)]
TTFT = [0.010, 0.030, 0.070, 0.040]
TPOT = [0.010, 0.100, 0.010]  # request 1 has one token
E2E = [0.050, 0.030, 0.370, 0.060]


def run(rows: list[tuple[int, int, int, int, int]] = ROWS) -> tuple[Outcome, Trace]:
    arrival, first, finish, prompt, output = (list(column) for column in zip(*rows, strict=True))
    times = [np.array(column, np.int64) * MS for column in (arrival, first, finish)]
    outcome = Outcome(
        arrival_ns=times[0],
        first_token_ns=times[1],
        finish_ns=times[2],
        preemptions=0,
        batches=1,
        busy_ns=np.zeros((1, 1), np.int64),
        counts=BatchCounts.empty(EngineSettings(max_num_seqs=4, max_num_batched_tokens=4)),
    )
    return outcome, make_trace(name="t", arrival_ns=times[0], prompt=prompt, output=output)


def told(
    outcome: Outcome,
    trace: Trace,
    goals: Sequence[Goal] = (),
    *,
    limits: Sequence[Goal] | None = None,
    max_model_len: int = 100,
    request_ns: int = 0,
    percentiles: Sequence[str] = (),
    **known: float,
) -> Metrics:
    """What is told of a run; by default a request must keep to the goals that mean something for one."""
    limits = [goal for goal in goals if goal.of_requests] if limits is None else limits
    run = outcome.as_run(trace, max_model_len, outside_ns=request_ns, limits=limits, **known)
    return measure(run, goals, percentiles=percentiles)


def measured(goals: str = "", *, max_model_len: int = 100, request_ns: int = 0) -> Metrics:
    return told(*run(), parse_goals(goals) if goals else (), max_model_len=max_model_len, request_ns=request_ns)


@pytest.mark.parametrize(("name", "values"), [("ttft", TTFT), ("tpot", TPOT), ("e2e", E2E)])
def test_statistics_are_those_of_numpy(name: str, values: list[float]) -> None:
    expected = {
        "mean": np.mean(values),
        "p50": np.percentile(values, 50),
        "p90": np.percentile(values, 90),
        "p95": np.percentile(values, 95),
        "p99": np.percentile(values, 99),
        "max": np.max(values),
    }
    assert tuple(expected) == STATISTICS
    assert measured().latency_s[name] == pytest.approx(expected, rel=1e-12)


def test_rates_are_over_the_time_from_first_arrival_to_last_token() -> None:
    metrics = measured()
    assert metrics.value("makespan") == pytest.approx(0.4)
    assert metrics.value("throughput") == pytest.approx(4 / 0.4)
    assert metrics.output_tokens_per_s == pytest.approx((5 + 1 + 4 + 3) / 0.4)
    assert metrics.total_tokens_per_s == pytest.approx((7 + 3 + 9 + 2 + 13) / 0.4)


def test_the_makespan_is_no_less_than_the_longest_latency_since_the_first_arrival() -> None:
    outcome, trace = run()
    metrics = measured(request_ns=50_000_000)
    assert metrics.value("makespan") == pytest.approx(0.4 + 0.05)
    since = (trace.arrival_ns - trace.arrival_ns.min()) / 1e9
    latest = since + each(outcome.as_run(trace, 100, outside_ns=50_000_000), figure("e2e"))
    assert metrics.value("makespan") == pytest.approx(latest.max(), rel=1e-12)
    assert metrics.value("throughput") == pytest.approx(4 / 0.45)


def test_tpot_of_one_token_is_nan_and_left_out() -> None:
    outcome, trace = run()
    values = {name: each(outcome.as_run(trace, 100), figure(name)) for name in ("ttft", "tpot", "e2e")}
    assert np.isnan(values["tpot"]).tolist() == [False, True, False, False]
    assert not np.isnan(values["ttft"]).any() and not np.isnan(values["e2e"]).any()
    assert measured().latency_s["tpot"]["mean"] == pytest.approx(0.04)


def test_tokens_the_model_has_no_room_for_are_not_counted() -> None:
    """With a length of 10 request 0 (7 + 5) generates 3 and request 2 (9 + 4) only 1."""
    metrics = measured(max_model_len=10)
    assert metrics.output_tokens_per_s == pytest.approx((3 + 1 + 1 + 3) / 0.4)
    assert metrics.latency_s["tpot"] == pytest.approx(
        {"mean": 0.015, "p50": 0.015, "p90": 0.019, "p95": 0.0195, "p99": 0.0199, "max": 0.02}
    )


def test_time_outside_the_engine_is_in_ttft_and_e2e_but_not_between_tokens() -> None:
    plain, later = measured(), measured(request_ns=3 * MS)
    for statistic in STATISTICS:
        assert later.latency_s["ttft"][statistic] == pytest.approx(plain.latency_s["ttft"][statistic] + 0.003)
        assert later.latency_s["e2e"][statistic] == pytest.approx(plain.latency_s["e2e"][statistic] + 0.003)
    assert later.latency_s["tpot"] == plain.latency_s["tpot"]


@pytest.mark.parametrize(
    ("goal", "met", "attainment"),
    [
        ("ttft_max<=70ms", True, 1.0),
        ("ttft_max<=69ms", False, 0.75),
        ("ttft_p50<=35ms", True, 0.5),
        ("ttft_p50<=34ms", False, 0.5),
        ("ttft<=40ms@75%", True, 0.75),
        ("ttft<=40ms@76%", False, 0.75),
        ("tpot_mean<=40ms", True, 2 / 3),
        ("tpot<=10ms@66%", True, 2 / 3),
        ("tpot<=10ms@67%", False, 2 / 3),
        ("e2e_mean<=128ms", True, 0.75),
        ("e2e_mean<=127ms", False, 0.75),
        ("throughput>=10", True, 1.0),
        ("throughput>=10.01", False, 0.0),
    ],
)
def test_goals_are_judged_by_their_statistic_and_attained_request_by_request(
    goal: str, met: bool, attainment: float
) -> None:
    metrics = measured(goal)
    assert metrics.slo_met == {goal: met}
    assert metrics.attainment == {goal: pytest.approx(attainment)}


def test_several_goals_are_judged_one_by_one() -> None:
    metrics = measured("ttft_max<=70ms,e2e_max<=300ms,throughput>=5")
    assert list(metrics.slo_met.values()) == [True, False, True]
    assert list(metrics.attainment.values()) == [1.0, 0.75, 1.0]


def test_a_goal_counts_time_outside_the_engine() -> None:
    assert measured("ttft_max<=70ms", request_ns=0).slo_met == {"ttft_max<=70ms": True}
    assert measured("ttft_max<=70ms", request_ns=1).slo_met == {"ttft_max<=70ms": False}


def test_a_tpot_goal_holds_where_nobody_has_two_tokens() -> None:
    outcome, trace = run([(0, 10, 10, 4, 1), (5, 20, 20, 4, 1)])
    metrics = told(outcome, trace, parse_goals("tpot_p95<=1ms,tpot<=1ns@99%"))
    assert all(metrics.slo_met.values()) and set(metrics.attainment.values()) == {1.0}
    assert all(math.isnan(value) for value in metrics.latency_s["tpot"].values())


def test_a_run_without_duration_has_finite_rates() -> None:
    outcome, trace = run([(5, 5, 5, 4, 1)])
    metrics = told(outcome, trace)
    assert metrics.value("makespan") == pytest.approx(1e-9)
    assert math.isfinite(metrics.value("throughput"))


@pytest.mark.parametrize(
    ("goals", "good"),
    [
        ("ttft_max<=40ms", 3),  # by its own TTFT, whatever the statistic
        ("ttft_p50<=40ms,e2e<=50ms@1%", 2),
        ("tpot_p95<=10ms", 3),  # a single token has no time per token
        ("ttft_p95<=9ms", 0),
        ("ttft_p95<=70ms,ttft_mean<=1ms,throughput>=100", 4),  # means and rates bind no request
    ],
)
def test_goodput_counts_requests_within_all_limits_that_mean_something_for_one(goals: str, good: int) -> None:
    assert measured(goals).value("goodput") == pytest.approx(good / 0.4)
    assert measured(goals).value("goodput") == measured(goals).value("goodput")


def test_goodput_is_unknown_where_requests_have_no_limits_and_judged_by_those_given_elsewhere() -> None:
    assert math.isnan(measured("ttft_mean<=1s").value("goodput"))
    assert math.isnan(measured().value("goodput"))
    outcome, trace = run()
    own = parse_goals("ttft_max<=40ms")
    metrics = told(outcome, trace, parse_goals("goodput>=7.5"), limits=own)
    assert metrics.value("goodput") == pytest.approx(7.5)
    assert metrics.slo_met == {"goodput>=7.5": True}


def test_energy_and_cost_are_told_for_the_run_and_for_a_token() -> None:
    outcome, trace = run()
    goals = "energy<=26J,energy_per_token<=1.9J,cost<=36$/h,cost_per_mtoken<=307.6$,cost_per_mtoken<=307.7$"
    slos = [slo for goal in goals.split(",") for slo in parse_goals(goal)]
    metrics = told(outcome, trace, slos, joules=26.0, cost_per_h=36.0)
    assert metrics.output_tokens == 13
    assert [metrics.value(name) for name in ("energy", "energy_per_token", "cost", "makespan")] == [
        26.0,
        2.0,
        36.0,
        0.4,
    ]
    assert metrics.value("cost_per_mtoken") == pytest.approx(0.01 * 0.4 / 13 * 1e6)  # 0.01 $ a second: 307.69
    assert list(metrics.slo_met.values()) == [True, False, True, False, True]
    assert list(metrics.attainment.values()) == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert math.isnan(measured().value("energy")) and math.isnan(measured().value("cost_per_mtoken"))


def test_further_percentiles_stand_in_their_place() -> None:
    outcome, trace = run()
    metrics = told(outcome, trace, percentiles=("p99.9", "p12.5"))
    assert list(metrics.latency_s["e2e"]) == ["mean", "p12.5", "p50", "p90", "p95", "p99", "p99.9", "max"]
    assert metrics.latency_s["e2e"]["p12.5"] == pytest.approx(np.percentile(E2E, 12.5))


def test_times_between_tokens_weigh_the_same_and_are_judged_by_their_own_share() -> None:
    outcome, trace = run()
    gaps = np.array([5, 10, 10, 15, 100, 100, 100, 10, 10]) * MS
    logged = replace(outcome, gaps_ns=gaps)
    slos = parse_goals("itl_mean<=40ms,itl<=15ms@66%,itl<=15ms@67%")
    metrics = told(logged, trace, slos, request_ns=3 * MS)
    assert metrics.latency_s["itl"]["mean"] == pytest.approx(0.040)
    assert metrics.latency_s["itl"]["p50"] == pytest.approx(0.010)
    assert list(metrics.slo_met.values()) == [True, True, False]
    assert list(metrics.attainment.values()) == pytest.approx([2 / 3] * 3)
    assert "itl" not in measured().latency_s
    nobody = told(replace(outcome, gaps_ns=gaps[:0]), trace, parse_goals("itl_p95<=1ms"))
    assert nobody.slo_met == {"itl_p95<=1ms": True}
