"""vLLM runs with their log: metrics as defined, settings as recorded, cold starts recognised, faults located."""

from __future__ import annotations

import copy
import gzip
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from measured_cases import BLOCKS, engine, recorded, write_runs

from apex_opt.errors import InputError
from apex_opt.measured.runs import MeasuredRun, UnusableRun
from apex_opt.measured.vllm_runs import read_vllm_runs, recognised
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator.law import linear_law
from apex_opt.workload import load_trace

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = EngineSettings(max_num_seqs=32, max_num_batched_tokens=1024, max_model_len=2048)
REQUESTS = [[0.5, 0.6, 1.6, 100, 11], [0.0, 0.2, 0.2, 50, 1], [0.25, 0.35, 2.35, 70, 41]]


def one(path: Path, requests: list[list[float]] = REQUESTS, **changes: Any) -> MeasuredRun:
    write_runs(path, {"a": {"requests": requests}}, engine(SETTINGS, **changes))
    (run,) = read_vllm_runs(path)
    assert isinstance(run, MeasuredRun)
    return run


def test_metrics_are_those_of_the_requests(tmp_path: Path) -> None:
    run = one(tmp_path / "x.json")
    assert run.measured["ttft_mean"] == pytest.approx((0.1 + 0.2 + 0.1) / 3)
    assert run.measured["ttft_p95"] == pytest.approx(np.percentile([0.1, 0.2, 0.1], 95))
    assert run.measured["tpot_mean"] == pytest.approx((1 / 10 + 2 / 40) / 2)  # one token has none
    assert run.measured["itl_mean"] == pytest.approx(3 / 50)
    assert run.measured["e2e_mean"] == pytest.approx((1.1 + 0.2 + 2.1) / 3)
    assert run.measured["throughput"] == pytest.approx(3 / 2.35)
    assert "energy" not in run.measured


def test_a_run_is_of_the_same_sweep_wherever_its_file_lies(tmp_path: Path) -> None:
    """Else the same run would be judged by here, and fitted on there."""
    found = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        (folder / "x.config.json").write_text("{}")
        found.append(one(folder / "x.json"))
    assert found[0].model != found[1].model
    assert found[0].sweep == found[1].sweep


def test_arrivals_are_the_times_of_submission_in_order(tmp_path: Path) -> None:
    trace = one(tmp_path / "x.json").trace
    assert trace.arrival_ns.tolist() == [0, 250_000_000, 500_000_000]
    assert trace.prompt.tolist() == [50, 70, 100]
    assert trace.output.tolist() == [1, 41, 11]


def test_settings_and_blocks_are_the_recorded_ones(tmp_path: Path) -> None:
    run = one(tmp_path / "x.json", async_scheduling=False, block_size=32)
    assert run.kv_blocks == BLOCKS  # one is kept back
    assert (run.settings.max_num_seqs, run.settings.max_num_batched_tokens) == (32, 1024)
    assert (run.settings.block_size, run.settings.async_scheduling) == (32, False)


@pytest.mark.parametrize(
    ("changes", "plan"),
    [
        ({}, "tp1"),
        ({"quantization": "fp8", "kv_dtype": "fp8_e4m3"}, "tp1 fp8 kv=fp8"),
        ({"kv_dtype": "bfloat16", "tensor_parallel_size": 2}, "tp2 kv=bf16"),
    ],
)
def test_formats_and_shards_make_the_plan(tmp_path: Path, changes: dict[str, Any], plan: str) -> None:
    assert one(tmp_path / "x.json", **changes).plan == plan


@pytest.mark.parametrize("changes", [{"quantization": "nf4"}, {"kv_dtype": "int3"}, {"quantization": ["fp8"]}])
def test_formats_that_are_not_known_leave_the_run_in_the_count(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write_runs(tmp_path / "x.json", {"a": {"requests": REQUESTS}}, engine(SETTINGS, **changes))
    (run,) = read_vllm_runs(path)
    assert isinstance(run, UnusableRun)
    assert run.reason == "number formats not described"


def test_the_model_is_that_beside_the_file_and_the_gpu_that_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "h100-vllm-0.21"
    folder.mkdir()
    run = one(folder / "x.json.gz")
    assert (run.model, run.cluster, run.assumptions) == ("models/llama-3.1-8b", "h100", ())
    (folder / "x.config.json").write_text("{}")
    assert one(folder / "x.json.gz").model == str(folder / "x.config.json")
    assert one(folder / "x.json.gz", tensor_parallel_size=4).cluster == "4xh100"
    other = one(tmp_path / "x.json")
    assert (other.cluster, other.assumptions) == ("h200-sxm", ("measured on h200-sxm",))


def test_only_a_first_request_far_slower_than_later_ones_is_a_cold_start(tmp_path: Path) -> None:
    def asides(first_s: float) -> list[list[str]]:
        runs = {
            "first": {"requests": [[0.0, first_s, first_s + 1, 100, 10]], "summary": {"energy_J": 5.0}},
            "second": {"requests": [[0.0, 0.9, 2.0, 50, 10], [0.1, 0.2, 2.0, 300, 10]]},
        }
        path = write_runs(tmp_path / "x.json", runs, engine(SETTINGS))
        return [sorted(run.set_aside) for run in read_vllm_runs(path) if isinstance(run, MeasuredRun)]

    assert asides(0.29) == [[], []]  # within three times the 0.1 s of a longer prompt
    assert asides(0.31) == [["e2e_mean", "energy", "throughput", "ttft_mean", "ttft_p95"], []]


def test_a_single_run_has_nothing_to_tell_a_cold_start_by(tmp_path: Path) -> None:
    assert one(tmp_path / "x.json", [[0.0, 99.0, 100.0, 10, 10]]).set_aside == {}


def test_the_log_is_kept_with_the_requests_it_belongs_to(tmp_path: Path) -> None:
    law = linear_law(base_ns=10**6, token_ns=9000, context_ns=3, max_num_seqs=32, max_num_batched_tokens=1024)
    trace = load_trace("poisson:rate=50,n=20,prompt=100,output=9")
    path = write_runs(tmp_path / "x.json.gz", {"a": recorded(SETTINGS, law, trace)}, engine(SETTINGS))
    (run,) = read_vllm_runs(path)
    assert isinstance(run, MeasuredRun)
    assert run.iterations is not None
    assert run.iterations.requests[:, 0].tolist() == pytest.approx((run.trace.arrival_ns / 1e9).tolist())
    assert run.measured["energy"] == 100.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["runs"]["a"]["requests"][1].pop(), r"run a: request 2: expected 5 finite numbers"),
        (lambda c: c["runs"]["a"]["requests"][0].__setitem__(3, -4), r"run a: request 1: expected 5 finite numbers"),
        (lambda c: c["runs"]["a"]["requests"][0].__setitem__(1, "1"), r"run a: request 1: expected 5 finite numbers"),
        (lambda c: c["runs"]["a"]["requests"][0].__setitem__(1, 0.1), r"request 1: .* three times in this order"),
        (lambda c: c["runs"]["a"]["requests"][2].__setitem__(4, 0), r"request 3: .* two whole numbers above 0"),
        (lambda c: c["runs"]["a"]["requests"][2].__setitem__(3, 1.5), r"request 3: .* two whole numbers above 0"),
        (lambda c: c["runs"]["a"].__setitem__("requests", []), r"'requests' must be a list with at least one row"),
        (lambda c: c["runs"].__setitem__("a", 3), r"run a: expected an object with 'requests'"),
        (lambda c: c.__setitem__("runs", {}), r"'runs' must be an object with at least one run"),
        (lambda c: c["engine"].__setitem__("num_gpu_blocks", 0), r"engine.num_gpu_blocks 0 is not a whole number"),
        (lambda c: c["engine"].pop("max_model_len"), r"engine.max_model_len None is not a whole number"),
        (lambda c: c["engine"].__setitem__("max_num_batched_tokens", 8), r"engine: max_num_batched_tokens 8 is below"),
        (lambda c: c["runs"]["a"].__setitem__("summary", {"energy_J": -1}), r"summary.energy_J -1 is not a finite"),
        (lambda c: c["runs"]["a"].__setitem__("summary", 3), r"run a: 'summary' must be an object"),
        (lambda c: c["runs"]["a"].__setitem__("iterations", [[1, 2]]), r"iteration 1: expected 7 finite numbers"),
        (lambda c: c["runs"]["a"].__setitem__("iterations", [[2] * 7, [1] * 7]), r"iterations are not in order"),
    ],
)
def test_a_fault_is_one_line_that_names_its_place(tmp_path: Path, change: Any, said: str) -> None:
    content = {"engine": engine(SETTINGS), "runs": {"a": {"requests": copy.deepcopy(REQUESTS)}}}
    change(content)
    path = tmp_path / "x.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    with pytest.raises(InputError, match=said) as caught:
        read_vllm_runs(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_other_json_is_not_taken_for_runs() -> None:
    for content in ({}, [], {"runs": {}}, {"engine": 3, "runs": {}}, {"model_type": "llama"}):
        assert not recognised(content)


@pytest.mark.data
def test_the_recorded_runs_have_their_summaries_and_one_cold_start(shared: Path) -> None:
    aside = []
    for path in sorted((shared / "measured" / "h200-vllm-0.20.2").glob("*.json.gz")):
        summaries = {
            name: run["summary"] for name, run in json.loads(gzip.decompress(path.read_bytes()))["runs"].items()
        }
        for run in read_vllm_runs(path):
            assert isinstance(run, MeasuredRun)
            summary = summaries[run.name.partition("/")[2]]
            assert run.measured["ttft_mean"] * 1e3 == pytest.approx(summary["mean_ttft_ms"])
            assert run.measured["tpot_mean"] * 1e3 == pytest.approx(summary["mean_tpot_ms"])
            assert run.measured["energy"] == summary["energy_J"]
            assert run.cluster == "h200"
            aside += [run.name] if run.set_aside else []
    assert aside == ["llama-3.1-8b/static_b1"]
