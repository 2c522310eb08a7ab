"""apex_opt.figures.stops: a run is cut short exactly where the finished one passes a limit, and never on rounding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import feasible_plans, make_cluster, make_problem, random_trace, simulated
from simulator_cases import IMPLEMENTATIONS, LOOPS, Case, Loop, alone, assert_same, cases, linear, requests

from apex_opt.engines.schedulers import StaticScheduling
from apex_opt.errors import ApexError, UnknownNameError, UsageError
from apex_opt.figures import Goal, load_objective, parse_goals
from apex_opt.figures.measure import measure
from apex_opt.figures.registry import STATISTICS, names, per_run, timed
from apex_opt.figures.run import Facts
from apex_opt.figures.stops import METRICS, Stop, early_stops, latencies_ns
from apex_opt.ir import load_model
from apex_opt.plans.engine import EngineSettings
from apex_opt.search import Scored, Scorer
from apex_opt.simulator.outcome import BatchCounts, Outcome
from apex_opt.workload import make_trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.figures.stops import Metric
    from apex_opt.simulator.api import Implementation
    from apex_opt.workload import Trace

    Ints = NDArray[np.int64]

NAMES = names()
FIGURES = tuple(one.name for one in per_run())
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}


def generated(case: Case) -> Ints:
    return np.minimum(case.trace.output, case.settings.max_model_len - case.trace.prompt)


def seen(case: Case, outcome: Outcome, metric: str) -> list[int]:
    """A latency of every request, written out."""
    origin = int(outcome.arrival_ns.min())
    columns = (outcome.arrival_ns.tolist(), outcome.first_token_ns.tolist(), outcome.finish_ns.tolist())
    values = []
    for arrival, first, finish, tokens in zip(*columns, generated(case).tolist(), strict=True):
        step = (finish - first) // (tokens - 1) if tokens > 1 else 0
        values.append(
            {"first": first - arrival, "step": step, "whole": finish - arrival, "makespan": finish - origin}[metric]
        )
    return values


def passes(case: Case, outcome: Outcome, stop: Stop) -> bool:
    """Whether a whole run is beyond a limit, by definition."""
    values = seen(case, outcome, stop.metric)
    if stop.kind == "sum":
        return sum(values) > stop.limit_ns
    return sum(value > stop.limit_ns for value in values) >= stop.most


@st.composite
def near(draw: st.DrawFn, case: Case, outcome: Outcome) -> Stop:
    """A limit of any kind, mostly close to what the run has, on either side."""
    metric: Metric = draw(st.sampled_from(METRICS))
    adds = metric != "makespan" and draw(st.booleans())
    values = seen(case, outcome, metric)
    at = sum(values) if adds else draw(st.sampled_from(values))
    limit = draw(st.one_of(st.integers(at - 2, at + 2), st.integers(-1, 2 * at + 2)))
    return Stop(
        metric=metric, kind="sum" if adds else "count", limit_ns=limit, most=draw(st.integers(1, len(values) + 1))
    )


def any_case(loop: Loop) -> st.SearchStrategy[Case]:
    return st.one_of(cases(loop, "dealt"), cases(loop, "routed"), cases(loop, "closed"))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_stops_exactly_where_the_whole_one_passes_a_limit_and_is_whole_otherwise(loop: Loop) -> None:
    @settings(max_examples=25)
    @given(any_case(loop), st.data())
    def check(case: Case, data: st.DataObject) -> None:
        whole = case.run()
        limits = data.draw(st.lists(near(case, whole), min_size=1, max_size=3))
        expected = any(passes(case, whole, stop) for stop in limits)
        assert case.run("reference", stops=limits).stopped == expected
        plain = case.run(stops=limits)
        runs = [plain]
        if len(case.laws) == 1 or not case.settings.async_scheduling:
            floors = alone(case)
            runs.append(case.run(stops=limits, floors=floors))
            assert runs[1].batches <= plain.batches, "floors only stop a run sooner"
        for run in runs:
            assert run.stopped == expected
            if not expected:
                assert_same(run, whole)
            assert run.batches <= whole.batches

    check()


@pytest.mark.parametrize("loop", LOOPS)
def test_what_a_request_needs_alone_is_a_floor_under_any_law(loop: Loop) -> None:
    """Otherwise a sum with floors would pass a limit that the run keeps."""

    @settings(max_examples=25)
    @given(any_case(loop))
    def check(case: Case) -> None:
        if len(case.laws) > 1 and case.settings.async_scheduling:
            return
        floors, whole = alone(case), case.run(log=False)
        for metric in METRICS[:3]:
            least = latencies_ns(
                metric, floors.arrival_ns, floors.first_token_ns, floors.finish_ns, generated(case)
            ).tolist()
            assert all(low <= value for low, value in zip(least, seen(case, whole, metric), strict=True)), metric

    check()


ENGINE = EngineSettings(
    max_num_seqs=2, max_num_batched_tokens=64, max_model_len=64, block_size=4, async_scheduling=False
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_each_metric_by_hand(metric: Metric, implementation: Implementation) -> None:
    """Two requests of three tokens each, batches of 10 ns: first at 15 and 25, last at 35 and 45 ns."""
    case = Case(settings=ENGINE, blocks=50, laws=(linear(ENGINE, 10),), trace=requests([(5, 2, 3), (7, 2, 3)]))
    whole = case.run()
    assert (whole.first_token_ns.tolist(), whole.finish_ns.tolist()) == ([15, 25], [35, 45])
    values = {"first": [10, 18], "step": [10, 10], "whole": [30, 38], "makespan": [30, 40]}[metric]
    assert seen(case, whole, metric) == values

    def stopped(**limit: Any) -> bool:
        return case.run(implementation, stops=[Stop(metric=metric, **limit)]).stopped

    if metric != "makespan":
        assert not stopped(kind="sum", limit_ns=sum(values)) and stopped(kind="sum", limit_ns=sum(values) - 1)
    assert not stopped(kind="count", limit_ns=values[1]) and stopped(kind="count", limit_ns=values[1] - 1)
    assert not stopped(kind="count", limit_ns=values[0], most=2)
    assert stopped(kind="count", limit_ns=values[0] - 1, most=2)


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        ({"metric": "tbt", "kind": "sum"}, UnknownNameError, "metric of a stop 'tbt'"),
        ({"metric": "makespan", "kind": "sum"}, UsageError, "cannot sum the makespan"),
        ({"metric": "whole", "kind": "most"}, UsageError, "cannot most the whole"),
        ({"metric": "whole", "kind": "count", "most": 0}, UsageError, "at 0 requests would always fire"),
    ],
)
def test_a_limit_that_means_nothing_is_refused(limit: Any, error: type[ApexError], message: str) -> None:
    with pytest.raises(error, match=message):
        Stop(limit_ns=1, **limit)


def test_a_run_ends_as_soon_as_its_own_requests_prove_it() -> None:
    """A request a microsecond; the third to take longer than 10 ns is the third of all."""
    case = Case(
        settings=ENGINE, blocks=50, laws=(linear(ENGINE, 20),), trace=requests([(1000 * i, 2, 1) for i in range(50)])
    )
    cut = case.run(stops=[Stop(metric="whole", kind="count", limit_ns=10, most=3)])
    assert cut.stopped and cut.batches == 3
    # Of 1000 ns in all, 46 requests take more than 900; with floors of 19 ns each the rest is sure to add so much that
    # (50 - k) 19 + 20 k is above 970 at k = 21.
    assert case.run(stops=[Stop(metric="whole", kind="sum", limit_ns=900)]).batches == 46
    floors = replace(case.run(), finish_ns=case.trace.arrival_ns + 19)
    limit = [Stop(metric="whole", kind="sum", limit_ns=970)]
    assert case.run(stops=limit).batches == 49
    assert case.run(stops=limit, floors=floors).batches == 21
    assert not case.run(stops=[Stop(metric="whole", kind="sum", limit_ns=1000)], floors=floors).stopped


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_single_token_has_no_time_per_token_even_if_its_batch_goes_on(implementation: Implementation) -> None:
    """Static batching answers request 0 long after its only token; metrics leave it out of TPOT, so must a limit."""
    engine = EngineSettings(
        max_num_seqs=2,
        max_num_batched_tokens=64,
        max_model_len=64,
        scheduler=StaticScheduling(),
        async_scheduling=False,
    )
    case = Case(settings=engine, blocks=50, laws=(linear(engine, 10),), trace=requests([(0, 2, 1), (0, 2, 41)]))
    whole = case.run(implementation)
    assert (whole.first_token_ns.tolist(), whole.finish_ns.tolist()) == ([10, 10], [410, 410])
    assert measure(whole.as_run(case.trace, 64)).latency_s["tpot"]["max"] == pytest.approx(10e-9)
    for stop in (Stop.mean_above("step", 20e-9, 1), Stop.percentile_above("step", 20e-9, 1.0, 1)):
        assert not case.run(implementation, stops=[stop]).stopped


# Limits in seconds: never passed by rounding.

tied = st.integers(0, 3).map(lambda k: 1_000_000 * k)
spans = st.one_of(tied, st.integers(0, 50), st.integers(0, 10**10), st.integers(0, 10**17))


@st.composite
def runs(draw: st.DrawFn) -> tuple[Outcome, Trace, int]:
    """A run as numbers alone, ties among them, and the time a request spends outside the engine."""
    count = draw(st.one_of(st.integers(1, 12), st.sampled_from((20, 21, 40, 100, 101))))
    kind = draw(st.sampled_from((tied, st.integers(0, 50), st.integers(0, 10**10), spans)))
    some = st.lists(kind, min_size=count, max_size=count)
    arrival = np.sort(np.array(draw(some), np.int64))
    first = arrival + np.array(draw(some), np.int64)
    output = np.array(draw(st.lists(st.sampled_from((1, 2, 3, 7, 100)), min_size=count, max_size=count)))
    finish = first + np.where(output > 1, np.array(draw(some), np.int64), 0)
    outcome = Outcome(
        arrival_ns=arrival,
        first_token_ns=first,
        finish_ns=finish,
        preemptions=0,
        batches=1,
        busy_ns=np.zeros((1, 1), np.int64),
        counts=BatchCounts.empty(EngineSettings()),
    )
    trace = make_trace(name="numbers", arrival_ns=arrival, prompt=np.ones_like(output), output=output)
    return outcome, trace, draw(st.sampled_from((0, 0, 1, 1_000_000, 123_456_789)))


def limited(metric: Metric, goal: Goal, trace: Trace, request_ns: int) -> Stop:
    """The limit that a goal is to the simulator, as the search sets it."""
    counted = int((trace.output > 1).sum()) if metric == "step" else len(trace)
    inside_s = goal.limit if metric == "step" else goal.limit - request_ns / 1e9
    if goal.statistic == "mean":
        return Stop.mean_above(metric, inside_s, counted)
    if goal.fraction is not None:
        return Stop.attainment_below(metric, inside_s, goal.fraction, counted)
    return Stop.percentile_above(metric, inside_s, QUANTILES[goal.statistic], counted)


def passed(stop: Stop, outcome: Outcome, trace: Trace) -> bool:
    times = outcome.arrival_ns, outcome.first_token_ns, outcome.finish_ns
    return stop.passed(latencies_ns(stop.metric, *times, trace.output))


def nudged(value: float, way: float) -> float:
    """A number a little off: its neighbour in floating point at 0, else by that share of it."""
    return value * (1 + way) if way else math.nextafter(value, math.inf)


ways = st.sampled_from((0.0, 1e-15, -1e-15, 1e-13, -1e-13, 1e-9, -1e-9, 1e-3, -1e-3))


@pytest.mark.parametrize("metric", METRICS[:3])
def test_a_goal_that_is_met_in_floating_point_never_cuts_a_run_short(metric: Metric) -> None:
    """Every statistic at exactly its value and a little to either side; shares of the requests likewise."""

    @settings(max_examples=40)
    @given(runs(), ways, st.floats(0.001, 1.0), st.integers(1, 101))
    def check(run: tuple[Outcome, Trace, int], way: float, share: float, exactly: int) -> None:
        outcome, trace, request_ns = run
        if metric == "step" and not (trace.output > 1).any():
            return
        count = len(trace)
        name, seen = timed(metric).name, outcome.as_run(trace, 1 << 30, outside_ns=request_ns)
        latency = measure(seen).latency_s[name]
        goals = []
        for statistic in STATISTICS:
            for limit in (latency[statistic], nudged(latency[statistic], way)):
                if limit > 0:
                    goals.append(Goal(metric=name, statistic=statistic, limit=limit))
                    # Shares: any, usual ones, and what so many of the requests are exactly.
                    for fraction in (share, 0.9, 0.99, 1.0, min(exactly, count) / count):
                        goals.append(Goal(metric=name, statistic="attain", limit=limit, fraction=fraction))
        judged = measure(seen, goals)
        for goal in goals:
            if judged.slo_met[goal.text]:
                assert not passed(limited(metric, goal, trace, request_ns), outcome, trace), goal

    check()


@pytest.mark.parametrize("metric", METRICS[:3])
def test_a_goal_that_is_clearly_missed_cuts_a_run_short(metric: Metric) -> None:
    """By nanoseconds, and for a percentile by all order statistics that it lies between."""

    @settings(max_examples=40)
    @given(runs(), st.floats(0.01, 0.99), st.floats(0.001, 1.0))
    def check(run: tuple[Outcome, Trace, int], factor: float, share: float) -> None:
        outcome, trace, request_ns = run
        gaps = np.maximum(trace.output - 1, 1)
        times = {
            "first": outcome.first_token_ns - outcome.arrival_ns + request_ns,
            "step": ((outcome.finish_ns - outcome.first_token_ns) / gaps)[trace.output > 1],
            "whole": outcome.finish_ns - outcome.arrival_ns + request_ns,
        }
        values = np.sort(times[metric] / 1e9)
        if not values.size:
            return
        # A percentile is no less than the order statistic below it; of a share, one more is late than may be.
        allowed = math.floor(len(values) * (1 - share) + 1e-6)
        ranks = {name: math.floor(QUANTILES[name] * (len(values) - 1)) for name in QUANTILES}
        least = {name: float(values[rank]) for name, rank in ranks.items()} | {"mean": float(values.mean())}
        if allowed < len(values):
            least["attain"] = float(values[len(values) - allowed - 1])
        for statistic, value in least.items():
            limit = value * factor
            if limit > 0 and value - limit > 3.1e-9:
                fraction = share if statistic == "attain" else None
                goal = Goal(metric=timed(metric).name, statistic=statistic, limit=limit, fraction=fraction)
                assert passed(limited(metric, goal, trace, request_ns), outcome, trace), goal

    check()


@settings(max_examples=40)
@given(runs(), st.none() | ways)
def test_a_makespan_is_above_a_limit_where_its_last_request_is(
    run: tuple[Outcome, Trace, int], way: float | None
) -> None:
    outcome, trace, _ = run
    makespan = measure(outcome.as_run(trace, 1 << 30)).value("makespan")
    limit = makespan if way is None else nudged(makespan, way)
    stop = Stop.percentile_above("makespan", limit, 1.0, len(trace))
    if makespan <= limit:
        assert not passed(stop, outcome, trace)
    if makespan > limit * (1 + 1e-11) + 3e-9:
        assert passed(stop, outcome, trace)


@pytest.mark.parametrize("seconds", [1e9, 1e200, 1.7e308, math.inf])
def test_a_limit_beyond_all_clocks_is_never_passed(seconds: float) -> None:
    values = np.array([1 << 60, 1 << 60], np.int64)
    for stop in (
        Stop.mean_above("whole", seconds * 2, 10**6),
        Stop.percentile_above("makespan", seconds * 2, 0.95, 2),
        Stop.attainment_below("first", seconds * 2, 0.9, 2),
    ):
        assert stop.limit_ns <= 1 << 62
        assert not stop.passed(values)


@pytest.mark.parametrize("requests_", [1, 2, 3, 10, 99, 100, 101, 1000])
def test_as_many_as_a_share_allows_may_be_late_and_not_one_more(requests_: int) -> None:
    for percent in range(1, 101):
        stop = Stop.attainment_below("first", 1.0, percent / 100, requests_)
        allowed = requests_ * (100 - percent) // 100
        late = np.array([2 * 10**9] * requests_, np.int64)
        assert stop.most == allowed + 1
        late[allowed:] = 0
        assert not stop.passed(late)
        if allowed < requests_:
            late[: allowed + 1] = 2 * 10**9
            assert stop.passed(late)


FACTORS = (0.3, 0.9, 1 - 1e-13, 1.0, 1 + 1e-13, 1.1, 3.0)
STOPPED = ("makespan", "throughput", "goodput", "energy", "energy_per_token", "cost_per_mtoken")


def candidates_of(seed: int) -> tuple[Scorer, list[Scored]]:
    """What scores plans on every figure, and what some plans give."""
    everything = tuple(load_objective(name) for name in NAMES)
    trace = random_trace(seed, 30, closed=seed % 2 == 1)
    problem = make_problem(load_model("llama-3.1-8b"), make_cluster(4), trace)
    problem = replace(
        problem,
        objective=everything[0],
        then=everything[1:],
        request_slos=parse_goals("ttft_max<=30ms,tpot_max<=12ms"),
    )
    plans, scorer = feasible_plans(problem), Scorer(problem)
    return scorer, [simulated(scorer, plan) for plan in plans[:: max(1, len(plans) // 5)]]


def challenged(scorer: Scorer, candidate: Scored, *worst: float, bounds: tuple[float, ...] = ()) -> Scored | None:
    """A plan scored by other objectives and goals, as long as it costs no more than given."""
    bounds = bounds or scorer.bounds(candidate.deployment)[0]
    return scorer.challenge(candidate.deployment, bounds, worst or scorer.any_cost)


@pytest.mark.parametrize("seed", range(4))
def test_a_run_cut_short_by_a_goal_misses_it_and_one_that_is_not_is_judged_as_it_is(seed: int) -> None:
    scorer, candidates = candidates_of(seed)
    problem, cut = scorer.problem, dict.fromkeys(FIGURES, 0)
    for candidate in candidates:
        for name in FIGURES:
            for factor in FACTORS:
                limit = candidate.metrics.value(name) * factor
                if limit <= 0:
                    continue
                goal = Goal(metric=name, statistic="mean", limit=limit)
                asked = replace(problem, slos=(goal,), objective=load_objective("ttft_mean"), then=())
                found = challenged(Scorer(asked, like=scorer), candidate)
                met = goal.met(candidate.metrics.value(name))
                if found is None:
                    assert not met, (name, factor)
                    cut[name] += 1
                else:
                    assert found.meets_slos == met
    # Limits that are missed by far are seen early, but for the cost, which no run moves.
    assert all(cut[name] > 0 for name in STOPPED)
    assert cut["cost"] == 0


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 6))])
def test_a_run_cut_short_by_an_objective_is_worse_than_the_cost_given(seed: int) -> None:
    scorer, candidates = candidates_of(seed)
    cut = dict.fromkeys(NAMES, 0)
    for name in NAMES:
        asked = replace(scorer.problem, objective=load_objective(name), then=())
        own = Scorer(asked, like=scorer)
        for candidate in candidates:
            (cost,), (bounds, _) = asked.costs(candidate.metrics), own.bounds(candidate.deployment)
            for factor in FACTORS:
                found = challenged(own, candidate, cost * factor, bounds=bounds)
                if found is None:
                    assert cost > cost * factor, (name, factor)
                    cut[name] += 1
                else:
                    assert found.value == candidate.metrics.value(*_parts(name)) or math.isnan(found.value)
    assert all(cut[name] > 0 for name in NAMES if name in STOPPED or name.startswith(("ttft", "tpot", "e2e")))
    assert not any(cut[name] for name in NAMES if name.startswith(("itl", "cost")) and name not in STOPPED)


def test_a_run_as_good_by_the_cost_of_its_gpus_is_cut_short_by_what_comes_after() -> None:
    scorer, candidates = candidates_of(0)
    asked = replace(scorer.problem, objective=load_objective("cost"), then=(load_objective("e2e_mean"),))
    own = Scorer(asked, like=scorer)
    for candidate in candidates:
        cost, mean = asked.costs(candidate.metrics)
        assert challenged(own, candidate, cost, mean * 0.5) is None
        assert challenged(own, candidate, cost, mean) is not None
        # Cheaper than what it is held against, it may be as slow as it is.
        assert challenged(own, candidate, cost * 2, mean * 0.5) is not None


def test_energy_is_passed_once_the_idle_draw_and_every_tokens_least_are_beyond_it() -> None:
    facts = Facts(
        requests=10,
        decoding=9,
        output_tokens=100,
        request_s=0.0,
        least_j=400.0,
        idle_w=50.0,
        limit_w=700.0,
        cost_per_h=None,
    )

    def longest_ns(metric: str, limit: float) -> int:
        (stop,) = early_stops(metric, "mean", limit, facts)
        return stop.limit_ns

    assert longest_ns("energy", 1400.0) == pytest.approx(20e9)  # (1400 - 400) / 50
    assert longest_ns("energy", 350.0) == pytest.approx(0.5e9)  # all that may be drawn
    assert longest_ns("energy_per_token", 14.0) == pytest.approx(20e9)
    assert longest_ns("throughput", 5.0) == longest_ns("goodput", 5.0) == pytest.approx(2e9)
    assert early_stops("cost_per_mtoken", "mean", 1.0, facts) == []  # without a price
    paid = replace(facts, cost_per_h=36.0)
    (stop,) = early_stops("cost_per_mtoken", "mean", 1000.0, paid)
    assert stop.limit_ns == pytest.approx(10e9)  # 0.1 $ for 100 tokens, 0.01 $ a second
    assert early_stops("energy", "mean", 1400.0, replace(facts, idle_w=0.0)) == []
    assert early_stops("itl", "p95", 1e-9, facts) == early_stops("cost", "mean", 1e-9, facts) == []


def _parts(name: str) -> tuple[str, str]:
    metric, _, statistic = name.partition("_")
    return (name, "mean") if name in FIGURES else (metric, statistic)
