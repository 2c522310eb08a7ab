"""APEX's runs: only meaningful columns are used, the instance runs alone, settings are those of its script."""

from __future__ import annotations

import csv
import gzip
import json
from typing import TYPE_CHECKING, Any

import pytest

from apex_opt.errors import InputError
from apex_opt.measured.apex import NEEDED, read_apex
from apex_opt.measured.runs import MeasuredRun, UnusableRun

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.measured.runs import Run

ROW = {
    "file": "vllm/results/llama_lmsys_05_validation_2DP4TP_1.txt",
    "engine": "vllm",
    "model": "Meta-Llama-3.1-70B",
    "hf_model_in_script": "meta-llama/Meta-Llama-3.1-70B",
    "dtype": "bf16",
    "kv_dtype": "bf16",
    "plan": "2DP4TP",
    "gpus_in_this_instance": "4",
    "valid": "True",
    "note": "",
    "ttft_mean_s": "0.038",
    "itl_mean_s": "0.02",
    "e2e_mean_s": "1.5",
}
NAME = "vllm__llama_lmsys_05_2DP4TP_1"
SERVED = {NAME: [[0, 100, 20], [500_000_000, 4000, 10]]}


def read(tmp_path: Path, served: Any = SERVED, **changes: str) -> list[Run]:
    path = tmp_path / "apex.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerow(ROW | changes)
    (tmp_path / "apex-served.json.gz").write_bytes(gzip.compress(json.dumps(served).encode()))
    return read_apex(path)


def one(tmp_path: Path, **changes: Any) -> MeasuredRun:
    (run,) = read(tmp_path, **changes)
    assert isinstance(run, MeasuredRun), run
    return run


def test_a_shard_is_an_instance_of_its_own(tmp_path: Path) -> None:
    run = one(tmp_path)
    assert (run.name, run.plan, run.cluster, run.engine) == (NAME, "tp4 bf16", "8xh100-sxm", "vllm-0.6")
    assert run.measured == {"ttft_mean": 0.038, "itl_mean": 0.02, "e2e_mean": 1.5}
    assert run.trace.arrival_ns.tolist() == [0, 500_000_000]
    assert run.trace.output.tolist() == [20, 10]
    assert run.trace.concurrency is None


def test_large_llama_instances_cut_prompts_to_512_tokens(tmp_path: Path) -> None:
    settings = one(tmp_path).settings
    assert (settings.chunked_prefill, settings.max_num_batched_tokens, settings.max_num_seqs) == (True, 512, 256)
    assert (settings.gpu_memory_utilization, settings.async_scheduling) == (0.97, False)


@pytest.mark.parametrize(
    ("model", "dtype", "length", "share"),
    [("Meta-Llama-3.1-70B", "bf16", 24272, 0.97), ("Mistral-Large-Instruct-2407", "fp8", 20560, 0.85)],
)
def test_two_gpus_run_whole_prompts(tmp_path: Path, model: str, dtype: str, length: int, share: float) -> None:
    run = one(tmp_path, model=model, dtype=dtype, kv_dtype=dtype, plan="4DP2TP", gpus_in_this_instance="2")
    assert (run.settings.chunked_prefill, run.settings.max_model_len) == (False, length)
    assert run.settings.gpu_memory_utilization == share
    assert run.plan == ("tp2 bf16" if dtype == "bf16" else "tp2 fp8 kv=fp8")
    assert any("whole prompts" in text for text in run.assumptions)


def test_of_sglang_only_the_whole_latency_is_used(tmp_path: Path) -> None:
    run = one(
        tmp_path,
        served={"sglang__mistral_ep_8_lmsys_05": SERVED[NAME]},
        file="sglang/results/mistral_ep_8_lmsys_05_validation.txt",
        engine="sglang",
        model="Mixtral-8x22B-Instruct-v0.1",
        plan="8EP",
        gpus_in_this_instance="8",
        valid="e2e only",
        note="tokens come in fifties",
    )
    assert run.measured == {"e2e_mean": 1.5}
    assert (run.plan, run.engine) == ("ep8 bf16", "sglang-eager")
    assert any("only the mean E2E can be compared: tokens come in fifties" in text for text in run.assumptions)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"valid": "False", "note": "crashed"}, "measurement not valid"),
        ({"valid": ""}, "measurement not valid"),
        ({"model": "Gemma"}, "deployment not described"),
        ({"plan": "weird"}, "deployment not described"),
        ({"gpus_in_this_instance": ""}, "deployment not described"),
        ({"plan": "8TP"}, "plan and GPUs disagree"),
        ({"itl_mean_s": ""}, "nothing measured"),
    ],
)
def test_a_row_that_cannot_be_compared_says_why(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    (run,) = read(tmp_path, **changes)
    assert isinstance(run, UnusableRun)
    assert run.reason == reason


@pytest.mark.parametrize(
    ("served", "said"),
    [
        ({}, rf"apex\.csv: line 2: apex-served\.json\.gz has no requests under {NAME}"),
        ([], r"expected an object of lists"),
        ({NAME: []}, rf"{NAME}: expected a list of"),
        ({NAME: [[0, 1]]}, rf"{NAME}: expected a list of"),
        ({NAME: [[0, 1.5, 2]]}, rf"{NAME}: expected a list of"),
        ({NAME: [[0, 1, 0]]}, r"row 1: output 0 is outside"),
        ({NAME: [[-1, 1, 1]]}, r"row 1: arrival_ns -1 is outside"),
        ({NAME: [[1 << 80, 1, 1]]}, r"arrival_ns"),
    ],
)
def test_requests_with_faults_are_refused(tmp_path: Path, served: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(tmp_path, served)


def test_requests_must_lie_beside_the_table(tmp_path: Path) -> None:
    read(tmp_path)
    (tmp_path / "apex-served.json.gz").unlink()
    with pytest.raises(InputError, match=r"apex-served\.json\.gz: no such file"):
        read_apex(tmp_path / "apex.csv")


@pytest.mark.data
def test_every_row_of_the_real_table_is_a_run_or_has_a_reason(shared: Path) -> None:
    runs = read_apex(shared / "measured" / "apex-8xh100.csv")
    usable = [run for run in runs if isinstance(run, MeasuredRun)]
    assert (len(runs), len(usable)) == (108, 105)
    assert sum(set(run.measured) == {"e2e_mean"} for run in usable) == 12
    assert set(NEEDED) <= set(ROW)
