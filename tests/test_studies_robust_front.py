"""How far times may be off before other deployments are on a front: held against simulating every deployment."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
from plan_cases import dense, make_cluster, make_model, make_problem, random_trace
from search_cases import SPACE, every

from apex_opt.errors import UsageError
from apex_opt.figures import load_objective
from apex_opt.studies import robust as study
from apex_opt.studies.pareto import dominates, pareto
from apex_opt.studies.robust import scale, slowed
from apex_opt.studies.robust_front import robust_front
from apex_opt.workload import make_trace

if TYPE_CHECKING:
    from apex_opt.search import Problem, Scored
    from apex_opt.search.ledger import Costs

MODEL = make_model((dense(hidden=1024, columns=4096), 6))
BUSY = random_trace(5, 40)


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer factors, so that all of them can be simulated."""
    monkeypatch.setattr(study, "STEP", 1.15)
    monkeypatch.setattr(study, "STEPS", 5)


class Brute:
    """Every deployment simulated with every factor, and all pairs compared."""

    def __init__(self, problem: Problem, names: tuple[str, ...]) -> None:
        self.objectives = tuple(map(load_objective, names))
        self.problem = problem
        self.runs = cache(lambda factor: {one.text: one for one in every(slowed(problem, factor))})
        self.members = self.front(1.0)

    def costs(self, scored: Scored, factor: float) -> Costs:
        return tuple(o.signed(o.value(scored.metrics)) * scale(o.figure, factor) for o in self.objectives)

    def good(self, factor: float, aside: frozenset[str] = frozenset()) -> dict[str, Costs]:
        runs = self.runs(factor)
        return {text: self.costs(one, factor) for text, one in runs.items() if one.meets_slos and text not in aside}

    def front(self, factor: float, aside: frozenset[str] = frozenset()) -> frozenset[str]:
        found = self.good(factor, aside)
        return frozenset(
            text for text, mine in found.items() if not any(dominates(other, mine) for other in found.values())
        )

    def same(self, times: str, of: str, factor: float) -> bool:
        if times == "all":
            return self.front(factor) == self.members
        now = self.good(1.0)
        if times == "best":
            run, rivals = self.runs(factor)[of], [costs for text, costs in now.items() if text != of]
            return run.meets_slos and not any(dominates(rival, self.costs(run, factor)) for rival in rivals)
        own = [now[text] for text in self.members]
        others = self.good(factor, self.members).values()
        return all(any(mine == its or dominates(mine, its) for mine in own) for its in others)


@pytest.mark.parametrize(
    ("names", "slo"),
    [
        (("e2e_mean", "cost"), ""),
        (("e2e_mean", "energy"), "ttft_p95<=20ms"),
        (("ttft_p95", "tpot_mean", "energy"), "tpot_p95<=1.6ms"),
    ],
)
def test_turns_are_where_comparing_all_pairs_has_them(names: tuple[str, ...], slo: str) -> None:
    problem = make_problem(MODEL, make_cluster(4), BUSY, slo)
    brute = Brute(problem, names)
    front = pareto(problem, brute.objectives, SPACE)
    assert {one.text for one in front.candidates} == brute.members
    found = robust_front(problem, front, SPACE)
    of = [None if turn.of is None else turn.of.text for turn in found.turns]
    assert of == [None, None, *(one.text for one in front.candidates), None]
    changed = 0
    for turn, whose in zip(found.turns, of, strict=True):
        steps = [study.factor_of(step, turn.slower) for step in range(1, study.STEPS + 1)]
        same = [brute.same(turn.times, whose or "", factor) for factor in steps]
        if turn.factor is None:
            assert (turn.holds, turn.change) == (steps[-1], None)
            assert same[-1]
            continue
        changed += 1
        place, change = steps.index(turn.factor), turn.change
        assert not same[place]
        assert turn.holds == ([1.0, *steps])[place]
        assert change is not None
        joins, leaves = ({one.text for one in some} for some in (change.joins, change.leaves))
        if turn.times == "all":
            assert (brute.members - leaves) | joins == brute.front(turn.factor)
        elif turn.times == "best":
            assert (joins, leaves) == (set(), {whose})
            assert bool(change.missed) != brute.runs(turn.factor)[whose].meets_slos
        else:
            assert leaves == set()
            assert joins <= brute.front(turn.factor, brute.members)
    assert changed


def test_a_goal_that_is_missed_is_told_in_the_time_of_the_question() -> None:
    trace = make_trace(name="one", arrival_ns=[0], prompt=[300], output=[10])
    alone = make_problem(MODEL, make_cluster(1), trace)
    ttft_s = every(alone)[0].metrics.value("ttft", "p95")
    problem = make_problem(MODEL, make_cluster(1), trace, f"ttft_p95<={1.2 * ttft_s:.9f}s")
    objectives = load_objective("e2e_mean"), load_objective("energy")
    found = robust_front(problem, pareto(problem, objectives, SPACE), SPACE)
    slower = next(turn for turn in found.turns if turn.times == "best")
    assert slower.factor == pytest.approx(1.15**2)
    assert slower.change is not None
    assert f"it reaches {1e3 * ttft_s * 1.15**2:.4g} ms" in slower.change.missed


def test_a_front_without_deployments_has_nothing_to_be_held_against() -> None:
    problem = make_problem(MODEL, make_cluster(1), BUSY, "ttft_p95<=1us")
    objectives = load_objective("e2e_mean"), load_objective("energy")
    with pytest.raises(UsageError, match="no deployment"):
        robust_front(problem, pareto(problem, objectives, SPACE), SPACE)


def test_where_no_other_plan_can_run_only_what_can_change_is_asked() -> None:
    trace = make_trace(name="two", arrival_ns=[0, 10**8], prompt=[300, 300], output=[10, 10])
    alone = make_problem(MODEL, make_cluster(1), trace)
    objectives = load_objective("e2e_mean"), load_objective("energy")
    front = pareto(alone, objectives, SPACE)
    assert len(every(alone)) == len(front.candidates) == 1
    assert robust_front(alone, front, SPACE).turns == ()
    pair = make_problem(MODEL, make_cluster(2), trace)
    both = pareto(pair, objectives, SPACE)
    whose = {turn.times for turn in robust_front(pair, both, SPACE).turns}
    assert ("others" in whose) == (len(every(pair)) > len(both.candidates))
