"""How far times may be off: held against simulating every deployment at every factor, and against slower kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import pytest
from plan_cases import (
    dense,
    double_times,
    make_cluster,
    make_model,
    make_problem,
    random_problem,
    random_trace,
    sparse,
)
from search_cases import SPACE, every, mixed_problem

from apex_opt.errors import UsageError
from apex_opt.figures import load_objective, load_objectives, parse_goals
from apex_opt.figures.registry import Figure, registered
from apex_opt.figures.units import Unit
from apex_opt.search import Problem, Scored, Scorer, search
from apex_opt.search.search import rank
from apex_opt.studies import robust as study
from apex_opt.studies.robust import Robustness, deciding, robust, slowed
from apex_opt.workload import make_trace

if TYPE_CHECKING:
    from apex_opt.workload import Trace

MODEL = make_model((dense(hidden=1024, columns=4096), 6))
BUSY = random_trace(5, 40)
OFFLINE = make_trace(name="offline", arrival_ns=[0] * 12, prompt=[200] * 12, output=[20] * 12)


def asked(problem: Problem, error: float | None = None, top: int = 2) -> Robustness:
    """What is found of a problem's answer."""
    scorer = Scorer(problem)
    return robust(problem, search(problem, SPACE, top=top, scorer=scorer), SPACE, scorer, error)


def in_time(problem: Problem, value: float, name: str, factor: float) -> float:
    """A figure of a slowed problem's run in the time of the other."""
    power = {"s": 1, "J": 1, "J/token": 1, "$/Mtoken": 1, "requests/s": -1, "$/h": 0}[load_objective(name).unit]
    return value * factor**power


def ranked(problem: Problem, scored: Scored, factor: float) -> tuple[object, ...]:
    costs, *others = rank(problem, scored)
    parts = zip(costs, problem.objectives, strict=True)
    return tuple(in_time(problem, cost, one.name, factor) for cost, one in parts), *others


@cache
def simulated(problem: Problem, factor: float) -> list[Scored]:
    """Every deployment simulated with a factor, once for all that is asked of it."""
    return every(slowed(problem, factor))


class Brute:
    """Every deployment simulated with every factor."""

    def __init__(self, problem: Problem, tied: set[str]) -> None:
        self.problem, self.tied = problem, tied
        (self.best, *others) = self.good(1.0)
        self.next = others[0] if others else None
        self.rival = next((one for one in others if one.text not in tied), None)

    def good(self, factor: float) -> list[Scored]:
        found = [one for one in simulated(self.problem, factor) if one.meets_slos]
        return sorted(found, key=lambda one: ranked(self.problem, one, factor))

    def own(self, factor: float) -> Scored:
        """The best, with its times so much longer."""
        return next(one for one in simulated(self.problem, factor) if one.text == self.best.text)

    def all(self, factor: float) -> str | None:
        """What wins with the times of all."""
        found = next((one.text for one in self.good(factor)), None)
        return self.best.text if found in self.tied and self.own(factor).meets_slos else found

    def alone(self, factor: float) -> str | None:
        """With those of the best."""
        own = self.own(factor)
        if not own.meets_slos:
            return self.next and self.next.text
        if self.rival is None or ranked(self.problem, own, factor) < ranked(self.problem, self.rival, 1.0):
            return self.best.text
        return self.rival.text

    def others(self, factor: float) -> str | None:
        """With those of any other one."""
        rivals = [one for one in self.good(factor) if one.text not in {self.best.text, *self.tied}]
        found = [(self.best, 1.0), *((one, factor) for one in rivals)]
        return min(found, key=lambda pair: ranked(self.problem, *pair))[0].text


def check_turns(problem: Problem, found: Robustness) -> int:
    """Every turn is where brute force has one; how many there are."""
    brute = Brute(problem, {one.text for one in found.tied or ()})
    assert (found.runner_up and found.runner_up.text) == (brute.next and brute.next.text)
    turned = 0
    for turn in found.turns:
        wins = {"all": brute.all, "best": brute.alone, "others": brute.others}[turn.times]
        steps = [study.factor_of(step, turn.slower) for step in range(1, study.STEPS + 1)]
        holds = [wins(factor) == brute.best.text for factor in steps]
        assert turn.holds == 1 or holds[steps.index(turn.holds)]
        if turn.factor is None:
            assert (turn.holds, turn.loss) == (steps[-1], None)
            continue
        turned += 1
        place = steps.index(turn.factor)
        assert turn.loss is not None
        assert turn.holds == ([1.0, *steps])[place]
        assert not holds[place]
        winner = None if turn.loss.winner is None else turn.loss.winner.text
        assert winner == wins(turn.factor)
        if sorted(holds, reverse=True) == holds:  # it wins, and then it does not: then the first is found
            assert place == sum(holds)
    return turned


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer factors, so that all of them can be simulated."""
    monkeypatch.setattr(study, "STEP", 1.15)
    monkeypatch.setattr(study, "STEPS", 5)


@pytest.mark.parametrize(
    ("objective", "slo", "formats"),
    [
        ("e2e_mean", "", ("bf16",)),
        ("ttft_p95", "tpot_p95<=1.4ms", ("bf16",)),
        ("energy", "ttft_p95<=20ms,tpot_mean<=1.6ms", ("bf16", "fp8")),
        ("goodput", "ttft_p90<=14ms,tpot_p95<=1ms", ("bf16",)),
        ("cost_per_mtoken", "throughput>=0.4,e2e<=45ms@80%", ("bf16",)),
    ],
)
@pytest.mark.parametrize("error", [None, 0.1])
@pytest.mark.usefixtures("coarse")
def test_turns_are_where_simulating_everything_has_them(
    objective: str, slo: str, formats: tuple[str, ...], error: float | None
) -> None:
    some = {"weight_formats": formats, "kv_formats": ("bf16",) * len(formats)}
    problem = make_problem(MODEL, make_cluster(4), BUSY, slo, objective=objective, **some)
    assert check_turns(problem, asked(problem, error)) or error


def test_that_a_tied_deployment_wins_is_not_counted() -> None:
    problem = make_problem(MODEL, make_cluster(4), BUSY)
    strict, lenient = asked(problem), asked(problem, 0.25)
    assert lenient.tied
    farther = [
        (one.slower, other.slower, one.factor, other.factor)
        for one, other in zip(strict.turns, lenient.turns, strict=True)
        if one.times in ("best", "others")
    ]
    for slower, _, near, far in farther:
        assert near is not None
        assert far is None or (far > near if slower else far < near)
    winners = {turn.loss.winner.text for turn in lenient.turns if turn.loss and turn.loss.winner}
    assert not winners & {one.text for one in lenient.tied}


SEEDS = [range(9), pytest.param(range(9, 600), marks=pytest.mark.nightly)]


@pytest.mark.parametrize("seeds", SEEDS, ids=["ci", "nightly"])
@pytest.mark.usefixtures("coarse")
def test_turns_of_random_problems_are_where_simulating_everything_has_them(seeds: range) -> None:
    turned = problems = 0
    for seed in seeds:
        problem = random_problem(seed) if seed % 3 else mixed_problem(seed)
        if any(one.meets_slos for one in every(problem)):
            problems += 1
            turned += check_turns(problem, asked(problem, [None, 0.02, 0.3][seed % 3]))
    assert turned >= problems > len(seeds) / 5


@pytest.mark.parametrize("closed", [False, True])
def test_a_slowed_problem_has_the_runs_of_one_whose_times_are_longer(
    monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    trace = random_trace(3, 40, closed=closed)
    if closed:
        trace = replace(trace, pause_ns=7_000_000)
    slo = "ttft_p90<=14ms,throughput>=20,tpot<=2ms@50%"
    problem = make_problem(make_model((sparse(), 4)), make_cluster(4), trace, slo, objective="goodput")

    def runs(asked: Problem) -> list[Scored]:
        """Those without attention copies, whose coordinator has timers, which do not get longer here."""
        return [one for one in every(asked) if one.plan.attention.dp == 1]

    shorter = runs(slowed(problem, 2.0))
    double_times(monkeypatch)
    longer = runs(problem)
    assert [one.text for one in shorter] == [one.text for one in longer]
    assert len({tuple(one.metrics.slo_met.values()) for one in longer}) > 1
    for one, other in zip(shorter, longer, strict=True):
        assert one.metrics.slo_met == other.metrics.slo_met
        for name, power in {"makespan": 1, "throughput": -1, "goodput": -1}.items():
            assert one.metrics.value(name) * 2.0**power == pytest.approx(other.metrics.value(name), rel=1e-5)
        for name in ("ttft", "tpot", "e2e"):
            assert 2 * one.metrics.value(name, "p90") == pytest.approx(other.metrics.value(name, "p90"), rel=1e-5)


@pytest.mark.parametrize("trace", [OFFLINE, random_trace(1, 20, closed=True)], ids=["offline", "closed"])
def test_where_nothing_goes_by_the_clock_times_of_all_cannot_matter(
    monkeypatch: pytest.MonkeyPatch, trace: Trace
) -> None:
    problem = make_problem(MODEL, make_cluster(4), trace, "cost<=9$/h")
    found = asked(problem)
    assert not found.common
    assert [turn.times for turn in found.turns] == ["best", "others"]
    once = sorted(every(problem), key=lambda one: rank(problem, one))
    double_times(monkeypatch)
    twice = sorted(every(problem), key=lambda one: rank(problem, one))
    assert [one.text for one in once] == [one.text for one in twice]
    assert len({one.value for one in once}) > 1


@pytest.mark.parametrize("trace", [OFFLINE, replace(random_trace(1, 20, closed=True), pause_ns=1000), BUSY])
def test_goals_pauses_and_arrivals_make_times_of_all_matter(trace: Trace) -> None:
    slo = "makespan<=10min" if trace is OFFLINE else ""
    assert asked(make_problem(MODEL, make_cluster(2), trace, slo)).common


@pytest.mark.parametrize("error", [0.0, 0.02, 0.3, 5.0])
@pytest.mark.parametrize(
    ("objectives", "slo"),
    [("e2e_mean", ""), ("cost,e2e_mean", ""), ("throughput", "ttft_p95<=20ms"), ("energy~3%,e2e_p95", "")],
)
def test_tied_are_all_that_are_nearer_to_the_best_than_the_error(
    objectives: str, slo: str, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "STEPS", 1)  # no more is asked about times
    objective, *then = load_objectives(objectives)
    problem = make_problem(MODEL, make_cluster(4), BUSY, slo, objective=objective.name, then=tuple(then))
    problem = replace(problem, objective=objective)
    by = deciding(problem)
    assert by.name == objectives.removeprefix("cost,").partition(",")[0].partition("~")[0]
    best = search(problem, SPACE).best
    assert best is not None
    value, sign = by.value(best.metrics), -1 if by.maximise else 1
    near = [
        one
        for one in simulated(problem, 1.0)
        if one.meets_slos
        and one.text != best.text
        and sign * by.value(one.metrics) <= sign * value * (1 + sign * error)
        and (objective.name != "cost" or one.value <= best.value)
    ]
    aims = tuple(replace(one, tolerance=0.0) for one in problem.objectives)
    plain = replace(problem, objective=aims[0], then=aims[1:])
    expected = [one.text for one in sorted(near, key=lambda one: rank(plain, one))]
    found = asked(problem, error).tied
    assert found is not None
    assert [one.text for one in found] == expected[: study.MOST_TIED]


def test_no_more_than_so_many_are_told_to_be_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "MOST_TIED", 2)
    problem = make_problem(MODEL, make_cluster(4), BUSY)
    found = asked(problem, 50.0).tied
    assert found is not None
    assert [one.text for one in found] == [one.text for one in search(problem, SPACE, top=3).candidates[1:3]]
    assert asked(problem).tied is None


def test_a_goal_that_is_missed_is_told_with_what_is_reached_in_the_time_of_the_question() -> None:
    trace = make_trace(name="one", arrival_ns=[0], prompt=[300], output=[10])
    alone = make_problem(MODEL, make_cluster(1), trace)
    ttft_s = every(alone)[0].metrics.value("ttft", "p95")
    problem = replace(alone, slos=parse_goals(f"ttft_p95<={1.095 * ttft_s:.9f}s"))
    slower, shorter, best, others = asked(problem).turns
    assert (shorter.factor, others.factor) == (None, None)
    for turn in (slower, best):
        assert turn.factor == pytest.approx(1.01**10)
        assert turn.holds == pytest.approx(1.01**9)
        assert turn.loss is not None
        assert (turn.loss.winner, turn.loss.value) == (None, None)
        assert f"it reaches {1e3 * ttft_s * 1.01**10:.4g} ms" in turn.loss.missed


def test_with_a_tolerance_times_of_one_alone_are_not_asked_about() -> None:
    problem = make_problem(MODEL, make_cluster(2), BUSY, then=(load_objective("energy"),))
    tolerant = replace(problem, objective=replace(problem.objective, tolerance=0.1))
    assert [turn.times for turn in asked(tolerant).turns] == ["all", "all"]
    assert [turn.times for turn in asked(problem).turns] == ["all", "all", "best", "others"]


def test_what_cannot_be_asked_is_refused() -> None:
    infeasible = make_problem(MODEL, make_cluster(1), BUSY, "ttft_p95<=1us")
    with pytest.raises(UsageError, match="no deployment"):
        asked(infeasible)
    odd = Figure(name="odd", help="odd", unit=Unit(name="odd", form="a number"), value=lambda run: run.makespan_s)
    with registered(odd), pytest.raises(UsageError, match="--robust: how odd moves with all times is not known"):
        asked(make_problem(MODEL, make_cluster(2), BUSY, objective="odd"))
