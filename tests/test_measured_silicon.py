"""Closed-loop means: what a row says becomes a run, what it leaves open a stated assumption, what clashes a reason."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from apex_opt.engines.schedulers import SglangScheduling, TrtllmScheduling
from apex_opt.errors import InputError
from apex_opt.measured.runs import MeasuredRun, UnusableRun
from apex_opt.measured.silicon import NEEDED, read_silicon

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.measured.runs import Run

DENSE = {
    "id": "row",
    "backend": "vllm",
    "backend_version": "0.19.0",
    "model_path": "meta-llama/Llama-3.1-70B",
    "precision": "",
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
INFERENCEX = {"silicon_data_source": "source_file=2026-04-06.csv; measured=2025-10-05T00:00:00.000Z; wip=False"}
LLAMA_FP8 = DENSE | INFERENCEX | {"precision": "fp8", "osl": "1024", "system": "h200_sxm"}
"""A row of the family llama70b-fp8-h200-vllm."""


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
    assert len(run.trace) == 16 * 10
    assert set(run.trace.prompt.tolist()) == {1024}
    assert set(run.trace.output.tolist()) == {128}
    assert run.settings.max_model_len >= 1024 + 128
    assert run.origin.endswith("agg.csv: line 2")
    assert run.assumptions[0] == "deployment: the engine's defaults"
    assert any("KV cache" in text for text in run.assumptions)


@pytest.mark.parametrize(("told", "clients"), [(448, 32), (32, 32), (16, 16)])
def test_clients_of_the_source_are_those_of_one_instance_at_most(tmp_path: Path, told: int, clients: int) -> None:
    source = {"silicon_data_source": f"source_file=a.csv; silicon_concurrency={told}"}
    degrees = {"tp_size": 4, "attention_dp_size": 2, "moe_tp_size": 8}
    assert one(tmp_path, SPARSE | source, **degrees).trace.concurrency == clients


def test_lengths_of_inferencex_are_those_that_its_client_draws(tmp_path: Path) -> None:
    run = one(tmp_path, DENSE | INFERENCEX, batch_size=64)
    random = np.random.RandomState(0)
    assert np.array_equal(run.trace.prompt, random.randint(819, 1025, 640))
    assert np.array_equal(run.trace.output, random.randint(102, 129, 640))


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
def test_multiplied_degrees_of_inferencex_are_taken_apart(tmp_path: Path, degrees: tuple[int, ...], plan: str) -> None:
    names = ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    run = one(tmp_path, SPARSE | INFERENCEX, batch_size=2, **dict(zip(names, degrees, strict=True)))
    assert run.plan.startswith(plan)
    assert run.cluster == "8xh100-sxm"
    assert run.trace.concurrency == 2 * degrees[1]


def test_a_measurement_in_several_rows_is_one_run(tmp_path: Path) -> None:
    exact = DENSE | {"silicon_ttft_ms": "250.4938", "silicon_tpot_ms": "12.2302"}
    rounded = {"id": "again", "silicon_ttft_ms": "250.49", "silicon_tpot_ms": "12.23"}
    (run,) = read(tmp_path, exact, DENSE | rounded)
    assert (run.name, run.rows) == ("row", 2)
    odd = rounded | {"model_path": "acme/unheard-of"}
    assert [run.name for run in read(tmp_path, DENSE | odd, exact)] == ["row"]  # the one that can be simulated tells
    assert len(read(tmp_path, exact, exact | {"silicon_ttft_ms": "260"})) == 2
    assert len(read(tmp_path, exact, DENSE | rounded | {"system": "b200_sxm"})) == 2


@pytest.mark.data
def test_the_rows_at_hand_are_so_many_measurements(shared: Path) -> None:
    runs = read_silicon(shared / "measured" / "silicon" / "agg_dev.csv")
    assert (len(runs), sum(run.rows for run in runs)) == (1572, 2021)
    aside = [run for run in runs if isinstance(run, UnusableRun) and run.aside]
    assert {run.reason for run in aside} == {
        "set aside: pools",
        "set aside: outlier",
    }
    drafting = [run.engine for run in runs if isinstance(run, MeasuredRun) and run.drafts]
    assert {engine: drafting.count(engine) for engine in drafting} == {
        "trtllm-1.1": 31,
        "trtllm-1.2": 47,
        "sglang-0.5.9-drafts": 45,
    }
    sides = [run.judged for run in runs if isinstance(run, MeasuredRun)]
    assert 0.3 < sum(sides) / len(sides) < 0.7


def test_loads_and_releases_of_a_deployment_are_on_one_side(tmp_path: Path) -> None:
    of_all = {
        one(tmp_path, DENSE, batch_size=clients, backend_version=release).sweep
        for clients in (1, 16, 256)
        for release in ("0.11.0", "0.19.0")
    }
    assert len(of_all) == 1
    assert one(tmp_path, DENSE, isl=2048).sweep not in of_all
    assert one(tmp_path, DENSE, tp_size=2, moe_tp_size=2).sweep not in of_all


@pytest.mark.parametrize(
    ("row", "changes", "words"),
    [
        (DENSE, {"gemm_quant_mode": ""}, "bf16 kv=bf16"),
        (DENSE, {"gemm_quant_mode": "fp8_block"}, "fp8 kv=bf16"),
        (DENSE, {"gemm_quant_mode": "nvfp4", "moe_quant_mode": "junk"}, "nvfp4 kv=bf16"),  # no experts
        (DENSE, {"gemm_quant_mode": "int4_wo"}, "w4a16 kv=bf16"),
        (DENSE, {"backend": "trtllm"}, "fp8 kv=bf16"),
        (DENSE, {"backend": "trtllm", "gemm_quant_mode": ""}, "bf16 kv=bf16"),
        (LLAMA_FP8, {}, "fp8 kv=fp8"),
        (DENSE, {"model_path": "openai/gpt-oss-120b", "gemm_quant_mode": "nvfp4", "moe_quant_mode": "nvfp4"}, "mxfp4"),
    ],
)
def test_formats_follow_the_tables(tmp_path: Path, row: dict[str, str], changes: dict[str, str], words: str) -> None:
    plan = one(tmp_path, row, **changes).plan
    assert words in plan


def test_a_row_is_started_as_its_family_says(tmp_path: Path) -> None:
    run = one(tmp_path, LLAMA_FP8, backend_version="")
    assert run.assumptions[0] == "deployment: llama70b-fp8-h200-vllm, script"
    assert run.engine == "vllm-0.12"
    assert run.settings.max_num_seqs == 16  # as many as clients
    waits = {"backend": "trtllm", "batch_size": "64", "backend_version": ""}
    waiting, prompt_after_prompt = one(tmp_path, LLAMA_FP8 | waits), one(tmp_path, LLAMA_FP8 | waits, osl=8192)
    for found, turns in ((waiting, 20), (prompt_after_prompt, 0)):
        scheduler = found.settings.scheduler
        assert isinstance(scheduler, TrtllmScheduling)
        assert scheduler.batch_wait_timeout_iters == turns
        assert not found.settings.chunked_prefill
        assert found.share_of == "left"


@pytest.mark.parametrize(("copies", "drafter"), [(1, "mtp:3"), (8, "mtp:1")])
def test_drafts_that_are_told_in_full_are_made(tmp_path: Path, copies: int, drafter: str) -> None:
    (tmp_path / "deployments.csv").write_text(
        "family,engine,model,gpu,precision,date_from,date_to,isl,osl,tp,max_num_batched_tokens,speculative\n"
        'a,trtllm,deepseek-ai/DeepSeek-R1,,,,,,,,(K+1)*C+ISL,"MTP, 3 draft tokens (1 with attention DP)"\n'
        'b,sglang,deepseek-ai/DeepSeek-R1,,,,,,,,,"EAGLE/MTP, 2 steps, 8 draft tokens, top-k 4"\n'
        'd,trtllm,deepseek-ai/DeepSeek-R1,,,,,,,,,"MTP, 0 draft tokens"\n'
        'e,trtllm,deepseek-ai/DeepSeek-R1,,,,,,,,,"MTP, 4 draft tokens"\n'
    )
    (tmp_path / "families_x.csv").write_text("id,family\na,a\nb,b\nd,d\ne,e\n")
    (tmp_path / "set_aside_x.csv").write_text("id,reason,metric,detail\na,speculative,both,\nc,speculative,both,why\n")
    degrees = {"tp_size": 8 // copies, "attention_dp_size": copies, "moe_tp_size": 1, "moe_ep_size": 8}
    row = SPARSE | {"model_path": "deepseek-ai/DeepSeek-R1", "batch_size": 32 // copies, **degrees}
    engines = {"a": "trtllm", "b": "sglang", "c": "trtllm", "d": "trtllm", "e": "trtllm"}
    rows = [row | {"id": k, "backend": e, "silicon_ttft_ms": str(ord(k))} for k, e in engines.items()]
    drafts, *others = read(tmp_path, *rows)
    assert isinstance(drafts, MeasuredRun)
    assert drafts.drafts
    assert f" spec={drafter} " in drafts.plan
    assert drafts.settings.max_num_batched_tokens == (int(drafter[-1]) + 1) * 32 + int(SPARSE["isl"])
    assert not drafts.set_aside
    assert len(others) == 4
    for run in others:
        assert isinstance(run, UnusableRun)
        assert (run.aside, run.reason) == (True, "set aside: speculative")


@pytest.mark.parametrize(("image", "ahead"), [("sglang:v0.5.9-cu130", False), ("sglang:v0.5.12", True)])
def test_chains_of_sglang_are_made_without_forming_batches_ahead_up_to_a_release(
    tmp_path: Path, image: str, ahead: bool
) -> None:
    (tmp_path / "deployments.csv").write_text(
        "family,engine,model,gpu,precision,date_from,date_to,isl,osl,tp,max_num_seqs,image,speculative\n"
        f'b,sglang,deepseek-ai/DeepSeek-R1,,,,,,,,512,{image},"EAGLE/MTP, 2 steps, 3 draft tokens, top-k 1"\n'
    )
    (tmp_path / "families_x.csv").write_text("id,family\nb,b\n")
    degrees = {"tp_size": 8, "attention_dp_size": 1, "moe_tp_size": 1, "moe_ep_size": 8}
    row = SPARSE | {"model_path": "deepseek-ai/DeepSeek-R1", "batch_size": 32, "id": "b", "backend": "sglang"} | degrees
    (run,) = read(tmp_path, row)
    assert isinstance(run, MeasuredRun)
    assert " spec=mtp:2 " in run.plan
    assert run.settings.async_scheduling == ahead
    own = run.settings.scheduler
    assert isinstance(own, SglangScheduling)
    assert own.drafting_seats == 0  # a number was asked for


def test_drafts_of_a_model_without_layers_for_them_are_not_predicted(tmp_path: Path) -> None:
    (tmp_path / "deployments.csv").write_text(
        "family,engine,model,gpu,precision,date_from,date_to,isl,osl,tp,max_num_batched_tokens,speculative\n"
        'a,trtllm,meta-llama/Llama-3.1-70B,,,,,,,,,"MTP, 1 draft token"\n'
    )
    (tmp_path / "families_x.csv").write_text("id,family\nrow,a\n")
    (run,) = read(tmp_path, DENSE | {"backend": "trtllm"})
    assert isinstance(run, UnusableRun)
    assert (run.aside, run.reason) == (False, "drafts that the model cannot make")


def test_tables_beside_the_rows_come_first(tmp_path: Path) -> None:
    (tmp_path / "deployments.csv").write_text(
        "family,engine,model,gpu,precision,date_from,date_to,isl,osl,tp,max_num_batched_tokens,speculative\n"
        "plain,vllm,meta-llama/Llama-3.1-70B,h100_sxm,,,,,,,3*ISL,\n"
        "drafts,vllm,meta-llama/Llama-3.1-70B,h100_sxm,,,,,,,512,MTP\n"
    )
    names = {"plain": "plain", "drafts": "drafts", "cold": "plain", "broken": "plain", "moved": "plain"}
    (tmp_path / "families_x.csv").write_text("id,family\n" + "".join(f"{k},{v}\n" for k, v in names.items()))
    (tmp_path / "set_aside_x.csv").write_text(
        "id,reason,metric,detail\ncold,cold start,ttft,why\nbroken,outlier,both,\n"
    )
    (tmp_path / "relabel_x.csv").write_text("id,clients,tp,dp,moe_tp,moe_ep\nmoved,7,2,1,2,1\n")
    rows = [DENSE | {"id": name, "silicon_ttft_ms": str(k + 1)} for k, name in enumerate(names)]
    plain, drafts, cold, broken, moved = read(tmp_path, *rows)
    assert isinstance(plain, MeasuredRun)
    assert plain.settings.max_num_batched_tokens == 3 * 1024
    assert isinstance(drafts, UnusableRun)
    assert (drafts.aside, drafts.reason) == (True, "set aside: speculative")
    assert isinstance(cold, MeasuredRun)
    assert set(cold.set_aside) == {"ttft_mean"}
    assert isinstance(broken, UnusableRun)
    assert (broken.aside, broken.reason) == (True, "set aside: outlier")
    assert isinstance(moved, MeasuredRun)
    assert (moved.plan.split()[0], moved.trace.concurrency) == ("attn(tp2)", 7)


@pytest.mark.parametrize(
    ("backend", "release", "kind"),
    [
        ("vllm", "0.12.0", "vllm-0.12"),
        ("vllm", "0.14.1", "vllm"),
        ("vllm", "", "vllm"),
        ("trtllm", "1.0.0rc3", "trtllm-1.0"),
        ("trtllm", "1.1.0rc2.post2", "trtllm-1.1"),
        ("trtllm", "1.2.0rc6", "trtllm-1.2"),
        ("trtllm", "1.3.0rc5", "trtllm"),
        ("sglang", "0.5.6.post2", "sglang-0.5.9"),
        ("sglang", "0.5.9", "sglang-0.5.9"),
        ("sglang", "0.5.10.post1", "sglang"),
        ("sglang", "nightly-dev", "sglang"),
    ],
)
def test_releases_are_the_kinds_that_they_behave_as(tmp_path: Path, backend: str, release: str, kind: str) -> None:
    run = one(tmp_path, DENSE, backend=backend, backend_version=release)
    assert run.engine == kind
    assert run.settings.async_scheduling == (kind not in ("vllm-0.12", "trtllm-1.0"))
    assert run.settings.scheduler.name == backend


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
        (SPARSE | INFERENCEX, {"tp_size": 36, "moe_tp_size": 36}, "set aside: prefill and decode pools added up"),
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


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"batch_size": 32}, True),
        ({"batch_size": 16}, False),
        ({"batch_size": 128}, True),
        ({"osl": 8192, "batch_size": 32}, False),
        ({"osl": 8192, "batch_size": 64}, True),
    ],
)
def test_prompts_run_from_captured_pieces_at_the_loads_that_scripts_chose(
    tmp_path: Path, changes: dict[str, int], pieces: bool
) -> None:
    """`dsr1-fp4-b200-trt-mtp-2602`: at 32 and 64 clients, and at 128 without attention copies."""
    (tmp_path / "families_x.csv").write_text("id,family\nrow,dsr1-fp4-b200-trt-mtp-2602\n")
    ours = {"model_path": "deepseek-ai/DeepSeek-R1", "system": "b200_sxm", "gemm_quant_mode": "nvfp4"}
    row = SPARSE | INFERENCEX | ours | {"backend": "trtllm", "moe_quant_mode": "nvfp4", "osl": "1024"}
    run = one(tmp_path, row, **changes)
    largest = run.settings.max_num_batched_tokens
    assert (run.captured_tokens is not None and run.captured_tokens >= largest) if pieces else not run.captured_tokens
