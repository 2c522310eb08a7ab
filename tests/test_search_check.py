"""The replay agrees with the search, and says so where a certificate claims what is not true."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from plan_cases import make_cluster, make_question, random_question, random_trace

from apex_opt.figures import load_objective, load_objectives
from apex_opt.ir import load_model
from apex_opt.search import Answer, Question, check, search
from formulations.plan_space import PlanSpace

SEEDS = range(100, 200)
SPACE = PlanSpace()


@cache
def honest() -> tuple[Question, Answer]:
    """A question with several plans that meet its goals, bounded ones among the rest, and its answer."""
    question = make_question(load_model("llama-3.1-8b"), make_cluster(4), random_trace(5, 30))
    answer = search(question, SPACE, top=2)
    assert answer.certificate.bounded > 0
    assert sum(answer.certificate.infeasible.values()) > 0
    assert len(answer.candidates) >= 2
    return question, answer


def disagreements(question: Question, answer: Answer) -> str:
    found = check(question, answer)
    assert found.holds == (not found.disagreements)
    return "; ".join(found.disagreements)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_certificate_of_every_answer_holds_when_replayed(seed: int) -> None:
    question = random_question(seed)
    answer = search(question, SPACE)
    found = check(question, answer)
    assert found.disagreements == ()
    assert (found.meeting == 0) == (answer.best is None)
    assert found.space == sum(found.infeasible.values()) + found.repeated + found.simulated


@pytest.mark.parametrize("seed", SEEDS[:40])
@pytest.mark.parametrize("aims", ["cost,e2e_mean", "energy~5%,itl_p99", "e2e_mean~20%,cost~50%,energy_per_token"])
def test_the_certificate_of_several_objectives_holds_when_replayed(seed: int, aims: str) -> None:
    objective, *then = load_objectives(aims)
    question = replace(random_question(seed), objective=objective, then=tuple(then))
    assert check(question, search(question, SPACE)).disagreements == ()


@pytest.mark.parametrize("aims", ["cost,energy", "energy~50%,e2e_mean"])
def test_a_plan_that_is_best_by_the_first_objective_alone_is_found_out(aims: str) -> None:
    objective, *then = load_objectives(aims)
    question = replace(honest()[0], objective=objective, then=tuple(then), clocks=(None, 1500, 900))
    answer = search(question, SPACE)
    alone = search(replace(question, objective=load_objective(objective.name), then=()), SPACE)
    assert answer.best is not None
    assert alone.best is not None
    assert answer.best.plan != alone.best.plan
    said = disagreements(question, replace(answer, best=alone.best))
    assert f"{answer.best.plan} comes before {alone.best.plan}" in said


@pytest.mark.parametrize("objective", ["energy", "e2e_mean"])
def test_clocks_are_part_of_the_space_that_is_replayed(objective: str) -> None:
    question = replace(honest()[0], objective=load_objective(objective), clocks=(None, 1500, 900))
    found = check(question, search(question, SPACE))
    assert found.holds
    assert found.space == 3 * check(*honest()).space


def test_answers_cut_short_by_time_hold_within_their_gap_and_not_within_none() -> None:
    cut = beaten = 0
    for seed in SEEDS:
        question = random_question(seed)
        answer = search(question, SPACE, time_limit_s=0.0)
        assert disagreements(question, answer) == ""
        best = search(question, SPACE).best
        cut += answer.certificate.left > 0
        if answer.best is None or best is None or best.value == answer.best.value:
            continue
        beaten += 1
        claimed = replace(answer, certificate=replace(answer.certificate, gap=0.0))
        assert f"{best.plan} is better by more than the gap of 0.0%" in disagreements(question, claimed)
    assert cut >= 10
    assert beaten >= 3


def test_a_plan_that_is_not_the_best_is_found_out() -> None:
    question, answer = honest()
    assert disagreements(question, answer) == ""
    second = replace(answer, best=answer.candidates[1])
    assert f"{answer.candidates[0].plan} comes before {answer.candidates[1].plan}" in disagreements(question, second)


def test_a_best_plan_that_misses_a_goal_is_found_out() -> None:
    question, answer = honest()
    assert answer.best is not None
    stricter = make_question(question.model, question.cluster, question.trace, "ttft_max<=1ns")
    assert f"{answer.best.plan} is not among the plans that meet the goals" in disagreements(stricter, answer)


def test_an_answer_that_there_is_no_plan_is_found_out() -> None:
    question, answer = honest()
    assert answer.best is not None
    none = replace(answer, status="infeasible", best=None, candidates=())
    assert f"{answer.best.plan} meets the goals, though no plan is said to" in disagreements(question, none)


@pytest.mark.parametrize("family", ["divisibility", "memory"])
def test_a_family_charged_with_too_many_plans_is_found_out(family: str) -> None:
    question, answer = honest()
    counts = answer.certificate.infeasible
    wrong = replace(answer.certificate, infeasible={**counts, family: counts[family] + 1})
    said = disagreements(question, replace(answer, certificate=wrong))
    assert said == f"{counts[family]} plans break {family} first, not {counts[family] + 1}"


def test_a_plan_left_out_of_the_space_or_of_the_count_is_found_out() -> None:
    question, answer = honest()
    wrong = replace(answer.certificate, space=answer.certificate.space - 1, bounded=answer.certificate.bounded - 1)
    said = disagreements(question, replace(answer, certificate=wrong))
    assert f"the space has {answer.certificate.space} plans, not {wrong.space}" in said
    assert "are accounted for" in said


def test_a_bound_above_what_a_plan_costs_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from apex_opt.search import Evaluator

    question, answer = honest()
    true = Evaluator.bound
    monkeypatch.setattr(Evaluator, "bound", lambda self, plan: (true(self, plan)[0] * 100, True))
    assert "less than its bound" in disagreements(question, answer)
    monkeypatch.setattr(Evaluator, "bound", lambda self, plan: (true(self, plan)[0], False))
    assert "meets the goals, which its bound rules out" in disagreements(question, answer)
