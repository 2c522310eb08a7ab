"""Several plans side by side: the figures of each in its column, the best named, what cannot run told why."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from apex_opt.arguments import Ask
from apex_opt.planned import resolve_plans
from apex_opt.report.document import answer_document
from apex_opt.report.layout import amount, seconds
from apex_opt.report.side_by_side import compared_document, compared_page
from apex_opt.schema import to_plain
from apex_opt.search import Scorer, judge
from apex_opt.studies.explain import differences

if TYPE_CHECKING:
    from apex_opt.schema import Document

CHEAP = {"model": "llama-3.1-8b", "cluster": "2xh200-sxm", "trace": "static:n=4,prompt=64,output=16"}


@cache
def compared(*plans: str, **given: str) -> Document:
    """Plans, each judged."""
    asked = resolve_plans(plans, Ask(**CHEAP | given))
    answers = [judge(problem, plan) for problem, plan in asked]
    documents = [
        answer_document("simulate", problem, answer, Scorer(problem).provenance(answer.candidates))
        for (problem, plan), answer in zip(asked, answers, strict=True)
    ]
    runs = [(Scorer(q), answer.best) for (q, _), answer in zip(asked, answers, strict=True) if answer.best]
    return to_plain(
        compared_document([str(plan) for _, plan in asked], documents, differences(runs) if len(runs) > 1 else ())
    )


def rows_of(document: Document, width: int = 120) -> dict[str, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        lines = compared_page(document).splitlines()
    start = lines.index("Side by side")
    rows = [line.split("  ") for line in lines[start + 3 : lines.index("", start)]]
    return {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}


def test_every_plan_has_its_figures_in_its_column() -> None:
    document = compared("tp2", "dp2", "tp1 fp8", slo="ttft_p95<=1s,e2e_p95<=1us,itl<=1s@90%", objective="energy")
    assert json.loads(json.dumps(document, allow_nan=False))["status"] == "feasible"
    rows = rows_of(document)
    runs = [plan["best"] for plan in document["plans"]]
    assert rows["GPUs"] == ["2", "2", "1"]
    assert rows["ttft_p95<=1s"] == [f"met, {seconds(run['metrics']['ttft_s']['p95'])}" for run in runs]
    assert rows["e2e_p95<=1us"] == [f"MISSED, {seconds(run['metrics']['e2e_s']['p95'])}" for run in runs]
    assert rows["itl<=1s@90%"] == ["met, 100.0%"] * 3
    assert rows["TTFT p95"] == [seconds(run["metrics"]["ttft_s"]["p95"]) for run in runs]
    assert rows["energy"] == [amount(run["metrics"]["energy_j"], "J") for run in runs]
    assert rows["batches"] == [f"{run['metrics']['batches']:,}" for run in runs]
    weights = [run["memory"][0]["weights_bytes"] for run in runs]
    assert rows["weights per GPU, at most"] == [amount(size, "B") for size in weights]


def test_what_differs_has_a_column_for_each_plan_and_the_gap_of_two() -> None:
    two, three = compared("tp2", "dp2"), compared("tp2", "dp2", "tp1")
    terms = two["differences"]["terms"]
    assert [term["share"] for term in terms] == sorted((term["share"] for term in terms), reverse=True)
    assert {term["part"] for term in terms} >= {"time per GPU", "mean latency", "energy", "memory per GPU"}
    page = compared_page(two).splitlines()
    head = page[page.index("What differs, largest share of its whole first") + 1]
    assert head.split() == ["of", "#1", "#2", "difference", "share"]
    page = compared_page(three).splitlines()
    head = page[page.index("What differs, largest share of its whole first") + 1]
    assert head.split() == ["of", "#1", "#2", "#3", "share"]
    assert all(len(term["values"]) == 3 for term in three["differences"]["terms"])


@pytest.mark.parametrize(
    ("plans", "given", "best"),
    [
        (("dp2", "tp2"), {}, 2),
        (("tp2", "dp2"), {}, 1),
        (("tp1", "tp2"), {"objective": "cost"}, 1),
        (("tp1", "tp2"), {"objective": "throughput"}, 2),
        (("tp8", "tp1"), {}, 2),
        (("dp2", "tp2"), {"objective": "cost,e2e_mean"}, 2),
        (("tp8", "tp4"), {}, None),
    ],
)
def test_the_best_by_the_objectives_is_named(plans: tuple[str, ...], given: dict[str, str], best: int | None) -> None:
    document = compared(*plans, **given)
    assert document["best"] == best
    page = " ".join(compared_page(document).split())
    assert ("best of 2 plans" in page) == (best is not None)
    if best is not None:
        assert f"best of 2 plans: {document['plans'][best - 1]['plan']}, " in page


def test_a_plan_that_misses_a_goal_is_no_better_than_one_that_meets_all() -> None:
    quick, slow = (compared(plan)["plans"][0]["best"]["metrics"]["e2e_s"]["p95"] for plan in ("tp2", "tp1"))
    limit = f"e2e_p95<={(quick + slow) / 2}s"
    document = compared("tp1", "tp2", slo=limit, objective="cost")
    assert document["best"] == 2
    (limit,) = document["plans"][0]["best"]["metrics"]["slo"]
    assert f"misses {limit}" in " ".join(compared_page(document).split())


def test_where_every_plan_misses_a_goal_the_best_is_said_to() -> None:
    page = " ".join(compared_page(compared("tp1", "tp2", slo="e2e_p95<=1us")).split())
    assert "though it misses e2e_p95<=1us" in page


def test_what_cannot_run_is_told_why_and_has_no_column() -> None:
    document = compared("tp8", "tp2")
    assert document["plans"][0]["status"] == "infeasible"
    assert document["differences"] == {"plans": [2], "terms": []}
    assert "the plan takes 8 GPUs, 2 are offered" in " ".join(compared_page(document).split())
    assert rows_of(document)["GPUs"] == ["2"]


def test_sources_and_notes_of_all_plans_are_told_once() -> None:
    document = compared("tp2", "tp1 fp8")
    for plan in document["plans"]:
        for figure, text in plan["provenance"].items():
            told = document["provenance"][figure].split("; ")
            assert set(text.split("; ")) <= set(told)
            assert len(set(told)) == len(told)
    assert document["notes"] == []


@pytest.mark.parametrize("width", [40, 50, 80, 120])
def test_pages_fit_their_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for plans in (("tp2", "dp2"), ("tp8", "tp2", "dp2", "pp2", "tp1 fp8")):
        page = compared_page(compared(*plans, slo="ttft_p95<=1s"))
        assert all(len(line) <= width for line in page.splitlines())


def test_the_same_plan_twice_is_refused() -> None:
    from apex_opt.errors import UsageError

    options: Any = Ask(**CHEAP)
    with pytest.raises(UsageError, match="which is given before; give each plan once"):
        resolve_plans(("tp2", "attn(tp2) ffn(tp2)"), options)


def test_deployments_on_several_types_of_gpu_stand_beside_plans_on_one() -> None:
    plans = "h100-sxm-80gb: tp1", "h100-sxm-80gb: tp1 + l40s-48gb: tp1"
    found = compared(*plans, cluster="1xh100-sxm+1xl40s")
    assert [row["best"]["gpus"] for row in found["plans"]] == [1, 2]
    assert any("l40s" in figure for figure in found["provenance"])
    assert "l40s-48gb" in compared_page(found)
