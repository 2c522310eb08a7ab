"""Points are the same question where their options resolve to the same; whatever comes of one is kept."""

from __future__ import annotations

from typing import Any

import pytest

import apex_opt.api
from apex_opt.arguments import CapacityAsk, PlanAsk
from apex_opt.grids.points import Outcome, answered, figures, identified
from apex_opt.grids.study import Study

FIXED = {"model": "llama-3.1-8b", "cluster": "2xh200-sxm", "trace": "static:n=6,prompt=64,output=8"}
PLAN = Study(command="plan", asks=PlanAsk, fixed=FIXED, axes={})


def key(study: Study = PLAN, **point: Any) -> str:
    found = identified((study, point))
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize(
    "point",
    [
        {"cluster": "2xh200-sxm-141gb"},
        {"weights": "bf16"},
        {"gpus": 2},
        {"routing": "round_robin"},
        {"objective": " e2e_mean"},
        {"max_num_batched_tokens": 8192},
    ],
)
def test_what_resolves_to_the_same_is_the_same_question(point: dict[str, Any]) -> None:
    assert key(**point) == key()


@pytest.mark.parametrize(
    "point",
    [
        {"model": "llama-3.1-70b"},
        {"cluster": "1xh200-sxm"},
        {"weights": "bf16,fp8"},
        {"trace": "static:n=6,prompt=64,output=9"},
        {"slo": "ttft_p95<=1s"},
        {"engine": "sglang"},
        {"top": 1},
        {"check": True},
        {"rate": 2.0, "trace": "chat"},
        {"seed": 1, "trace": "poisson:rate=2,n=9"},
    ],
)
def test_what_differs_in_anything_is_another_question(point: dict[str, Any]) -> None:
    assert key(**point) != key()


def test_the_rate_that_capacity_is_asked_for_tells_its_questions_apart() -> None:
    study = Study(command="capacity", asks=CapacityAsk, fixed=FIXED | {"slo": "ttft_p95<=1s"}, axes={})
    assert len({key(study), key(study, rate=2.0), key(study, rate=3.0), key(study, resolution=0.5)}) == 4


def test_a_point_that_cannot_be_asked_is_kept_with_its_reason() -> None:
    found = identified((PLAN, {"model": "lama"}))
    assert isinstance(found, Outcome)
    assert (found.status, found.exit_code) == ("failed", 2)
    assert found.error is not None and found.error.startswith("unknown model 'lama'")
    assert answered((apex_opt.api.plan, FIXED | {"model": "lama"})).error == found.error


def test_an_answer_is_a_row_with_the_figures_of_its_document() -> None:
    found, told = answered((apex_opt.api.plan, FIXED)), apex_opt.api.plan(**FIXED).to_dict()
    ((row),) = found.rows
    best = told["best"]
    assert (found.status, found.exit_code, row["plan"], row["gpus"]) == ("optimal", 0, best["plan"], best["gpus"])
    assert row["figures"]["ttft_s.p95"] == best["metrics"]["ttft_s"]["p95"]
    assert row["figures"]["energy_j"] == best["metrics"]["energy_j"]
    assert tuple(row["figures"]) == figures()


def test_a_front_has_a_row_for_each_plan_and_what_does_not_fit_one_with_its_reason() -> None:
    asked = FIXED | {"objective": "e2e_mean,energy"}
    front = answered((apex_opt.api.pareto, asked))
    assert [row["plan"] for row in front.rows] == [r.plan for r in apex_opt.api.pareto(**asked).document.candidates]  # type: ignore[attr-defined]
    none = answered((apex_opt.api.plan, FIXED | {"model": "llama-3.1-70b", "cluster": "1xl4"}))
    assert (none.status, none.exit_code, none.rows) == ("infeasible", 3, ({},))
    assert none.error is not None and "memory" in none.error


def test_a_fault_of_one_point_does_not_end_the_study() -> None:
    def broken(**_: Any) -> Any:
        raise ZeroDivisionError("of\nours")

    found = answered((broken, {}))
    assert (found.status, found.exit_code, found.error) == ("failed", 1, "a fault of ours: ZeroDivisionError: of ours")
