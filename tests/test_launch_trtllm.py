"""Plans in TensorRT-LLM's words."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import pytest
from launch_cases import CHECKPOINT, DENSE, MOE, emitted, has, value

from apex_opt.engines.schedulers import TrtllmScheduling
from apex_opt.plans.speculation import Speculation, parse_drafter

if TYPE_CHECKING:
    from apex_opt.launch import Command


def options(command: Command) -> dict[str, Any]:
    """The options file of a command."""
    assert command.file is not None
    found: dict[str, Any] = json.loads(command.file[1])
    return found


def test_tensor_shards_on_one_node() -> None:
    (command,) = emitted("trtllm", DENSE, "tp8", 1, 8).commands
    assert command.env == (("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7"),)
    assert " ".join(command.argv).startswith(
        f"trtllm-serve {CHECKPOINT} --backend pytorch --tp_size 8 --pp_size 1 --max_batch_size 1024 "
        "--max_num_tokens 8192 --max_seq_len 8192 --kv_cache_free_gpu_memory_fraction 0."
    )
    assert value(command, "--extra_llm_api_options") == "trtllm-replica0.yaml"
    assert options(command)["kv_cache_config"] == {
        "dtype": "auto",
        "enable_block_reuse": False,
        "tokens_per_block": 16,
    }


def test_a_line_for_a_shell_writes_the_options_file_before_it_starts_the_server() -> None:
    (command,) = emitted("trtllm", DENSE, "tp8", 1, 8).commands
    words = shlex.split(command.text)
    assert words[0] == "echo"
    assert json.loads(words[1]) == options(command)
    assert words[2:5] == [">", "trtllm-replica0.yaml", "&&"]


@pytest.mark.parametrize(
    ("drafter", "expected"),
    [
        ("mtp:2", {"decoding_type": "MTP", "num_nextn_predict_layers": 2}),
        ("eagle:3", {"decoding_type": "Eagle", "max_draft_len": 3, "speculative_model_dir": "EAGLE3_HEAD"}),
        ("ngram:4", {"decoding_type": "NGram", "max_draft_len": 4, "max_matching_ngram_size": 4}),
        (
            "draft:llama-3.1-8b:3",
            {"decoding_type": "DraftTarget", "max_draft_len": 3, "speculative_model_dir": "meta-llama/Llama-3.1-8B"},
        ),
    ],
)
def test_drafts_are_asked_for_in_the_options_file(drafter: str, expected: dict[str, Any]) -> None:
    its = parse_drafter(drafter)
    assert its is not None
    drafting = Speculation(method=its.method, draft_tokens=its.draft_tokens, model=its.model, accepted=((1,),))
    emission = emitted("trtllm", DENSE, f"tp8 spec={drafter}", 1, 8, settings={"drafting": (drafting,)})
    (command,) = emission.commands
    assert options(command)["speculative_config"] == expected
    assert has(emission, "put the EAGLE-3 head") == ("eagle" in drafter)


def test_attention_is_cut_or_has_a_copy_on_every_gpu() -> None:
    (command,) = emitted("trtllm", MOE, "attn(dp8) ffn(ep8) seqs=100 tokens=2000", 1, 8).commands
    assert options(command)["enable_attention_dp"] is True
    assert (value(command, "--tp_size"), value(command, "--ep_size")) == ("8", "8")
    # As TensorRT-LLM takes them, of each rank, which is how it was simulated.
    assert (value(command, "--max_batch_size"), value(command, "--max_num_tokens")) == ("100", "2000")
    assert has(emitted("trtllm", MOE, "attn(dp2,tp4) ffn(ep8)", 1, 8), "or has a copy on each")
    assert has(emitted("trtllm", DENSE, "attn(dp8) ffn(tp8)", 1, 8), "no attention copies before one dense FFN")


def test_experts_may_be_cut_both_ways() -> None:
    (command,) = emitted("trtllm", MOE, "attn(tp8) ffn(tp2,ep4)", 1, 8).commands
    assert (value(command, "--tp_size"), value(command, "--ep_size")) == ("8", "4")


def test_layers_that_differ_are_told() -> None:
    (command,) = emitted("trtllm", DENSE, "pp2[41,39] tp2 kv=fp8", 1, 4).commands
    assert options(command)["pp_partition"] == [41, 39]
    assert options(command)["kv_cache_config"]["dtype"] == "fp8"
    assert "pp_partition" not in options(emitted("trtllm", DENSE, "pp2 tp2", 1, 4).commands[0])


def test_several_nodes_are_one_mpirun_with_equally_many_ranks_on_each() -> None:
    (command,) = emitted("trtllm", DENSE, "pp2 tp4", 2, 4).commands
    assert command.argv[:8] == (
        "mpirun", "-n", "4", "-host", "NODE0:4", "-x", "CUDA_VISIBLE_DEVICES=0,1,2,3", "trtllm-llmapi-launch",
    )  # fmt: skip
    assert command.argv.count(":") == 1
    assert has(emitted("trtllm", DENSE, "pp2 tp4", 2, 4), "mpirun")


@pytest.mark.parametrize(("capability", "fits"), [(8.0, False), (9.0, True)])
def test_fp8_needs_a_gpu_that_computes_in_it(capability: float, fits: bool) -> None:
    found = emitted("trtllm", DENSE, "tp8 fp8", 1, 8, gpu={"capability": capability})
    assert bool(found.commands) == fits
    assert fits or has(found, "compute capability from 8.9")
    assert not fits or has(found, "needs a checkpoint in this format")


def test_blocks_are_reused_whole_and_states_kept_as_they_are_simulated() -> None:
    forced = TrtllmScheduling(context_chunking_policy="FORCE_CHUNK", snapshot_interval=64)
    for own, more in ((None, {}), (forced, {"mamba_state_config": {"periodic_snapshot_interval": 64}})):
        settings = {"prefix_caching": True, **({"scheduler": own} if own else {})}
        emission = emitted("trtllm", DENSE, "tp8", 1, 8, settings=settings)
        expected = {"dtype": "auto", "enable_block_reuse": True, "enable_partial_reuse": False, "tokens_per_block": 16}
        assert options(emission.commands[0])["kv_cache_config"] == {**expected, **more}
        assert has(emission, "whole blocks alone are simulated as reused")


def test_settings_of_its_scheduler_are_told_and_whole_prompts_fit_a_copy() -> None:
    policies = {"capacity_policy": "MAX_UTILIZATION", "context_chunking_policy": "EQUAL_PROGRESS"}
    own = TrtllmScheduling(**policies, batch_wait_timeout_iters=3)
    settings = {"scheduler": own, "chunked_prefill": False, "max_num_batched_tokens": 4096}
    (command,) = emitted("trtllm", MOE, "attn(dp8) ffn(ep8)", 1, 8, settings=settings).commands
    assert command.file is not None
    options = json.loads(command.file[1])
    assert options["scheduler_config"] == {
        "capacity_scheduler_policy": "MAX_UTILIZATION",
        "context_chunking_policy": "EQUAL_PROGRESS",
    }
    assert (options["batch_wait_timeout_iters"], options["batch_wait_max_tokens_ratio"]) == (3, 0.0)
    assert value(command, "--max_num_tokens") == "4096"
