"""How far times may be off as a document and as a page, and what `--robust` refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cli_cases import CHEAP, Once

import apex_opt

ONCE = Once()
BUSY = ("--model=llama-3.1-8b", "--cluster=4xl40s", "--trace=poisson:rate=4,n=40,prompt=500,output=40", "--robust")


def found(*words: str) -> tuple[dict[str, Any], str]:
    """The document of `plan`, and its page with single spaces."""
    ran = ONCE.run("plan", *words, "--format=json")
    page = ONCE.run("plan", *words).out
    return json.loads(ran.out), " ".join(page.split())


def test_a_document_has_what_wins_then_and_its_page_tells_it() -> None:
    document, page = found(*BUSY, "--slo=ttft_p95<=1s", "--top=1")
    robust = document["robust"]
    assert len(document["candidates"]) == 2
    assert [(turn["times"], turn["slower"]) for turn in robust["turns"]] == [
        ("all", True),
        ("all", False),
        ("best", True),
        ("others", False),
    ]
    turned = [turn for turn in robust["turns"] if turn["factor"] is not None]
    assert turned
    for turn in turned:
        assert abs(turn["factor"] / turn["holds"] - 1) == pytest.approx(0.01, abs=2e-4)
        assert f"{turn['holds']:.3f} {turn['factor']:.3f}" in page
        assert turn["plan"] != document["best"]["plan"]
    assert robust["runner_up"]["plan"] == document["candidates"][1]["plan"]
    first, second = (one["value"] for one in document["candidates"])
    assert robust["runner_up"]["margin"] == pytest.approx(second / first - 1)
    assert f"{second / first - 1:.1%} worse" in page
    assert f"Asked: {robust['searches']} searches and {robust['simulations']} runs" in page


def test_the_error_is_that_of_the_nearest_measured_kind() -> None:
    document, page = found(*BUSY, "--slo=ttft_p95<=1s", "--top=1")
    robust, e2e = document["robust"], next(one for one in document["expected"] if one["figure"] == "E2E")
    assert robust["deciding"] == "e2e_mean"
    assert robust["error"] == pytest.approx((e2e["high"] / e2e["low"]) ** 0.5 - 1)
    assert (robust["rows"], robust["of"]) == (e2e["rows"], e2e["of"])
    near = [
        one for one in document["candidates"][1:] if one["value"] <= document["best"]["value"] * (1 + robust["error"])
    ]
    assert [one["plan"] for one in robust["tied"]][: len(near)] == [one["plan"] for one in near]
    assert f"{robust['error']:.1%}" in page


def test_where_nothing_comparable_was_measured_no_plan_is_called_a_tie() -> None:
    document, page = found(*CHEAP, "--robust", "--objective=makespan")
    assert document["robust"]["tied"] is None
    assert "Ties: not known, nothing comparable was measured of makespan." in page
    assert "Times of all plans: make no difference" in page


def test_one_plan_alone_has_nothing_to_be_held_against() -> None:
    document, page = found("--model=llama-3.1-8b", "--cluster=1xh200-sxm", CHEAP[2], "--robust")
    robust = document["robust"]
    assert (robust["turns"], robust["runner_up"], robust["tied"]) == ([], None, [])
    assert (robust["searches"], robust["simulations"]) == (0, 0)
    assert "nothing to compare: no other plan can run" in page


def test_a_front_of_one_plan_alone_has_nothing_to_be_held_against() -> None:
    gpu = (
        "--model=llama-3.1-8b",
        "--cluster=1xl40s",
        "--clock=2520",
        "--trace=poisson:rate=2,n=10,prompt=300,output=40",
    )
    words = ("pareto", *gpu, "--robust", "--objective=e2e_mean,cost")
    assert json.loads(ONCE.run(*words, "--format=json").out)["robust"]["turns"] == []
    page = ONCE.run(*words).out
    assert "nothing to compare: no other plan can run" in page and "another, shorter" not in page


def test_where_no_plan_fits_there_is_nothing_to_ask() -> None:
    ran = ONCE.run("plan", *CHEAP, "--robust", "--slo=ttft_p95<=1us", "--format=json")
    assert ran.code == 3
    assert "robust" not in json.loads(ran.out)
    assert "robust" not in json.loads(ONCE.run("plan", *CHEAP, "--format=json").out)


def test_what_robust_does_not_go_with_is_refused_in_a_line() -> None:
    for words, said in {
        ("--robust", "--time_limit=5"): "error: --robust: searches again with other times, each to its end; leave",
        ("--robust=maybe",): "error: --robust: expected true or false, got 'maybe'",
    }.items():
        ran = ONCE.run("plan", *CHEAP, *words)
        assert ran.code == 2
        assert said in ran.err
        assert ran.err.count("\n") == 1


def test_several_types_of_gpu_and_tolerances_are_told_as_well() -> None:
    words = (
        "--model=llama-3.1-8b",
        "--cluster=1xh100-sxm+1xl40s",
        CHEAP[2],
        "--robust",
        "--objective=energy~5%,e2e_mean",
    )
    document, page = found(*words)
    assert document["schema"].startswith("apex_opt.mixed/")
    assert document["robust"]["turns"] == []
    assert "none, no other plan is within the tolerance" in page
    assert "Times of one plan: not asked about" in page


SMALL = ("--model=llama-3.1-8b", "--cluster=2xl40s", "--trace=poisson:rate=2,n=30,prompt=300,output=20", "--robust")


@pytest.mark.usefixtures("short_rates")
def test_a_capacity_tells_what_takes_its_place_and_rates_have_no_known_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apex_opt.studies.robust.STEPS", 7)
    words = ("capacity", *SMALL, "--slo=ttft_p95<=200ms", "--resolution=0.5")
    document = json.loads(ONCE.run(*words, "--format=json").out)
    page = " ".join(ONCE.run(*words).out.split())
    robust = document["robust"]
    assert (robust["deciding"], robust["error"], robust["tied"]) == ("highest rate", None, None)
    first, second = document["candidates"][:2]
    assert robust["runner_up"]["plan"] == second["plan"]
    assert robust["runner_up"]["value"] == second["rate_per_s"]
    margin = 1 - second["rate_per_s"] / first["rate_per_s"]
    assert robust["runner_up"]["margin"] == pytest.approx(margin)
    assert f"rate = {second['rate_per_s']:.3f} requests/s ({margin:.1%} worse)" in page
    assert f"Asked: {robust['searches']} searches, with times" in page
    assert "Ties: not known, nothing comparable was measured of highest rate." in page


def test_a_front_tells_which_plans_join_and_leave() -> None:
    words = ("pareto", *SMALL, "--objective=e2e_mean,cost", "--clock=2520", "--slo=ttft_p95<=300ms")
    document = json.loads(ONCE.run(*words, "--format=json").out)
    page = " ".join(ONCE.run(*words).out.split())
    turns = document["robust"]["turns"]
    assert [turn["plan"] for turn in turns if turn["times"] == "best"] == [
        one["plan"] for one in document["candidates"]
    ]
    changed = [turn for turn in turns if turn["factor"] is not None]
    assert changed
    for turn in changed:
        assert f"{turn['holds']:.3f} {turn['factor']:.3f}" in page
        assert turn["joins"] or turn["leaves"]
    assert f"{document['candidates'][0]['plan']}, longer" in page
    assert f"{document['robust']['simulations']} runs of plans of the front" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--time_limit=5",), "error: --robust: searches again with other times, each to its end; leave"),
        (("--plan=tp1",), "error: --robust: holds the best plan against all others, and --plan is the only one"),
    ],
)
def test_what_robust_of_a_capacity_does_not_go_with_is_refused(words: tuple[str, ...], said: str) -> None:
    ran = ONCE.run("capacity", *SMALL, "--slo=ttft_p95<=200ms", *words)
    assert ran.code == 2
    assert said in ran.err
    assert ran.err.count("\n") == 1


def test_python_answers_the_same() -> None:
    words = {"model": "llama-3.1-8b", "cluster": "2xh200-sxm", "trace": CHEAP[2].partition("=")[2]}
    told = apex_opt.plan(**words, robust=True, top=2).to_dict()["robust"]
    assert told == found(*CHEAP, "--robust", "--top=2")[0]["robust"]
