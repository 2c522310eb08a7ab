"""Memory as the engine allots it: groups, pages, enlarged blocks, states beside blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plan_cases import SMALL, dense, instance_at, keeping, make_gpu, make_model, with_window

from apex_opt.engines.schedulers import SglangScheduling, TrtllmScheduling
from apex_opt.ir import model_from_config
from apex_opt.ir.registry import load_model
from apex_opt.oracle.checks import violations
from apex_opt.oracle.space import space
from apex_opt.plans.allotment import allotted
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.kv_groups import KvGroup
from apex_opt.plans.memory import kv_blocks, settings_of, stage_memory
from apex_opt.plans.plan import parse_plan
from apex_opt.units import GIB
from formulations.plan_space import PlanSpace

FULL = KvGroup(kind="full", block_size=16)
CASES = Path(__file__).parent / "cases" / "models"


def test_gpt_oss_has_as_many_blocks_in_20_gib_as_vllm_says() -> None:
    """The figure of `get_kv_cache_config_from_groups`: 12 layers of each kind, pages of 32 KiB."""
    model = load_model("gpt-oss-20b")
    found = allotted(model, parse_plan("tp1", model), EngineSettings())
    assert found.groups == (KvGroup(kind="window", block_size=16, window=128), FULL)
    assert 20 * GIB // found.block_bytes(0, 24) == 54_613


@pytest.mark.parametrize(("tp", "tokens"), [(1, 544), (2, 544), (4, 272), (8, 144)])
def test_blocks_are_enlarged_to_a_state_as_vllm_logs_it(tp: int, tokens: int) -> None:
    """Qwen3-Next-80B: three layers of four have a state of 1,097,728 bytes, the others two KV heads of 256."""
    plain = dense(hidden=2048, heads=16, kv=2, width=256)
    model = make_model(*[(keeping(plain, state_bytes=1_097_728), 3), (plain, 1)] * 12)
    plan = parse_plan(f"tp{tp}", model)
    settings = settings_of(model, EngineSettings(), plan)
    assert settings.block_size == tokens
    assert [group.kind for group in settings.kv_groups] == ["state"] * 3 + ["full"]
    page = tokens * 2 * 256 * 2 * max(2 // tp, 1)
    assert allotted(model, plan, EngineSettings()).block_bytes(0, 48) == 12 * page
    held = settings.most_blocks(np.array([1, tokens, tokens + 1, 100_000]))
    assert held.tolist() == [3 + 1, 3 + 1, 3 + 2, 3 + -(-100_000 // tokens)]


@pytest.mark.parametrize(
    ("tp", "kv", "asked", "tokens"),
    [
        *((2, "bf16", 16, 944), (2, "bf16", 32, 960), (2, "bf16", 64, 960), (2, "fp8", 16, 1888), (2, "fp8", 64, 1920)),
        *((4, "bf16", 16, 480), (4, "bf16", 64, 512), (4, "fp8", 16, 944), (4, "fp8", 64, 960)),
    ],
)
def test_enlarged_blocks_hold_a_multiple_of_those_asked_for(tp: int, kv: str, asked: int, tokens: int) -> None:
    """Kimi-Linear-48B-A3B: sizes as vLLM 0.20.2 finds them, 32 by itself on a B200 and 64 on an H100 with fp8."""
    model = load_model(str(CASES / "kimi-linear-48b-a3b.json"))
    plan = parse_plan(f"tp{tp} kv={kv}", model)
    assert allotted(model, plan, EngineSettings(block_size=asked)).block_size == tokens


def test_with_prefix_caching_the_last_state_is_kept_beside_the_running_one() -> None:
    plain = dense(hidden=256, heads=4, kv=2)
    model = make_model((keeping(plain, state_bytes=5000), 1), (plain, 1))
    settings = settings_of(model, replace(SMALL, prefix_caching=True), parse_plan("tp1", model))
    state, full = settings.kv_groups
    assert (state.kind, state.mode, state.block_size) == ("state", "align", settings.block_size)
    assert full.block_size == settings.block_size
    assert settings.most_blocks(np.array([settings.block_size, settings.block_size + 1])).tolist() == [2, 4]


def test_one_kind_of_layer_is_charged_as_ever() -> None:
    model = load_model("llama-3.1-8b")
    plan = parse_plan("pp2 tp2", model)
    found = allotted(model, plan, EngineSettings())
    assert (found.groups, found.block_size) == ((), 16)
    assert found.block_bytes(0, 16) == 16 * 16 * 2 * 4 * 128 * 2
    assert settings_of(model, EngineSettings(), plan) == EngineSettings()


def test_groups_are_common_to_all_stages_and_a_stage_has_room_for_its_fullest() -> None:
    plain = dense(hidden=256, heads=4, kv=2)
    slid = with_window(plain, 64)
    model = make_model((slid, 4), (plain, 4))
    found = allotted(model, parse_plan("pp2 tp1", model), EngineSettings())
    page = found.page_bytes
    assert [group.kind for group in found.groups] == ["window", "full"]
    assert [found.block_bytes(0, 8), found.block_bytes(0, 4), found.block_bytes(2, 6)] == [4 * page, 4 * page, 2 * page]
    stages = stage_memory(model, make_gpu(), parse_plan("pp2 tp1", model), SMALL)
    assert kv_blocks(stages) == min(stage.kv_blocks for stage in stages) - 1


def test_chunks_are_a_group_of_their_own_but_where_drafts_compute_the_last_block_anew() -> None:
    plain = dense(hidden=256, heads=4, kv=2)
    model = make_model((keeping(plain, chunk=64), 3), (plain, 1))
    chunk, page = KvGroup(kind="chunk", block_size=16, window=64), 16 * 2 * 2 * 64 * 2
    for text in ("tp1", "tp1 spec=ngram:2"):
        found = allotted(model, parse_plan(text, model), EngineSettings())
        assert found.groups == (chunk, chunk, chunk, FULL)
        assert found.block_bytes(0, 4) == page
    found = allotted(model, parse_plan("tp1 spec=eagle:2", model), EngineSettings())
    assert found.groups == ()
    assert found.block_bytes(0, 4) == 4 * page


def test_llama_4_has_as_many_blocks_as_vllm_finds() -> None:
    """Maverick with pp4 tp8 on a B200: 5,841,693 blocks in 133.706 GiB, of 3 layers each."""
    model = load_model("llama-4-maverick")
    plan = parse_plan("pp4 tp8", model)
    assert allotted(model, plan, EngineSettings()).block_bytes(0, 12) == 3 * 16 * 2 * 128 * 2
    assert int(133.706 * GIB) // (3 * 16 * 2 * 128 * 2) == pytest.approx(5_841_693, rel=1e-5)


def test_a_sequence_over_chunks_needs_no_more_than_a_chunk_and_a_batch() -> None:
    settings = EngineSettings(
        max_num_seqs=8,
        max_num_batched_tokens=32,
        max_model_len=4096,
        kv_groups=(KvGroup(kind="chunk", block_size=16, window=64),),
    )
    tokens = np.array([1, 64, 65, 96, 97, 4096])
    assert settings.most_blocks(tokens).tolist() == [1, 4, 5, 6, 6, 6]
    assert settings.least_blocks(tokens).tolist() == [1] * 6
    assert settings.held_blocks(np.array([64, 65, 128]), np.array([63, 64, 127])).tolist() == [4, 1, 4]


def test_pages_that_have_no_common_size_are_a_fault_that_says_so() -> None:
    model = make_model((with_window(dense(heads=6, kv=2), 64), 1), (dense(heads=6, kv=3), 1))
    assert "do not divide" in allotted(model, parse_plan("tp1", model), EngineSettings()).fault


@pytest.mark.parametrize("scheduler", [SglangScheduling(), TrtllmScheduling()])
def test_other_engines_keep_all_tokens_and_have_a_state_for_every_sequence(
    scheduler: SglangScheduling | TrtllmScheduling,
) -> None:
    plain = dense(hidden=256, heads=4, kv=2)
    model = make_model((keeping(plain, state_bytes=5000), 3), (with_window(plain, 64), 1))
    settings = replace(SMALL, scheduler=scheduler)
    plan = parse_plan("tp1", model)
    assert settings_of(model, settings, plan) == settings
    (stage,) = stage_memory(model, make_gpu(), plan, settings)
    assert stage.states_bytes == settings.max_num_seqs * 3 * 5000
    assert stage.kv_block_bytes == settings.block_size * 2 * 2 * 64 * 2


def test_a_longer_sequence_needs_no_fewer_blocks_and_the_longest_that_fits_is_found() -> None:
    groups = (FULL, KvGroup(kind="window", block_size=16, window=40), KvGroup(kind="state", block_size=999))
    settings = replace(SMALL, kv_groups=groups)
    needs = settings.most_blocks(np.arange(1, settings.max_model_len + 1))
    assert (np.diff(needs) >= 0).all()
    for blocks in (0, 1, 3, 10, 57):
        assert settings.longest(blocks) == int((needs <= blocks).sum())
    assert (settings.least_blocks(np.arange(1, 500)) <= settings.most_blocks(np.arange(1, 500) + 1)).all()


WHISPER = {
    "model_type": "whisper",
    "d_model": 256,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 1024,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 1024,
    "encoder_layers": 4,
    "max_source_positions": 300,
    "max_target_positions": 1024,
    "num_mel_bins": 80,
    "vocab_size": 5000,
}


def test_an_encoder_leaves_blocks_of_its_tokens_to_every_sequence() -> None:
    model = model_from_config(WHISPER, "small", "small")
    plan = parse_plan("tp2", model)
    found = allotted(model, plan, SMALL)
    blocks = -(-300 // SMALL.block_size)
    assert [group.kind for group in found.groups] == ["full"] + ["state"] * blocks
    (stage,) = stage_memory(model, make_gpu(), plan, SMALL)
    assert stage.kv_block_bytes == 4 * SMALL.block_size * 2 * 128 * 2


@pytest.mark.parametrize("memory", [-1, 0, 10**6])
@pytest.mark.parametrize("place", range(0, 12, 3))
def test_program_and_oracle_agree_on_what_encoder_decoders_take(place: int, memory: int) -> None:
    model = model_from_config(WHISPER, "small", "small")
    plans = [plan for plan in space(instance_at(model, None, 4)) if plan.even and plan.replicas == 1]
    instance = instance_at(model, plans[place % len(plans)], 4, memory=memory)
    allowed = {plan for plan in plans if not violations(instance, plan)}
    assert set(PlanSpace().enumerate(instance).plans) == allowed


@pytest.mark.parametrize("name", ["kimi-k3", "gpt-oss-20b", "llama-3.1-8b", "whisper-large-v3"])
@pytest.mark.parametrize("scheduler", [None, SglangScheduling()])
def test_what_stages_take_together_is_what_each_takes(name: str, scheduler: SglangScheduling | None) -> None:
    model, settings = load_model(name), EngineSettings()
    settings = settings if scheduler is None else replace(settings, scheduler=scheduler)
    found = allotted(model, parse_plan("attn(tp1) ffn(tp1) bf16", model), settings)
    ends = [0, 1, 3, found.layers // 2, found.layers]
    blocks, states = found.stages_bytes(ends)
    assert blocks == [found.block_bytes(*ends[place : place + 2]) for place in range(4)]
    assert states == [found.state_bytes(*ends[place : place + 2]) for place in range(4)]
