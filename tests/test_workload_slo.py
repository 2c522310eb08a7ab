"""apex_opt.workload.slo: forms, units, exactness, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.errors import ApexError, UnknownNameError, UsageError
from apex_opt.workload import Slo, parse_slos
from apex_opt.workload.slo import LATENCIES, STATISTICS


@pytest.mark.parametrize("metric", LATENCIES)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_every_latency_takes_every_statistic(metric: str, statistic: str) -> None:
    (goal,) = parse_slos(f"{metric}_{statistic}<=500ms")
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
    assert parse_slos(f"ttft_p95<={limit}")[0].limit == seconds


def test_several_goals_by_commas_or_spaces_in_their_order() -> None:
    expected = ["ttft_p95<=500ms", "tpot_p95<=50ms", "e2e<=10s@99%", "throughput>=10"]
    for text in (
        "ttft_p95<=500ms,tpot_p95<=50ms,e2e<=10s@99%,throughput>=10",
        "ttft_p95<=500ms tpot_p95<=50ms e2e<=10s@99% throughput>=10",
        " ttft_p95 <= 500ms, tpot_p95<= 50ms ,, e2e<=10s @ 99%\n throughput >= 10.0, ",
        "TTFT_P95<=0.5s,TPOT_P95<=50000us,E2E<=10000ms@99.0%,THROUGHPUT>=1e1",
    ):
        assert [goal.text for goal in parse_slos(text)] == expected


def test_attainment_is_a_share_of_requests() -> None:
    (goal,) = parse_slos("ttft<=500ms@99.9%")
    assert (goal.statistic, goal.limit, goal.fraction) == ("attain", 0.5, 0.999)
    assert goal.met(0.999) and goal.met(1.0) and not goal.met(0.998)
    assert goal.margin(0.999) == 0 and goal.margin(1.0) > 0 > goal.margin(0.9)


def test_two_shares_of_one_metric_are_two_goals() -> None:
    assert len(parse_slos("ttft<=500ms@90%,ttft<=1s@99%,ttft_p50<=200ms")) == 3


def test_a_latency_is_met_up_to_and_on_its_limit() -> None:
    (goal,) = parse_slos("ttft_p95<=500ms")
    assert goal.met(0.4) and goal.met(0.5) and not goal.met(0.5000001) and not goal.met(float("nan"))
    assert goal.margin(0.25) == 0.5 and goal.margin(0.5) == 0 and goal.margin(1.0) == -1


def test_throughput_is_met_from_its_limit_on() -> None:
    (goal,) = parse_slos("throughput>=10")
    assert (goal.metric, goal.statistic, goal.limit) == ("throughput", "mean", 10.0)
    assert goal.met(10) and goal.met(12) and not goal.met(9.99)
    assert goal.margin(15) == 0.5 and goal.margin(5) == -0.5


positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
shares = st.floats(min_value=1e-9, max_value=1)


@given(st.sampled_from(LATENCIES), st.sampled_from(STATISTICS), positive)
def test_canonical_text_of_a_statistic_round_trips(metric: str, statistic: str, limit: float) -> None:
    goal = Slo(metric=metric, statistic=statistic, limit=limit)
    (again,) = parse_slos(goal.text)
    assert again == goal and again.text == goal.text


@given(st.sampled_from(LATENCIES), positive, shares)
def test_canonical_text_of_a_share_round_trips(metric: str, limit: float, fraction: float) -> None:
    goal = Slo(metric=metric, statistic="attain", limit=limit, fraction=fraction)
    assert parse_slos(goal.text) == (goal,)


@given(positive)
def test_canonical_text_of_throughput_round_trips(limit: float) -> None:
    goal = Slo(metric="throughput", statistic="mean", limit=limit)
    assert parse_slos(goal.text) == (goal,)


def test_given_text_is_kept_and_does_not_tell_goals_apart() -> None:
    said = Slo(metric="ttft", statistic="p95", limit=0.5, text="half a second")
    assert said.text == "half a second" and (said,) == parse_slos("ttft_p95<=500ms")


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
        ("throughput_p95>=10", "throughput has no statistic"),
        ("throughput>=10@99%", "throughput has no statistic and no share"),
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
    ],
)
def test_bad_goals_are_refused_in_one_line(text: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_slos(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tttf_p95<=500ms", r"unknown SLO metric 'tttf'; did you mean ttft"),
        ("itl_p95<=500ms", "unknown SLO metric 'itl'"),
        ("ttft_p59<=500ms", r"unknown statistic of ttft 'p59'; did you mean p"),
        ("ttft_attain<=500ms", "goes with"),
        ("ttft@99%<=500ms", "unknown SLO metric 'ttft@99%'; did you mean ttft"),
    ],
)
def test_unknown_words_are_suggested(text: str, message: str) -> None:
    with pytest.raises((UnknownNameError, UsageError), match=message):
        parse_slos(text)


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
        {"metric": "itl"},
        {"statistic": "p42"},
        {"statistic": "attain"},
        {"fraction": 0.9},
        {"statistic": "attain", "fraction": 0.0},
        {"statistic": "attain", "fraction": 1.01},
        {"statistic": "attain", "fraction": float("nan")},
        {"statistic": "attain", "fraction": True},
        {"metric": "throughput", "statistic": "p95"},
    ],
)
def test_a_goal_made_by_hand_checks_itself(fields: dict[str, Any]) -> None:
    good: dict[str, Any] = {"metric": "ttft", "statistic": "p95", "limit": 0.5}
    Slo(**good)
    with pytest.raises(ApexError):
        Slo(**(good | fields))


@given(st.text(alphabet="tfpoe2_95<=>@%ms,.0 1-+enu", max_size=40))
def test_no_text_escapes_with_another_error(text: str) -> None:
    for given_text in (text, f"ttft_p95<={text}", f"ttft<=5ms@{text}"):
        try:
            goals = parse_slos(given_text)
        except ApexError:
            continue
        assert parse_slos(",".join(goal.text for goal in goals)) == goals
