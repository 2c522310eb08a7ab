"""Families with windows, chunks, sparse or compressed attention: what each layer is, and what is refused and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apex_opt.errors import InputError
from apex_opt.ir import Attention, Block, LatentAttention, Model, MoeFfn, load_model, model_from_config
from apex_opt.ir.cells import CompressedAttention

MODELS = Path(__file__).parent / "cases" / "models"


def read(name: str) -> Model:
    return load_model(str(MODELS / f"{name}.json"))


def changed(name: str, inner: str = "", **changes: Any) -> Model:
    """A model whose file has other values, or lacks those that are None; `inner` is the section they are in."""
    config = json.loads((MODELS / f"{name}.json").read_text())
    section = config[inner] if inner else config
    for key, value in changes.items():
        if value is None:
            section.pop(key, None)
        else:
            section[key] = value
    return model_from_config(config, name, name)


def layers(model: Model) -> list[Block]:
    return [run.block for run in model.runs for _ in range(run.count)]


def attention(model: Model) -> list[Attention]:
    cells = [block.attention for block in layers(model)]
    assert all(isinstance(cell, Attention) for cell in cells)
    return cells  # type: ignore[return-value]


# ---- indexers -------------------------------------------------------------------------------------------------


def test_deepseek_v32_keeps_1284_bytes_of_a_token_in_every_layer_and_788_in_fp8() -> None:
    model = read("deepseek-v3.2")
    assert model.kv_bytes_per_token(2) == 61 * (1152 + 132)
    assert model.kv_bytes_per_token(1) == 61 * (656 + 132)


def test_glm_52_has_an_indexer_in_the_first_three_layers_and_every_fourth_of_the_others() -> None:
    cells = [block.attention for block in layers(read("glm-5.2"))]
    assert all(isinstance(cell, LatentAttention) and cell.topk == 2048 for cell in cells)
    own = [number for number, cell in enumerate(cells) if len(cell.cache()) == 2]
    assert own == [0, 1, 2, *range(6, 78, 4)]
    assert read("glm-5.2").kv_bytes_per_token(1) == 78 * 656 + 21 * 132


@pytest.mark.parametrize(
    "changes",
    [
        {"indexer_types": None},
        {"indexer_types": None, "index_topk_freq": None, "index_topk_pattern": "FFF" + "SSSF" * 18 + "SSS"},
    ],
)
def test_shared_indexers_may_be_told_by_a_schedule_or_a_pattern(changes: dict[str, Any]) -> None:
    assert changed("glm-5.2", **changes) == changed("glm-5.2")


def test_every_layer_has_an_indexer_where_nothing_is_said() -> None:
    assert all(len(block.attention.cache()) == 2 for block in layers(read("glm-5")))


def test_minimax_m3_sees_2048_tokens_behind_three_layers_that_see_all() -> None:
    model = read("minimax-m3")
    chosen = [cell.indexer.topk if cell.indexer else None for cell in attention(model)]
    assert chosen == [None] * 3 + [2048] * 57
    assert [block.is_moe for block in layers(model)] == [False] * 3 + [True] * 57
    assert model.kv_bytes_per_token(2) == 60 * 2048 + 57 * 256


def test_minimax_m3_may_tell_its_indexer_outside_a_section() -> None:
    flat = {"index_n_heads": 4, "index_head_dim": 128, "index_topk_blocks": 16, "index_block_size": 128}
    kinds = ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57
    assert changed("minimax-m3", sparse_attention_config=None, layer_types=kinds, **flat) == changed("minimax-m3")


# ---- compressed -----------------------------------------------------------------------------------------------


def test_deepseek_v4_compresses_by_4_and_128_in_turn() -> None:
    cells = [block.attention for block in layers(read("deepseek-v4-flash"))]
    assert all(isinstance(cell, CompressedAttention) for cell in cells)
    assert [cell.ratio for cell in cells] == [0, 0, *([4, 128] * 20), 4]  # type: ignore[attr-defined]
    ffns = [block.ffn for block in layers(read("deepseek-v4-flash"))]
    # The first ones take the expert of each token from a table, and need no correction.
    assert [isinstance(ffn, MoeFfn) and ffn.router_bias for ffn in ffns] == [False] * 3 + [True] * 40


def test_deepseek_v4_may_tell_kinds_of_layers_in_words() -> None:
    words = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    ratios = json.loads((MODELS / "deepseek-v4-flash.json").read_text())["compress_ratios"]
    kinds = [words[ratio] for ratio in ratios[:43]]
    hashed = ["hash_moe"] * 3 + ["moe"] * 40
    spelled = changed(
        "deepseek-v4-flash", compress_ratios=None, layer_types=kinds, num_hash_layers=None, mlp_layer_types=hashed
    )
    assert spelled == changed("deepseek-v4-flash")


def test_residual_streams_are_mixed_at_both_cells_and_joined_at_the_end() -> None:
    model = read("deepseek-v4-flash")
    block = model.runs[0].block
    mixed = 24 * 4 * 4096
    assert block.own_parameters == 2 * 4096 + 2 * (mixed + 24 + 3)
    assert [op.name for op in block.own_operations] == ["hyper connections"] * 2
    assert model.after_parameters == 4096 + 4 * 4 * 4096 + 4 + 1


@pytest.mark.parametrize(
    ("expert_dtype", "more", "weight_format", "gigabytes"),
    [
        ("fp4", {}, "mxfp4+fp8", 155.9),
        ("fp8", {}, "fp8", 285.8),
        ("fp4", {"moe_quant_algo": "NVFP4"}, "nvfp4+fp8", 164.6),
    ],
)
def test_experts_of_deepseek_v4_have_a_format_of_their_own(
    expert_dtype: str, more: dict[str, Any], weight_format: str, gigabytes: float
) -> None:
    """156 GB and 286 GB as published, less the layer of multi-token prediction."""
    section: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    if more:
        named = {f"layers.{layer}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for layer in range(43)}
        section |= more | {"quant_algo": "MIXED_PRECISION", "quantized_layers": named, "ignore": ["*.attn.*", "head"]}
    model = changed("deepseek-v4-flash", quantization_config=section, expert_dtype=expert_dtype)
    assert model.weight_format == weight_format
    assert model.weight_bytes() / 1e9 == pytest.approx(gigabytes, abs=0.05)


# ---- windows and chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "window", "every", "count"),
    [
        ("gemma-2-9b", 4096, 2, 42),
        ("gemma-3-27b", 1024, 6, 62),
        ("command-a", 4096, 4, 64),
        ("olmo-3-7b", 4096, 4, 32),
        ("exaone-4.0-32b", 4096, 4, 64),
    ],
)
def test_every_so_manieth_layer_sees_all(name: str, window: int, every: int, count: int) -> None:
    expected = [None if (layer + 1) % every == 0 else window for layer in range(count)]
    assert [cell.window for cell in attention(read(name))] == expected


def test_layers_that_see_all_have_no_positions_beside_windows_in_command_a_and_exaone() -> None:
    for name in ("command-a", "exaone-4.0-32b"):
        assert all(cell.rotary == (cell.window is not None) for cell in attention(read(name)))
    assert all(cell.rotary and cell.window is None for cell in attention(read("exaone-4.0-1.2b")))


def test_exaone_repeats_a_pattern_of_letters_and_lets_the_last_layer_see_all() -> None:
    model = changed("exaone-4.0-32b", sliding_window_pattern="LG", num_hidden_layers=5)
    assert [cell.window for cell in attention(model)] == [4096, None, 4096, None, None]


def test_gemma_has_norms_before_and_after_each_cell() -> None:
    assert [layers(read(name))[0].norm_count for name in ("gemma-2-2b", "gemma-3-4b", "gemma-4-31b")] == [4, 4, 4]
    assert layers(read("gemma-4-26b-a4b"))[0].norm_count == 7


def test_gemma_3_states_a_context_that_is_scaled_already() -> None:
    assert read("gemma-3-27b").max_position == 131072


def test_gemma_4_has_fewer_and_wider_heads_in_layers_that_see_all_whose_values_are_keys() -> None:
    shapes = {
        (cell.window, cell.kv_heads, cell.head_dim, cell.keys_as_values) for cell in attention(read("gemma-4-26b-a4b"))
    }
    assert shapes == {(1024, 8, 256, False), (None, 2, 512, True)}


def test_small_gemma_4_borrow_keys_and_values_and_embed_every_layer() -> None:
    """Its last layers read the cache of the last layer of their kind; of the class, files may leave out 256 columns."""
    small = {"num_kv_shared_layers": 20, "use_double_wide_mlp": True, "hidden_size_per_layer_input": None}
    model = changed("gemma-4-31b", "text_config", **small)
    cells, whole = attention(model), attention(read("gemma-4-31b"))
    assert [cell.borrowed for cell in cells] == [False] * 40 + [True] * 20
    assert [block.ffn.token_columns for block in layers(model)] == [21504] * 40 + [43008] * 20
    assert model.kv_bytes_per_token(2) == sum(kept.token_bytes(2) for cell in whole[:40] for kept in cell.cache())
    assert model.before_parameters == 262144 * 60 * 256 + 5376 * 60 * 256 + 256
    assert layers(model)[0].own_parameters == 4 * 5376 + 2 * 256 * 5376 + 5376
    assert [op.name for op in layers(model)[0].own_operations][2:] == ["per-layer gate", "per-layer projection"]


def test_of_a_table_of_every_layer_a_token_reads_one_row() -> None:
    """Publishers leave the table out of what is effective; the last 18 of 42 layers keep nothing."""
    model = read("gemma-4-e4b")
    table = 262144 * 42 * 256
    assert model.parameters - model.active_parameters == table - 42 * 256
    assert [bool(cell.cache()) for cell in attention(model)] == [True] * 24 + [False] * 18


def test_llama_4_sees_chunks_but_in_every_fourth_layer_which_has_no_positions() -> None:
    for name, every in (("llama-4-scout", 1), ("llama-4-maverick", 2)):
        model = read(name)
        assert [cell.window for cell in attention(model)] == [8192, 8192, 8192, None] * 12
        assert all(cell.chunked == cell.rotary == (cell.window is not None) for cell in attention(model))
        assert [block.is_moe for block in layers(model)] == [(layer + 1) % every == 0 for layer in range(48)]


def test_llama_4_may_list_its_mixtures_and_its_layers_without_positions() -> None:
    listed = changed(
        "llama-4-maverick", "text_config", moe_layers=list(range(1, 48, 2)), no_rope_layers=[1, 1, 1, 0] * 12
    )
    assert listed == changed("llama-4-maverick")
    assert all(cell.window is None for cell in attention(_without_chunks()))


def _without_chunks() -> Model:
    config = json.loads((MODELS / "llama-4-scout.json").read_text())
    config["text_config"]["attention_chunk_size"] = None
    return model_from_config(config, "x", "x")


def test_step_has_a_gate_for_each_head_and_more_heads_behind_windows_where_the_file_says_so() -> None:
    model = read("step-3.7-flash")
    assert all(cell.gated and cell.query_heads == 64 for cell in attention(model))
    other = {
        "attention_type": "sliding_attention",
        "num_attention_heads": 96,
        "num_attention_groups": 8,
        "head_dim": 128,
    }
    wide = changed("step-3.7-flash", attention_other_setting=other)
    assert {(cell.window, cell.query_heads) for cell in attention(wide)} == {(None, 64), (512, 96)}
    assert wide == changed("step-3.7-flash", num_sliding_attention_heads=96)
    assert [block.is_moe for block in layers(model)] == [False] * 3 + [True] * 42


def test_step_may_name_fields_as_it_was_first_published() -> None:
    first = {"num_attention_groups": 8, "moe_num_experts": 288, "moe_top_k": 8, "share_expert_dims": 1280}
    listed = ",".join(map(str, range(3, 45)))
    usual = ("num_key_value_heads", "num_experts", "num_experts_per_tok", "share_expert_dim", "first_k_dense_replace")
    kinds = json.loads((MODELS / "step-3.7-flash.json").read_text())["layer_types"] + ["sliding_attention"] * 3
    named = changed("step-3.7-flash", **dict.fromkeys(usual), **first, moe_layers_enum=listed, layer_types=kinds)
    assert named == changed("step-3.7-flash")


def test_mimo_v2_has_narrow_values_and_twice_the_kv_heads_with_sinks_behind_windows() -> None:
    model = read("mimo-v2-flash")
    shapes = {(cell.window, cell.kv_heads, cell.head_dim, cell.value_dim, cell.sinks) for cell in attention(model)}
    assert shapes == {(None, 4, 192, 128, False), (128, 8, 192, 128, True)}
    full, behind = 9, 39
    assert model.kv_bytes_per_token(2) == 2 * (192 + 128) * (4 * full + 8 * behind)


def test_command_r_reads_one_norm_for_both_cells() -> None:
    for name in ("command-r", "command-r-plus", "command-a"):
        assert all(block.norm_count == 1 and block.shares_norm for block in layers(read(name)))
    assert [cell.qk_norm_each for cell in attention(read("command-r-plus"))] == [True] * 64


def test_olmo_3_has_norms_over_the_whole_width_of_queries_and_keys() -> None:
    assert all(cell.qk_norm_whole for cell in attention(read("olmo-3-32b")))


def test_experts_for_images_are_held_beside_those_for_text_and_never_used() -> None:
    model, text = read("ernie-4.5-vl-28b-a3b"), read("ernie-4.5-21b-a3b")
    twins = 27 * (64 * 3 * 2560 * 512 + 64 * 2560 + 64)
    assert model.parameters - text.parameters == twins
    assert model.active_parameters == text.active_parameters
    nested = {"model_type": "ernie4_5_vl_moe", "text_config": {"model_type": "ernie4_5_vl_moe_text"}}
    assert model_from_config(nested, "nested", "nested").parameters == model.parameters


# ---- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "inner", "changes", "text"),
    [
        ("deepseek-v3.2", "", {"index_topk": None}, "index_topk is missing"),
        ("deepseek-v3.2", "", {"q_lora_rank": None}, "q_lora_rank is missing; the indexer's queries"),
        ("deepseek-v3.2", "", {"layer_types": ["full_attention"] * 61}, "layer_types may hold deepseek_sparse"),
        ("glm-5.2", "", {"indexer_types": ["shared"] * 78}, "indexer_types shares in the first layer"),
        ("glm-5.2", "", {"indexer_types": ["full"] * 3}, "indexer_types has 3 entries for num_hidden_layers 78"),
        ("glm-5.2", "", {"indexer_types": None, "index_topk_pattern": "FX"}, "index_topk_pattern may hold F and S"),
        ("glm-5.2", "", {"mlp_layer_types": ["moe"] * 78}, "mlp_layer_types may hold dense and sparse, not 'moe'"),
        ("minimax-m3", "", {"attention_output_gate": True}, "attention_output_gate true is not supported"),
        ("minimax-m3", "", {"qk_norm_type": "whole"}, "qk_norm_type must be per_head, not 'whole'"),
        ("minimax-m3", "sparse_attention_config", {"sparse_num_index_heads": 8}, "8 is not num_key_value_heads 4"),
        ("minimax-m3", "sparse_attention_config", {"sparse_topk_blocks": None}, "sparse_topk_blocks is missing"),
        ("minimax-m3", "sparse_attention_config", {"sparse_attention_freq": [2] * 60}, "may hold 0 and 1, not 2"),
        ("minimax-m3", "sparse_attention_config", {"sparse_attention_freq": None}, "sparse_attention_freq is missing"),
        (
            "minimax-m3",
            "sparse_attention_config",
            {"sparse_disable_index_value": [0] * 60},
            "sparse_disable_index_value has layers whose indexer adds a value",
        ),
        ("deepseek-v4-flash", "", {"compress_ratios": None}, "compress_ratios is missing"),
        ("deepseek-v4-flash", "", {"compress_ratios": [8] * 43}, "compress_ratios may hold 0, 4, 128, not 8"),
        ("deepseek-v4-flash", "", {"compress_ratios": [4] * 5}, "compress_ratios has 5 entries"),
        ("deepseek-v4-flash", "", {"hc_mult": None}, "hc_mult is missing"),
        ("deepseek-v4-flash", "", {"num_key_value_heads": 2}, "num_key_value_heads must be 1"),
        ("deepseek-v4-flash", "", {"expert_dtype": "fp6"}, "expert_dtype must be fp4 or fp8, not 'fp6'"),
        (
            "deepseek-v4-flash",
            "",
            {"expert_dtype": None, "quantization_config": {"quant_method": "fp8"}},
            "expert_dtype is missing; give fp4 or fp8",
        ),
        (
            "deepseek-v4-flash",
            "",
            {"quantization_config": {"quant_method": "fp8", "quantized_layers": {"a": {"quant_algo": "FP8"}}}},
            "quantized_layers is not understood without moe_quant_algo",
        ),
        ("gemma-2-2b", "", {"sliding_window": None}, "sliding_window is missing"),
        ("gemma-4-26b-a4b", "text_config", {"top_k_experts": 200}, "top_k_experts 200 is above num_experts 128"),
        ("gemma-4-31b", "text_config", {"num_kv_shared_layers": 58}, "58 leaves no layer of each kind"),
        ("llama-4-scout", "text_config", {"num_experts_per_tok": 20}, "20 is above num_local_experts 16"),
        ("llama-4-scout", "text_config", {"moe_layers": [48]}, "moe_layers entry must be a whole number from 0 to 47"),
        ("llama-4-scout", "text_config", {"layer_types": ["sliding"] * 48}, "layer_types may hold full_attention"),
        ("step-3.7-flash", "", {"use_moe_router_bias": False}, "use_moe_router_bias false is not supported"),
        ("step-3.7-flash", "", {"moe_layers_enum": "3,x"}, "moe_layers_enum must hold numbers with commas, not 'x'"),
        ("step-3.7-flash", "", {"attention_other_setting": {}}, "attention_type must be sliding_attention"),
        ("mimo-v2-flash", "", {"swa_num_key_value_heads": None}, "swa_num_key_value_heads is missing"),
        ("mimo-v2-flash", "", {"hybrid_layer_pattern": None}, "hybrid_layer_pattern is missing"),
        ("mimo-v2-flash", "", {"moe_layer_freq": None}, "moe_layer_freq is missing"),
        ("mimo-v2-flash", "", {"n_shared_experts": 1}, "n_shared_experts 1 is not supported"),
        ("command-a", "", {"sliding_window": None}, "sliding_window is missing"),
        ("ernie-4.5-vl-28b-a3b", "", {"moe_intermediate_size": [1536]}, "must list the columns of an expert for text"),
        ("ernie-4.5-vl-28b-a3b", "", {"moe_num_experts": [64, 32]}, "moe_num_experts has entries that differ"),
        ("ernie-4.5-vl-28b-a3b", "", {"moe_layer_end_index": [29, 20]}, "moe_layer_end_index has entries that differ"),
    ],
)
def test_what_is_not_known_is_refused_by_its_field(name: str, inner: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        changed(name, inner, **changes)
