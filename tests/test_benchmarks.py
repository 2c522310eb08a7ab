"""Benchmarks: every figure can be measured, and the command line prints and refuses what it says."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks.__main__ import benchmarks, main
from benchmarks.registry import ROOT
from benchmarks.traces import azure_csv, conversation_lookalike

if TYPE_CHECKING:
    from pathlib import Path

NAMED = (
    "plan_70b_8xh100_chat_warm_s",
    "plan_70b_8xh100_chat_process_s",
    "plan_first_process_s",
    "simulate_20000_requests_s",
    "enumerate_8_gpus_s",
    "enumerate_32_gpus_s",
    "read_azure_csv_s",
    "help_s",
    "kernel_compile_s",
)


SLOW = {"plan_first_process_s", "plan_70b_8xh100_chat_process_s", "kernel_compile_s"}
"""Figures of compiling the kernel anew, and of several processes."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.nightly] if name in SLOW else []) for name in benchmarks()],
)
def test_a_reduced_run_gives_a_positive_finite_figure(name: str) -> None:
    value = benchmarks()[name].measure(True)
    assert math.isfinite(value)
    assert value > 0


def test_the_names_that_others_rely_on_stay() -> None:
    assert set(NAMED) <= set(benchmarks())


def test_each_name_is_snake_case_and_ends_in_its_unit() -> None:
    for name, benchmark in benchmarks().items():
        assert re.fullmatch(r"[a-z0-9_]+", name)
        assert name.endswith("_" + benchmark.unit.replace("/", "_per_"))


def test_each_engine_loop_has_its_figures_and_says_which_trace_it_ran() -> None:
    for loop in ("sync", "async", "pipeline_2"):
        for unit in ("batches", "requests"):
            pattern = rf"simulate_{loop}_azure_conv(_lookalike)?_{unit}_per_s"
            assert sum(bool(re.fullmatch(pattern, name)) for name in benchmarks()) == 1


def test_a_figure_is_one_line_of_name_value_unit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help_s", "--quick"]) == 0
    name, value, unit = capsys.readouterr().out.split()
    assert (name, unit) == ("help_s", "s")
    assert float(value) > 0


def test_json_gives_one_object_per_line_even_with_the_flag_before_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--quick", "help_s", "read_azure_csv_s"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["help_s", "read_azure_csv_s"]
    assert all(set(row) == {"name", "value", "unit"} for row in rows)


def test_list_names_every_figure_and_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(benchmarks())


@pytest.mark.parametrize(
    ("words", "told"), [(["help_z"], "help_s"), (["help_s", "--jsn"], "--json"), (["1.10"], "known: ")]
)
def test_an_unknown_word_is_one_line_with_what_is_known_and_runs_nothing(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.count("\n") == 1
    assert told in shown.err


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nothing_of_that_name"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown benchmark 'nothing_of_that_name'; ")


def test_the_file_written_in_azures_layout_is_read_back_as_it_was(tmp_path: Path) -> None:
    from apex_opt.workload import load_trace

    path = tmp_path / "azure.csv"
    path.write_text(azure_csv(conversation_lookalike(50)))
    read, meant = load_trace(str(path)), conversation_lookalike(50)
    assert read.prompt.tolist() == meant.prompt.tolist()
    assert read.output.tolist() == meant.output.tolist()
    # Azure gives seven decimals of a second and counts from its first row.
    shifted = meant.arrival_ns - meant.arrival_ns[0]
    assert abs(read.arrival_ns - shifted).max() <= 200
