"""The file of per-request results: complete, in the trace's order, equal to what the tables sum up, or not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from cli_cases import run

from apex_opt.errors import InputError
from apex_opt.figures.measure import measure
from apex_opt.report.requests import write_requests
from apex_opt.simulator.law import linear_law
from apex_opt.workload import load_trace

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.simulator import Outcome

TRACE = load_trace("poisson:rate=50,n=40,prompt=uniform(1,200),output=uniform(1,9)", seed=3)


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator import simulate

    law = linear_law(base_ns=10**6, token_ns=5000, context_ns=1, max_num_seqs=8, max_num_batched_tokens=256)
    settings = EngineSettings(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=205)
    return simulate(settings, 500, [law], TRACE)


def test_the_means_of_the_file_are_those_of_the_metrics(tmp_path: Path, outcome: Outcome) -> None:
    write_requests(tmp_path / "r.csv", outcome, TRACE, 205, 7000)
    table = pd.read_csv(tmp_path / "r.csv")
    metrics = measure(outcome.as_run(TRACE, 205, outside_ns=7000))
    assert table["request"].tolist() == list(range(40))
    assert table["prompt"].tolist() == TRACE.prompt.tolist()
    assert table["output"].tolist() == np.minimum(TRACE.output, 205 - TRACE.prompt).tolist()
    for name, statistics in metrics.latency_s.items():
        assert table[f"{name}_s"].mean() == pytest.approx(statistics["mean"], abs=2e-9)
    assert table["tpot_s"].isna().sum() == (table["output"] == 1).sum() > 0


def test_a_file_that_cannot_be_written_is_one_clear_line_and_leaves_nothing(tmp_path: Path, outcome: Outcome) -> None:
    with pytest.raises(InputError, match=r"requests .*nowhere.* cannot be written"):
        write_requests(tmp_path / "nowhere" / "r.csv", outcome, TRACE, 205, 0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_requests(tmp_path / "folder", outcome, TRACE, 205, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_simulate_writes_the_file_of_its_run(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    words = ["simulate", "--plan=tp1", "--model=llama-3.1-8b", "--trace=static:n=3,prompt=10,output=4"]
    done = run(*words, f"--requests={path}")
    assert done.code == 0, done.err
    assert len(pd.read_csv(path)) == 3
