"""The replay agrees with the search, and says so where a certificate claims what is not true."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from plan_cases import every_deployment, make_cluster, make_problem, random_mixed, random_problem, random_trace

from apex_opt.figures import load_objective, load_objectives, parse_goals
from apex_opt.ir import load_model
from apex_opt.search import Answer, Problem, Scorer, search
from apex_opt.studies import check as module
from apex_opt.studies.check import check
from apex_opt.workload import make_trace
from formulations import deployment
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from apex_opt.plans.deployment import Deployment

SEEDS = range(100, 108)
MORE = [pytest.param(seed, marks=pytest.mark.nightly) for seed in range(108, 300)]
SPACE = PlanSpace()


@cache
def honest() -> tuple[Problem, Answer]:
    """A problem with several plans that meet its goals, bounded ones among the rest, and its answer."""
    problem = make_problem(load_model("llama-3.1-8b"), make_cluster(4), random_trace(5, 30))
    answer = search(problem, SPACE, top=2)
    (part,) = answer.ledger.parts
    assert part.bounded > 0
    assert sum(part.infeasible.values()) > 0
    assert len(answer.candidates) >= 2
    return problem, answer


def changed(answer: Answer, place: int = 0, **changes: Any) -> Answer:
    """The answer with other figures of a part of its ledger."""
    parts = list(answer.ledger.parts)
    parts[place] = replace(parts[place], **changes)
    return replace(answer, ledger=replace(answer.ledger, parts=tuple(parts)))


def disagreements(problem: Problem, answer: Answer) -> str:
    found = check(problem, answer, SPACE, deployment)
    assert found.holds == (not found.disagreements)
    return "; ".join(found.disagreements)


@pytest.mark.parametrize("seed", [*SEEDS, *MORE])
def test_the_certificate_of_every_answer_holds_when_replayed(seed: int) -> None:
    problem = random_problem(seed)
    answer = search(problem, SPACE)
    found = check(problem, answer, SPACE, deployment)
    assert found.disagreements == ()
    assert (found.meeting == 0) == (answer.best is None)
    assert found.space == sum(found.infeasible.values()) + found.repeated + found.simulated


@pytest.mark.parametrize(
    ("aims", "seeds"),
    [
        ("cost,e2e_mean", (101, 103)),
        ("energy~5%,itl_p99", (101, 102)),
        ("e2e_mean~20%,cost~50%,energy_per_token", (100, 101)),
    ],
)
def test_the_certificate_of_several_objectives_holds_when_replayed(aims: str, seeds: tuple[int, ...]) -> None:
    objective, *then = load_objectives(aims)
    for seed in seeds:
        problem = replace(random_problem(seed), objective=objective, then=tuple(then))
        assert check(problem, search(problem, SPACE), SPACE, deployment).disagreements == ()


@pytest.mark.parametrize("aims", ["cost,energy", "energy~50%,e2e_mean"])
def test_a_plan_that_is_best_by_the_first_objective_alone_is_found_out(aims: str) -> None:
    objective, *then = load_objectives(aims)
    problem = replace(honest()[0], objective=objective, then=tuple(then)).offering(clocks=(None, 1500, 900))
    answer = search(problem, SPACE)
    alone = search(replace(problem, objective=load_objective(objective.name), then=()), SPACE)
    assert answer.best is not None
    assert alone.best is not None
    assert answer.best.plan != alone.best.plan
    said = disagreements(problem, replace(answer, candidates=(alone.best,)))
    assert f"{answer.best.plan} comes before {alone.best.plan}" in said


@pytest.mark.parametrize("objective", ["energy", "e2e_mean"])
def test_clocks_are_part_of_the_space_that_is_replayed(objective: str) -> None:
    problem = replace(honest()[0], objective=load_objective(objective)).offering(clocks=(None, 1500, 900))
    found = check(problem, search(problem, SPACE), SPACE, deployment)
    assert found.holds
    assert found.space == 3 * check(*honest(), SPACE, deployment).space


def test_routers_are_part_of_the_space_that_is_replayed() -> None:
    problem = replace(honest()[0], routings=("round_robin", "least_loaded"))
    answer = search(problem, SPACE)
    found = check(problem, answer, SPACE, deployment)
    assert found.holds
    assert found.space > check(*honest(), SPACE, deployment).space
    assert answer.ledger.parts[0].space == found.space


def test_answers_cut_short_by_time_hold_within_their_gap_and_not_within_none() -> None:
    cut = beaten = 0
    for seed in (100, 102, 105, 107):
        problem = random_problem(seed)
        answer = search(problem, SPACE, time_limit_s=0.0)
        assert disagreements(problem, answer) == ""
        best = search(problem, SPACE).best
        cut += answer.ledger.waiting > 0
        if answer.best is None or best is None or best.value == answer.best.value:
            continue
        beaten += 1
        claimed = changed(answer, left=[])
        assert f"{best.plan} is better by more than the gap of 0.0%" in disagreements(problem, claimed)
    assert cut >= 2
    assert beaten >= 1


def test_a_plan_that_is_not_the_best_is_found_out() -> None:
    problem, answer = honest()
    assert disagreements(problem, answer) == ""
    second = replace(answer, candidates=answer.candidates[1:])
    assert f"{answer.candidates[0].plan} comes before {answer.candidates[1].plan}" in disagreements(problem, second)


def test_a_best_plan_that_misses_a_goal_is_found_out() -> None:
    problem, answer = honest()
    assert answer.best is not None
    stricter = make_problem(problem.model, problem.cluster, problem.trace, "ttft_max<=1ns")
    assert f"{answer.best.plan} is not among the plans that meet the goals" in disagreements(stricter, answer)


def test_an_answer_that_there_is_no_plan_is_found_out() -> None:
    problem, answer = honest()
    assert answer.best is not None
    none = replace(answer, status="infeasible", candidates=())
    assert f"{answer.best.plan} meets the goals, though no plan is said to" in disagreements(problem, none)


@pytest.mark.parametrize("family", ["divisibility", "memory"])
def test_a_family_charged_with_too_many_plans_is_found_out(family: str) -> None:
    problem, answer = honest()
    counts = answer.ledger.parts[0].infeasible
    said = disagreements(problem, changed(answer, infeasible={**counts, family: counts[family] + 1}))
    assert said == f"{counts[family]} plans break {family} first, not {counts[family] + 1}"


def test_a_plan_left_out_of_the_space_or_of_the_count_is_found_out() -> None:
    problem, answer = honest()
    (part,) = answer.ledger.parts
    said = disagreements(problem, changed(answer, space=part.space - 1, beaten=part.beaten - 1))
    assert f"the space has {part.space} plans, not {part.space - 1}" in said
    assert "are accounted for" in said


def test_a_bound_above_what_a_plan_costs_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, answer = honest()
    true = Scorer.bounds

    def higher(self: Scorer, deployment: Deployment) -> tuple[tuple[float, ...], bool]:
        bounds, _ = true(self, deployment)
        return tuple(100 * bound for bound in bounds), True

    monkeypatch.setattr(Scorer, "bounds", higher)
    assert "less than its bound" in disagreements(problem, answer)
    monkeypatch.setattr(Scorer, "bounds", lambda self, deployment: (true(self, deployment)[0], False))
    assert "meets the goals, which its bound rules out" in disagreements(problem, answer)


# ---- several types of GPU ---------------------------------------------------------------------------------------


MIXED = (0, 4, 9, 11, 13, 15, 16, 18, 21, 25, 33)
"""Seeds whose answers, among them, simulate every shape."""
MORE_MIXED = [pytest.param(seed, marks=pytest.mark.nightly) for seed in range(60) if seed not in MIXED]


@cache
def mixed(seed: int) -> tuple[Problem, Answer]:
    problem = random_mixed(seed)
    return problem, search(problem, SPACE)


@pytest.mark.parametrize("seed", [*MIXED, *MORE_MIXED])
def test_the_ledger_of_every_answer_over_two_types_holds_when_replayed(seed: int) -> None:
    problem, answer = mixed(seed)
    found = check(problem, answer, SPACE, deployment)
    assert found.disagreements == ()
    assert found.chosen is None
    assert found.simulated == len(every_deployment(Scorer(problem)))
    assert (found.meeting == 0) == (answer.best is None)
    assert [(part.shape, part.types) for part in found.parts] == [
        (part.shape, part.types) for part in answer.ledger.parts
    ]


@pytest.mark.parametrize("scarce", ["clients", "requests"])
@pytest.mark.parametrize("goal", ["ttft_p95<=1ns", "ttft_p95<=1s"])
def test_fleets_for_which_there_is_too_little_to_do_are_counted_as_such_whatever_the_goals(
    scarce: str, goal: str
) -> None:
    problem = random_mixed(1)
    requests = 20 if scarce == "clients" else 1
    trace = make_trace(
        name="test",
        arrival_ns=[0] * requests,
        prompt=[50] * requests,
        output=[4] * requests,
        concurrency=1 if scarce == "clients" else None,
    )
    problem = replace(problem, trace=trace, slos=parse_goals(goal))
    answer = search(problem, SPACE)
    found = check(problem, answer, SPACE, deployment)
    assert found.disagreements == ()
    (claimed,), (counted,) = answer.ledger.of("mixed"), [part for part in found.parts if part.shape == "mixed"]
    assert claimed.infeasible == counted.infeasible
    assert claimed.infeasible["share"] > 0 == claimed.bounded + claimed.simulated


@pytest.mark.parametrize("aims", ["cost,e2e_mean", "e2e_mean~20%,energy"])
def test_the_ledgers_of_several_objectives_over_two_types_hold_when_replayed(aims: str) -> None:
    objective, *then = load_objectives(aims)
    for seed in (9, 11, 25, 33):
        problem = replace(random_mixed(seed), objective=objective, then=tuple(then))
        assert check(problem, search(problem, SPACE), SPACE, deployment).disagreements == ()


def test_these_ledgers_have_parts_of_every_shape() -> None:
    parts = [part for seed in MIXED for part in mixed(seed)[1].ledger.parts]
    for shape in ("single", "mixed", "pipeline"):
        assert sum(part.shape == shape and part.simulated > 0 for part in parts) >= 5, shape
    assert any(part.infeasible.get("gpus") for part in parts)
    assert any(part.infeasible.get("part") for part in parts)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("changes", [{"space": 1}, {"out_of_reach": 1}, {"beaten": -1}])
def test_a_part_that_does_not_add_up_is_found_out(place: int, changes: dict[str, int]) -> None:
    problem, answer = mixed(1)
    part = answer.ledger.parts[place]
    wrong = {name: getattr(part, name) + more for name, more in changes.items()}
    said = disagreements(problem, changed(answer, place, **wrong))
    where = {"single": "alone: ", "mixed": "together: ", "pipeline": "pipelines over "}[part.shape]
    assert where in said
    assert ("the space has" if "space" in changes else "are accounted for") in said


def test_a_mix_that_is_not_the_best_is_found_out_by_a_sample_too(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, answer = mixed(18)
    assert answer.best is not None and len(answer.best.pools) == 2
    alone = min((one for one in answer.alone if one is not None), key=lambda one: problem.costs(one.metrics))
    wrong = replace(answer, candidates=(alone,))
    assert f"{answer.best.text} comes before {alone.text}" in disagreements(problem, wrong)
    every = check(problem, answer, SPACE, deployment).simulated
    monkeypatch.setattr(module, "MOST", 3)
    monkeypatch.setattr(module, "SAMPLE", 2)
    found = check(problem, answer, SPACE, deployment)
    assert found.disagreements == ()
    assert found.chosen is not None
    assert 3 < found.simulated <= 3 + 2 + 1
    monkeypatch.setattr(module, "NEAR", 1e9)
    monkeypatch.setattr(module, "MOST", every - 1)
    assert f"{answer.best.text} comes before {alone.text}" in disagreements(problem, wrong)
