"""Families whose layers keep states, lack cells or differ one by one: parameters as published, states as vLLM has them.

Totals are those of the checkpoints' safetensors where a card gives them, without layers of multi-token prediction and
without towers; else as rounded in the card, which is then told. Active ones count embedding and LM head unless told.
"""

from __future__ import annotations

from typing import Any

import pytest

from apex_opt.errors import InputError
from apex_opt.ir import Model, model_from_config
from apex_opt.ir.cells import Cut, GatedAttention, LatentMoeFfn, Replaced, Skipped

QWEN_NEXT: dict[str, Any] = {
    "model_type": "qwen3_next",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
QWEN_35: dict[str, Any] = {
    **QWEN_NEXT,
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 4096,
    "num_hidden_layers": 60,
    "vocab_size": 248320,
    "num_attention_heads": 32,
    "linear_num_value_heads": 64,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
    "mamba_ssm_dtype": "float32",
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 15,
}
QWEN_35_DENSE: dict[str, Any] = {
    **QWEN_35,
    "model_type": "qwen3_5_text",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "linear_num_value_heads": 48,
    "intermediate_size": 17408,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 16,
}
KIMI_LINEAR: dict[str, Any] = {
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "num_hidden_layers": 27,
    "vocab_size": 163840,
    "max_position_embeddings": 1048576,
    "num_attention_heads": 32,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "mla_use_nope": True,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [layer for layer in range(1, 27) if layer % 4],
        "head_dim": 128,
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
}
KIMI_K3: dict[str, Any] = {
    **KIMI_LINEAR,
    "hidden_size": 7168,
    "num_hidden_layers": 93,
    "num_attention_heads": 96,
    "q_lora_rank": 1536,
    "intermediate_size": 33792,
    "moe_intermediate_size": 3072,
    "num_experts": 896,
    "num_experts_per_token": 16,
    "num_shared_experts": 2,
    "routed_expert_hidden_size": 3584,
    "latent_moe_use_norm": True,
    "mla_use_output_gate": True,
    "attn_res_block_size": 12,
    "hidden_act": "situ",
    "linear_attn_config": {
        "full_attn_layers": [*range(4, 93, 4), 93],
        "kda_layers": [layer for layer in range(1, 93) if layer % 4],
        "head_dim": 128,
        "num_heads": 96,
        "short_conv_kernel_size": 4,
        "use_full_rank_gate": True,
        "gate_lower_bound": -5.0,
    },
}
NEMOTRON: dict[str, Any] = {
    "model_type": "nemotron_h",
    "vocab_size": 131072,
    "max_position_embeddings": 262144,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "n_shared_experts": 1,
    "mlp_hidden_act": "relu2",
}
NANO: dict[str, Any] = {
    **NEMOTRON,
    "hidden_size": 2688,
    "mamba_num_heads": 64,
    "num_hidden_layers": 52,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
}
SUPER: dict[str, Any] = {
    **NEMOTRON,
    "hidden_size": 4096,
    "mamba_num_heads": 128,
    "hybrid_override_pattern": (
        "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
    ),
    "moe_intermediate_size": 2688,
    "moe_latent_size": 1024,
    "moe_shared_expert_intermediate_size": 5376,
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
}
NEMOTRON_H: dict[str, Any] = {
    **NEMOTRON,
    "hidden_size": 8192,
    "head_dim": None,
    "attention_head_dim": 128,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 32768,
    "mamba_num_heads": 256,
    "ssm_state_size": 256,
    "hybrid_override_pattern": "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-",
}
NANO_V2: dict[str, Any] = {
    **NEMOTRON,
    "hidden_size": 4480,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 15680,
    "mamba_num_heads": 128,
    "mamba_head_dim": 80,
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
}
MAMBA2: dict[str, Any] = {
    "model_type": "mamba2",
    "hidden_size": 4096,
    "num_hidden_layers": 64,
    "vocab_size": 32768,
    "num_heads": 128,
    "head_dim": 64,
    "n_groups": 8,
    "state_size": 128,
    "conv_kernel": 4,
    "expand": 2,
    "use_conv_bias": True,
}
MAMBA: dict[str, Any] = {
    "model_type": "mamba",
    "hidden_size": 2560,
    "num_hidden_layers": 64,
    "vocab_size": 50280,
    "state_size": 16,
    "conv_kernel": 4,
    "intermediate_size": 5120,
    "time_step_rank": 160,
}
GRANITE: dict[str, Any] = {
    "model_type": "granitemoehybrid",
    "hidden_size": 4096,
    "num_hidden_layers": 40,
    "vocab_size": 100352,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 768,
    "shared_intermediate_size": 1536,
    "num_local_experts": 72,
    "num_experts_per_tok": 10,
    "mamba_n_heads": 128,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "layer_types": ["attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)],
}
GRANITE_TINY: dict[str, Any] = {
    **GRANITE,
    "hidden_size": 1536,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "shared_intermediate_size": 1024,
    "num_local_experts": 64,
    "num_experts_per_tok": 6,
    "mamba_n_heads": 48,
}
JAMBA: dict[str, Any] = {
    "model_type": "jamba",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "vocab_size": 65536,
    "max_position_embeddings": 262144,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "mamba_dt_rank": 256,
}
JAMBA_LARGE: dict[str, Any] = {
    **JAMBA,
    "hidden_size": 8192,
    "num_hidden_layers": 72,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "mamba_dt_rank": "auto",
}
MINIMAX: dict[str, Any] = {
    "model_type": "minimax_text_01",
    "hidden_size": 6144,
    "num_hidden_layers": 80,
    "vocab_size": 200064,
    "max_position_embeddings": 10240000,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9216,
    "num_local_experts": 32,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 0,
    "attn_type_list": ([0] * 7 + [1]) * 10,
}
LFM2: dict[str, Any] = {
    "model_type": "lfm2",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "vocab_size": 65536,
    "max_position_embeddings": 128000,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "conv_L_cache": 3,
    "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
}
LFM2_MOE: dict[str, Any] = {
    **LFM2,
    "model_type": "lfm2_moe",
    "num_hidden_layers": 24,
    "intermediate_size": 7168,
    "moe_intermediate_size": 1792,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_dense_layers": 2,
    "layer_types": ["full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)],
}


def read(config: dict[str, Any], **changes: Any) -> Model:
    return model_from_config(config | changes, "tiny", "tiny.json")


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        # Qwen3-Next-80B-A3B card: 80 B, 79 B without embedding; 3 B active, of which its report counts 3.9 in all
        (QWEN_NEXT, 79.67e9, 3.87e9),
        # Qwen3.5 cards: 397 B with 17 B active; 27 B
        (QWEN_35, 397e9, 17.35e9),
        (QWEN_35_DENSE, 27e9, 27e9),
        # Kimi-Linear card: 48 B with 3 B active; its safetensors hold 49.1 B
        (KIMI_LINEAR, 49.1e9, 3.48e9),
        # Kimi-K3 report (arXiv 2607.24653): 2.8 T; the experts and latents alone make up 2.72 + 0.005
        (KIMI_K3, 2.78e12, 105.4e9),
        # Nemotron-3 report: Nano 31.6 B with 3.6 active; Super 120.6 B with 12.7 active, both with embeddings
        (NANO, 31.6e9, 3.58e9),
        (SUPER, 120.6e9, 12.75e9),
        # Nemotron-H report: 56.3 B; Nemotron Nano 2 card: 8.89 B
        (NEMOTRON_H, 56.3e9, 56.3e9),
        (NANO_V2, 8.89e9, 8.89e9),
        # Mamba-Codestral-7B-v0.1 card: 7,285,403,648; mamba-2.8b: 2,768,345,600
        (MAMBA2, 7_285_403_648, 7_285_403_648),
        (MAMBA, 2_768_345_600, 2_768_345_600),
        # Granite 4.0 H cards: Small 32.2 B with 9 B active, Tiny 6.94 B
        (GRANITE, 32.2e9, 8.8e9),
        (GRANITE_TINY, 6.94e9, 1.46e9),
        # Jamba-1.5 cards: 51.57 B with 12 B active; 398.56 B with 94 B active
        (JAMBA, 51.57e9, 12.1e9),
        (JAMBA_LARGE, 398.56e9, 94.1e9),
        # MiniMax-Text-01 card: 456 B with 45.9 B active, without embedding and LM head of 1.23 B each
        (MINIMAX, 456.1e9, 45.9e9 + 2 * 1.229e9),
        # LFM2 cards: 1,170,340,608; 8.34 B with 1.56 B active
        (LFM2, 1_170_340_608, 1_170_340_608),
        (LFM2_MOE, 8.34e9, 1.56e9),
    ],
)
def test_parameters_are_as_published(config: dict[str, Any], total: float, active: float) -> None:
    model = read(config)
    assert model.parameters == pytest.approx(total, rel=0.005)
    assert model.active_parameters == pytest.approx(active, rel=0.005)


@pytest.mark.parametrize(
    ("config", "tp", "state", "draft"),
    [
        # Bytes per layer of `MambaStateShapeCalculator` of vLLM 0.20.2, as the specification counts them
        (QWEN_NEXT, 1, 3 * 8192 * 2 + 32 * 128 * 128 * 2, 8192 * 2),
        (QWEN_NEXT, 4, 3 * 2048 * 2 + 8 * 128 * 128 * 2, 2048 * 2),
        (QWEN_35, 8, 3 * 1536 * 2 + 8 * 128 * 128 * 4, 1536 * 2),  # "mamba_ssm_dtype": "float32"
        (KIMI_K3, 8, 3 * 3 * 1536 * 2 + 12 * 128 * 128 * 4, 3 * 1536 * 2),
        (NANO, 2, 3 * (2048 + 2 * 4 * 128) * 2 + 32 * 64 * 128 * 4, (2048 + 2 * 4 * 128) * 2),
        (GRANITE, 4, 3 * (2048 + 2 * 128) * 2 + 32 * 64 * 128 * 2, (2048 + 2 * 128) * 2),  # the only group is copied
        (JAMBA, 2, 4096 * (3 * 2 + 16 * 2), 0),
        (MINIMAX, 8, 8 * 128 * 128 * 2, 0),
        (LFM2, 2, 2 * 1024 * 2, 0),
    ],
)
def test_states_are_cut_and_kept_as_vllm_does(config: dict[str, Any], tp: int, state: int, draft: int) -> None:
    kept = [kept for run in read(config).runs for kept in run.block.attention.cache(Cut(heads=tp))]
    (found,) = {entry for entry in kept if entry.sequence_bytes()}
    assert (found.sequence_bytes(), found.sequence_bytes(2) - found.sequence_bytes()) == (state, 2 * draft)
    assert found.token_bytes(2) == 0


def kinds(model: Model) -> str:
    """Layers in short: what mixes tokens, "." where nothing does, each as often as it comes."""
    letters = {"GatedDelta": "d", "KimiDelta": "d", "Mamba2": "m", "Mamba1": "m", "LightningAttention": "l"}
    letters |= {"ShortConvolution": "c", "Skipped": ".", "Replaced": "r"}
    return "".join(letters.get(type(run.block.attention).__name__, "A") * run.count for run in model.runs)


def test_layers_are_in_the_order_of_the_file() -> None:
    assert kinds(read(QWEN_NEXT)) == kinds(read(QWEN_35))[:48] == "dddA" * 12
    assert kinds(read(QWEN_NEXT, full_attention_interval=3)) == "ddA" * 16
    assert kinds(read(KIMI_LINEAR)) == "dddA" * 6 + "ddA"
    assert kinds(read(NANO))[:9] == "m.m.mA.m."
    assert kinds(read(GRANITE)) == "mmmmmAmmmm" * 4
    assert kinds(read(JAMBA)) == "mmmmAmmm" * 4
    assert kinds(read(MINIMAX)) == "lllllllA" * 10
    assert kinds(read(LFM2)) == "ccAccAccAcAcAcAc"
    assert [run.block.is_moe for run in read(JAMBA).runs][:2] == [False, True]
    assert [run.block.is_moe for run in read(LFM2_MOE).runs][:2] == [False, True]


def test_layers_of_one_cell_have_one_norm_and_nothing_in_the_place_of_the_other() -> None:
    model = read(NANO)
    assert model.layers == 52
    assert {run.block.norm_count for run in model.runs} == {1}
    assert all(isinstance(run.block.attention, Skipped) != isinstance(run.block.ffn, Skipped) for run in model.runs)


def test_the_number_of_layers_is_that_of_the_list_where_a_file_tells_no_other() -> None:
    listed = {key: value for key, value in SUPER.items() if key != "hybrid_override_pattern"}
    kinds = {"M": "mamba", "E": "moe", "*": "attention"}
    letters = SUPER["hybrid_override_pattern"]
    assert read(listed, layers_block_type=[kinds[letter] for letter in letters]).runs == read(SUPER).runs


def test_gates_and_latent_experts_are_read() -> None:
    assert isinstance(read(QWEN_NEXT).runs[1].block.attention, GatedAttention)
    assert not isinstance(read(QWEN_NEXT, attn_output_gate=False).runs[1].block.attention, GatedAttention)
    moe = next(run.block.ffn for run in read(SUPER).runs if run.block.is_moe)
    assert isinstance(moe, LatentMoeFfn)
    assert (moe.latent, moe.latent_norm, moe.gated) == (1024, False, False)
    low_rank = KIMI_K3["linear_attn_config"] | {"use_full_rank_gate": False}
    saved = 7168 * 12288 - 128 * (7168 + 12288)
    assert read(KIMI_K3).parameters - read(KIMI_K3, linear_attn_config=low_rank).parameters == 69 * saved
    residuals = read(KIMI_K3).parameters - read(KIMI_K3, attn_res_block_size=None).parameters
    assert residuals == (93 * 4 + 2) * 7168


PRUNED: dict[str, Any] = {
    "model_type": "nemotron-nas",
    "hidden_size": 8192,
    "num_hidden_layers": 3,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "block_configs": [
        {"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": 2.625}},
        {"attention": {"no_op": True}, "ffn": {"ffn_mult": 5.25}},
        {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
    ],
}


def test_pruned_layers_have_fewer_heads_narrower_ffns_a_matrix_or_nothing() -> None:
    model = read(PRUNED)
    first, second, third = (run.block for run in model.runs)
    assert (first.attention.kv_heads, first.ffn.token_columns) == (8, 14336)
    assert (second.attention.skipped, second.ffn.token_columns, second.norm_count) == (True, 28672, 1)
    assert (third.attention, third.ffn) == (Replaced(hidden=8192), Skipped(hidden=8192))
    assert third.parameters == 8192 * 8192 + 8192


@pytest.mark.parametrize(
    ("config", "changes", "text"),
    [
        (QWEN_NEXT, {"layer_types": ["mamba"] * 48}, "layer_types may hold full_attention and linear_attention"),
        (
            QWEN_NEXT,
            {"linear_num_value_heads": 40},
            "linear_num_value_heads 40 is not a multiple of linear_num_key_heads",
        ),
        (QWEN_NEXT, {"linear_key_head_dim": None}, "linear_key_head_dim is missing"),
        (QWEN_35, {"mamba_ssm_dtype": "fp8"}, "mamba_ssm_dtype must be one of auto, bfloat16, float16, float32"),
        (KIMI_LINEAR, {"mla_use_nope": False}, "mla_use_nope False is not supported; supported: True"),
        (KIMI_LINEAR, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (KIMI_LINEAR, {"linear_attn_config": None}, "linear_attn_config is missing"),
        (
            KIMI_LINEAR,
            {"linear_attn_config": KIMI_LINEAR["linear_attn_config"] | {"kda_layers": [1]}},
            "linear_attn_config.kda_layers and full_attn_layers leave out layer 2",
        ),
        (KIMI_LINEAR, {"num_experts_per_token": 500}, "num_experts_per_token 500 is above num_experts 256"),
        (NANO, {"hybrid_override_pattern": "MX" * 26}, "hybrid_override_pattern may hold M and .*, not 'X'"),
        (NANO, {"num_hidden_layers": 50}, "hybrid_override_pattern has 52 entries for num_hidden_layers 50"),
        (NANO, {"mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu' is not supported; supported: relu2"),
        (NANO, {"mamba_num_heads": 60}, "mamba_num_heads 60 is not a multiple of n_groups 8"),
        (MAMBA2, {"num_heads": 64}, "num_heads 64 times head_dim 64 is 4096, but expand times hidden_size is 8192"),
        (GRANITE, {"layer_types": None}, "layer_types is missing"),
        (GRANITE, {"num_experts_per_tok": 80}, "num_experts_per_tok must be a whole number from 1 to 72"),
        (JAMBA, {"mamba_d_conv": 0}, "mamba_d_conv must be a whole number"),
        (MINIMAX, {"attn_type_list": [2] * 80}, "attn_type_list may hold 0"),
        (MINIMAX, {"attn_type_list": None}, "attn_type_list is missing"),
        (LFM2, {"conv_dim": 1024}, "conv_dim 1024 is not supported; supported: 2048"),
        (LFM2, {"full_attn_idxs": None}, "layer_types is missing, and so is full_attn_idxs"),
        (PRUNED, {"block_configs": None}, "block_configs is missing"),
        (
            PRUNED,
            {"block_configs": [{"attention": {"window_length": 128}, "ffn": {"no_op": True}}] * 3},
            r"block_configs\[0\].attention.window_length 128 is not supported",
        ),
        (
            PRUNED,
            {"block_configs": [{"attention": {"no_op": True}, "ffn": {"ffn_mult": "x"}}] * 3},
            r"block_configs\[0\].ffn.ffn_mult must be a number above 0",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_its_name(
    config: dict[str, Any], changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        read(config, **changes)
