"""Capacity as a document and as tables: the figures of the search, with their units, the same in both."""

from __future__ import annotations

import io
import json
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from apex_opt.ask import Options, ask, ask_plan
from apex_opt.options import method
from apex_opt.report.capacity import capacity_document, capacity_page
from apex_opt.search.capacity import Capacity, fewest_gpus, highest_rate
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from apex_opt.report.document import Document
    from apex_opt.search import Question

CHEAP = {
    "model": "llama-3.1-8b",
    "cluster": "4xh200-sxm",
    "trace": "poisson:rate=2,n=120,prompt=300,output=40",
    "slo": "ttft_p95<=150ms,tpot<=20ms@90%",
}


@cache
def found(rate: float | None = None, top: int = 3, **given: str) -> tuple[Question, Capacity]:
    """A capacity, or the fewest GPUs for a rate."""
    options = Options.of(method("capacity")(None, **CHEAP | given).options)
    question = ask(options)
    if rate is None:
        return question, highest_rate(question, PlanSpace(), top=top)
    return question, fewest_gpus(question, PlanSpace(), rate, top=top)


def document(rate: float | None = None, **given: Any) -> Document:
    return capacity_document(*found(rate, **given), {"gemm": "measured"})


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))


def test_a_document_has_rates_runs_and_everything_they_depend_on() -> None:
    question, capacity = found()
    shown = document()
    assert list(shown) == [
        "command",
        "status",
        "asked",
        "reason",
        "best",
        "candidates",
        "certificate",
        "assumption",
        "question",
        "provenance",
        "version",
        "notes",
    ]
    assert shown["asked"] == {"for": "highest rate", "rate_per_s": None, "resolution": 0.02}
    assert shown["best"] == shown["candidates"][0]
    assert len(shown["candidates"]) == 3
    for row, item in zip(shown["candidates"], capacity.plans, strict=True):
        assert (row["plan"], row["gpus"]) == (str(item.plan), item.plan.devices)
        assert row["rate_per_s"] == item.rate_per_s
        assert row["rate_per_gpu_per_s"] == item.rate_per_s / item.plan.devices
        assert row["times_own_rate"] == item.rate_per_s / question.trace.rate_per_s
        assert row["next_rate_per_s"] == item.next_rate_per_s
        assert row["arrivals_s"] == pytest.approx(119 / item.rate_per_s)
        assert row["arrivals_s"] + row["after_last_arrival_s"] == pytest.approx(item.holds.metrics.makespan_s)
        assert [(near["rate_per_s"], near["holds"]) for near in row["near"]] == list(item.near)
        assert row["metrics"]["ttft_s"] == item.holds.metrics.latency_s["ttft"]
        assert item.fails is not None
        assert list(row["missed_at_next_rate"]) == [t for t, met in item.fails.metrics.slo_met.items() if not met]
        reached = {"ttft_p95<=150ms": item.fails.metrics.latency_s["ttft"]["p95"]}
        reached["tpot<=20ms@90%"] = item.fails.metrics.attainment["tpot<=20ms@90%"]
        assert all(value == reached[text] for text, value in row["missed_at_next_rate"].items())
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown


def test_the_table_has_the_figures_of_the_document() -> None:
    shown, text = document(), capacity_page(document())
    best = shown["best"]
    lines = text.splitlines()
    assert lines[0].endswith("requests/s as given), ttft_p95<=150ms, tpot<=20ms@90%")
    assert f"highest rate: {best['rate_per_s']:.3f} requests/s with {best['plan']} on {best['gpus']} GPUs" in lines
    assert f"; at {best['next_rate_per_s']:.3f} requests/s, the next of the grid, " in text
    for rank, row in enumerate(shown["candidates"], 1):
        line = next(line for line in lines if line.startswith(f"{rank}  {row['plan']}  "))
        figures = (f"{row[key]:.3f}" for key in ("rate_per_s", "rate_per_gpu_per_s", "next_rate_per_s"))
        assert all(f" {figure} " in line for figure in figures)
        for goal in row["missed_at_next_rate"]:
            assert f"{goal} fails at " in line
    certificate = shown["certificate"]
    flat = " ".join(text.split())
    assert f"{certificate['ruled_out']} ruled out by simulation at the rate of those found" in flat
    assert f"{certificate['found']} searched for their highest rate" in flat
    assert f"{certificate['simulations']} simulations in all: every plan is accounted for" in flat
    assert "Assumed: goals that fail at a rate fail at every higher one." in flat
    assert "Latency" in lines


@pytest.mark.parametrize("n", [200, 3000])
def test_a_trace_too_short_for_its_answer_is_told(n: int) -> None:
    shown = document(trace=f"poisson:rate=2,n={n},prompt=300,output=40", top=1)
    short = shown["best"]["after_last_arrival_s"] > 0.1 * shown["best"]["arrivals_s"]
    assert short == (n == 200)
    assert ("too short a trace to say that this rate lasts" in " ".join(capacity_page(shown).split())) == short


def test_how_sharp_the_limit_is_is_told() -> None:
    shown = document()
    best = shown["best"]
    best["near"] = [{"rate_per_s": best["rate_per_s"] + step, "holds": step < 0} for step in (-2, -1, 1)]
    assert "the goals hold at the 2 rates before and fail at the 1 rate after" in capacity_page(shown)
    best["near"][0]["holds"], best["near"][2]["holds"] = False, True
    low, high = (f"{best['rate_per_s'] + step:.3f}" for step in (-2, 1))
    assert f"not a sharp limit: the goals fail at {low}, hold at {high} requests/s" in capacity_page(shown)


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


def test_goals_that_no_rate_breaks_are_told_as_such() -> None:
    shown = document(slo="e2e_max<=10min", top=1)
    assert shown["best"]["next_rate_per_s"] is None
    assert "the highest that is looked at: so few requests load no plan" in " ".join(capacity_page(shown).split())


@pytest.mark.parametrize("rate", [None, 8.0])
def test_an_infeasible_answer_has_a_reason_and_no_plan(rate: float | None) -> None:
    shown = document(rate, slo="ttft_p95<=10us")
    assert (shown["status"], shown["best"], shown["candidates"]) == ("infeasible", None, [])
    assert "misses ttft_p95<=10us (it reaches" in shown["reason"]
    assert shown["reason"] in " ".join(capacity_page(shown).split())


def test_one_plan_is_asked_about_alone() -> None:
    options = Options.of(method("capacity")(None, **CHEAP).options)
    question, plan = ask_plan("dp2 tp2", options)
    shown = capacity_document(question, highest_rate(question, PlanSpace(), plan=plan), {})
    assert shown["status"] == "feasible"
    assert shown["best"]["plan"] == "dp2 attn(tp2) ffn(tp2) bf16"
    assert "1 plan in the space" in capacity_page(shown)
