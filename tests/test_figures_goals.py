"""apex_opt.figures.goals: forms, units, exactness, and what is refused; objectives read the right figure."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.errors import ApexError, UnknownNameError, UsageError
from apex_opt.figures import Goal, load_latency, load_objective, load_objectives, parse_goals
from apex_opt.figures.measure import percent
from apex_opt.figures.metrics import Metrics
from apex_opt.figures.registry import STATISTICS, names, per_item, per_run
from apex_opt.report.layout import amount, seconds
from apex_opt.search.answer import reached

FIGURES = {one.name: one.unit.name for one in per_run()}
LATENCIES = tuple(one.name for one in per_item())
AT_LEAST = tuple(one.name for one in per_run() if one.maximise)


@pytest.mark.parametrize("metric", LATENCIES)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_every_latency_takes_every_statistic(metric: str, statistic: str) -> None:
    (goal,) = parse_goals(f"{metric}_{statistic}<=500ms")
    assert (goal.metric, goal.statistic, goal.limit, goal.fraction) == (metric, statistic, 0.5, None)


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("7ns", 7e-9),
        ("7us", 7e-6),
        ("7ms", 0.007),
        ("7s", 7.0),
        ("7m", 420.0),
        ("7min", 420.0),
        ("0.1s", 0.1),
        (".5s", 0.5),
        ("1e-3s", 0.001),
        ("300MS", 0.3),
        ("1.7ms", 0.0017),
    ],
)
def test_units_give_the_nearest_float_in_seconds(limit: str, seconds: float) -> None:
    assert parse_goals(f"ttft_p95<={limit}")[0].limit == seconds


def test_several_goals_by_commas_or_spaces_in_their_order() -> None:
    expected = ["ttft_p95<=500ms", "tpot_p95<=50ms", "e2e<=10s@99%", "throughput>=10"]
    for text in (
        "ttft_p95<=500ms,tpot_p95<=50ms,e2e<=10s@99%,throughput>=10",
        "ttft_p95<=500ms tpot_p95<=50ms e2e<=10s@99% throughput>=10",
        " ttft_p95 <= 500ms, tpot_p95<= 50ms ,, e2e<=10s @ 99%\n throughput >= 10.0, ",
        "TTFT_P95<=0.5s,TPOT_P95<=50000us,E2E<=10000ms@99.0%,THROUGHPUT>=1e1",
    ):
        assert [goal.text for goal in parse_goals(text)] == expected


def test_attainment_is_a_share_of_requests() -> None:
    (goal,) = parse_goals("ttft<=500ms@99.9%")
    assert (goal.statistic, goal.limit, goal.fraction) == ("attain", 0.5, 0.999)
    assert goal.met(0.999) and goal.met(1.0) and not goal.met(0.998)
    assert goal.margin(0.999) == 0 and goal.margin(1.0) > 0 > goal.margin(0.9)


def test_two_shares_of_one_metric_are_two_goals() -> None:
    assert len(parse_goals("ttft<=500ms@90%,ttft<=1s@99%,ttft_p50<=200ms")) == 3


def test_a_latency_is_met_up_to_and_on_its_limit() -> None:
    (goal,) = parse_goals("ttft_p95<=500ms")
    assert goal.met(0.4) and goal.met(0.5) and not goal.met(0.5000001) and not goal.met(float("nan"))
    assert goal.margin(0.25) == 0.5 and goal.margin(0.5) == 0 and goal.margin(1.0) == -1


def test_throughput_is_met_from_its_limit_on() -> None:
    (goal,) = parse_goals("throughput>=10")
    assert (goal.metric, goal.statistic, goal.limit) == ("throughput", "mean", 10.0)
    assert goal.met(10) and goal.met(12) and not goal.met(9.99)
    assert goal.margin(15) == 0.5 and goal.margin(5) == -0.5


positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
shares = st.floats(min_value=1e-9, max_value=1)


@given(st.sampled_from(LATENCIES), st.sampled_from(STATISTICS), positive)
def test_canonical_text_of_a_statistic_round_trips(metric: str, statistic: str, limit: float) -> None:
    goal = Goal(metric=metric, statistic=statistic, limit=limit)
    (again,) = parse_goals(goal.text)
    assert again == goal and again.text == goal.text


@given(st.sampled_from(LATENCIES), positive, shares)
def test_canonical_text_of_a_share_round_trips(metric: str, limit: float, fraction: float) -> None:
    goal = Goal(metric=metric, statistic="attain", limit=limit, fraction=fraction)
    assert parse_goals(goal.text) == (goal,)


@given(st.sampled_from(list(FIGURES)), positive)
def test_canonical_text_of_a_figure_round_trips(metric: str, limit: float) -> None:
    goal = Goal(metric=metric, statistic="mean", limit=limit)
    assert parse_goals(goal.text) == (goal,)


@given(st.integers(1, 10**8))
def test_any_percentile_round_trips_in_its_one_spelling(millionths: int) -> None:
    (goal,) = parse_goals(f"itl_p{millionths / 10**6:.6f}<=1s")
    assert percent(goal.statistic) == float(f"{millionths / 10**6:.6f}")
    assert not goal.statistic.endswith((".0", "."))
    assert parse_goals(goal.text) == (goal,)


def test_the_percentile_of_a_statistic_is_its_number_and_that_of_the_maximum_100() -> None:
    assert [percent(name) for name in ("p50", "p99.9", "p0.5", "p100", "max")] == [50.0, 99.9, 0.5, 100.0, 100.0]


@pytest.mark.parametrize(
    ("text", "limit", "canonical"),
    [
        ("makespan<=2min", 120.0, "makespan<=120s"),
        ("energy<=200kJ", 2e5, "energy<=200kJ"),
        ("energy<=1.5kWh", 5.4e6, "energy<=5.4MJ"),
        ("energy<=10Wh", 36000.0, "energy<=36kJ"),
        ("ENERGY<=7J", 7.0, "energy<=7J"),
        ("energy_per_token<=2J", 2.0, "energy_per_token<=2J"),
        ("energy_per_token<=500mJ/token", 0.5, "energy_per_token<=500mJ"),
        ("cost<=20", 20.0, "cost<=20$/h"),
        ("cost<=$20", 20.0, "cost<=20$/h"),
        ("cost <= 20$/h", 20.0, "cost<=20$/h"),
        ("cost_per_mtoken<=3$", 3.0, "cost_per_mtoken<=3$"),
        ("cost_per_mtoken<=0.3$/Mtoken", 0.3, "cost_per_mtoken<=0.3$"),
        ("goodput>=5", 5.0, "goodput>=5"),
        ("itl_p99.90<=80ms", 0.08, "itl_p99.9<=80ms"),
        ("itl<=50ms@99%", 0.05, "itl<=50ms@99%"),
    ],
)
def test_figures_of_a_run_take_their_units_and_have_one_spelling(text: str, limit: float, canonical: str) -> None:
    (goal,) = parse_goals(text)
    assert (goal.limit, goal.text) == (limit, canonical)


def test_more_is_better_of_requests_per_second_only() -> None:
    assert set(AT_LEAST) == {name for name, unit in FIGURES.items() if unit == "requests/s"}


def test_goals_mean_something_for_one_request_where_they_are_on_its_own_latency() -> None:
    goals = parse_goals(
        "ttft_p95<=1s,tpot_max<=1s,e2e<=1s@9%,ttft_mean<=1s,itl_p95<=1s,itl<=1s@9%,throughput>=1,energy<=1J"
    )
    assert [goal.metric for goal in goals if goal.of_requests] == ["ttft", "tpot", "e2e"]
    assert [goal.at_most for goal in goals] == [True, True, False, True, True, False, False, True]


def test_given_text_is_kept_and_does_not_tell_goals_apart() -> None:
    said = Goal(metric="ttft", statistic="p95", limit=0.5, text="half a second")
    assert said.text == "half a second" and (said,) == parse_goals("ttft_p95<=500ms")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected text such as ttft_p95<=500ms"),
        (" , ", "expected text such as"),
        (None, "expected text such as"),
        (5, "expected text such as"),
        ("ttft_p95", "expected METRIC_STATISTIC<=LIMIT"),
        ("<=500ms", "expected METRIC_STATISTIC<=LIMIT"),
        ("ttft_p95<=5<=6ms", "expected METRIC_STATISTIC<=LIMIT"),
        ("ttft_p95<=", "the limit must be a number and a unit .*, got ''"),
        ("ttft_p95<=ms", "the limit must be a number and a unit .*, got 'ms'"),
        ("ttft_p95<=500", r"a number and a unit \(ns, us, ms, s, m, min\), got '500'"),
        ("ttft_p95<=500 ms", "a number and a unit .*, got '500'"),
        ("ttft_p95<=500h", "a number and a unit"),
        ("ttft_p95<=1_0ms", "a number and a unit"),
        ("ttft_p95<=nanms", "a number and a unit"),
        ("ttft_p95<=infs", "a number and a unit"),
        ("ttft_p95<=nan", "a number and a unit"),
        ("ttft_p95<=0ms", "the limit must be above 0 and finite, got '0ms'"),
        ("ttft_p95<=-5ms", "the limit must be above 0"),
        ("ttft_p95<=1e999s", "the limit must be above 0 and finite"),
        ("ttft_p95<=1e-999s", "the limit must be above 0 and finite"),
        ("ttft_p95<500ms", "ttft takes <=, got <"),
        ("ttft_p95>=500ms", "ttft takes <=, got >="),
        ("ttft_p95=500ms", "ttft takes <=, got ="),
        ("ttft_p95≤500ms", "ttft takes <=, got ≤"),
        ("throughput<=10", "throughput takes >=, got <="),
        ("throughput>10", "throughput takes >=, got >"),
        ("throughput>=10ms", "a number, in requests per second, got '10ms'"),
        ("throughput>=0", "the limit must be above 0"),
        ("throughput>=10@99%", "a run has one throughput, so no share of it"),
        ("goodput<=5", "goodput takes >=, got <="),
        ("goodput>=5s", "a number, in requests per second, got '5s'"),
        ("makespan>=60s", "makespan takes <=, got >="),
        ("makespan<=60", r"a number and a unit \(ns, us, ms, s, m, min\), got '60'"),
        ("energy<=200", r"a number and a unit \(mJ, J, kJ, MJ, Wh, kWh\), got '200'"),
        ("energy<=200kj", r"a number and a unit \(mJ, J, kJ, MJ, Wh, kWh\), got '200kj'"),
        ("energy<=200kJ@99%", "a run has one energy"),
        ("energy<=0J", "the limit must be above 0"),
        ("energy_per_token<=2", "a number and a unit .*, per output token, got '2'"),
        ("cost<=20s", r"a number, in \$ per hour such as 20\$/h, got '20s'"),
        ("cost<=$", r"a number, in \$ per hour such as 20\$/h, got '\$'"),
        ("cost<=-3$", "the limit must be above 0"),
        ("cost_per_mtoken<=3J", r"a number, in \$ per million output tokens such as 3\$, got '3J'"),
        ("itl<=50ms", r"of which tokens\? e.g. itl_p95<=500ms or itl<=500ms@99%"),
        ("itl_p99<=80", "a number and a unit"),
        ("ttft<=500ms", r"of which requests\? e.g. ttft_p95<=500ms or ttft<=500ms@99%"),
        ("ttft_<=500ms", r"of which requests\?"),
        ("ttft_p95<=500ms@99%", "a statistic and a share exclude each other"),
        ("ttft<=500ms@99", "the share must be above 0% and at most 100%"),
        ("ttft<=500ms@0.99", "the share must be"),
        ("ttft<=500ms@0%", "the share must be"),
        ("ttft<=500ms@101%", "the share must be"),
        ("ttft<=500ms@-1%", "the share must be"),
        ("ttft<=500ms@nan%", "the share must be"),
        ("ttft<=500ms@%", "the share must be"),
        ("ttft_p95<=500ms,ttft_p95<=400ms", "ttft_p95 is limited twice"),
        ("ttft<=500ms@99%,ttft<=400ms@99.0%", "ttft is limited twice"),
        ("throughput>=1,throughput>=2", "throughput is limited twice"),
        ("energy<=5J,energy<=5kJ", "energy is limited twice"),
        ("ttft_p99.9<=1s,ttft_p99.90<=2s", "ttft_p99.9 is limited twice"),
    ],
)
def test_bad_goals_are_refused_in_one_line(text: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_goals(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tttf_p95<=500ms", r"unknown SLO metric 'tttf'; did you mean ttft"),
        ("tlt_p95<=500ms", "unknown SLO metric 'tlt'; did you mean itl"),
        ("enrgy<=3J", "unknown SLO metric 'enrgy'; did you mean energy"),
        ("energy_p95<=3J", "unknown SLO metric 'energy_p95'; did you mean energy"),
        ("throughput_p95>=10", "unknown SLO metric 'throughput_p95'; did you mean throughput"),
        ("cost_per_token<=3", "unknown SLO metric 'cost_per_token'; did you mean cost_per_mtoken"),
        ("ttft_q95<=500ms", r"unknown statistic of ttft 'q95'; did you mean p"),
        ("ttft_p0<=500ms", r"unknown statistic of ttft 'p0'.*any percentile above 0 to 100, as p99.9"),
        ("ttft_p100.1<=500ms", "unknown statistic of ttft 'p100.1'"),
        ("ttft_p<=500ms", "unknown statistic of ttft 'p'"),
        ("ttft_attain<=500ms", "goes with"),
        ("ttft@99%<=500ms", "unknown SLO metric 'ttft@99%'; did you mean ttft"),
    ],
)
def test_unknown_words_are_suggested(text: str, message: str) -> None:
    with pytest.raises((UnknownNameError, UsageError), match=message):
        parse_goals(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"limit": 0.0},
        {"limit": -1.0},
        {"limit": float("nan")},
        {"limit": float("inf")},
        {"limit": 10**400},
        {"limit": 10**5000},
        {"metric": 10**5000},
        {"limit": True},
        {"limit": "1"},
        {"metric": "itk"},
        {"metric": "energy"},
        {"statistic": "p142"},
        {"statistic": "p0"},
        {"statistic": "42"},
        {"statistic": "attain"},
        {"fraction": 0.9},
        {"statistic": "attain", "fraction": 0.0},
        {"statistic": "attain", "fraction": 1.01},
        {"statistic": "attain", "fraction": float("nan")},
        {"statistic": "attain", "fraction": True},
        {"metric": "throughput", "statistic": "p95"},
        {"metric": "cost", "statistic": "attain", "fraction": 0.9},
    ],
)
def test_a_goal_made_by_hand_checks_itself(fields: dict[str, Any]) -> None:
    good: dict[str, Any] = {"metric": "ttft", "statistic": "p95", "limit": 0.5}
    Goal(**good)
    with pytest.raises(ApexError):
        Goal(**(good | fields))


@given(st.text(alphabet="tfpoe2_95<=>@%ms,.0 1-+enu$JWh/k", max_size=40))
def test_no_text_escapes_with_another_error(text: str) -> None:
    for given_text in (text, f"ttft_p95<={text}", f"ttft<=5ms@{text}", f"energy<={text}", f"cost<={text}"):
        try:
            goals = parse_goals(given_text)
        except ApexError:
            continue
        assert parse_goals(",".join(goal.text for goal in goals)) == goals


LATENCY = {
    metric: {statistic: 100.0 * row + column for column, statistic in enumerate(STATISTICS)}
    for row, metric in enumerate(LATENCIES)
}
OTHERS = {
    "makespan": (7.0, "s"),
    "throughput": (3.0, "requests/s"),
    "goodput": (2.0, "requests/s"),
    "energy": (500.0, "J"),
    "energy_per_token": (12.5, "J/token"),
    "cost": (36.0, "$/h"),
    "cost_per_mtoken": (36.0 * 7.0 / 3600 / 40 * 1e6, "$/Mtoken"),
}
METRICS = Metrics(
    latency_s=LATENCY,
    figures={name: value for name, (value, _) in OTHERS.items()},
    output_tokens_per_s=11.0,
    total_tokens_per_s=13.0,
    output_tokens=40,
)


@pytest.mark.parametrize("name", names())
def test_every_objective_reads_its_own_figure(name: str) -> None:
    metric, _, statistic = name.partition("_")
    value, unit = OTHERS[name] if name in OTHERS else (LATENCY[metric][statistic], "s")
    objective = load_objective(name)
    assert objective.value(METRICS) == value
    assert objective.unit == unit


def test_less_is_better_except_for_requests_per_second() -> None:
    for name in names():
        objective = load_objective(name)
        assert objective.maximise == (name in ("throughput", "goodput"))
        assert (objective.signed(2.0) > objective.signed(1.0)) != objective.maximise


def test_a_latency_that_no_request_has_costs_nothing() -> None:
    assert load_objective("tpot_p99").signed(math.nan) == 0.0


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


def test_large_values_are_told_in_digits() -> None:
    (goal,) = parse_goals("ttft_p95<=1ms")
    told = [goal.told(value) for value in (0.01234567, 0.9994, 95.92, 12345.678)]
    assert told == ["12.35 ms", "999.4 ms", "95.92 s", "12,346 s"]


@pytest.mark.parametrize(
    ("goal", "value", "told"),
    [
        ("e2e_mean<=532ms", 0.53201, "532.01 ms"),
        ("e2e_mean<=532ms", 0.5329, "532.9 ms"),
        ("e2e_mean<=532ms", 0.532, "532 ms"),
        ("e2e_mean<=1s", 1.00002, "1.00002 s"),
        ("e2e_mean<=532.04ms", 0.532041, "532.041 ms"),
        ("makespan<=20000s", 20000.25, "20,000.2 s"),
        ("throughput>=10", 9.99999, "9.99999 requests/s"),
        ("cost_per_mtoken<=1$", 1.00001, "1.00001"),
        ("ttft<=1s@99%", 0.98999, "98.999%"),
        ("ttft<=1s@99%", 0.95, "95.0%"),
    ],
)
def test_what_is_reached_is_told_in_as_many_digits_as_tell_it_from_the_limit(
    goal: str, value: float, told: str
) -> None:
    (one,) = parse_goals(goal)
    assert reached(one, value).startswith(told)


def test_tables_have_as_many_digits_beside_a_limit() -> None:
    assert seconds(0.53201) == "532.0 ms" and seconds(0.53201, 0.532) == "532.01 ms"
    assert amount(1.00001, "$", 1.0) == "1.00001 $" and amount(2000.1, "J", 2000.0) == "2.0001 kJ"
