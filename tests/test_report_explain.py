"""Explanations as a document and as a page: the same figures, at any width."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cli_cases import run

from apex_opt.arguments import ExplainAsk
from apex_opt.planned import resolve_plan
from apex_opt.report.explain import _apart, explanation_document, explanation_page
from apex_opt.resolve import resolve
from apex_opt.schema import to_plain
from apex_opt.studies.explain import explain
from formulations.plan_space import PlanSpace

CHEAP = {"model": "llama-3.1-8b", "cluster": "2xh200-sxm", "trace": "static:n=4,prompt=64,output=16"}


def document(plan: str | None = None, **given: Any) -> dict[str, Any]:
    """One problem, explained."""
    options = ExplainAsk(**CHEAP | given)
    parsed = None if plan is None else resolve_plan(plan, options)[1]
    problem = resolve(options)
    return to_plain(explanation_document(problem, explain(problem, PlanSpace(), deployment=parsed), {}))


def words(page: str) -> str:
    return " ".join(page.split())


@pytest.fixture(scope="module")
def infeasible() -> dict[str, Any]:
    return document(model="llama-3.1-70b", cluster="1xh100-sxm")


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    return document("dp2", slo="ttft_p95<=10s")


def test_a_document_of_an_infeasible_problem_is_json_with_clashes_and_relaxations(infeasible: dict[str, Any]) -> None:
    assert json.loads(json.dumps(infeasible, allow_nan=False)) == infeasible
    assert (infeasible["command"], infeasible["status"], infeasible["best"]) == ("explain", "infeasible", None)
    assert [clash["of"] for clash in infeasible["clashes"]] == [["memory"]]
    assert infeasible["comparison"] is None
    assert {name for way in infeasible["relaxations"] for name in way["options"]} == {"weights", "cluster"}
    assert all(way["gpus"] <= 1 + way["more_gpus"] for way in infeasible["relaxations"])


def test_the_page_says_what_the_document_says(infeasible: dict[str, Any]) -> None:
    page = words(explanation_page(infeasible))
    for clash in infeasible["clashes"]:
        assert all(fact in page for fact in clash["facts"])
    for way in infeasible["relaxations"]:
        assert all(f"--{name}={value}" in page for name, value in way["options"].items())
        assert way["plan"] in page
    assert all(what in page for what in infeasible["tried_for_nothing"])


def test_of_several_types_of_gpu_the_page_says_what_was_compared(infeasible: dict[str, Any]) -> None:
    mixed = document(cluster="1xh100-sxm+1xl40s")
    counts = [part["space"] for part in (*mixed["certificates"], *mixed["pipelines"])]
    said = (
        f"Compared were {counts[0]} plan (h100-sxm-80gb alone), {counts[1]} plan (l40s-48gb alone), {counts[2]} fleet "
        f"(h100-sxm-80gb and l40s-48gb together) and {counts[3]} pipelines (stages on h100-sxm-80gb and on l40s-48gb)."
    )
    assert counts[:3] == [1, 1, 1]
    assert said in words(explanation_page(mixed))
    assert "None fits" not in explanation_page(mixed)
    none = document(cluster="1xh100-sxm+1xl40s", slo="ttft_p95<=1us")
    assert f"{said} None fits; why is told of each type alone" in words(explanation_page(none))
    assert "Compared" not in explanation_page(infeasible)


def test_limits_are_shown_as_a_shell_takes_them() -> None:
    late = document(slo="ttft_p95<=1us")
    (eased,) = [way for way in late["relaxations"] if "slo" in way["options"]]
    page = explanation_page(late)
    assert f'--slo="{eased["options"]["slo"]}"' in page
    assert "shown by a lower bound of every plan" in words(page)


def test_nodes_are_no_option_but_a_line_of_the_file_that_describes_the_cluster(infeasible: dict[str, Any]) -> None:
    way = infeasible["relaxations"][0] | {"options": {"nodes": "2"}}
    page = words(explanation_page(infeasible | {"relaxations": [way]}))
    assert "--nodes" not in page
    assert "nodes = 2 in the" in page


def test_where_nothing_helps_the_page_says_so(infeasible: dict[str, Any]) -> None:
    page = words(explanation_page(infeasible | {"relaxations": []}))
    assert "No change that was tried makes it feasible" in page


def test_what_the_time_cut_short_is_said_in_words(infeasible: dict[str, Any]) -> None:
    goals = {"of": ["ttft_p95<=1s", "tpot_p95<=1ms"], "proof": "simulation", "facts": [], "smallest": False}
    way = infeasible["relaxations"][0] | {"best": False}
    cut = {"clashes": [goals], "relaxations": [way], "not_tried": ["16 to 64 GPUs"], "explain_time_limit_s": 2.5}
    page = words(explanation_page(infeasible | cut))
    assert "no plan satisfies them together, shown by simulating the plans." in page
    assert "Fewer of them may clash already: the time was up" in page
    assert f"Not shown to be the best, the time was up: {way['plan']}." in page
    assert "Not tried, as the time limit of 2.5 s was reached: 16 to 64 GPUs." in page
    whole = words(explanation_page(infeasible))
    assert "the time was up" not in whole
    assert "Not tried" not in whole


def test_a_clash_of_several_says_that_fewer_of_them_do_not_clash(infeasible: dict[str, Any]) -> None:
    several = infeasible["clashes"][0] | {"of": ["divisibility", "memory"]}
    assert "though some plan satisfies any fewer" in words(explanation_page(infeasible | {"clashes": [several]}))
    assert "any fewer" not in words(explanation_page(infeasible))


def test_a_plan_is_shown_beside_the_best_with_what_differs_largest_first(compared: dict[str, Any]) -> None:
    given, page = compared["comparison"], explanation_page(compared)
    assert given["plan"] == "dp2 attn(tp1) ffn(tp1) bf16"
    assert f"({given['value'] / compared['best']['value'] - 1:+.1%})" in page
    assert compared["best"]["plan"] in page
    terms = [(term["part"], term["name"]) for term in given["terms"]][:12]
    rows = [
        line
        for line in page.splitlines()
        if line.startswith(("time per GPU", "mean latency", "energy", "memory per GPU"))
    ]
    assert len(rows) == len(terms) >= 5
    assert all(line.startswith(part) and name in line for line, (part, name) in zip(rows, terms, strict=True))
    assert all(term["difference"] == term["plan"] - term["best"] for term in given["terms"])


def test_a_plan_that_cannot_run_is_shown_with_its_reason() -> None:
    found = document("tp8")
    assert found["comparison"]["value"] is None
    assert "takes 8 GPUs, 2 are offered" in words(explanation_page(found))


@pytest.mark.parametrize("columns", ["40", "70", "400"])
def test_pages_fit_the_width(
    columns: str, infeasible: dict[str, Any], compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for shown in (infeasible, compared):
        assert max(map(len, explanation_page(shown).splitlines())) <= int(columns)


def test_a_pair_that_is_the_best_is_told_so_and_groups_by_their_side() -> None:
    words = ("--model=llama-3.1-8b", "--cluster=4xh100-sxm", "--trace=poisson:rate=6,n=20,prompt=500,output=8")
    for plan, best in (("prefill{tp2} + decode{tp2}", True), ("prefill{tp1} + decode{tp2}", False)):
        shown = run("explain", *words, "--serving=pools", f"--plan={plan}").out
        assert ("The plan that was given is the best: e2e_mean = " in shown) == best
        assert ("What differs" in shown) != best
        assert [f"{role}: tp2 " in shown for role in ("prefill", "decode")] == [best, True]


def test_hardly_any_difference_has_no_minus() -> None:
    assert _apart(0.99999, 1.0) == " (+0.0%)"
    assert _apart(0.98, 1.0) == " (-2.0%)"
