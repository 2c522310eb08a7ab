"""Families whose layers differ by a few facts each, and those beside them: which layers are what, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apex_opt.cluster import load_cluster
from apex_opt.engines import VLLM
from apex_opt.errors import InputError
from apex_opt.ir import Attention, DenseFfn, Model, model_from_config
from apex_opt.ir.cells import (
    Cut,
    GatedAttention,
    JoinedAttention,
    Kept,
    LatentAttention,
    Mamba2,
    MoeFfn,
    SharedAttention,
    State,
)
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.plan import parse_plan
from apex_opt.plans.refusals import refusals

H100 = load_cluster("1xh100-sxm")
MODELS = Path(__file__).parent / "cases" / "models"


def case(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text())
    return config


TRINITY, EXAONE, CWM = case("trinity-mini"), case("k-exaone-236b-a23b"), case("cwm")
BAMBA, FALCON, GEMMA, STEP = case("bamba-9b"), case("falcon-h1-34b"), case("gemma-3n-e4b"), case("step3")
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
}
LAGUNA = SMALL | {"model_type": "laguna", "architectures": ["LagunaForCausalLM"], "sliding_window": 32}
DENSE = {key: value for key, value in SMALL.items() if "expert" not in key and not key.startswith("moe_")}
GRANITE = DENSE | {"model_type": "granite_swa", "architectures": ["GraniteSWAForCausalLM"], "sliding_window": 32}


def read(config: dict[str, Any], **changes: Any) -> Model:
    return model_from_config(config | changes, "tiny", "tiny.json")


def blocks(model: Model) -> list[Any]:
    return [run.block for run in model.runs for _ in range(run.count)]


def test_trinity_gates_whole_heads_and_turns_them_behind_windows_alone() -> None:
    found = blocks(read(TRINITY))
    assert all(isinstance(block.attention, GatedAttention) and block.norm_count == 4 for block in found)
    assert [block.attention.window for block in found[:4]] == [2048, 2048, 2048, None]
    assert all(block.attention.rotary == (block.attention.window is not None) for block in found)
    assert [isinstance(block.ffn, DenseFfn) for block in found[:3]] == [True, True, False]
    spelled_out = {key: value for key, value in TRINITY.items() if key != "layer_types"}
    assert read(spelled_out).runs == read(TRINITY).runs
    assert [block.attention.window for block in blocks(read(spelled_out, global_attn_every_n_layers=2))[:2]] == [
        2048,
        None,
    ]


def test_k_exaone_has_norms_before_its_cells_and_experts_behind_the_first_layer() -> None:
    found = blocks(read(EXAONE))
    assert all(block.norm_count == 2 and block.attention.qk_norm for block in found)
    assert [block.attention.window for block in found[:4]] == [128, 128, 128, None]
    assert [block.attention.rotary for block in found[:4]] == [True, True, True, False]
    assert [type(block.ffn) for block in found[:2]] == [DenseFfn, MoeFfn]
    assert found[1].ffn.shared_intermediate == 2048


def test_layers_that_see_all_come_first_in_some_families() -> None:
    kinds = {key: value for key, value in CWM.items() if key != "layer_types"}
    assert read(kinds).runs == read(CWM).runs
    assert [block.attention.window for block in blocks(read(CWM))[:5]] == [None, 8192, 8192, 8192, None]
    assert [block.attention.window for block in blocks(read(GRANITE))] == [None, 32, 32, 32]
    assert all(block.attention.sinks and block.attention.rotary for block in blocks(read(GRANITE)))


def test_a_base_of_0_tells_that_a_layer_has_no_positions() -> None:
    found = blocks(read(GRANITE, layer_rope_theta=[1e4, 0, 0, 1e4]))
    assert [block.attention.rotary for block in found] == [True, False, False, True]


def test_layers_have_the_query_heads_that_are_listed() -> None:
    found = blocks(read(LAGUNA, num_attention_heads_per_layer=[8, 16, 16, 8]))
    assert [block.attention.query_heads for block in found] == [8, 16, 16, 8]
    assert {block.attention.kv_heads for block in found} == {2}
    assert all(block.attention.gated for block in found)


def test_bamba_has_attention_where_its_file_says() -> None:
    found = [type(block.attention) for block in blocks(read(BAMBA))]
    assert [layer for layer, kind in enumerate(found) if kind is Attention] == [9, 18, 27]
    assert set(found) == {Attention, Mamba2}
    kinds = ["attention" if layer in (9, 18, 27) else "mamba" for layer in range(32)]
    listed = {key: value for key, value in BAMBA.items() if key != "attn_layer_indices"}
    assert read(listed, layers_block_type=kinds).runs == read(BAMBA).runs


def test_falcon_h1_keeps_keys_and_values_of_tokens_and_a_state_of_sequences() -> None:
    (run,) = read(FALCON).runs
    cell = run.block.attention
    assert isinstance(cell, JoinedAttention)
    # `MambaStateShapeCalculator` of vLLM: 3 inputs of 4096 + 2 x 2 x 256 channels, 32 heads of 128 x 256, in 16 bit
    state = 2 * (3 * (4096 + 2 * 2 * 256) + 32 * 128 * 256)
    assert cell.cache() == (Kept(2 * 4 * 128, None), State(state, 2 * (4096 + 2 * 2 * 256)))
    assert read(FALCON).kv_bytes_per_token(2) == 72 * 2 * 4 * 128 * 2
    assert read(FALCON).state_bytes_per_sequence == 72 * state
    with_norm = read(FALCON, mamba_rms_norm=True)
    assert with_norm.parameters - read(FALCON).parameters == 72 * 4096


def test_zamba2_holds_once_what_its_layers_share_and_computes_it_in_each() -> None:
    config = case("zamba2-7b")
    found = blocks(read(config))
    met = [block.attention for block in found if isinstance(block.attention, SharedAttention)]
    assert [layer for layer, block in enumerate(found) if block.attention in met] == config["hybrid_layer_ids"]
    assert [cell.again for cell in met] == [False] * 2 + [True] * 11
    first, later = met[0], met[2]
    # Projections over twice the width, the output, two norms of the one and one of the other.
    shared = 3 * 7168 * 7168 + 3584 * 7168 + 3 * 3584
    assert first.parameters - later.parameters == shared
    assert first.operations(Cut(), 2) == later.operations(Cut(), 2)
    assert later.cache() == first.cache() and later.cache()[0] == Kept(2 * 7168, None)
    kinds = ["hybrid" if layer in config["hybrid_layer_ids"] else "linear_attention" for layer in range(81)]
    saved = {key: value for key, value in config.items() if key != "hybrid_layer_ids"}
    assert read(saved, layers_block_type=kinds).runs == read(config).runs
    adapted = read(config, use_shared_attention_adapter=True)
    assert adapted.parameters - read(config).parameters == 13 * 3 * 128 * (7168 + 7168)
    # vLLM cuts none of it into stages, so that no stage lacks what lies in another.
    problem = parse_plan("pp3 tp1", read(config))
    assert any("does not cut zamba2" in text for text in refusals(VLLM, read(config), H100, problem, EngineSettings()))


def test_each_half_of_a_joined_cell_has_its_own_format() -> None:
    section = {"quant_method": "fp8", "modules_to_not_convert": [f"model.layers.{i}.mamba" for i in range(72)]}
    (run,) = read(FALCON, quantization_config=section).runs
    forms = {matrix.name: matrix.quantised for matrix in run.block.attention.matrices() if matrix.quantised is not None}
    assert (forms["queries"], forms["keys"], forms["input"]) == (1, 1, 0)


def test_gemma_3n_borrows_in_its_last_layers_and_has_an_embedding_for_each() -> None:
    model = read(GEMMA)
    found = blocks(model)
    assert [block.attention.borrowed for block in found] == [False] * 20 + [True] * 15
    assert [block.attention.window for block in found[:5]] == [512, 512, 512, 512, None]
    assert model.kv_bytes_per_token(2) == 20 * 2 * 2 * 256 * 2
    table = next(matrix for matrix in model.before if matrix.name == "per-layer embedding")
    assert (table.weights, table.used_weights) == (262144 * 35 * 256, 35 * 256)


def test_step_3_compresses_queries_and_keeps_one_head() -> None:
    model = read(STEP)
    cell = blocks(model)[0].attention
    assert (cell.query_heads, cell.kv_heads, cell.query_rank) == (64, 1, 2048)
    assert model.kv_bytes_per_token(2) == 61 * 2 * 256 * 2
    assert [isinstance(block.ffn, MoeFfn) for block in blocks(model)] == [False] * 4 + [True] * 56 + [False]
    text = STEP["text_config"]
    listed = STEP | {"text_config": text | {"moe_layers_enum": list(range(4, 60))}}
    assert read(listed).runs == model.runs


def test_lfm3_gates_its_attention_and_has_norms_behind_its_cells() -> None:
    config = DENSE | {"model_type": "lfm3", "architectures": ["Lfm3ForCausalLM"], "sliding_window": 32}
    kinds = ["conv", "full_attention", "sliding_attention", "conv"]
    found = blocks(read(config, layer_types=kinds))
    assert [block.norm_count for block in found] == [4] * 4
    assert [block.attention.window for block in found] == [None, None, 32, None]
    assert all(block.attention.gated for block in found[1:3])
    assert {block.ffn.intermediate for block in found} == {96}  # as the file has it
    plain = blocks(read(config, layer_types=kinds, use_attention_gate=False, use_sandwich_norm=False))
    assert [block.norm_count for block in plain] == [2] * 4 and not plain[1].attention.gated
    with pytest.raises(InputError, match="layer_types may hold conv and full_attention, not 'sliding_attention'"):
        read(config | {"model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"]}, layer_types=kinds)


def test_a_decoder_is_found_wherever_a_file_has_it() -> None:
    """In `text_config`, `llm_config` or `language_config`, or in the part of an Omni model that writes."""
    inner = {key: value for key, value in CWM.items() if key != "architectures"}
    plain = read(CWM)
    for key in ("text_config", "llm_config", "language_config"):
        assert read({"model_type": "whatever", key: inner}).runs == plain.runs
    spoken = {"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": inner}, "talker_config": {"x": 1}}
    assert read(spoken).runs == plain.runs
    quantised = read(spoken, quantization_config={"quant_method": "fp8"})
    assert quantised.weight_format == "fp8"
    with pytest.raises(InputError, match="llm_config must be an object, not 7"):
        read({"model_type": "internvl_chat", "llm_config": 7})


def test_deepseek_v2_without_latent_widths_has_usual_attention() -> None:
    latent = case("deepseek-vl2-small")
    assert all(isinstance(block.attention, LatentAttention) for block in blocks(read(latent)))
    usual = latent["language_config"] | {"qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "kv_lora_rank": None}
    found = blocks(read(latent | {"language_config": usual}))
    assert all(block.attention == Attention(hidden=2048, query_heads=16, kv_heads=16, head_dim=128) for block in found)


@pytest.mark.parametrize(
    ("config", "changes", "text"),
    [
        (TRINITY, {"sliding_window": None}, "layer_types has sliding_attention layers but sliding_window is missing"),
        (TRINITY, {"num_experts_per_tok": 129}, "num_experts_per_tok 129 is above num_experts 128"),
        (TRINITY, {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers 32"),
        (LAGUNA, {"num_attention_heads_per_layer": [8, 8]}, "num_attention_heads_per_layer has 2 entries"),
        (LAGUNA, {"num_attention_heads_per_layer": [8, 8, 8, 9]}, "9 is not a multiple of num_key_value_heads 2"),
        (LAGUNA, {"num_attention_heads_per_layer": [8, 8, 8, "8"]}, "num_attention_heads_per_layer entry must be"),
        (GRANITE, {"layer_rope_theta": [0]}, "layer_rope_theta has 1 entries for num_hidden_layers 4"),
        (BAMBA, {"attn_layer_indices": [32]}, "attn_layer_indices entry must be a whole number from 0 to 31, not 32"),
        (BAMBA, {"mamba_gate": "new"}, "mamba_gate is not understood"),
        (case("zamba2-7b"), {"hybrid_layer_ids": None}, "hybrid_layer_ids is missing, and so is layers_block_type"),
        (case("zamba2-7b"), {"hybrid_layer_ids": [81]}, "hybrid_layer_ids entry must be a whole number from 0 to 80"),
        (case("zamba2-7b"), {"num_key_value_heads": 8}, "num_key_value_heads 8 is not supported; supported: 32"),
        (case("zamba2-7b"), {"mamba_gate": 1}, "mamba_gate is not understood"),
        (FALCON, {"mamba_d_head": 64}, "mamba_n_heads 32 times mamba_d_head 64 is not mamba_d_ssm 4096"),
        (FALCON, {"projectors_bias": True}, "projectors_bias true is not supported; supported: false"),
        (FALCON, {"mamba_conv_kernel_kind": 3}, "mamba_conv_kernel_kind is not understood"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_name(
    config: dict[str, Any], changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        read(config, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("gemma-3n-e4b", {"intermediate_size": [16384]}, "intermediate_size has 1 entries for .*num_hidden_layers 35"),
        ("gemma-3n-e4b", {"num_kv_shared_layers": 35}, "num_kv_shared_layers 35 leaves no layer of each kind"),
        ("step3", {"num_attention_groups": 2}, "num_attention_groups 2 is not supported; supported: 1"),
        ("step3", {"moe_layers_enum": "4,five"}, "moe_layers_enum must hold numbers with commas, not 'five'"),
    ],
)
def test_what_a_decoder_within_a_file_cannot_have_is_refused_by_its_name(
    name: str, changes: dict[str, Any], text: str
) -> None:
    config = case(name)
    with pytest.raises(InputError, match=text):
        read(config | {"text_config": config["text_config"] | changes})
