"""The line that an answer ends with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cli_cases import run

from apex_opt.cli import arranged
from apex_opt.described import COMMANDS
from apex_opt.report.onward import _FOUND, _MISSED, onward

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.schema import Document

CHEAP = ("--model", "llama-3.1-8b", "--cluster", "1xh100-sxm", "--trace", "poisson:rate=2,n=20")


def test_every_command_that_shows_a_page_says_what_comes_next() -> None:
    files = {"profile distill", "profile import", "profile collect", "profile fit", "cluster import"}
    assert set(_FOUND) == set(COMMANDS) - files
    assert set(_MISSED) <= set(_FOUND)


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_one_line_and_names_options_that_there_are(command: str, found: bool) -> None:
    line = onward(command, {}, found=found)
    assert "\n" not in line
    for word in line.split():
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0].strip(".,;")
            assert any(option.name == name for one in COMMANDS.values() for option in one.options)
    if (at := line.find("solve.py ")) >= 0:
        assert arranged([line[at:].split()[1].strip("."), "--help"])


def test_a_plan_ends_with_what_starts_it_and_then_with_the_files() -> None:
    assert run("plan", *CHEAP).out.rstrip().splitlines()[-1].startswith("Next: --emit")
    assert run("plan", *CHEAP, "--emit").out.rstrip().splitlines()[-1].startswith("Next: --save=DIR")


def test_what_is_written_already_is_not_offered_but_begun_with(tmp_path: Path) -> None:
    target = tmp_path / "new"
    for command in (("plan",), ("simulate", "--plan=tp1")):
        saved = target / command[0]
        done = run(*command, *CHEAP, f"--save={saved}")
        assert done.code == 0
        told = " ".join(done.out.partition("Next: ")[2].split())
        assert told == f"written to {saved}; begin with {saved}/README.md."


def test_pools_are_not_told_to_be_calibrated() -> None:
    launch: Document = {"launch": {"commands": [{}]}, "best": {"plan": "tp1"}}
    assert "calibrate" in onward("plan", launch, found=True)
    launch["best"] = {"plan": "tp1", "parts": []}
    assert onward("plan", launch, found=True) == "Next: --save=DIR writes this as files."
    launch["best"] = {"plan": "tp1", "parts": [{}]}
    assert "calibrate" in onward("plan", launch, found=True)


@pytest.mark.parametrize("command", ["plan", "capacity"])
def test_where_no_cluster_of_several_will_do_one_of_them_is_explained(command: str) -> None:
    line = onward(command, {"clusters": []}, found=False)
    assert line == "Next: solve.py explain with --cluster of one of them says what would fit there."
    assert "the same options" in onward(command, {}, found=False)


def test_where_nothing_fits_it_tells_of_the_changes_found() -> None:
    done = run("plan", "--cluster", "1xh100-sxm", "--trace", "poisson:rate=2,n=20")
    assert done.code == 3
    assert "Next: give one of the changes above" in done.out
    assert "looks longer" in onward("plan", {}, found=False)


def test_a_goal_is_only_to_be_eased_where_there_is_one() -> None:
    pools: Document = {"question": {"serving": ["pools"], "slo": []}, "reason": "prefill{tp1}"}
    for command, way in (("plan", "offer more GPUs"), ("simulate", "simulate another plan")):
        assert onward(command, pools, found=False) == f"Next: {way}."
        with_goal = pools | {"question": {"serving": ["pools"], "slo": ["ttft_p95<=1s"]}}
        assert onward(command, with_goal, found=False) == f"Next: ease a goal, or {way}."


def test_json_and_csv_end_without_it() -> None:
    for form in ("json", "csv"):
        assert "Next:" not in run("models", "--format", form).out


@pytest.mark.parametrize(
    ("words", "said", "not_said"),
    [
        (("plan", "--cluster=1xl40s", "--engine=static"), "plans of these can be started", "--emit"),
        (("simulate", "--cluster=1xl40s", "--plan=tp1 share=80/100", "--runnable=any"), "--requests=r.csv", "explain"),
        (("simulate", "--cluster=2xl40s", "--plan=prefill{tp1} + decode{tp1}"), "--requests=r.csv", "explain"),
        (("plan", "--cluster=1xl40s,1xh100-sxm"), "one of them", "--save"),
    ],
)
def test_it_suggests_nothing_that_is_refused(words: tuple[str, ...], said: str, not_said: str) -> None:
    done = run(*words, "--model=llama-3.1-8b", f"--trace={CHEAP[-1]}")
    assert done.code == 0
    line = " ".join(done.out.split("Next: ")[-1].split())
    assert said in line
    assert not_said not in line


def test_of_several_clusters_each_has_its_certificate_where_it_was_replayed() -> None:
    done = run("plan", "--cluster=1xl40s,1xl4", "--model=llama-3.1-8b", f"--trace={CHEAP[-1]}", "--check", "--robust")
    text = " ".join(done.out.split())
    assert text.count("the certificate holds") == text.count("How far times may be off") == 2


def test_files_are_of_one_cluster_which_is_said_before_the_work(tmp_path: Path) -> None:
    done = run("plan", "--cluster=1xl40s,1xl4", "--save", str(tmp_path / "new"))
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: --save: is of one cluster, and --cluster names several; give one of them\n"
    assert not (tmp_path / "new").exists()


def test_a_period_of_no_time_and_an_engine_without_figures_are_named_as_they_were_given() -> None:
    common = ("simulate", "--model=llama-3.1-8b", "--cluster=2xl40s", "--plan=dp2 tp1", f"--trace={CHEAP[-1]}")
    assert "period_ms must be above 0" in run(*common, "--rescheduling=llumnix:period_ms=0").err
    assert (
        "error: --rescheduling: how requests of sglang move"
        in run(*common, "--rescheduling=llumnix", "--engine=sglang").err
    )


@pytest.mark.parametrize(("gpus", "plan"), [(16, '"dp2 tp4"'), (4, '"dp2 tp2"'), (3, "tp2"), (1, "tp1")])
def test_the_plan_to_place_fits_on_the_free_gpus_of_the_cluster_shown(gpus: int, plan: str) -> None:
    document: Document = {"gpus": [{"state": "free"}] * gpus + [{"state": "busy"}] * 8}
    assert f"solve.py place --plan={plan} with" in onward("cluster show", document, found=True)
