"""Capacity as a document and as tables: the figures of the search, with their units, the same in both."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from apex_opt.arguments import CapacityAsk
from apex_opt.planned import resolve_plan
from apex_opt.report.capacity import capacity_document, capacity_page
from apex_opt.resolve import resolve
from apex_opt.schema import to_plain
from apex_opt.studies.capacity import Capacity, fewest_gpus, highest_rate
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from apex_opt.schema import Document
    from apex_opt.search import Problem

pytestmark = pytest.mark.usefixtures("short_rates")

CHEAP = {
    "model": "llama-3.1-8b",
    "cluster": "4xh200-sxm",
    "trace": "poisson:rate=2,n=120,prompt=300,output=40",
    "slo": "ttft_p95<=150ms,tpot<=20ms@90%",
}


@cache
def found(rate: float | None = None, top: int = 3, **given: str) -> tuple[Problem, Capacity]:
    """A capacity, or the fewest GPUs for a rate."""
    options = CapacityAsk(**CHEAP | given)
    problem = resolve(options, rated=True)
    if rate is None:
        return problem, highest_rate(problem, PlanSpace(), top=top)
    return problem, fewest_gpus(problem, PlanSpace(), rate, top=top)


def document(rate: float | None = None, **given: Any) -> Document:
    return to_plain(capacity_document(*found(rate, **given), {"gemm": "measured"}))


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))


def test_a_document_has_rates_runs_and_everything_they_depend_on() -> None:
    problem, capacity = found()
    shown = document()
    assert set(shown) == {
        "schema",
        "command",
        "status",
        "asked",
        "steady",
        "reason",
        "best",
        "candidates",
        "certificate",
        "assumption",
        "question",
        "provenance",
        "version",
        "notes",
    }
    assert shown["asked"] == {"for": "highest rate", "rate_per_s": None, "resolution": 0.02}
    assert shown["best"] == shown["candidates"][0]
    assert len(shown["candidates"]) == 3
    for row, item in zip(shown["candidates"], capacity.plans, strict=True):
        assert (row["plan"], row["gpus"]) == (str(item.deployment), item.deployment.devices)
        assert row["rate_per_s"] == item.rate_per_s
        assert row["rate_per_gpu_per_s"] == item.rate_per_s / item.deployment.devices
        assert row["times_own_rate"] == item.rate_per_s / problem.trace.rate_per_s
        assert row["next_rate_per_s"] == item.next_rate_per_s
        evidence = item.evidence
        assert row["arrivals_s"] == pytest.approx((evidence.requests - 1) / item.rate_per_s)
        assert row["arrivals_s"] + row["after_last_arrival_s"] == pytest.approx(
            item.holds.metrics.value("makespan"), rel=1e-3
        )
        assert row["steady"] is True
        assert row["evidence"]["requests"] == evidence.requests >= 2_000
        assert row["evidence"]["backlog_first_half"] == evidence.transient.before
        assert row["evidence"]["goals_predicted_at_worst"] == evidence.predicted
        assert row["metrics"]["ttft_s"] == item.holds.metrics.latency_s["ttft"]
        assert row["why_not_next"] == item.why
        assert row["missed_at_next_rate"] == item.missed
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown


def test_the_table_has_the_figures_of_the_document() -> None:
    shown, text = document(), capacity_page(document())
    best = shown["best"]
    lines = text.splitlines()
    assert lines[0].endswith("requests/s as given), ttft_p95<=150ms, tpot<=20ms@90%")
    assert (
        f"highest rate sustained: {best['rate_per_s']:.3f} requests/s with {best['plan']} on {best['gpus']} GPUs"
        in lines
    )
    assert f"; at {best['next_rate_per_s']:.3f} requests/s, the next of the grid, " in text
    for rank, row in enumerate(shown["candidates"], 1):
        line = next(line for line in lines if line.startswith(f"{rank}  {row['plan']}  "))
        figures = (f"{row[key]:.3f}" for key in ("rate_per_s", "rate_per_gpu_per_s", "next_rate_per_s"))
        assert all(f" {figure} " in line for figure in figures)
        for goal in row["missed_at_next_rate"]:
            assert re.search(rf"{re.escape(goal)} (fails )?at ", line)
    certificate = shown["certificate"]
    flat = " ".join(text.split())
    assert f"{certificate['ruled_out']} ruled out by simulation at the rate of those found" in flat
    assert f"{certificate['found']} searched for their highest rate" in flat
    assert f"{certificate['simulations']} simulations in all: every plan is accounted for" in flat
    assert "Assumed: goals that fail at a rate fail at every higher one." in flat
    assert "Latency" in lines


@pytest.mark.parametrize("rate", [None, 2.0])
def test_what_was_found_before_the_time_was_up_is_not_told_as_the_best(rate: float | None) -> None:
    problem, _ = found()
    if rate is None:
        capacity = highest_rate(problem, PlanSpace(), time_limit_s=0.0)
    else:
        capacity = replace(found(rate)[1], ledger=highest_rate(problem, PlanSpace(), time_limit_s=0.0).ledger)
    left = capacity.ledger.waiting
    assert left > 0
    shown = to_plain(capacity_document(problem, capacity, {"gemm": "measured"}))
    better = "hold a higher rate" if rate is None else "be better"
    note = f"--time_limit: {left} deployments left when the time was up may {better}; allow more time to know"
    assert note in shown["notes"]
    assert note not in document(rate)["notes"]
    text = capacity_page(shown)
    assert f"\n{'highest rate' if rate is None else 'fewest GPUs'} found so far: " in text
    assert " sustained: " not in text
    assert "so far" not in capacity_page(document(rate))


def test_what_shows_that_the_rate_lasts_is_told() -> None:
    shown = document()
    best, flat = shown["best"], " ".join(capacity_page(document()).split())
    evidence = best["evidence"]
    assert f"sustained: {evidence['requests']:,} requests, fresh Poisson arrivals" in flat
    assert f"a backlog of {evidence['backlog_first_half']:.1f}, later {evidence['backlog_second_half']:.1f}" in flat
    assert "6 further runs" in flat


def test_why_the_next_rate_is_not_sustained_is_told() -> None:
    shown = document()
    best = shown["best"]
    for why, missed, words in (
        ("goals", {"ttft_p95<=150ms": 0.2}, "ttft_p95<=150ms fails at 200.0 ms"),
        ("prediction", {"ttft_p95<=150ms": 0.2}, "another run could miss ttft_p95<=150ms at 200.0 ms"),
        ("prediction", {}, "another run could miss a goal"),
        ("queue", {}, "the queue grows"),
        ("saturated", {}, "it is too near to what the plan serves from a queue that never empties"),
    ):
        best["why_not_next"], best["missed_at_next_rate"] = why, missed
        assert f"the next of the grid, {words}" in " ".join(capacity_page(shown).split())


def test_a_rate_asked_for_is_answered_with_gpus() -> None:
    shown = document(8.0)
    text = capacity_page(shown)
    best = shown["best"]
    assert shown["asked"] == {"for": "fewest GPUs", "rate_per_s": 8.0, "resolution": None}
    assert (best["rate_per_s"], best["next_rate_per_s"], best["missed_at_next_rate"]) == (8.0, None, {})
    assert shown["assumption"] is None
    assert f"fewest GPUs: {best['gpus']} for 8.000 requests/s, with {best['plan']}" in text.splitlines()
    flat = " ".join(text.split())
    certificate = shown["certificate"]
    assert f"{certificate['found']} hold; {certificate['larger']} on more GPUs than needed" in flat
    assert "Assumed" not in text


@pytest.mark.parametrize("rate", [None, 8.0])
def test_an_infeasible_answer_has_a_reason_and_no_plan(rate: float | None) -> None:
    shown = document(rate, slo="ttft_p95<=10us")
    assert (shown["status"], shown["best"], shown["candidates"]) == ("infeasible", None, [])
    assert "misses ttft_p95<=10us (it reaches" in shown["reason"]
    assert shown["reason"] in " ".join(capacity_page(shown).split())


def test_one_plan_is_asked_about_alone() -> None:
    options = CapacityAsk(**CHEAP)
    problem, plan = resolve_plan("dp2 tp2", options)
    shown = to_plain(capacity_document(problem, highest_rate(problem, PlanSpace(), deployment=plan), {}))
    assert shown["status"] == "feasible"
    assert shown["best"]["plan"] == "dp2 attn(tp2) ffn(tp2) bf16"
    assert "1 plan in the space" in capacity_page(shown)


def test_parts_of_a_certificate_are_counted_in_what_they_are_of() -> None:
    mixed = {"cluster": "1xh100-sxm+1xl40s", "trace": "poisson:rate=2,n=40,prompt=100,output=8", "slo": "ttft_p95<=9s"}
    options = CapacityAsk(**CHEAP | mixed)
    problem, deployment = resolve_plan("h100: tp1 + l40s: tp1", options)
    page = capacity_page(
        to_plain(capacity_document(problem, highest_rate(problem, PlanSpace(), deployment=deployment), {}))
    )
    assert "h100-sxm-80gb and l40s-48gb together: 1 fleet in the space" in page
    assert "every deployment is accounted for" in page


def test_lengths_alone_have_no_rate_of_their_own() -> None:
    lengths = str(Path(__file__).parent / "cases" / "traces" / "vidur-len.csv")
    problem, capacity = found(1.0, trace=lengths, cluster="1xh200-sxm", slo="ttft_p95<=5s")
    document = to_plain(capacity_document(problem, capacity, {}))
    assert document["best"]["times_own_rate"] is None
    page = capacity_page(document)
    assert "trace vidur-len (2 requests, lengths alone), ttft_p95<=5s" in page
    assert "the trace has no rate of its own" in page
