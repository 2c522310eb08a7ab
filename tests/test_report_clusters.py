"""Clusters side by side: the best plan on each, which is the cheapest and which the fastest, what has none told why."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import pytest

from apex_opt.arguments import Ask
from apex_opt.cluster import cluster_names
from apex_opt.report.capacity import capacity_document
from apex_opt.report.clusters import clusters_document, clusters_page
from apex_opt.report.document import answer_document
from apex_opt.resolve import resolve
from apex_opt.schema import to_plain
from apex_opt.search import Scorer, search
from apex_opt.studies.capacity import fewest_gpus, highest_rate
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from apex_opt.schema import Document

CHEAP = {"model": "llama-3.1-8b", "trace": "static:n=4,prompt=64,output=16"}


def options(cluster: str, given: dict[str, str]) -> Ask:
    return Ask(**CHEAP | given | {"cluster": cluster})


@cache
def compared(clusters: str, **given: str) -> Document:
    """The best plan on each."""
    documents = []
    for cluster in cluster_names(clusters):
        problem = replace(resolve(options(cluster, given)), priced=True)
        answer = search(problem, PlanSpace())
        documents.append(answer_document("plan", problem, answer, Scorer(problem).provenance(answer.candidates[:1])))
    return to_plain(clusters_document("plan", documents))


def page_of(document: Document, width: int = 120) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        return clusters_page(document)


def row_of(page: str, cluster: str) -> str:
    (row,) = [line for line in page.splitlines() if line.startswith(f"{cluster} ")]
    return row


def test_the_cheapest_and_the_fastest_are_marked_and_every_answer_is_whole() -> None:
    document = compared("2xh100,1xl4,2xa100")
    answers = [row["answer"] for row in document["clusters"]]
    assert [row["cluster"] for row in document["clusters"]] == ["2xh100-sxm-80gb", "1xl4-24gb", "2xa100-sxm-80gb"]
    costs = [answer["best"]["metrics"]["cost_usd_per_mtoken"] for answer in answers]
    values = [answer["best"]["value"] for answer in answers]
    assert document["cheapest"] == 1 + costs.index(min(costs)) != 1
    assert document["fastest"] == document["best"] == 1 + values.index(min(values)) == 1
    assert document["status"] == "optimal"
    assert all("certificate" in answer and "provenance" in answer for answer in answers)
    assert "price" not in document["provenance"]
    assert document["provenance"]["1xl4-24gb, price"].startswith("$0.7 per GPU and hour; assumed")
    page = page_of(document)
    assert "llama-3.1-8b (8.0 B parameters) on 3 clusters, trace static" in page
    assert "fastest" in row_of(page, "2xh100-sxm-80gb")
    marked = [row["cluster"] for row in document["clusters"] if "cheapest" in row_of(page, row["cluster"])]
    assert marked == [document["clusters"][document["cheapest"] - 1]["cluster"]]
    assert "prices that are assumed unless given" in page
    assert row_of(page, "1xl4-24gb, price").split()[2] == "$0.7"
    json.dumps(document, allow_nan=False)


def test_a_cluster_without_a_plan_stays_with_its_reason() -> None:
    document = compared("1xt4,2xh100")
    assert document["status"] == "optimal"
    assert (document["cheapest"], document["fastest"], document["best"]) == (2, 2, 2)
    assert document["clusters"][0]["answer"]["status"] == "infeasible"
    page = page_of(document)
    assert "infeasible" in row_of(page, "1xt4-16gb")
    assert "infeasible on 1xt4-16gb: no plan" in page
    none = compared("1xt4,1xv100-pcie-16gb")
    assert none["status"] == "infeasible"
    assert (none["cheapest"], none["fastest"], none["best"]) == (None, None, None)
    assert "infeasible on 1xv100-pcie-16gb" in page_of(none)


def test_by_an_objective_that_is_no_speed_the_mean_time_tells_the_fastest() -> None:
    document = compared("2xh100,1xl4", objective="cost")
    assert document["fastest_by"] == "e2e_mean"
    assert (document["fastest"], document["best"]) == (1, 2)
    assert "E2E mean" in page_of(document)
    assert compared("2xh100,1xl4", objective="throughput")["fastest_by"] == "throughput"


def test_a_mixed_cluster_is_one_of_them() -> None:
    document = compared("1xh100+1xl4,1xl4")
    assert [row["cluster"] for row in document["clusters"]] == ["1xh100-sxm-80gb+1xl4-24gb", "1xl4-24gb"]
    assert any("assumed: all on one leaf switch" in note for note in document["notes"])
    assert set(document["clusters"][0]["answer"]["provenance"]) >= {"h100-sxm-80gb"}
    assert all(isinstance(text, str) for text in document["provenance"].values())
    assert "1xh100-sxm-80gb+1xl4-24gb" in page_of(document)


def test_rates_are_compared_by_rate_and_those_given_by_gpus_and_price() -> None:
    given = {"slo": "ttft_p95<=1s", "trace": "poisson:rate=2,n=20,prompt=64,output=16"}
    documents, fewest = [], []
    for cluster in ("1xh100", "1xl4"):
        problem = replace(resolve(options(cluster, given)), priced=True)
        found = highest_rate(problem, PlanSpace(), resolution=0.5)
        documents.append(capacity_document(problem, found, {}))
        fewest.append(capacity_document(problem, fewest_gpus(problem, PlanSpace(), 2.0), {}))
    rates = [document.best.rate_per_s for document in documents]
    document = to_plain(clusters_document("capacity", documents))
    assert (document["fastest_by"], document["fastest"]) == ("rate", 1 + rates.index(max(rates)))
    assert "per GPU" in page_of(document)
    document = to_plain(clusters_document("capacity", fewest))
    assert (document["fastest_by"], document["fastest"], document["cheapest"]) == ("e2e_mean", 1, 2)
    assert "cheapest by $ per hour" in page_of(document)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_table_fits_and_keeps_the_marks(width: int) -> None:
    page = page_of(compared("2xh100,1xl4,2xa100"), width)
    assert max(map(len, page.splitlines())) <= max(width, 60)
    assert "cheapest" in page
    assert "fastest" in page
