"""Closed loops on prefill and decode instances: what a row says becomes a run, and what it lacks a reason."""

from __future__ import annotations

import csv
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.measured.compare import Predictor
from apex_opt.measured.handed import NEEDED, read_pools
from apex_opt.measured.readers import read_measured
from apex_opt.measured.runs import MeasuredRun, UnusableRun
from apex_opt.measured.silicon import closed_loop
from apex_opt.report.validation import validation_document
from apex_opt.workload import make_trace

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.measured.runs import Run

ROW = {
    "id": "row",
    "engine": "sglang",
    "version": "0.5.8.post1",
    "model": "deepseek-ai/DeepSeek-R1-0528",
    "gpu": "gb300",
    "precision": "fp4",
    "isl": "1024",
    "osl": "1024",
    "clients": "4",
    "speculative": "none (all others of the date)",
    "prefill_workers": "1",
    "prefill_tp": "4",
    "prefill_dp": "1",
    "prefill_moe_tp": "4",
    "prefill_moe_ep": "1",
    "decode_workers": "2",
    "decode_tp": "4",
    "decode_dp": "1",
    "decode_moe_tp": "4",
    "decode_moe_ep": "1",
    "ttft_mean_ms": "250.5",
    "tpot_mean_ms": "6.25",
}


def read(tmp_path: Path, **changes: str) -> Run:
    path = tmp_path / "pools.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerow(ROW | changes)
    assert set(NEEDED) == set(ROW)
    (run,) = read_pools(path)
    assert read_measured(path).files == (str(path),)
    return run


def one(tmp_path: Path, **changes: str) -> MeasuredRun:
    run = read(tmp_path, **changes)
    assert isinstance(run, MeasuredRun), run
    return run


def test_a_row_becomes_a_closed_loop_over_two_pools(tmp_path: Path) -> None:
    run = one(tmp_path)
    assert run.measured == {"ttft_mean": 0.2505, "tpot_mean": 0.00625}
    assert run.plan == "dp1 attn(tp4) ffn(tp4,ep1) nvfp4 kv=fp8"
    assert run.answering is not None
    assert run.answering.plan == "dp2 attn(tp4) ffn(tp4,ep1) nvfp4 kv=fp8"
    assert run.cluster == "72xgb300"
    assert run.trace == closed_loop(4, 1024, 1024, 10, True)
    assert run.assumptions[0].startswith("deployment: dsr1-fp4-gb300-1p2d-tp4, srt-slurm recipes/")


def test_either_side_is_started_as_its_recipe_says(tmp_path: Path) -> None:
    run = one(tmp_path, clients="200")
    first, then = run.settings, run.answering and run.answering.settings
    assert then is not None and isinstance(first.scheduler, SglangScheduling)
    assert (first.max_num_batched_tokens, run.kv_blocks) == (8192, 8192)
    assert (first.scheduler.max_prefill_tokens, first.scheduler.ignore_eos) == (16384, True)
    assert first.gpu_memory_utilization == then.gpu_memory_utilization == 0.95
    assert (first.max_num_seqs, then.max_num_seqs) == (200, 200)
    slower = one(tmp_path, gpu="gb200", precision="fp8", decode_workers="1", clients="200")
    assert slower.answering is not None and slower.answering.settings.max_num_seqs == 128


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"speculative": "unknown"}, "set aside: whether drafts were made is not known", "unknown"),
        ({"engine": "trtllm"}, "hand-over that is not modelled", "how trtllm hands prompts over"),
        ({"decode_dp": "4", "decode_tp": "1"}, "pools of attention copies", "1 before prompts, 4 before answers"),
        ({"decode_workers": "3"}, "pools whose deployment is not told", "sglang, gb300, fp4, 1024, 1024"),
        ({"model": "nobody/nothing"}, "model not described", "nothing"),
    ],
)
def test_a_row_that_cannot_be_simulated_says_what_it_lacks(
    tmp_path: Path, changes: dict[str, str], reason: str, detail: str
) -> None:
    run = read(tmp_path, **changes)
    assert isinstance(run, UnusableRun)
    assert run.reason == reason
    assert detail in run.detail
    assert run.aside == reason.startswith("set aside")


def predicted(run: MeasuredRun) -> dict[str, float]:
    (comparison,) = Predictor().compare([run], lambda what, done, total: None)
    assert comparison.prediction is not None, comparison
    assert str(comparison.prediction.plan).startswith("prefill{attn(tp4)")
    assert comparison.prediction.plan.devices == 12
    return dict(comparison.prediction.values)


def often(run: MeasuredRun) -> MeasuredRun:
    """The run with instances that look for requests before every batch."""
    assert run.answering is not None
    own = run.answering.settings.scheduler
    assert isinstance(own, SglangScheduling)
    assert own.scheduler_recv_interval == 10
    settings = replace(run.answering.settings, scheduler=replace(own, scheduler_recv_interval=1))
    return replace(run, answering=replace(run.answering, settings=settings))


def test_a_request_alone_takes_what_its_prompt_its_hand_over_and_its_answer_take(tmp_path: Path) -> None:
    run = one(tmp_path)

    def alone(**lengths: Any) -> dict[str, float]:
        trace = make_trace(name="one", arrival_ns=[0], **lengths)
        return predicted(replace(often(run), trace=trace))

    short, long = alone(prompt=[100], output=[50]), alone(prompt=[1900], output=[50])
    assert "energy" not in short
    assert 0 < short["ttft_mean"] < long["ttft_mean"]
    # Prompts are computed elsewhere: beside contexts, answers go on at one pace.
    assert short["tpot_mean"] < long["tpot_mean"] < 1.1 * short["tpot_mean"]
    more = alone(prompt=[100], output=[100])
    assert more["ttft_mean"] == pytest.approx(short["ttft_mean"])


def test_prompts_wait_for_those_who_answer_to_look_for_requests(tmp_path: Path) -> None:
    run = replace(one(tmp_path), trace=closed_loop(12, 64, 200, 2, True))
    at_once, rarely = predicted(often(run)), predicted(run)
    # Nine batches at most, and fewer in the mean: whoever begins to be answered makes its instance look at once.
    assert 0 < rarely["ttft_mean"] - at_once["ttft_mean"] < 9 * at_once["tpot_mean"]


def test_pools_are_a_half_of_their_own_on_the_board(tmp_path: Path) -> None:
    run = one(tmp_path)
    few = replace(run, trace=closed_loop(4, 64, 8, 2, True))
    comparisons = Predictor().compare([few], lambda what, done, total: None)
    document = validation_document(read_measured(tmp_path / "pools.csv"), comparisons, {})
    assert list(document.summary_by["half"]) == ["judged, of pools" if run.judged else "fitted on, of pools"]
