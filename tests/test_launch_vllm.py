"""Plans in vLLM's words: typical ones, those it has no words for, and its own parser on all of them."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launch_cases import CHECKPOINT, DENSE, MOE, PLANS, asked, emitted, has, placed, servers, value

import apex_opt
from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.ir import load_model
from apex_opt.ir.scheme import Scheme
from apex_opt.launch import launch
from apex_opt.plans.memory import kv_blocks, stage_memory
from apex_opt.plans.plan import parse_plan
from apex_opt.plans.speculation import Speculation, parse_drafter
from apex_opt.units import GIB

MODELS = Path(__file__).parent / "cases" / "models"


def test_tensor_shards_on_one_node() -> None:
    (command,) = emitted("vllm", DENSE, "tp8", 1, 8).commands
    assert command.env == (("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7"),)
    assert " ".join(command.argv) == (
        f"vllm serve {CHECKPOINT} --tensor-parallel-size 8 --pipeline-parallel-size 1 --dtype bfloat16 "
        "--kv-cache-dtype auto --max-num-seqs 1024 --max-num-batched-tokens 8192 --max-model-len 8192 --block-size 16 "
        "--gpu-memory-utilization 0.9 --enable-chunked-prefill --no-enable-prefix-caching --async-scheduling "
        "--distributed-executor-backend mp --port 8000"
    )


def test_stages_of_two_replicas_on_two_nodes() -> None:
    found = emitted("vllm", DENSE, "dp2 pp2[41,39] tp2", 2, 4)
    assert [(command.node, command.replica) for command in found.commands] == [(0, 0), (1, 1)]
    for command in found.commands:
        assert dict(command.env) == {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "VLLM_PP_LAYER_PARTITION": "41,39"}
        assert value(command, "--pipeline-parallel-size") == "2"
        assert "--no-async-scheduling" in command.argv
        assert "--nnodes" not in command.argv


def test_one_replica_over_two_nodes() -> None:
    head, other = emitted("vllm", DENSE, "pp2[41,39] tp4", 2, 4).commands
    joined = ("--nnodes", "2", "--node-rank", "0", "--master-addr", "NODE0", "--master-port", "29501")
    assert head.argv[-8:] == joined
    assert other.argv[-9:] == (*joined[:3], "1", *joined[4:], "--headless")


def test_engines_that_share_their_first_node_join_at_other_ports() -> None:
    found = emitted("vllm", DENSE, "dp4 tp2", 8, 1)
    heads = [value(command, "--master-addr") for command in found.commands]
    assert heads == ["NODE0", "NODE0", "NODE2", "NODE2", "NODE4", "NODE4", "NODE6", "NODE6"]
    crowded = emitted("vllm", DENSE, "dp2 tp3", 3, 2).commands
    ports = {(c.replica, value(c, "--master-addr"), value(c, "--master-port")) for c in crowded}
    assert len(ports) == 2
    assert len({(head, port) for _, head, port in ports}) == 2


@pytest.mark.parametrize(
    ("plan", "nodes", "gpus", "hosts"),
    [
        ("pp5 tp1", 2, 3, [(0, "0"), (0, "1"), (0, "2"), (1, "0"), (1, "1")]),
        ("pp2 tp3", 2, 4, [(0, "0,1,2"), (1, "0,1,2")]),
    ],
)
def test_ranks_that_lie_unevenly_are_started_in_equal_shares(
    plan: str, nodes: int, gpus: int, hosts: list[tuple[int, str]]
) -> None:
    found = emitted("vllm", DENSE, plan, nodes, gpus)
    assert [(c.node, dict(c.env)["CUDA_VISIBLE_DEVICES"]) for c in found.commands] == hosts
    assert [value(c, "--node-rank") for c in found.commands] == [str(rank) for rank in range(len(hosts))]
    assert {value(c, "--nnodes") for c in found.commands} == {str(len(hosts))}


@pytest.mark.parametrize("heads", [16, 0])
def test_a_tower_that_reads_images_is_left_out_as_it_is_of_the_plan(heads: int) -> None:
    model = replace(load_model(DENSE), tower_heads=heads)
    found = emitted("vllm", model, "tp4", 1, 4)
    (command,) = found.commands
    assert "--language-model-only" in command.argv
    assert has(found, "images: --language-model-only")
    plain = emitted("vllm", DENSE, "tp4", 1, 4)
    assert "--language-model-only" not in plain.commands[0].argv and not has(plain, "images")


def test_a_tower_that_the_plan_serves_is_not_left_out() -> None:
    model = replace(load_model(str(MODELS / "qwen2.5-vl-7b.json")), images=(300.0, 0.5))
    found = emitted("vllm", model, "tp4", 1, 4)
    assert "--language-model-only" not in found.commands[0].argv and not has(found, "images")


def test_encoders_are_run_as_what_they_answer_with() -> None:
    found = emitted("vllm", load_model(str(MODELS / "bert-large-uncased.json")), "tp1", 1, 1)
    assert value(found.commands[0], "--runner") == "pooling"
    whisper = emitted("vllm", load_model(str(MODELS / "whisper-large-v3.json")), "tp4", 1, 4)
    assert "--runner" not in whisper.commands[0].argv


def test_a_deprecated_method_of_quantisation_is_allowed_by_name() -> None:
    model = replace(load_model(DENSE), weight_format="fp8", scheme=Scheme(method="fbgemm_fp8"))
    assert "--allow-deprecated-quantization" in emitted("vllm", model, "tp8 fp8", 1, 8).commands[0].argv
    assert "--allow-deprecated-quantization" not in emitted("vllm", model, "tp8 bf16", 1, 8).commands[0].argv


@pytest.mark.parametrize("gib", [20.5, 21.0, 24.0, 80.0])
def test_the_length_is_one_whose_cache_the_plan_holds_with_a_little_to_spare(gib: float) -> None:
    problem = asked("llama-3.1-8b", 1, 1, gpu={"memory_bytes": int(gib * GIB)})
    plan = parse_plan("tp1", problem.model)
    found = launch(problem, plan, "vllm", CHECKPOINT, placed(problem, plan))
    stage, *_ = memory = stage_memory(problem.model, problem.cluster.gpu, plan, problem.settings)
    told = int(value(found.commands[0], "--max-model-len") or 0)
    size, longest = problem.settings.block_size, problem.instance().longest_tokens
    assert min(longest, 8192) <= told <= min(kv_blocks(memory) * size, 8192)
    if longest < told < 8192:
        assert (stage.kv_blocks - told // size) * stage.kv_block_bytes >= 0.01 * problem.cluster.gpu.memory_bytes
    assert has(found, "what the KV cache of the plan holds") == (told < 8192)


def test_attention_copies_with_experts_over_all_of_them() -> None:
    found = emitted("vllm", MOE, "attn(dp8) ffn(ep8) seqs=100 tokens=2000", 1, 8)
    (command,) = found.commands
    assert value(command, "--tensor-parallel-size") == "1"
    assert value(command, "--data-parallel-size") == "8"
    assert "--enable-expert-parallel" in command.argv
    assert value(command, "--max-num-seqs") == "100"
    assert value(command, "--max-num-batched-tokens") == "2000"
    assert has(found, "per attention copy")


def test_experts_in_shards_need_no_flag() -> None:
    (command,) = emitted("vllm", MOE, "attn(dp2,tp4) ffn(tp8)", 1, 8).commands
    assert "--enable-expert-parallel" not in command.argv


def test_gpus_are_listed_copy_by_copy_where_copies_have_stages() -> None:
    (command,) = emitted("vllm", MOE, "pp2 attn(dp2,tp2) ffn(ep4)", 1, 8).commands
    assert dict(command.env)["CUDA_VISIBLE_DEVICES"] == "0,1,4,5,2,3,6,7"


def test_settings_have_their_flags() -> None:
    settings: dict[str, Any] = {
        "chunked_prefill": False,
        "prefix_caching": True,
        "async_scheduling": False,
        "block_size": 32,
        "gpu_memory_utilization": 0.85,
        "scheduler": VllmScheduling(long_prefill_token_threshold=512),
    }
    (command,) = emitted("vllm", DENSE, "tp8 fp16 kv=fp8", 1, 8, settings=settings).commands
    assert {"--no-enable-chunked-prefill", "--enable-prefix-caching", "--no-async-scheduling"} <= set(command.argv)
    assert value(command, "--block-size") == "32"
    assert value(command, "--gpu-memory-utilization") == "0.85"
    assert value(command, "--long-prefill-token-threshold") == "512"
    assert value(command, "--dtype") == "float16"
    assert value(command, "--kv-cache-dtype") == "fp8"


@pytest.mark.parametrize("settings", [{"chunked_prefill": False}, {}])
def test_an_attention_copy_takes_the_longest_prompt_where_it_must_whole(settings: dict[str, Any]) -> None:
    (command,) = emitted("vllm", MOE, "attn(dp8) ffn(ep8)", 1, 8, settings=settings).commands
    assert value(command, "--max-num-batched-tokens") == "8192"


def test_limits_of_the_plan_come_before_those_of_the_engine() -> None:
    (command,) = emitted("vllm", DENSE, "tp8 seqs=64 tokens=2048", 1, 8).commands
    assert value(command, "--max-num-seqs") == "64"
    assert value(command, "--max-num-batched-tokens") == "2048"


@pytest.mark.parametrize(
    ("model", "plan", "nodes", "gpus", "why"),
    [
        (DENSE, "attn(dp2,tp4) ffn(tp8)", 1, 8, "dense FFN"),
        (MOE, "attn(tp8) ffn(tp2,ep4)", 1, 8, "either by ep or by tp"),
        (MOE, "attn(dp2,tp4) ffn(dp2,tp4)", 1, 8, "over all attention copies"),
        (MOE, "attn(tp8) ffn(dp2,tp4)", 1, 8, "no copies of the FFN"),
        (MOE, "pp2 attn(dp2,tp2) ffn(ep4)", 2, 4, ""),
        (MOE, "attn(dp4,tp2) ffn(ep8)", 2, 4, ""),
        (MOE, "attn(dp2,tp2) ffn(ep4)", 3, 2, ""),
    ],
)
def test_what_it_has_no_words_for_gets_a_reason_and_no_command(
    model: str, plan: str, nodes: int, gpus: int, why: str
) -> None:
    found = emitted("vllm", model, plan, nodes, gpus)
    assert bool(found.commands) == (not why)
    assert not why or has(found, why)


def test_its_own_parser_takes_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed: its own parser cannot judge the commands")
    platform = importlib.import_module("vllm.platforms").current_platform
    if not platform.device_type:  # without a GPU vLLM does not even list its options
        monkeypatch.setattr(platform, "device_type", "cuda", raising=False)
    parsing = importlib.import_module("vllm.utils.argparse_utils")
    parser = importlib.import_module("vllm.entrypoints.openai.cli_args").make_arg_parser(
        parsing.FlexibleArgumentParser()
    )
    commands = [command for plan in PLANS for command in servers(emitted("vllm", *plan))]
    assert len(commands) >= len(PLANS) - 2
    for command in commands:
        read = parser.parse_args(list(command.argv[2:]))
        assert str(read.tensor_parallel_size) == value(command, "--tensor-parallel-size")
        assert read.enable_expert_parallel == ("--enable-expert-parallel" in command.argv)
        assert read.async_scheduling == ("--async-scheduling" in command.argv)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("eagle:3", {"method": "eagle3", "model": "EAGLE3_HEAD", "num_speculative_tokens": 3}),
        ("mtp:1", {"method": "mtp", "num_speculative_tokens": 1}),
        ("ngram:5", {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 5}),
        (
            "draft:llama-3.1-8b:4",
            {"method": "draft_model", "model": "meta-llama/Llama-3.1-8B", "num_speculative_tokens": 4},
        ),
    ],
)
def test_drafts_are_asked_for_as_json(text: str, said: dict[str, Any]) -> None:
    drafter = parse_drafter(text)
    known = Speculation(method=drafter.method, draft_tokens=drafter.draft_tokens, model=drafter.model, accepted=((1,),))
    found = emitted("vllm", DENSE, f"tp8 spec={text}", 1, 8, settings={"drafting": (known,)})
    (command,) = found.commands
    assert json.loads(value(command, "--speculative-config")) == said
    assert ("--async-scheduling" in command.argv) is not text.startswith("ngram")
    assert any("EAGLE3_HEAD" in note for note in found.notes) is text.startswith("eagle")


def test_pools_that_hand_over_have_the_connector_and_a_proxy_that_knows_every_server() -> None:
    answer = apex_opt.simulate(
        plan="prefill{dp2 tp1 bf16} + decode{tp2 bf16}",
        model="llama-3.1-8b",
        cluster="4xh100-sxm",
        trace="poisson:rate=2,n=20,prompt=100,output=8",
        emit=True,
    )
    *servers_, proxy = answer.to_dict()["launch"]["commands"]
    gpus = [server["env"]["CUDA_VISIBLE_DEVICES"] for server in servers_]
    assert sorted(",".join(gpus)) == sorted("0,1,2,3")
    assert len({server["env"]["VLLM_NIXL_SIDE_CHANNEL_PORT"] for server in servers_}) == 3
    listening = [server["argv"][server["argv"].index("--port") + 1] for server in servers_]
    assert len(set(listening)) == 3
    for server in servers_:
        config = json.loads(server["argv"][server["argv"].index("--kv-transfer-config") + 1])
        assert config == {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    words = proxy["argv"]
    prefill, decode = (words[words.index(f"--{kind}-ports") + 1 :] for kind in ("prefiller", "decoder"))
    assert prefill[:2] + decode[:1] == listening


def test_pools_over_several_nodes_say_once_what_stands_for_their_addresses() -> None:
    answer = apex_opt.simulate(
        plan="prefill{attn(tp16) ffn(ep16)} + decode{attn(tp16) ffn(ep16)}",
        model="deepseek-v3",
        cluster="4x8xh200-sxm",
        trace="static:n=2,prompt=64,output=2",
        emit=True,
    )
    (note,) = [note for note in answer.to_dict()["launch"]["notes"] if note.startswith("NODE0")]
    assert note.endswith("a replica runs once all its commands do")


def test_two_batches_take_the_kernels_of_deepep() -> None:
    found = emitted("vllm", MOE, "attn(dp8) ffn(ep8) overlap=two_batches", 1, 8)
    (command,) = found.commands
    assert "--enable-dbo" in command.argv and value(command, "--all2all-backend") == "deepep_high_throughput"
    assert any("runs from no CUDA graph" in note for note in found.notes)
    (plain,) = emitted("vllm", MOE, "attn(dp8) ffn(ep8)", 1, 8).commands
    assert "--enable-dbo" not in plain.argv and "--all2all-backend" not in plain.argv
