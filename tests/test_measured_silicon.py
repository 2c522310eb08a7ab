"""Closed-loop means: what a row says becomes a run, what it leaves open a stated assumption, what clashes a reason."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from apex_opt.errors import InputError
from apex_opt.measured.deployments import BESIDE_A_PROMPT, INFERENCEMAX_POLLS
from apex_opt.measured.runs import MeasuredRun, UnusableRun
from apex_opt.measured.silicon import NEEDED, REQUESTS_PER_CLIENT, read_silicon

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.measured.runs import Run

DENSE = {
    "id": "row",
    "backend": "vllm",
    "model_path": "meta-llama/Llama-3.1-70B",
    "system": "h100_sxm",
    "isl": "1024",
    "osl": "128",
    "gemm_quant_mode": "fp8",
    "moe_quant_mode": "fp8",
    "batch_size": "16",
    "tp_size": "4",
    "pp_size": "1",
    "attention_dp_size": "1",
    "moe_tp_size": "4",
    "moe_ep_size": "1",
    "silicon_ttft_ms": "250.5",
    "silicon_tpot_ms": "12.25",
    "silicon_data_source": "somewhere.csv",
}
SPARSE = DENSE | {"model_path": "mistralai/Mixtral-8x7B-v0.1", "tp_size": "8", "moe_tp_size": "8"}
INFERENCEMAX = {"silicon_data_source": "source_file=2026-04-06.csv; measured=2026"}


def read(tmp_path: Path, *rows: dict[str, str]) -> list[Run]:
    path = tmp_path / "agg.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(DENSE))
        writer.writeheader()
        writer.writerows(rows)
    return read_silicon(path)


def one(tmp_path: Path, row: dict[str, str], **changes: Any) -> MeasuredRun:
    (run,) = read(tmp_path, row | {key: str(value) for key, value in changes.items()})
    assert isinstance(run, MeasuredRun), run
    return run


def refused(tmp_path: Path, row: dict[str, str], **changes: Any) -> tuple[str, str]:
    (run,) = read(tmp_path, row | {key: str(value) for key, value in changes.items()})
    assert isinstance(run, UnusableRun), run
    return run.reason, run.detail


def test_a_row_becomes_a_closed_loop(tmp_path: Path) -> None:
    run = one(tmp_path, DENSE)
    assert run.measured == {"ttft_mean": 0.2505, "tpot_mean": 0.01225}
    assert (run.plan, run.cluster, run.engine) == ("attn(tp4) ffn(tp4) fp8 kv=bf16", "8xh100-sxm", "vllm")
    assert run.trace.concurrency == 16
    assert len(run.trace) == 16 * REQUESTS_PER_CLIENT
    assert set(run.trace.prompt.tolist()) == {1024}
    assert set(run.trace.output.tolist()) == {128}
    assert run.settings.max_model_len >= 1024 + 128
    assert run.origin.endswith("agg.csv: line 2")
    assert all("KV cache" in text or "requests per client" in text for text in run.assumptions)


def test_lengths_of_inferencemax_are_drawn_from_the_range_of_its_driver(tmp_path: Path) -> None:
    run = one(tmp_path, DENSE | INFERENCEMAX, batch_size=64)
    for lengths, most in ((run.trace.prompt, 1024), (run.trace.output, 128)):
        assert int(0.8 * most) <= lengths.min() < lengths.max() <= most
        assert lengths.mean() == pytest.approx(0.9 * most, rel=0.02)
    again = one(tmp_path, DENSE | INFERENCEMAX, batch_size=64)
    assert np.array_equal(run.trace.prompt, again.trace.prompt)


@pytest.mark.parametrize(
    ("degrees", "plan"),
    [
        ((8, 1, 8, 1), "attn(dp1,tp8) ffn(tp8,ep1)"),
        ((8, 1, 1, 8), "attn(dp1,tp8) ffn(tp1,ep8)"),
        ((1, 8, 1, 8), "attn(dp8,tp1) ffn(tp1,ep8)"),
        ((2, 4, 4, 2), "attn(dp4,tp2) ffn(tp4,ep2)"),
        ((8, "", 8, ""), "attn(dp1,tp8) ffn(tp8,ep1)"),
        ((8, 0, 8, 0), "attn(dp1,tp8) ffn(tp8,ep1)"),
    ],
)
def test_degrees_make_the_plan(tmp_path: Path, degrees: tuple[Any, ...], plan: str) -> None:
    names = ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    run = one(tmp_path, SPARSE, **dict(zip(names, degrees, strict=True)))
    assert run.plan.startswith(plan)
    assert run.trace.concurrency == 16 * int(degrees[1] or 1)  # the batch is that of one attention copy


@pytest.mark.parametrize(
    ("degrees", "plan"),
    [
        ((64, 1, 8, 8), "attn(dp1,tp8) ffn(tp1,ep8)"),
        ((16, 1, 4, 4), "attn(dp1,tp4) ffn(tp1,ep4)"),
        ((1, 64, 8, 8), "attn(dp8,tp1) ffn(tp1,ep8)"),
        ((1, 4, 2, 2), "attn(dp2,tp1) ffn(tp1,ep2)"),
        ((4, 4, 1, 16), "attn(dp1,tp4) ffn(tp1,ep4)"),
        ((8, 1, 1, 8), "attn(dp1,tp8) ffn(tp1,ep8)"),
        ((8, 1, 8, 1), "attn(dp1,tp8) ffn(tp8,ep1)"),
        ((1, 4, 4, 1), "attn(dp4,tp1) ffn(tp4,ep1)"),
    ],
)
def test_multiplied_degrees_of_inferencemax_are_taken_apart(
    tmp_path: Path, degrees: tuple[int, ...], plan: str
) -> None:
    names = ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    run = one(tmp_path, SPARSE | INFERENCEMAX, batch_size=2, **dict(zip(names, degrees, strict=True)))
    assert run.plan.startswith(plan)
    assert run.cluster == "8xh100-sxm"
    assert run.trace.concurrency == 2 * degrees[1]


@pytest.mark.data
def test_rows_with_the_same_measurement_are_the_same_deployment(shared: Path) -> None:
    path = shared / "measured" / "silicon" / "agg_dev.csv"
    same: dict[tuple[float, ...], list[MeasuredRun]] = {}
    for run in read_silicon(path):
        if isinstance(run, MeasuredRun):
            same.setdefault(tuple(run.measured.values()), []).append(run)
    twice = [runs for runs in same.values() if len(runs) > 1]
    assert len(twice) > 100
    for runs in twice:
        assert len({run.plan for run in runs}) == 1, runs[0].name
        assert len({run.trace.concurrency for run in runs}) == 1, runs[0].name


@pytest.mark.parametrize(
    ("row", "changes", "words"),
    [
        (DENSE, {"gemm_quant_mode": ""}, "bf16 kv=bf16"),
        (DENSE, {"gemm_quant_mode": "fp8_block"}, "fp8 kv=bf16"),
        (DENSE, {"gemm_quant_mode": "nvfp4", "moe_quant_mode": "junk"}, "nvfp4 kv=bf16"),  # no experts
        (DENSE, {"gemm_quant_mode": "int4_wo"}, "w4a16 kv=bf16"),
        (DENSE, {"backend": "trtllm"}, "fp8 kv=fp8"),
        (DENSE, {"backend": "trtllm", "gemm_quant_mode": ""}, "bf16 kv=bf16"),
        (DENSE | INFERENCEMAX, {}, "fp8 kv=fp8"),
        (DENSE | INFERENCEMAX, {"backend": "sglang", "system": "b200_sxm"}, "fp8 kv=fp8"),
        (DENSE, {"model_path": "openai/gpt-oss-120b", "gemm_quant_mode": "nvfp4", "moe_quant_mode": "nvfp4"}, "mxfp4"),
    ],
)
def test_formats_follow_the_tables(tmp_path: Path, row: dict[str, str], changes: dict[str, str], words: str) -> None:
    plan = one(tmp_path, row, **changes).plan
    assert words in plan


@pytest.mark.parametrize("backend", ["sglang", "trtllm"])
def test_a_deployment_tuned_to_its_prompts_takes_one_of_them_beside_the_sequences_that_decode(
    tmp_path: Path, backend: str
) -> None:
    for prompt in (128, 4096):
        run = one(tmp_path, DENSE, backend=backend, isl=prompt)
        assert run.settings.max_num_batched_tokens == prompt + BESIDE_A_PROMPT
        assert any(f"batches of up to {prompt + BESIDE_A_PROMPT} tokens" in text for text in run.assumptions)
    copies = one(tmp_path, SPARSE, backend=backend, tp_size=1, attention_dp_size=8)
    assert copies.settings.max_num_batched_tokens == 8 * (1024 + BESIDE_A_PROMPT)
    for given in (one(tmp_path, DENSE), one(tmp_path, DENSE | INFERENCEMAX, backend=backend)):
        assert given.settings.max_num_batched_tokens >= 8192  # as its scripts or its defaults say


def test_only_sglang_of_inferencemax_on_blackwell_looks_for_requests_now_and_then(tmp_path: Path) -> None:
    polling = DENSE | INFERENCEMAX | {"backend": "sglang", "system": "b200_sxm"}
    few, many = INFERENCEMAX_POLLS
    for clients, polls in ((1, few), (15, few), (16, many), (256, many)):
        run = one(tmp_path, polling, batch_size=clients)
        assert run.poll_every == polls
        assert f"new requests are looked for every {polls} batches" in run.assumptions
    for row in (
        polling | {"system": "h200_sxm"},
        polling | {"backend": "trtllm"},
        polling | {"silicon_data_source": "x"},
    ):
        run = one(tmp_path, row)
        assert run.poll_every == 1
        assert not any("looked for" in text for text in run.assumptions)


@pytest.mark.parametrize(
    ("changes", "cluster"),
    [
        ({"system": "b200_sxm"}, "8xb200-sxm"),
        ({"system": "gb200", "tp_size": 16, "moe_tp_size": 16}, "72xgb200"),
        ({"tp_size": 16, "moe_tp_size": 16}, "2x8xh100-sxm"),
    ],
)
def test_systems_are_whole_nodes(tmp_path: Path, changes: dict[str, Any], cluster: str) -> None:
    assert one(tmp_path, SPARSE, **changes).cluster == cluster


@pytest.mark.parametrize(
    ("row", "changes", "reason"),
    [
        (DENSE, {"silicon_ttft_ms": "", "silicon_tpot_ms": "0"}, "nothing measured"),
        (DENSE, {"model_path": "acme/unheard-of"}, "model not described"),
        (DENSE, {"backend": "tgi"}, "engine not described"),
        (DENSE, {"system": "mi300x"}, "GPU not in the catalogue"),
        (DENSE, {"gemm_quant_mode": "int3"}, "number formats not described"),
        (SPARSE, {"moe_quant_mode": "nvfp4"}, "number formats not described"),
        (SPARSE, {"moe_ep_size": 2}, "plan is contradictory"),
        (DENSE, {"attention_dp_size": 2}, "plan is contradictory"),
        (DENSE, {"tp_size": 0}, "row is incomplete"),
        (DENSE, {"isl": ""}, "row is incomplete"),
        (DENSE, {"batch_size": 99999999}, "row is incomplete"),
        (SPARSE | INFERENCEMAX, {"tp_size": 36, "moe_tp_size": 36}, "prefill and decode pools added up"),
    ],
)
def test_a_row_that_cannot_be_simulated_says_why(
    tmp_path: Path, row: dict[str, str], changes: dict[str, Any], reason: str
) -> None:
    found, detail = refused(tmp_path, row, **changes)
    assert found == reason
    assert detail


def test_one_of_the_two_figures_is_enough(tmp_path: Path) -> None:
    assert one(tmp_path, DENSE, silicon_ttft_ms="").measured == {"tpot_mean": 0.01225}


@pytest.mark.parametrize("column", ["silicon_ttft_ms", "isl", "tp_size"])
@pytest.mark.parametrize("text", ["-5", "nan", "x"])
def test_a_figure_that_is_none_is_an_error_with_its_line(tmp_path: Path, column: str, text: str) -> None:
    with pytest.raises(InputError, match=rf"agg\.csv: line 3: {column} "):
        read(tmp_path, DENSE, DENSE | {column: text})


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "agg.csv"
    path.write_text("id,backend\nx,vllm\n")
    with pytest.raises(InputError, match="missing column model_path, system"):
        read_silicon(path)
    assert set(NEEDED) <= set(DENSE)
