"""Expected errors: percentiles of what was measured, the nearest kind first, and nothing where nothing was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from cli_cases import run
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_cases import engine, write_runs
from test_measured_apex import read as apex
from test_measured_fit import BEFORE, RUNS, measured_with
from test_measured_handed import read as pools
from test_measured_silicon import DENSE as CLOSED_LOOP
from test_measured_silicon import read as closed_loop

from apex_opt.cost.engine import load_engine
from apex_opt.errors import UsageError
from apex_opt.ir import load_model
from apex_opt.measured.compare import Predictor
from apex_opt.measured.expected import (
    DOUBTFUL,
    FIGURES,
    HELD,
    LEAST_ROWS,
    TABLE,
    Expected,
    Kind,
    all_runs,
    doubtful,
    expected,
    honest,
    load_kind_of,
    made,
    main,
    model_kind,
    of_few,
)
from apex_opt.measured.readers import READERS
from apex_opt.measured.runs import judged_by
from apex_opt.plans.engine import EngineSettings

if TYPE_CHECKING:
    from pathlib import Path

HERE = Kind("vllm", "h200-sxm-141gb", "dense", "light")


HEAD = "engine,gpu,model,load,figure,rows,sweeps,low,middle,high,held\n"


def test_a_table_has_what_was_measured_over_what_was_predicted_of_judged_runs(tmp_path: Path) -> None:
    judged = [name for name in map(str, range(99)) if judged_by(name)][:3]
    kept = next(name for name in map(str, range(99)) if not judged_by(name))
    runs = [replace(run, sweep=sweep) for run in measured_with(BEFORE) for sweep in (*judged, kept)]
    comparisons = Predictor().compare(runs, lambda what, done, total: None)
    path = tmp_path / "x.csv"
    path.write_text(made(comparisons))
    found = expected(Kind("vllm", "h200-sxm-141gb", "dense", ""), "ttft_mean", path)
    assert found is not None and found.rows == 3 * len(RUNS)
    assert (found.low, found.middle, found.high) == pytest.approx((1, 1, 1), abs=1e-3)


def test_the_nearest_kind_with_enough_runs_that_hold_is_taken_and_told(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    few, many = LEAST_ROWS - 1, LEAST_ROWS
    path.write_text(
        f"{HEAD}vllm,h200-sxm-141gb,dense,light,ttft_mean,{few},3,0.5,1,2,0.9\n"
        f"vllm,h200-sxm-141gb,dense,,ttft_mean,{many},2,0.5,1,2,{HELD - 0.01}\n"
        f"vllm,,dense,light,ttft_mean,{many},3,0.8,1,1.25,{HELD}\n"
        f"vllm,,,,ttft_mean,{many},3,0.1,1,9,0.9\n"
    )
    found = expected(HERE, "ttft_mean", path)
    assert found is not None and not found.nearest
    assert found.of == str(Kind("vllm", "", "dense", "light"))
    assert found.interval(1.0) == pytest.approx((0.8, 1.25))
    assert found.share == pytest.approx(0.25)
    assert (found.above, found.below) == pytest.approx((0.25, 0.2))
    assert expected(HERE, "energy", path) is None
    assert expected(Kind("sglang", "h200-sxm-141gb", "dense", "light"), "ttft_mean", path) is None


def test_the_table_is_made_of_every_layout_at_once_or_not_at_all(tmp_path: Path) -> None:
    write_runs(tmp_path / "ours.json.gz", {"a": {"requests": [[0.0, 0.1, 0.2, 10, 5]]}}, engine(EngineSettings()))
    closed_loop(tmp_path, CLOSED_LOOP)
    with pytest.raises(UsageError, match="holds no runs of the layout apex, pools, and the table would lose"):
        main([str(tmp_path)])
    apex(tmp_path)
    pools(tmp_path)
    assert sorted(run.kind for run in all_runs(tmp_path)) == sorted(READERS)
    with pytest.raises(UsageError, match="expected one folder, that of all measured runs"):
        main([str(tmp_path), str(tmp_path)])


def test_a_prediction_lies_within_its_own_interval_however_it_was_off() -> None:
    assert Expected("it", True, 9, 1.1, 1.2, 1.5).interval(10.0) == pytest.approx((10, 15))
    assert Expected("it", True, 9, 0.5, 0.6, 0.9).interval(10.0) == pytest.approx((5, 10))


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.floats(0.02, 0.6), st.floats(0.0, 0.5))
def test_an_interval_holds_eight_of_ten_runs_of_sweeps_that_it_was_not_made_of(
    seed: int, within: float, between: float
) -> None:
    rng = np.random.default_rng(seed)

    def sweeps(count: int) -> dict[str, list[float]]:
        offs = rng.normal(0.1, between, count)
        return {str(i): np.exp(rng.normal(off, within, 6)).tolist() for i, off in enumerate(offs)}

    low, high, held = honest(sweeps(40))
    others = [ratio for some in sweeps(400).values() for ratio in some]
    assert held >= HELD
    # Of forty sweeps that differ as much as half a unit the ends are not known well.
    assert np.mean([low <= ratio <= high for ratio in others]) > HELD - 0.2


def test_few_runs_of_a_calibration_give_a_wide_interval() -> None:
    low, middle, high = of_few([0.9, 1.1])
    assert middle == pytest.approx(0.99**0.5)
    assert high / low > 2.5
    narrow = of_few([1.0] * 20)
    assert narrow[2] / narrow[0] == pytest.approx(1 + 2 * 0.01 * 1.328, rel=0.02)


def test_a_gpu_whose_runs_were_far_off_is_doubtful(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"{HEAD},mine,,,ttft_mean,3,3,2,{DOUBTFUL + 0.1},9,0.6\n,yours,,,ttft_mean,3,3,0.9,1,2,0.6\n")
    assert doubtful("mine", "ttft_mean", path) == (3, pytest.approx(DOUBTFUL + 0.1))
    assert doubtful("yours", "ttft_mean", path) is None
    assert doubtful("nobodys", "ttft_mean", path) is None
    assert doubtful("gb200-nvl72-185gb", "ttft_mean") is not None


def test_kinds_of_models_and_loads() -> None:
    names = ("llama-3.1-8b", "mixtral-8x7b")
    assert [model_kind(load_model(name)) for name in names] == ["dense", "MoE"]
    assert [load_kind_of(flight) for flight in (0.1, 4, 4.1, 32, 33)] == ["light", "light", "medium", "medium", "heavy"]


def test_the_table_that_ships_is_in_order() -> None:
    lines = [line.split(",") for line in TABLE.read_text().splitlines()[1:]]
    assert {line[4] for line in lines} == set(FIGURES)
    for *_, rows, sweeps, low, middle, high, held in lines:
        assert 0 < int(sweeps) <= int(rows)
        assert 0 < float(low) <= float(middle) <= float(high) < np.inf
        assert 0 <= float(held) <= 1


def test_an_answer_has_its_intervals_or_says_that_nothing_was_measured() -> None:
    words = ("simulate", "--plan=tp1", "--model=llama-3.1-8b", "--trace=static:n=2,prompt=16,output=2", "--format=json")
    figures = json.loads(run(*words, "--cluster=1xh200-sxm").out)["expected"]
    assert [one["figure"] for one in figures] == ["TTFT", "TPOT", "E2E", "energy"]
    assert all(one["low"] < one["high"] and one["rows"] >= LEAST_ROWS for one in figures)
    figures = json.loads(run(*words, "--cluster=1xh200-sxm", "--engine=static", "--runnable=any").out)["expected"]
    assert all(one["low"] is None and one["of"] == "nothing comparable was measured" for one in figures)


def test_intervals_of_a_closed_loop_have_what_clients_wait_on_their_way_as_measured_runs_do() -> None:
    words = ("simulate", "--plan=tp1", "--model=llama-3.1-8b", "--cluster=1xh200-sxm", "--format=json")
    document = json.loads(run(*words, "--trace=closed:concurrency=2,n=6,prompt=1000,output=9").out)
    figures = {one["figure"]: one for one in document["expected"]}
    own = load_engine("vllm")
    way_s = own.client_s + 1000 * own.client_token_s
    for figure in ("TTFT", "E2E", "TPOT"):
        one = figures[figure]
        kind = Kind.of("vllm", "h200-sxm-141gb", load_model("llama-3.1-8b"), 2.0)
        error = expected(kind, f"{figure.lower()}_mean")
        assert error is not None
        low, high = error.interval(one["predicted"] + (way_s if figure != "TPOT" else 0.0))
        assert (one["low"], one["high"]) == pytest.approx((low, high), rel=1e-3)
        assert (", clients wait 27.0 ms more on their way" in one["of"]) == (figure != "TPOT")


def test_a_goal_on_what_clients_see_counts_their_way() -> None:
    words = ("simulate", "--plan=tp1", "--model=llama-3.1-8b", "--cluster=1xh200-sxm", "--format=json")
    closed = "--trace=closed:concurrency=2,n=6,prompt=1000,output=9"
    mean = json.loads(run(*words, closed).out)["best"]["metrics"]["ttft_s"]["mean"]
    (near,) = json.loads(run(*words, closed, f"--slo=ttft_mean<={1000 * mean + 20:.3f}ms").out)["near_goals"]
    assert near["error"] > 0.027 / mean


@pytest.mark.parametrize("more", ["--prefix_caching=true", "--model=whisper-large-v3"])
def test_of_reused_prefixes_and_encoders_nothing_comparable_was_measured(more: str) -> None:
    model = () if more.startswith("--model") else ("--model=llama-3.1-8b",)
    words = ("simulate", "--plan=tp1", *model, "--trace=static:n=2,prompt=16,output=2", "--format=json")
    figures = json.loads(run(*words, "--cluster=1xh200-sxm", more).out)["expected"]
    assert all(one["low"] is None and one["of"] == "nothing comparable was measured" for one in figures)


def test_an_older_release_is_told_the_errors_of_its_engine_as_such() -> None:
    words = ("simulate", "--plan=tp1", "--model=llama-3.1-8b", "--trace=static:n=2,prompt=16,output=2", "--format=json")
    newest, older = (
        json.loads(run(*words, "--cluster=1xh200-sxm", f"--engine={name}").out)["expected"][0]
        for name in ("vllm", "vllm-0.12")
    )
    assert newest["of"].startswith("vllm, on h200-sxm-141gb")
    assert not older["nearest"] and older["of"].startswith("vllm of all releases, on h200-sxm-141gb")


def test_a_goal_that_is_met_by_less_than_the_expected_error_is_told() -> None:
    words = ("simulate", "--plan=tp1", "--model=llama-3.1-8b", "--trace=static:n=2,prompt=16,output=2", "--format=json")
    mean = json.loads(run(*words, "--cluster=1xh200-sxm").out)["best"]["metrics"]["tpot_s"]["mean"]
    goals = f"--slo=tpot_mean<={1010 * mean:.6f}ms,ttft_mean<=9s"
    document = json.loads(run(*words, "--cluster=1xh200-sxm", goals).out)
    (near,) = document["near_goals"]
    assert near["goal"].startswith("tpot_mean") and near["margin"] == pytest.approx(0.01, abs=1e-3)
    assert near["error"] > near["margin"]
    page = run(*words[:-1], "--cluster=1xh200-sxm", goals).out
    assert "is met by 1.0%, less than the expected error of its figure, " in page


def test_a_goal_on_itl_that_is_met_narrowly_is_told_to_have_no_known_error() -> None:
    words = ("simulate", "--plan=tp1", "--model=llama-3.1-8b", "--trace=static:n=2,prompt=16,output=3")
    ask = (*words, "--cluster=1xh200-sxm", "--format=json")
    p99 = json.loads(run(*ask).out)["best"]["metrics"]["itl_s"]["p99"]
    told = [json.loads(run(*ask, f"--slo=itl_p99<={more * p99:.6f}ms").out)["doubts"] for more in (1010, 2000)]
    assert ["is met by 1.0%, and no error of ITL is known" in text for text in told[0]] == [True]
    assert told[1] == []


def test_answers_on_a_gpu_whose_runs_were_far_off_are_called_a_guess() -> None:
    words = (
        "simulate",
        "--plan=tp1",
        "--model=llama-3.1-8b",
        "--trace=static:n=2,prompt=16,output=2",
        "--cluster=gb200",
    )
    assert "on gb200-nvl72-185gb had TTFT " in run(*words).out
