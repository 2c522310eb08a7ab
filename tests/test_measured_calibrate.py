"""Calibration: what was planted is found again, what loads cannot tell stays with the reason, files are left alone."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from cli_cases import run as cli
from test_measured_fit import BEFORE, RUNS, measured_with, quiet

from apex_opt.cost.engine import load_engine
from apex_opt.engines import load_kind
from apex_opt.errors import InputError, UsageError
from apex_opt.measured.calibrate import calibrate, divided
from apex_opt.measured.readers import SHIPPED, read_measured
from apex_opt.measured.runs import MeasuredRun
from apex_opt.report.calibration import calibration_document, calibration_page
from apex_opt.schema import to_plain

if TYPE_CHECKING:
    from pathlib import Path


def test_planted_times_are_found_again_within_what_is_said_of_them() -> None:
    planted = replace(BEFORE, step_s=2 * BEFORE.step_s, request_s=3 * BEFORE.request_s)
    found = calibrate(measured_with(planted), "vllm", quiet)
    times = {one.name: one for one in found.times}
    assert found.better
    for name in ("step_s", "request_s"):
        one = times[name]
        assert one.low_s is not None and one.high_s is not None
        assert one.low_s <= getattr(planted, name) <= one.high_s
        assert abs(one.after_s / getattr(planted, name) - 1) < 0.1
    assert found.crossed is not None
    before, after = found.crossed
    assert after["ttft_mean"].mean_ape_pct < before["ttft_mean"].mean_ape_pct / 4
    assert times["blocking_step_s"].kept.startswith("no figure of these runs moves")


def test_a_time_that_ends_at_its_limit_is_told_as_such_and_not_as_certain() -> None:
    planted = replace(BEFORE, request_s=0.0)
    found = calibrate(measured_with(planted), "vllm", quiet)
    (one,) = (one for one in found.times if one.name == "request_s")
    assert found.better and one.after_s == 0 and not one.kept
    assert one.at_limit and one.low_s is None and one.high_s is None
    document = calibration_document(found, "vllm", None)
    told = document.times_us["request_us"]
    assert (told.at_limit, told.low, told.high) == (True, None, None)
    assert "request_us 0 (at its limit)" in document.engine_toml
    (line,) = (line for line in calibration_page(to_plain(document)).splitlines() if line.startswith("request_us"))
    assert line.endswith("at its limit")


def test_one_load_cannot_tell_two_times_of_every_step_apart() -> None:
    (run,) = measured_with(replace(BEFORE, step_s=2 * BEFORE.step_s), RUNS[:1])
    found = calibrate([run], "vllm", quiet)
    kept = {one.name: one.kept for one in found.times}
    assert found.crossed is None
    told = [name for name in ("step_s", "sequence_s", "gap_s") if not kept[name]]
    assert len(told) <= 1
    assert any("cannot tell it from" in kept[name] for name in ("step_s", "sequence_s", "gap_s"))


def test_a_calibrated_engine_is_a_file_that_is_read_like_any_other(tmp_path: Path) -> None:
    planted = replace(BEFORE, request_s=3 * BEFORE.request_s)
    found = calibrate(measured_with(planted), "vllm", quiet)
    document = calibration_document(found, "vllm", None)
    path = tmp_path / "my.toml"
    path.write_text(document.engine_toml)
    kind = load_kind(str(path))
    assert tomllib.loads(document.engine_toml)["like"] == "vllm"
    assert kind.name == "my.toml" and kind.rules is load_kind("vllm").rules
    assert load_engine(str(path)).request_s == pytest.approx(found.after.request_s, rel=1e-4)
    assert "request_us" in calibration_page(to_plain(document))
    expected = {name: row for name, *row in load_engine(str(path)).expected or ()}
    runs, low, middle, high = expected["ttft_mean"]
    assert runs == len(RUNS) and low < middle < high
    assert middle == pytest.approx(1, abs=0.05)
    words = (
        "simulate",
        "--plan=tp1",
        "--model=llama-3.1-8b",
        "--trace=static:n=2,prompt=16,output=2",
        "--cluster=1xh200",
    )
    figures = json.loads(cli(*words, f"--engine={path}", "--format=json").out)["expected"]
    of = [one["of"] for one in figures]
    assert of[0] == of[1] == f"{path}, loads that were left out when it was calibrated"
    assert figures[0]["low"] == pytest.approx(min(low, 1) * figures[0]["predicted"], rel=1e-3)
    assert of[3].startswith("vllm, ")  # energies hang on the board


def test_a_single_load_is_told_to_be_extrapolated_from_and_leaves_errors_unknown(tmp_path: Path) -> None:
    (run,) = measured_with(replace(BEFORE, step_s=2 * BEFORE.step_s), RUNS[:1])
    document = calibration_document(calibrate([run], "vllm", quiet), "vllm", None)
    assert "One load tells of no other" in calibration_page(to_plain(document))
    path = tmp_path / "my.toml"
    path.write_text(document.engine_toml)
    words = (
        "simulate",
        "--plan=tp1",
        "--model=llama-3.1-8b",
        "--trace=static:n=2,prompt=16,output=2",
        "--cluster=1xh200",
    )
    figures = json.loads(cli(*words, f"--engine={path}", "--format=json").out)["expected"]
    assert [one["of"] for one in figures[:3]] == [f"{path} was not calibrated on several loads"] * 3


def test_a_load_measured_twice_is_left_out_at_once() -> None:
    planted = replace(BEFORE, step_s=2 * BEFORE.step_s)
    (run,) = measured_with(planted, RUNS[:1])
    again = replace(run, name="again", measured={name: 1.01 * value for name, value in run.measured.items()})
    found = calibrate([run, again], "vllm", quiet)
    assert found.runs == 2 and found.crossed is None and not found.expected
    assert "One load tells of no other" in calibration_page(to_plain(calibration_document(found, "vllm", None)))
    both = measured_with(planted)
    more = calibrate([*both, replace(both[0], name="again")], "vllm", quiet)
    assert more.crossed is not None and more.crossed[1]["tpot_mean"].n == len(both) + 1


@pytest.mark.parametrize(("slower", "doubted"), [(1.0, False), (3.0, True)])
def test_what_no_own_time_explains_casts_doubt_on_the_plan(slower: float, doubted: bool) -> None:
    runs = measured_with(replace(BEFORE, step_s=2 * BEFORE.step_s))
    some = [
        replace(run, measured={name: value * (slower if place % 2 else 1.0) for name, value in run.measured.items()})
        for place, run in enumerate(runs)
    ]
    page = calibration_page(to_plain(calibration_document(calibrate(some, "vllm", quiet), "vllm", None)))
    assert ("more than the own time of an engine explains: check that" in page) == doubted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('like = "vllm"\n[own_time]\nstep_us = -1.0', "step_us = -1.0"),
        ('like = "vllm"\n[own_time]\nstep_us = nan', "step_us = nan"),
        ('like = "vllm"\n[own_time]\ncaptured = 3', "captured is none of"),
        ('like = "nothing"\n[own_time]\nstep_us = 1', "like = 'nothing'"),
        ('like = "vllm"\nscheduler = "static"\n[own_time]\nstep_us = 1', "'scheduler'"),
        ('like = "vllm"', "own_time"),
        ("own_time = 3", "like is missing: give one of"),
        ('like = "vllm"\nexpected = 3\n[own_time]\nstep_us = 1', "expected must be a table"),
        (
            'like = "vllm"\n[own_time]\nstep_us = 1\n[expected]\nttft_mean = {runs = 1, low = 1, middle = 1, high = 1}',
            "expected.ttft_mean must have runs",
        ),
        (
            'like = "vllm"\n[own_time]\nstep_us = 1\n[expected]\nttft_mean = {runs = 3, low = 2, middle = 1, high = 1}',
            "rising numbers above 0",
        ),
    ],
)
def test_an_engine_file_with_faults_is_refused_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_kind(str(path))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_runs_ship_and_some_can_be_held_out() -> None:
    runs = read_measured(SHIPPED).runs
    assert len(runs) == 18 and all(isinstance(run, MeasuredRun) for run in runs)
    fitted, held = divided(runs, "vllm", "lmsys,llama-3.1-8b/conv")
    assert [run.name for run in held] == ["llama-3.1-8b/lmsys", "llama-3.1-8b/conv", "mixtral-8x7b/lmsys"]
    assert len(fitted) == 15
    with pytest.raises(UsageError, match="no run of vllm"):
        divided(runs, "vllm", "nowhere")
    with pytest.raises(UsageError, match="no run of trtllm"):
        divided(runs, "trtllm", None)
