"""Answers as plain data: complete, valid JSON, with the figures of the search."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from apex_opt.ask import Options, ask, ask_plan
from apex_opt.options import method
from apex_opt.report import answer_document, cluster_row, listing_document, model_row, trace_row
from apex_opt.search import Answer, Certificate, Question, judge

CHEAP = {"model": "llama-3.1-8b", "cluster": "2xh200-sxm", "trace": "static:n=4,prompt=64,output=16"}


def scored(plan: str = "tp2", **given: Any) -> tuple[Question, Answer]:
    """One plan, judged."""
    options = Options.of(method("plan")(None, **CHEAP | given).options)
    question, parsed = ask_plan(plan, options)
    return question, judge(question, parsed)


def test_a_document_has_everything_an_answer_depends_on() -> None:
    question, answer = scored(slo="ttft_p95<=1s", expert_routing="skewed")
    document = answer_document("simulate", question, answer, {"gemm": "measured"})
    assert list(document) == [
        "command",
        "status",
        "objective",
        "reason",
        "best",
        "candidates",
        "certificate",
        "question",
        "provenance",
        "version",
    ]
    assert document["best"] == document["candidates"][0]
    assert document["best"]["plan"] == "attn(tp2) ffn(tp2) bf16"
    assert set(document["certificate"]) >= {"space", "infeasible", "bounded", "simulated", "optimal", "gap"}
    assert document["provenance"] == {"gemm": "measured"}
    assert document["question"]["trace"]["requests"] == 4
    assert document["question"]["engine"]["name"] == "vllm"
    assert (document["question"]["engine"]["routing"], document["question"]["engine"]["expert_routing"]) == (
        "round_robin",
        "skewed",
    )
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_metrics_are_those_of_the_candidate() -> None:
    question, answer = scored(slo="ttft_p95<=1s,throughput>=1")
    best = answer.best
    assert best is not None
    metrics = answer_document("simulate", question, answer, {})["best"]["metrics"]
    for name in ("ttft", "tpot", "e2e"):
        assert metrics[f"{name}_s"] == best.metrics.latency_s[name]
        assert {"mean", "p50", "p95", "p99"} <= set(metrics[f"{name}_s"])
    assert metrics["throughput_rps"] == best.metrics.requests_per_s
    assert metrics["energy_j"] == best.usage.energy_j
    assert metrics["mean_power_w"] == pytest.approx(best.usage.energy_j / best.metrics.makespan_s)
    assert metrics["energy_per_output_token_j"] == pytest.approx(best.usage.energy_j / 64)
    assert (metrics["mfu"], metrics["mbu"]) == (best.usage.mfu, best.usage.mbu)
    assert metrics["operations_s"] == best.usage.operations_s
    assert "idle" in metrics["operations_s"]
    assert metrics["slo"]["ttft_p95<=1s"] == {
        "met": True,
        "reached": best.metrics.latency_s["ttft"]["p95"],
        "attainment": 1.0,
    }
    assert metrics["slo"]["throughput>=1"]["reached"] == best.metrics.requests_per_s


def test_memory_is_listed_per_stage() -> None:
    question, answer = scored("pp2")
    memory = answer_document("simulate", question, answer, {})["best"]["memory"]
    assert [part["layers"] for part in memory] == [16, 16]
    for part in memory:
        taken = part["weights_bytes"] + part["workspace_bytes"] + part["runtime_bytes"]
        assert taken + part["kv_blocks"] * part["kv_block_bytes"] <= part["usable_bytes"]


def test_only_the_top_candidates_are_listed() -> None:
    question, answer = scored()
    assert answer.best is not None
    many = replace(answer, candidates=(answer.best,) * 7)
    assert len(answer_document("plan", question, many, {}, 3)["candidates"]) == 3
    assert len(answer_document("plan", question, many, {}, 10)["candidates"]) == 7


def test_an_infeasible_answer_has_a_reason_and_no_plan() -> None:
    question = ask(Options.of(method("plan")(None, **CHEAP).options))
    nothing = Certificate(
        space=4, infeasible={"memory": 4}, bounded=0, simulated=0, cut_short=0, missed=0, optimal=True, gap=None
    )
    answer = Answer(status="infeasible", best=None, candidates=(), certificate=nothing, reason="too large")
    document = answer_document("plan", question, answer, {})
    assert (document["status"], document["best"], document["candidates"]) == ("infeasible", None, [])
    assert document["reason"] == "too large"
    assert document["objective"]["value"] is None
    assert document["certificate"]["infeasible"] == {"memory": 4}


def test_what_is_undefined_is_null() -> None:
    question, answer = scored(trace="static:n=4,prompt=64,output=1", objective="tpot_mean")
    document = answer_document("simulate", question, answer, {})
    assert document["best"]["metrics"]["tpot_s"]["mean"] is None
    assert document["objective"]["value"] is None
    json.dumps(document, allow_nan=False)


def test_a_bound_on_what_is_maximised_lies_above_it() -> None:
    question, answer = scored(objective="throughput")
    document = answer_document("simulate", question, answer, {})
    assert document["objective"]["direction"] == "maximise"
    assert document["objective"]["unit"] == "requests/s"
    assert document["best"]["bound"] >= document["best"]["value"] > 0
    question, answer = scored(objective="energy")
    document = answer_document("simulate", question, answer, {})
    assert (document["objective"]["direction"], document["objective"]["unit"]) == ("minimise", "J")
    assert 0 < document["best"]["bound"] <= document["best"]["value"]


def test_rows_of_lists_hold_the_figures_of_what_they_list() -> None:
    question = ask(Options.of(method("plan")(None, **CHEAP).options))
    assert model_row(question.model)["parameters"] == question.model.parameters
    row = cluster_row(question.cluster)
    assert (row["gpu"], row["gpus"], row["cluster"]) == ("h200-sxm-141gb", 2, "2xh200-sxm")
    assert row["profile"].startswith("measured")
    assert (row["bf16_flops_per_s"], row["fp8_flops_per_s"], row["fp4_flops_per_s"]) == (989e12, 1979e12, None)
    assert row["sources"]
    assert trace_row(question.trace, "Four")["title"] == "Four"
    assert trace_row(question.trace, "Four")["requests"] == 4


def test_a_list_is_a_document() -> None:
    document = listing_document("models", [{"name": "x", "share": float("nan")}])
    assert document["status"] == "ok"
    assert document["models"] == [{"name": "x", "share": None}]
