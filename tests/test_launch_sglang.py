"""Plans in SGLang's words: typical ones, those it has no words for, and its own parser on all of them."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import replace

import pytest
from launch_cases import CHECKPOINT, DENSE, MOE, PLANS, asked, emitted, has, servers, value

from apex_opt.engines.schedulers import SglangScheduling, VllmScheduling
from apex_opt.launch import handing_over, launch
from apex_opt.launch.sglang import pd_router, unmatched
from apex_opt.plans.plan import parse_plan
from apex_opt.plans.speculation import Speculation, parse_drafter


def test_tensor_shards_on_one_node() -> None:
    (command,) = emitted("sglang", DENSE, "tp8", 1, 8).commands
    assert command.env == (("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7"),)
    share = value(command, "--mem-fraction-static")
    assert share is not None
    assert 0.7 < float(share) < 0.9
    assert " ".join(command.argv) == (
        f"python -m sglang.launch_server --model-path {CHECKPOINT} --tp-size 8 --pp-size 1 --dtype bfloat16 "
        f"--kv-cache-dtype auto --mem-fraction-static {share} --max-running-requests 1024 --chunked-prefill-size 8192 "
        "--context-length 8192 --page-size 16 --disable-radix-cache --host 0.0.0.0 --port 8000"
    )


def test_one_replica_over_two_nodes() -> None:
    head, other = emitted("sglang", DENSE, "pp2[41,39] tp4 kv=fp8", 2, 4).commands
    assert head.argv[-6:] == ("--nnodes", "2", "--node-rank", "0", "--dist-init-addr", "NODE0:20000")
    assert value(other, "--node-rank") == "1"
    assert dict(other.env) == {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SGLANG_PP_LAYER_PARTITION": "41,39"}
    assert value(other, "--kv-cache-dtype") == "fp8_e4m3"
    assert "--disable-overlap-schedule" in other.argv


def test_attention_copies_lie_within_the_shards() -> None:
    found = emitted("sglang", "qwen3-30b-a3b", "attn(dp8) ffn(ep8) seqs=100 tokens=2000", 1, 8)
    (command,) = found.commands
    for flag, wanted in (("--tp-size", "8"), ("--dp-size", "8"), ("--ep-size", "8")):
        assert value(command, flag) == wanted
    assert "--enable-dp-attention" in command.argv
    # SGLang shares these out over the copies itself.
    assert value(command, "--max-running-requests") == "100"
    assert value(command, "--chunked-prefill-size") == "2000"


def test_experts_may_be_cut_both_ways() -> None:
    (command,) = emitted("sglang", MOE, "attn(tp8) ffn(tp2,ep4)", 1, 8).commands
    assert value(command, "--tp-size") == "8"
    assert value(command, "--ep-size") == "4"


def test_attention_has_copies_in_the_families_that_are_written_for_it() -> None:
    found = emitted("sglang", "qwen3-32b", "attn(dp2,tp4) ffn(tp8)", 1, 8)
    assert "--enable-dp-attention" in found.commands[0].argv
    assert has(emitted("sglang", DENSE, "attn(dp2,tp4) ffn(tp8)", 1, 8), "no attention copies of llama models")


def test_each_copy_has_the_limits_it_was_simulated_with_where_each_had_its_own() -> None:
    ranks = {"settings": {"scheduler": VllmScheduling()}}
    shared = emitted("sglang", "qwen3-30b-a3b", "attn(dp8) ffn(ep8) seqs=100 tokens=2000", 1, 8, **ranks).commands[0]
    # SGLang deals an eighth to each.
    assert (value(shared, "--max-running-requests"), value(shared, "--chunked-prefill-size")) == ("800", "16000")


def test_whole_prompts_have_no_chunks() -> None:
    (command,) = emitted("sglang", DENSE, "tp8", 1, 8, settings={"chunked_prefill": False}).commands
    assert value(command, "--chunked-prefill-size") == "-1"
    assert value(command, "--max-prefill-tokens") == "8192"
    assert (
        "--disable-radix-cache"
        not in emitted("sglang", DENSE, "tp8", 1, 8, settings={"prefix_caching": True}).commands[0].argv
    )


@pytest.mark.parametrize(
    ("model", "plan", "nodes", "gpus", "why"),
    [
        (MOE, "attn(tp8) ffn(dp2,tp4)", 1, 8, "no copies of the FFN"),
        (DENSE, "pp3 tp2", 2, 3, ""),
        (DENSE, "pp2 tp8", 4, 4, ""),
        (DENSE, "pp4 tp2", 2, 4, ""),
    ],
)
def test_what_it_has_no_words_for_gets_a_reason_and_no_command(
    model: str, plan: str, nodes: int, gpus: int, why: str
) -> None:
    found = emitted("sglang", model, plan, nodes, gpus)
    assert bool(found.commands) == (not why)
    assert not why or has(found, why)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("eagle:3", "EAGLE3 --speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4 "),
        ("mtp:1", "NEXTN --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2 "),
        ("ngram:5", "NGRAM --speculative-ngram-max-bfs-breadth 1 --speculative-num-draft-tokens 6 "),
        ("draft:llama-3.1-8b:4", "STANDALONE --speculative-num-steps 4 --speculative-eagle-topk 1 "),
    ],
)
def test_drafts_are_asked_for_as_chains(text: str, said: str) -> None:
    drafter = parse_drafter(text)
    known = Speculation(method=drafter.method, draft_tokens=drafter.draft_tokens, model=drafter.model, accepted=((1,),))
    own = {"drafting": (known,), "max_num_seqs": 64}
    found = emitted("sglang", DENSE, f"tp8 spec={text}", 1, 8, settings=own)
    (command,) = found.commands
    assert f"--speculative-algorithm {said}" in " ".join(command.argv)
    head = {"eagle": "EAGLE3_HEAD", "draft": "meta-llama/Llama-3.1-8B"}.get(drafter.method)
    assert value(command, "--speculative-draft-model-path") == head
    assert has(found, "EAGLE3_HEAD") is (head == "EAGLE3_HEAD")


def test_its_own_parser_takes_every_command() -> None:
    pytest.importorskip("sglang", reason="sglang is not installed: its own parser cannot judge the commands")
    parser = argparse.ArgumentParser()
    importlib.import_module("sglang.srt.server_args").ServerArgs.add_cli_args(parser)
    commands = [command for plan in PLANS for command in servers(emitted("sglang", *plan))]
    assert len(commands) >= len(PLANS)
    for command in commands:
        read = parser.parse_args(command.argv[3:])
        assert str(read.tp_size) == value(command, "--tp-size")
        assert str(read.ep_size) == (value(command, "--ep-size") or "1")


def test_phases_that_share_a_gpu_are_multiplexed_by_divisions_of_its_own_or_by_one_that_is_named() -> None:
    (command,) = emitted("sglang", DENSE, "tp8 share=pdmux", 1, 8).commands
    assert "--enable-pdmux" in command.argv and command.file is None
    assert value(command, "--chunked-prefill-size") == "-1" and "--disable-overlap-schedule" in command.argv
    (command,) = emitted("sglang", DENSE, "tp8 share=pdmux:72/60", 1, 8).commands
    assert command.file == ("pdmux-0.yaml", "{sm_group_num: 3, manual_divisions: [[72, 60, 0]]}")
    assert value(command, "--pdmux-config-path") == "pdmux-0.yaml"


def test_prefill_and_decode_servers_stand_behind_a_router_that_knows_both() -> None:
    problem = replace(asked(DENSE, 1, 8, settings={"scheduler": SglangScheduling()}), serving=("pools",))
    found, taken = [], dict[int, int]()
    for role, gpus in (("prefill", range(4)), ("decode", range(4, 8))):
        side, plan = problem.side(role, 0), parse_plan("dp2 tp2", problem.model)  # type: ignore[arg-type]
        assignment = tuple(((tuple(f"node0:{gpu}" for gpu in list(gpus)[r : r + 2]),)) for r in (0, 2))
        found.append(launch(side, plan, "sglang", CHECKPOINT, assignment, taken))
    both = handing_over(*found, 2)
    *servers_, router = both.commands
    modes = [value(command, "--disaggregation-mode") for command in servers_]
    assert modes == ["prefill", "prefill", "decode", "decode"]
    ports = [value(command, "--disaggregation-bootstrap-port") for command in servers_]
    assert ports == ["8998", "9008", None, None]
    assert {value(command, "--host") for command in servers_} == {"0.0.0.0"}  # the router may be on another node
    assert [command.replica for command in both.commands] == [0, 1, 2, 3, None]
    assert " ".join(router.argv) == (
        "python -m sglang_router.launch_router --pd-disaggregation --port 30000 --prefill http://NODE0:8000 8998 "
        "--prefill http://NODE0:8010 9008 --decode http://NODE0:8020 --decode http://NODE0:8030 "
        "--prefill-policy round_robin --decode-policy round_robin"
    )
    assert any("mooncake-transfer-engine" in note for note in both.notes)
    assert not any("put a router" in note for note in both.notes)


def test_a_router_of_pools_that_it_does_not_have_is_told() -> None:
    command = pd_router([[(0, "8000")], [(1, "8000")]], ("cache_aware", "least_loaded"))
    assert command.argv[-2:] == ("--prefill-policy", "cache_aware")
    many, one = [(0, "8000"), (0, "8010")], [(1, "8000")]
    (said,) = unmatched([many, many], ("cache_aware", "least_loaded"))
    assert "no least_loaded, which the figures are of before decode servers" in said
    assert "by its default, cache_aware" in said
    assert len(unmatched([many, many], ("pull", "session"))) == 2
    assert not unmatched([many, one], ("round_robin", "session"))
    assert not unmatched([one, many], ("session", "power_of_two"))


def test_two_batches_take_the_kernels_of_deepep() -> None:
    (command,) = emitted("sglang", "qwen3-30b-a3b", "attn(dp8) ffn(ep8) overlap=two_batches", 1, 8).commands
    assert "--enable-two-batch-overlap" in command.argv
    assert value(command, "--moe-a2a-backend") == "deepep" and value(command, "--deepep-mode") == "auto"
    assert value(command, "--moe-runner-backend") == "deep_gemm"
    (plain,) = emitted("sglang", "qwen3-30b-a3b", "attn(dp8) ffn(ep8) fp8 overlap=two_batches", 1, 8).commands
    assert value(plain, "--moe-runner-backend") is None


@pytest.mark.parametrize(("seats", "room"), [(1024, None), (1032, "129"), (8192, "1024"), (8200, "refused")])
def test_split_forwards_have_room_for_the_sequences_of_a_rank(seats: int, room: str | None) -> None:
    plan = f"attn(dp8) ffn(ep8) seqs={seats} tokens=16384 overlap=two_batches"
    found = emitted("sglang", "qwen3-30b-a3b", plan, 1, 8)
    if room == "refused":
        assert not found.commands and has(found, "at most 1024 sequences", "the plan 1025", "--max_num_seqs=8192")
        return
    variable = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
    assert dict(found.commands[0].env).get(variable) == room
    assert has(found, variable) == (room is not None)


def test_batches_between_two_looks_for_requests_are_named_where_they_are_more_than_one() -> None:
    own = {"scheduler": SglangScheduling(scheduler_recv_interval=10)}
    (command,) = emitted("sglang", DENSE, "tp8", 1, 8, settings=own).commands
    assert value(command, "--scheduler-recv-interval") == "10"
