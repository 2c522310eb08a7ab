"""Answers as plain data: complete, valid JSON, with the figures of the search."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from apex_opt.arguments import Ask
from apex_opt.figures import parse_goals
from apex_opt.planned import resolve_plan
from apex_opt.plans.engine import EngineSettings
from apex_opt.report import types
from apex_opt.report.document import answer_document, cluster_row, scored_document
from apex_opt.report.models import model_row
from apex_opt.report.tables import rendered
from apex_opt.resolve import resolve
from apex_opt.schema import to_plain
from apex_opt.search import Answer, Ledger, Part, Problem, Scorer, judge

CHEAP = {"model": "llama-3.1-8b", "cluster": "2xh200-sxm", "trace": "static:n=4,prompt=64,output=16"}


def scored(plan: str = "tp2", **given: Any) -> tuple[Problem, Answer]:
    """One plan, judged."""
    options = Ask(**CHEAP | given)
    problem, parsed = resolve_plan(plan, options)
    return problem, judge(problem, parsed)


def test_a_document_has_everything_an_answer_depends_on() -> None:
    problem, answer = scored(slo="ttft_p95<=1s", expert_routing="skewed")
    document = to_plain(answer_document("simulate", problem, answer, {"gemm": "measured"}))
    assert set(document) == {
        "schema",
        "command",
        "status",
        "objective",
        "then",
        "reason",
        "best",
        "candidates",
        "certificate",
        "question",
        "provenance",
        "version",
        "steady",
        "transient",
        "limited_by_arrivals",
        "notes",
        "expected",
        "near_goals",
        "doubts",
    }
    assert document["best"] == document["candidates"][0]
    assert document["best"]["plan"] == "attn(tp2) ffn(tp2) bf16"
    assert set(document["certificate"]) >= {"space", "infeasible", "bounded", "simulated", "optimal", "gap"}
    assert document["provenance"] == {"gemm": "measured"}
    assert document["question"]["trace"]["requests"] == 4
    assert document["question"]["engine"]["name"] == "vllm"
    assert document["question"]["engine"]["runnable"] == "vllm"
    assert (document["question"]["engine"]["routing"], document["question"]["engine"]["expert_routing"]) == (
        "round_robin",
        "skewed",
    )
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_where_no_engine_need_start_a_plan_the_answer_says_so() -> None:
    problem, answer = scored(runnable="any")
    document = to_plain(answer_document("simulate", problem, answer, {}))
    assert document["question"]["engine"]["runnable"] == "any"
    assert document["notes"] == ["--runnable=any: plans are told that no engine need be able to start"]
    json.dumps(document, allow_nan=False)


def test_metrics_are_those_of_the_candidate() -> None:
    problem, answer = scored(slo="ttft_p95<=1s,throughput>=1")
    best = answer.best
    assert best is not None
    metrics = to_plain(answer_document("simulate", problem, answer, {}))["best"]["metrics"]
    for name in ("ttft", "tpot", "e2e"):
        assert metrics[f"{name}_s"] == best.metrics.latency_s[name]
        assert {"mean", "p50", "p95", "p99"} <= set(metrics[f"{name}_s"])
    assert metrics["throughput_rps"] == best.metrics.value("throughput")
    assert metrics["energy_j"] == best.only.usage.energy_j
    assert metrics["mean_power_w"] == pytest.approx(best.only.usage.energy_j / best.metrics.value("makespan"))
    assert metrics["energy_per_output_token_j"] == pytest.approx(best.only.usage.energy_j / 64)
    assert (metrics["mfu"], metrics["mbu"]) == (best.only.usage.mfu, best.only.usage.mbu)
    assert metrics["operations_s"] == best.only.usage.operations_s
    assert "idle" in metrics["operations_s"]
    assert metrics["slo"]["ttft_p95<=1s"] == {
        "met": True,
        "reached": best.metrics.latency_s["ttft"]["p95"],
        "attainment": 1.0,
        "unit": "s",
    }
    assert metrics["slo"]["throughput>=1"]["reached"] == best.metrics.value("throughput")


def test_times_between_tokens_are_told_of_a_given_plan_and_of_others_where_asked_for() -> None:
    problem, answer = scored()
    assert answer.best is not None
    metrics = to_plain(answer_document("simulate", problem, answer, {}))["best"]["metrics"]
    assert metrics["itl_s"] == answer.best.metrics.latency_s["itl"]
    plain = Scorer(problem).simulate(answer.best.deployment)
    assert "itl_s" not in to_plain(scored_document(problem, plain))["metrics"]
    asked = replace(problem, slos=parse_goals("itl_p99.9<=1s"))
    metrics = to_plain(scored_document(asked, Scorer(asked).simulate(answer.best.deployment)))["metrics"]
    assert list(metrics["itl_s"]) == list(metrics["ttft_s"]) == ["mean", "p50", "p90", "p95", "p99", "p99.9", "max"]
    assert metrics["slo"]["itl_p99.9<=1s"]["reached"] == metrics["itl_s"]["p99.9"]


def test_costs_are_told_where_asked_for_and_where_the_price_is_not_an_assumed_one() -> None:
    def told(**given: Any) -> dict[str, Any]:
        problem, answer = scored(**given)
        assert answer.best is not None
        provenance = Scorer(problem).provenance([answer.best])
        document = to_plain(answer_document("simulate", problem, answer, provenance))
        names = ("cost_usd_per_h", "cost_usd_per_mtoken")
        found = {name: document["best"]["metrics"].get(name) for name in names}
        price = document["question"]["cluster"].get("usd_per_gpu_h")
        return found | {"price": price, "source": document["provenance"].get("price")}

    assert set(told().values()) == {None}
    assumed = told(objective="cost")
    assert (assumed["price"], assumed["cost_usd_per_h"]) == (3.8, 7.6)
    assert assumed["source"].startswith("$3.8 per GPU and hour; assumed: ")
    given = told(price=2.5)
    assert (given["cost_usd_per_h"], given["source"]) == (5.0, "$2.5 per GPU and hour; given: --price")
    answer = scored(price=2.5)[1]
    assert answer.best is not None
    hours = answer.best.metrics.value("makespan") / 3600
    assert given["cost_usd_per_mtoken"] == pytest.approx(5.0 * hours / 64 * 1e6)


def test_goodput_is_told_where_requests_have_limits() -> None:
    problem, answer = scored(slo="ttft_p95<=1us")
    metrics = to_plain(answer_document("simulate", problem, answer, {}))["best"]["metrics"]
    assert metrics["goodput_rps"] == 0.0
    problem, answer = scored(slo="throughput>=1")
    assert "goodput_rps" not in to_plain(answer_document("simulate", problem, answer, {}))["best"]["metrics"]


def test_every_objective_is_told_in_turn_with_its_tolerance() -> None:
    problem, answer = scored(objective="energy~2%,ttft_p95")
    document = to_plain(answer_document("simulate", problem, answer, {}))
    assert answer.best is not None
    assert (document["objective"]["name"], document["objective"]["tolerance"]) == ("energy", 0.02)
    (then,) = document["then"]
    assert (then["name"], then["tolerance"]) == ("ttft_p95", 0.0)
    assert then["value"] == answer.best.metrics.latency_s["ttft"]["p95"] == document["best"]["then"][0]


def test_memory_is_listed_per_stage() -> None:
    problem, answer = scored("pp2")
    memory = to_plain(answer_document("simulate", problem, answer, {}))["best"]["memory"]
    assert [part["layers"] for part in memory] == [16, 16]
    for part in memory:
        taken = part["weights_bytes"] + part["workspace_bytes"] + part["runtime_bytes"]
        assert taken + part["kv_blocks"] * part["kv_block_bytes"] <= part["usable_bytes"]


def test_only_the_top_candidates_are_listed() -> None:
    problem, answer = scored()
    assert answer.best is not None
    many = replace(answer, candidates=(answer.best,) * 7)
    assert len(to_plain(answer_document("plan", problem, many, {}, 3))["candidates"]) == 3
    assert len(to_plain(answer_document("plan", problem, many, {}, 10))["candidates"]) == 7


def test_an_infeasible_answer_has_a_reason_and_no_plan() -> None:
    problem = resolve(Ask(**CHEAP))
    nothing = Part(shape="single", types=problem.types, objective=problem.objective, space=4, infeasible={"memory": 4})
    ledger = Ledger(parts=(nothing,))
    answer = Answer(status="infeasible", candidates=(), alone=(None,), ledger=ledger, reason="too large")
    document = to_plain(answer_document("plan", problem, answer, {}))
    assert (document["status"], document["best"], document["candidates"]) == ("infeasible", None, [])
    assert document["reason"] == "too large"
    assert document["objective"]["value"] is None
    assert document["certificate"]["infeasible"] == {"memory": 4}


def test_what_is_undefined_is_null() -> None:
    problem, answer = scored(trace="static:n=4,prompt=64,output=1")
    document = to_plain(answer_document("simulate", problem, answer, {}))
    assert document["best"]["metrics"]["tpot_s"]["mean"] is None
    json.dumps(document, allow_nan=False)


def test_a_bound_on_what_is_maximised_lies_above_it() -> None:
    problem, answer = scored(objective="throughput")
    document = to_plain(answer_document("simulate", problem, answer, {}))
    assert document["objective"]["direction"] == "maximise"
    assert document["objective"]["unit"] == "requests/s"
    assert document["best"]["bound"] >= document["best"]["value"] > 0
    problem, answer = scored(objective="energy")
    document = to_plain(answer_document("simulate", problem, answer, {}))
    assert (document["objective"]["direction"], document["objective"]["unit"]) == ("minimise", "J")
    assert 0 < document["best"]["bound"] <= document["best"]["value"]


def test_every_setting_of_an_engine_is_told() -> None:
    told = {field.name for kind in (types.EngineFacts, types.QuestionFacts) for field in fields(kind)}
    # A scheduler is told by its name, as the policy, with what is its own; what comes of drafts among the speculation;
    # what instances do with each pool; groups of layers by the memory of each stage.
    assert {field.name for field in fields(EngineSettings)} - told == {"scheduler", "drafting", "role", "kv_groups"}


def test_rows_of_lists_hold_the_figures_of_what_they_list() -> None:
    problem = resolve(Ask(**CHEAP))
    assert model_row(problem.model).parameters == problem.model.parameters
    row = cluster_row(problem.cluster)
    assert (row.gpu, row.gpus, row.cluster) == ("h200-sxm-141gb", 2, "2xh200-sxm-141gb")
    assert row.profile.startswith("measured")
    assert (row.bf16_flops_per_s, row.fp8_flops_per_s, row.fp4_flops_per_s) == (989e12, 1979e12, None)
    assert row.sources


def test_prefix_caching_tells_what_was_found_and_nothing_is_told_without() -> None:
    problem, answer = scored(trace="static:n=20,prompt=100,output=4,prefix=(64,1)", prefix_caching=True)
    document = to_plain(answer_document("simulate", problem, answer, {}))
    found = document["best"]["metrics"]
    assert found["cached_tokens"] == 19 * 64 and found["cache_hit_rate"] == 19 * 64 / 2000
    assert f"cache        {19 * 64:,} prompt tokens found, 60.8% of all" in rendered(document)
    problem, answer = scored()
    assert "cached_tokens" not in to_plain(answer_document("simulate", problem, answer, {}))["best"]["metrics"]
