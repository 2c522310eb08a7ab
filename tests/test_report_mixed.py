"""Answers over several types of GPU: the same figures in JSON and in tables, and every deployment accounted for."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from plan_cases import beside, dense, make_cluster, make_model, make_problem

from apex_opt.figures import load_objective, load_objectives
from apex_opt.report.document import answer_document, beside_document
from apex_opt.report.mixed import mixed_page
from apex_opt.schema import to_plain
from apex_opt.search import Answer, Scorer, search
from apex_opt.workload import make_trace
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from apex_opt.schema import Document
    from apex_opt.search import Problem

SLOW = {"name": "slow", "memory_bytes_per_s": 1.5e12, "flops_per_s": (("bf16", 300e12),), "idle_w": 60.0}


def problem_of(slo: str = "", **changes: Any) -> Problem:
    """Two types of GPU that are busy with their requests."""
    rng = np.random.default_rng(5)
    trace = make_trace(
        name="test",
        arrival_ns=np.cumsum(rng.exponential(2e6, 60)).astype(np.int64),
        prompt=rng.integers(1, 700, 60),
        output=rng.integers(2, 40, 60),
    )
    model = make_model((dense(hidden=1024, columns=4096), 6))
    return beside(make_problem(model, make_cluster(2, name="quick"), trace, slo, **changes), make_cluster(2, **SLOW))


def documented(problem: Problem, command: str = "plan", **options: Any) -> tuple[Answer, Document]:
    answer = search(problem, PlanSpace(), top=3, **options)
    return answer, to_plain(answer_document(command, problem, answer, Scorer(problem).provenance(answer.candidates), 3))


@cache
def planned() -> tuple[Answer, Document]:
    return documented(problem_of("e2e_p95<=10s"))


def words(document: Document) -> str:
    return " ".join(mixed_page(document).split())


def test_json_tells_the_fleet_its_parts_and_what_each_type_reaches_alone() -> None:
    answer, document = planned()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    best = document["best"]
    assert answer.best is not None
    assert best["plan"] == answer.best.text
    assert [part["gpu"] for part in best["parts"]] == ["quick", "slow"]
    assert sum(part["requests"] for part in best["parts"]) == 60
    assert sum(part["share"] for part in best["parts"]) == pytest.approx(1)
    assert sum(part["gpus"] for part in best["parts"]) == best["gpus"]
    assert sum(part["energy_j"] for part in best["parts"]) == pytest.approx(best["metrics"]["energy_j"])
    assert sum(part["idle_energy_j"] for part in best["parts"]) == pytest.approx(best["metrics"]["idle_energy_j"])
    for part, found in zip(best["parts"], answer.best.pools, strict=True):
        assert len(part["memory"]) == found.pool.plan.stages
        assert part["plan"] == str(found.pool.plan)
    assert document["objective"]["value"] == best["value"] == best["metrics"]["e2e_s"]["mean"]
    assert best["metrics"]["slo"]["e2e_p95<=10s"]["met"]
    for alone in document["alone"]:
        assert alone["loss"] == pytest.approx(alone["value"] / best["value"] - 1)
        assert alone["loss"] > 0
    assert [certificate["types"] for certificate in document["certificates"]] == [
        ["quick"],
        ["slow"],
        ["quick", "slow"],
    ]
    assert (document["optimal"], document["gap"]) == (True, 0.0)
    pools = document["question"]["cluster"]["pools"]
    assert [(pool["gpu"], pool["gpus"], pool["weights"]) for pool in pools] == [
        ("quick", 2, ["bf16"]),
        ("slow", 2, ["bf16"]),
    ]
    assert document["question"]["cluster"]["gpus"] == 4


def test_the_page_has_the_figures_of_the_document() -> None:
    _, document = planned()
    text, best = words(document), document["best"]
    assert f"best fleet: {best['plan']} on {best['gpus']} GPUs, e2e_mean = " in text
    for part in best["parts"]:
        assert f"{part['gpu']} {part['plan']} {part['gpus']} {part['requests']} {part['share']:.1%}" in text
        assert f"Memory per GPU, GB: {part['gpu']}" in text
    for alone in document["alone"]:
        assert f"{alone['loss']:.1%}" in text
    both = document["certificates"][2]
    assert f"Certificate, quick and slow together: {both['space']} fleets in the space" in text
    assert f"({both['infeasible']['part']} with an infeasible part" in text or not both["infeasible"]["part"]
    assert "Certificate, quick alone: " in text
    assert text.count("plan is accounted for") == 2
    assert text.count("every fleet is accounted for, gap 0.0%") == 1
    assert "gemm bf16, quick" in text or "gemm bf16" in text


def test_the_fleet_of_the_best_latency_stands_beside_that_of_the_least_energy() -> None:
    problem = problem_of(objective="energy")
    answer, document = documented(problem, "energy")
    fast = replace(problem, objective=load_objective("e2e_mean"))
    other = search(fast, PlanSpace())
    assert answer.best is not None
    assert other.best is not None
    document |= {"beside": to_plain(beside_document(answer.best, fast, other))}
    saving = 1 - answer.best.metrics.value("energy") / other.best.metrics.value("energy")
    assert document["beside"]["energy_saving"] == pytest.approx(saving)
    assert f"{saving:.1%} less energy than the best e2e_mean" in words(document)


def test_searches_for_objectives_with_a_tolerance_are_certified_one_by_one() -> None:
    objective, *then = load_objectives("energy~20%,e2e_mean")
    _, document = documented(problem_of(objective="energy", then=tuple(then)))
    assert "before" in document["certificates"][0]
    aimed = replace(problem_of(then=tuple(then)), objective=objective)
    _, document = documented(aimed)
    text = words(document)
    assert "Certificate, quick and slow together of the best energy: " in text
    assert "energy = " in text
    assert "(at most 20% from the best)" in text


def test_an_answer_without_proof_says_how_far_it_can_be_from_the_best() -> None:
    _, document = documented(problem_of(), time_limit_s=1e-6)
    assert (document["status"], document["optimal"]) == ("feasible", False)
    text = words(document)
    assert f"The best there is may be better by up to {document['gap']:.1%}." in text
    assert "left when the time was up: the space was not exhausted" in text


def test_where_nothing_fits_each_type_says_why() -> None:
    _, document = documented(problem_of("e2e_p95<=1us"))
    assert (document["status"], document["best"], document["candidates"], document["alone"]) == (
        "infeasible",
        None,
        [],
        [None, None],
    )
    text = words(document)
    assert "infeasible: quick alone: no feasible plan meets the SLOs, as bounds show; by these the closest, " in text
    assert "; slow alone: no feasible plan meets the SLOs, as bounds show; by these the closest, " in text
    assert "; together: none of " in text
    assert json.dumps(document, allow_nan=False)
