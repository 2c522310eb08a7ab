"""Expected errors: percentiles of what was measured, the nearest kind first, and nothing where nothing was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from cli_cases import run
from test_measured_fit import BEFORE, RUNS, measured_with

from apex_opt.ir import load_model
from apex_opt.measured.compare import Predictor
from apex_opt.measured.expected import FIGURES, LEAST_ROWS, TABLE, Kind, expected, load_kind_of, made, model_kind
from apex_opt.measured.runs import judged_by

if TYPE_CHECKING:
    from pathlib import Path

HERE = Kind("vllm", "h200-sxm-141gb", "dense", "light")


def test_a_table_has_the_percentiles_of_predicted_over_measured(tmp_path: Path) -> None:
    judged, kept = (next(name for name in map(str, range(99)) if judged_by(name) is its) for its in (True, False))
    runs = [replace(run, sweep=sweep) for run in measured_with(BEFORE) for sweep in (judged, judged, kept)]
    comparisons = Predictor().compare(runs, lambda what, done, total: None)
    path = tmp_path / "x.csv"
    path.write_text(made(comparisons))
    found = expected(Kind("vllm", "h200-sxm-141gb", "dense", ""), "ttft_mean", path)
    assert found is not None and found.rows == 2 * len(RUNS)
    assert (found.p10, found.p50, found.p90) == pytest.approx((1, 1, 1), abs=1e-3)


def test_the_nearest_kind_with_enough_runs_is_taken_and_told(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    head = "engine,gpu,model,load,figure,rows,p10,p50,p90\n"
    few, many = LEAST_ROWS - 1, LEAST_ROWS
    path.write_text(
        f"{head}vllm,h200-sxm-141gb,dense,light,ttft_mean,{few},0.5,1,2\n"
        f"vllm,h200-sxm-141gb,dense,,ttft_mean,{few},0.5,1,2\n"
        f"vllm,,dense,light,ttft_mean,{many},0.8,1,1.25\n"
        f"vllm,,,,ttft_mean,{many},0.1,1,9\n"
    )
    found = expected(HERE, "ttft_mean", path)
    assert found is not None and not found.nearest
    assert found.kind == Kind("vllm", "", "dense", "light")
    assert found.interval(1.0) == pytest.approx((0.8, 1.25))
    assert found.share == pytest.approx(0.25)
    assert expected(HERE, "energy", path) is None
    assert expected(Kind("sglang", "h200-sxm-141gb", "dense", "light"), "ttft_mean", path) is None


def test_kinds_of_models_and_loads() -> None:
    names = ("llama-3.1-8b", "mixtral-8x7b")
    assert [model_kind(load_model(name)) for name in names] == ["dense", "MoE"]
    assert [load_kind_of(flight) for flight in (0.1, 4, 4.1, 32, 33)] == ["light", "light", "medium", "medium", "heavy"]


def test_the_table_that_ships_is_in_order() -> None:
    lines = [line.split(",") for line in TABLE.read_text().splitlines()[1:]]
    assert {line[4] for line in lines} == set(FIGURES)
    for *_, rows, p10, p50, p90 in lines:
        assert int(rows) > 0
        assert 0 < float(p10) <= float(p50) <= float(p90) < np.inf


def test_an_answer_has_its_intervals_or_says_that_nothing_was_measured() -> None:
    words = ("simulate", "--plan=tp1", "--model=llama-3.1-8b", "--trace=static:n=2,prompt=16,output=2", "--format=json")
    figures = json.loads(run(*words, "--cluster=1xh200-sxm").out)["expected"]
    assert [one["figure"] for one in figures] == ["TTFT", "TPOT", "E2E", "energy"]
    assert all(one["low"] < one["high"] and one["rows"] >= LEAST_ROWS for one in figures)
    figures = json.loads(run(*words, "--cluster=1xh200-sxm", "--engine=static", "--runnable=any").out)["expected"]
    assert all(one["low"] is None and one["of"] == "nothing comparable was measured" for one in figures)
