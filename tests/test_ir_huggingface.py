"""Reading of Hugging Face configurations: families, layer patterns, quantisation, and every way to be wrong."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.errors import InputError
from apex_opt.ir import (
    SUPPORTED_MODEL_TYPES,
    Attention,
    DenseFfn,
    LatentAttention,
    Model,
    MoeFfn,
    Scheme,
    model_from_config,
    read_config,
)
from apex_opt.ir.huggingface import MAX_CONFIG_BYTES

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN_MOE: dict[str, Any] = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
MIXTRAL: dict[str, Any] = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
DEEPSEEK: dict[str, Any] = LLAMA | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 2,
}
GPT_OSS: dict[str, Any] = LLAMA | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "head_dim": 8,
    "attention_bias": True,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def read(config: dict[str, Any], **changes: Any) -> Model:
    return model_from_config(config | changes, "tiny", "tiny.json")


def family(model_type: str, architecture: str, **changes: Any) -> Model:
    return read(LLAMA, model_type=model_type, architectures=[architecture], **changes)


def counts(model: Model) -> list[int]:
    return [run.count for run in model.runs]


def moe_pattern(model: Model) -> list[bool]:
    return [run.block.is_moe for run in model.runs for _ in range(run.count)]


def windows(model: Model) -> list[int | None]:
    return [run.block.attention.window for run in model.runs for _ in range(run.count)]


# --- families -----------------------------------------------------------------------------------------------------


def test_a_plain_llama_is_one_run() -> None:
    model = read(LLAMA)
    attention = model.runs[0].block.attention
    assert (model.layers, len(model.runs)) == (6, 1)
    assert (attention.head_dim, attention.query_heads // attention.kv_heads, attention.window) == (8, 4, None)
    assert (attention.qkv_bias, attention.output_bias, attention.qk_norm) == (False, False, False)
    assert (model.dtype, model.weight_format, model.kv_format, model.source) == ("bf16", "bf16", None, "tiny.json")


def test_absent_or_null_kv_heads_and_head_dim_take_their_defaults() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    for model in (read(config), read(config, num_key_value_heads=None, head_dim=None)):
        assert (model.runs[0].block.attention.kv_heads, model.runs[0].block.attention.head_dim) == (8, 8)


def test_an_explicit_head_dim_need_not_divide_hidden() -> None:
    assert read(LLAMA, head_dim=10, hidden_size=65).runs[0].block.attention.matrices()[0].rows == 80


@pytest.mark.parametrize(
    ("model_type", "architecture", "extra", "expected"),
    [
        ("llama", "LlamaForCausalLM", {"attention_bias": True}, (True, True, False)),
        ("granite", "GraniteForCausalLM", {}, (False, False, False)),
        ("mistral", "MistralForCausalLM", {"attention_bias": False}, (False, False, False)),
        ("phi3", "Phi3ForCausalLM", {}, (False, False, False)),
        ("qwen2", "Qwen2ForCausalLM", {}, (True, False, False)),
        ("qwen3", "Qwen3ForCausalLM", {}, (False, False, True)),
        ("qwen3", "Qwen3ForCausalLM", {"attention_bias": True}, (True, True, True)),
    ],
)
def test_biases_and_norms_follow_the_family(
    model_type: str, architecture: str, extra: dict[str, Any], expected: tuple[bool, bool, bool]
) -> None:
    attention = family(model_type, architecture, **extra).runs[0].block.attention
    assert (attention.qkv_bias, attention.output_bias, attention.qk_norm) == expected


def test_mlp_bias_is_counted() -> None:
    assert read(LLAMA, mlp_bias=True).parameters == read(LLAMA).parameters + 6 * (96 + 96 + 64)


def test_mixtral_experts_have_the_width_of_the_ffn() -> None:
    ffn = read(MIXTRAL).runs[0].block.ffn
    assert ffn == MoeFfn(hidden=64, expert_intermediate=96, experts=4, experts_per_token=2)


def test_qwen2_moe_has_a_gated_shared_expert() -> None:
    model = read(
        QWEN_MOE,
        model_type="qwen2_moe",
        architectures=["Qwen2MoeForCausalLM"],
        shared_expert_intermediate_size=40,
    )
    ffn = model.runs[0].block.ffn
    assert isinstance(ffn, MoeFfn)
    assert (ffn.shared_intermediate, ffn.shared_gate) == (40, True)
    assert model.runs[0].block.attention.qkv_bias


def test_qwen15_moe_a27b_has_its_published_size() -> None:
    """14.3 B parameters, 2.7 B active (Qwen1.5-MoE model card)."""
    model = read(
        QWEN_MOE | {"head_dim": None},
        model_type="qwen2_moe",
        architectures=["Qwen2MoeForCausalLM"],
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=151936,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    )
    assert model.parameters == pytest.approx(14.316e9, rel=0.005)
    assert model.active_parameters == pytest.approx(2.69e9, rel=0.02)


def test_glm_45_air_has_its_published_size_and_a_dense_first_layer() -> None:
    """106 B parameters, 12 B active, without the multi-token-prediction layer (GLM-4.5 report)."""
    model = read(
        LLAMA,
        model_type="glm4_moe",
        architectures=["Glm4MoeForCausalLM"],
        hidden_size=4096,
        intermediate_size=10944,
        num_hidden_layers=46,
        num_attention_heads=96,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151552,
        attention_bias=True,
        use_qk_norm=False,
        n_routed_experts=128,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
    )
    assert counts(model) == [1, 45]
    assert isinstance(model.runs[0].block.ffn, DenseFfn)
    assert model.parameters == pytest.approx(106.85e9, rel=0.005)
    assert model.active_parameters == pytest.approx(12e9, rel=0.2)
    attention = model.runs[1].block.attention
    assert (attention.qkv_bias, attention.output_bias, attention.qk_norm) == (True, False, False)


def test_deepseek_has_latent_attention_and_dense_first_layers() -> None:
    model = read(DEEPSEEK)
    assert counts(model) == [2, 4]
    attention, ffn = model.runs[1].block.attention, model.runs[1].block.ffn
    assert attention == LatentAttention(
        hidden=64, query_heads=8, q_lora_rank=24, kv_lora_rank=16, nope_head_dim=12, rope_head_dim=4, v_head_dim=10
    )
    assert ffn == MoeFfn(
        hidden=64, expert_intermediate=24, experts=8, experts_per_token=2, shared_intermediate=24, router_bias=True
    )
    assert isinstance(model.runs[0].block.ffn, DenseFfn)


def test_kimi_k2_is_read_as_deepseek_v3() -> None:
    assert read(DEEPSEEK, model_type="kimi_k2") == read(DEEPSEEK)


def test_deepseek_v2_lite_has_its_published_size() -> None:
    """15.7 B parameters, 2.4 B active (DeepSeek-V2 report, appendix B): no compression of queries, no correction."""
    model = read(
        DEEPSEEK,
        model_type="deepseek_v2",
        architectures=["DeepseekV2ForCausalLM"],
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=27,
        num_attention_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        vocab_size=102400,
    )
    assert model.parameters == pytest.approx(15.706e9, rel=0.0005)
    assert model.active_parameters - model.embedding_parameters == pytest.approx(2.4e9, rel=0.03)
    assert {m.name: m.weights for m in model.runs[1].block.ffn.matrices()}["router"] == 64 * 2048


def test_moe_layer_freq_makes_every_nth_layer_sparse() -> None:
    assert moe_pattern(read(DEEPSEEK, moe_layer_freq=3, first_k_dense_replace=1)) == [False] * 3 + [True] + [False] * 2
    assert moe_pattern(read(DEEPSEEK, moe_layer_freq=2, first_k_dense_replace=0)) == [True, False] * 3


def test_gpt_oss_has_biases_sinks_and_alternating_windows() -> None:
    model = read(GPT_OSS)
    assert windows(model) == [128, None] * 3
    assert model.runs[1].block.attention == Attention(
        hidden=64, query_heads=8, kv_heads=2, head_dim=8, qkv_bias=True, output_bias=True, sinks=True
    )
    assert model.runs[0].block.ffn == MoeFfn(
        hidden=64, expert_intermediate=96, experts=4, experts_per_token=2, bias=True, router_bias=True
    )


def test_gpt_oss_alternates_where_its_file_does_not_spell_the_layers_out() -> None:
    assert windows(read(GPT_OSS, layer_types=None)) == windows(read(GPT_OSS))


def test_minimax_m2_norms_the_whole_width_of_query_and_key() -> None:
    model = read(MIXTRAL, model_type="minimax_m2", architectures=["MiniMaxM2ForCausalLM"], head_dim=16)
    attention, ffn = model.runs[0].block.attention, model.runs[0].block.ffn
    assert (attention.qk_norm, attention.qk_norm_whole) == (True, True)
    assert {m.name: m.weights for m in attention.matrices()}["qk norm"] == 10 * 16
    assert ffn == MoeFfn(hidden=64, expert_intermediate=96, experts=4, experts_per_token=2, router_bias=True)


def test_architectures_stand_in_for_a_missing_model_type() -> None:
    config = {key: value for key, value in QWEN_MOE.items() if key != "model_type"}
    assert read(config).is_moe


def test_a_text_config_is_read_in_place_of_the_whole() -> None:
    inner = {key: value for key, value in LLAMA.items() if key not in ("architectures", "torch_dtype")}
    wrapper = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "hidden_size": 7,
        "torch_dtype": "float16",
        "quantization_config": {"quant_method": "fp8"},
        "text_config": inner | {"quantization_config": None},
    }
    model = read(wrapper)
    assert (model.hidden, model.dtype, model.weight_format) == (64, "fp16", "fp8")


# --- layers that differ -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_local_experts", "n_routed_experts"])
def test_experts_are_counted_by_whatever_name_the_file_was_saved_with(name: str) -> None:
    """`transformers` 5 saves those of Qwen3 as num_local_experts; a default must not stand for them."""
    renamed = {key: value for key, value in QWEN_MOE.items() if key != "num_experts"} | {name: 8}
    assert read(renamed).runs == read(QWEN_MOE).runs
    inner = renamed | {"model_type": "qwen3_vl_moe_text"}
    whole = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"}
    assert read(whole | {"text_config": inner}).runs == read(QWEN_MOE).runs
    with pytest.raises(InputError, match=f"{name} must be a whole number from 1"):
        read(renamed | {name: "8"})


@pytest.mark.parametrize("whole", [True, False])
def test_the_whole_file_says_first_whether_the_head_is_the_embedding(whole: bool) -> None:
    file = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "tie_word_embeddings": whole}
    for inner in (True, False):
        model = read(file | {"text_config": LLAMA | {"tie_word_embeddings": inner}})
        assert model.tied_embeddings is whole


def test_mlp_only_layers_are_dense() -> None:
    model = read(QWEN_MOE, mlp_only_layers=[0, 3])
    assert moe_pattern(model) == [False, True, True, False, True, True]
    assert counts(model) == [1, 2, 1, 2]


def test_decoder_sparse_step_makes_every_nth_layer_sparse() -> None:
    assert moe_pattern(read(QWEN_MOE, decoder_sparse_step=3)) == [False, False, True] * 2


def test_first_k_dense_replace_makes_leading_layers_dense() -> None:
    model = read(QWEN_MOE, first_k_dense_replace=2)
    assert moe_pattern(model) == [False] * 2 + [True] * 4
    sparse, dense = model.runs[1].block, model.runs[0].block
    assert model.parameters == 2 * dense.parameters + 4 * sparse.parameters + 2 * 6400 + 64


def test_layer_types_mix_sliding_and_full_attention() -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    model = read(LLAMA, layer_types=kinds, sliding_window=128)
    assert windows(model) == [128, 128, None] * 2
    assert counts(model) == [2, 1, 2, 1]


def test_sliding_window_pattern_gives_full_attention_to_every_nth_layer() -> None:
    assert windows(read(LLAMA, sliding_window_pattern=3, sliding_window=128)) == [128, 128, None] * 2


def test_max_window_layers_gives_full_attention_to_the_leading_layers() -> None:
    qwen = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 4}
    model = family("qwen2", "Qwen2ForCausalLM", **qwen)
    assert windows(model) == [None] * 4 + [128] * 2
    assert counts(model) == [4, 2]


def test_windows_and_experts_that_change_at_different_layers_make_more_runs() -> None:
    model = read(QWEN_MOE, first_k_dense_replace=1, use_sliding_window=True, sliding_window=128, max_window_layers=3)
    assert counts(model) == [1, 2, 3]


@pytest.mark.parametrize(
    ("model_type", "architecture", "extra", "expected"),
    [
        ("mistral", "MistralForCausalLM", {"sliding_window": 128}, 128),
        ("mistral", "MistralForCausalLM", {"sliding_window": None}, None),
        ("mixtral", "MixtralForCausalLM", {"sliding_window": 128}, 128),
        ("qwen2", "Qwen2ForCausalLM", {"sliding_window": 128, "use_sliding_window": False}, None),
        ("qwen2", "Qwen2ForCausalLM", {"sliding_window": 128}, None),
    ],
)
def test_a_bare_window_counts_where_the_family_has_one(
    model_type: str, architecture: str, extra: dict[str, Any], expected: int | None
) -> None:
    config = MIXTRAL if model_type == "mixtral" else LLAMA
    model = read(config, model_type=model_type, architectures=[architecture], **extra)
    assert windows(model) == [expected] * 6


# --- number formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bf16"),
        ({"torch_dtype": "float16"}, "fp16"),
        ({"torch_dtype": "torch.float16"}, "fp16"),
        ({"torch_dtype": "float32"}, "bf16"),
        ({"torch_dtype": None}, "bf16"),
        ({"torch_dtype": None, "dtype": "float16"}, "fp16"),
    ],
)
def test_dtype_is_read_from_either_field(fields: dict[str, Any], dtype: str) -> None:
    model = read(LLAMA, **fields)
    assert (model.dtype, model.weight_format) == (dtype, dtype)


FLOAT8 = {"num_bits": 8, "type": "float"}
FLOAT4 = {"num_bits": 4, "type": "float", "group_size": 16}


INT8 = {"num_bits": 8, "type": "int"}


def compressed(weights: object, inputs: object, **extra: Any) -> dict[str, Any]:
    group = {"weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **extra}


@pytest.mark.parametrize(
    ("section", "weights", "kv"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "fp8", None),
        ({"quant_method": "fbgemm_fp8"}, "fp8", None),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "fp8", "fp8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "w4a16", None),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "w8a16", None),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "w4a16g32", None),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, "w4a16g64", None),
        ({"quant_method": "gptq", "bits": 4, "group_size": 100}, "w4a16g64", None),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "w8a16g32", None),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, "w4a16g64", None),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, "nvfp4", None),
        ({"quant_algo": "FP8", "kv_cache_scheme": "FP8", "producer": {"name": "modelopt"}}, "fp8", "fp8"),
        ({"producer": {}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}, "nvfp4", "fp8"),
        (compressed(FLOAT4, FLOAT4), "nvfp4", None),
        (compressed(FLOAT4 | {"group_size": 32}, None), "mxfp4", None),
        (compressed(FLOAT8 | {"group_size": 32}, FLOAT8 | {"group_size": 32}), "mxfp8", None),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, "mxfp8", None),
        (compressed({"num_bits": 4, "type": "int", "group_size": 32}, None), "w4a16g32", None),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "w4a16", None),
        ({"quant_method": "awq", "w_bit": 4}, "w4a16", None),
        (compressed(FLOAT8, FLOAT8), "fp8", None),
        (compressed(FLOAT8, FLOAT8, kv_cache_scheme=FLOAT8), "fp8", "fp8"),
        (compressed({"num_bits": 4, "type": "int", "group_size": 128}, None), "w4a16", None),
        (compressed({"num_bits": 8, "type": "int", "group_size": None}, None), "w8a16", None),
        (compressed(FLOAT8, None), "w8a16", None),
        (compressed(INT8, INT8), "w8a8", None),
        (compressed(FLOAT4, None), "w4a16g32", None),
        ({"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": FLOAT8}, "bf16", "fp8"),
        (None, "bf16", None),
    ],
)
def test_quantisation_sections_become_formats(section: object, weights: str, kv: str | None) -> None:
    model = read(LLAMA, quantization_config=section)
    assert (model.weight_format, model.kv_format, model.dtype) == (weights, kv, "bf16")


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported; supported: fp8"),
        ({}, "quantization_config.quant_method is missing"),
        ({"quant_method": 8}, "quantization_config.quant_method must be text, not 8"),
        ("fp8", "quantization_config must be an object, not 'fp8'"),
        ({"quant_method": "gptq"}, "quantization_config.bits is missing"),
        ({"quant_method": "gptq", "bits": 3}, "bits 3 is not supported; supported: 4 and 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "group_size 16 is not supported; .* 32 and above"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 8}, "group_size 8 is not supported; .* 32 and above"),
        ({"quant_method": "gptq", "bits": 4, "group_size": True}, "group_size must be a whole number .* not true"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8"}, "quant_algo must be FP8, .* not 'W4A8'"),
        ({"quant_method": "modelopt", "quant_algo": ["FP8"]}, r"config\.quant_algo must be text, not \['FP8'\]$"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "group_size 32 is not supported"),
        ({"quant_method": "fp8", "ignore": "lm_head"}, "quantization_config.ignore must be a list, not 'lm_head'"),
        ({"quant_method": "fp8", "ignore": ["lm_head", 3]}, "quantization_config.ignore must hold names, not 3"),
        ({"quant_method": "fp8", "ignore": ["re:("]}, r"ignore holds 're:\(', which cannot be matched \(missing"),
        (compressed(FLOAT8, FLOAT8, kv_cache_scheme="INT8"), "kv_cache_scheme must be FP8, not 'INT8'"),
        (compressed(FLOAT4 | {"group_size": 32}, FLOAT4), "or of 4 bits in groups of 16"),
        ({"quant_method": "compressed-tensors"}, "config_groups is missing"),
        ({"quant_method": "compressed-tensors", "config_groups": None}, "config_groups is missing"),
        ({"quant_method": "compressed-tensors", "config_groups": []}, "config_groups must be an object"),
        (compressed(None, None), "config_groups.group_0 has no weights"),
        (compressed({"num_bits": 4, "type": "int"}, {"num_bits": 8, "type": "int"}), "group_0 must have 8-bit weights"),
        (compressed({"num_bits": 4, "type": "int"}, FLOAT8), "group_0 must have 8-bit weights"),
        (compressed(FLOAT8 | {"group_size": 32}, FLOAT8), "group_0 must have 8-bit weights"),
        (
            compressed({"num_bits": 4, "type": "float"}, None),
            "'float' is supported with num_bits 8, or with num_bits 4",
        ),
        (compressed(FLOAT8, FLOAT8, kv_cache_scheme={"num_bits": 4, "type": "float"}), "kv_cache_scheme.num_bits 4"),
        (compressed(FLOAT8, FLOAT8, kv_cache_scheme={"num_bits": 8, "type": "int"}), "num_bits 8 of type 'int'"),
        (compressed(FLOAT8, FLOAT8, kv_cache_quant_algo="INT8"), "kv_cache_quant_algo must be FP8, not 'INT8'"),
    ],
)
def test_quantisation_sections_we_cannot_serve_are_refused(section: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        read(LLAMA, quantization_config=section)


# --- what a number format covers ----------------------------------------------------------------------------------


def covered(model: Model) -> list[tuple[bool, ...]]:
    """Per layer: attention, its output projection, FFN or routed experts, shared FFN."""
    rows = []
    for run in model.runs:
        attention, ffn = run.block.attention, run.block.ffn
        own, shared = (
            min((m.quantised for m in matrices if m.quantised is not None), default=1)
            for matrices in ((ffn.routed(), ffn.dense.matrices()) if ffn.dense else (ffn.routed(), ()))
        )
        own, shared = (own, shared) if ffn.experts else (shared, 1)
        parts = attention.quantised, attention.output_quantised, own, shared
        rows += [tuple(part > 0 for part in parts)] * run.count
    return rows


def modelopt(*names: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": list(names)}


ALL = (True, True, True, True)


@pytest.mark.parametrize(
    "section",
    [
        None,
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "fp8", "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]},
        {
            "quant_method": "fp8",
            "modules_to_not_convert": ["model.layers.0.input_layernorm", "model.layers.3.mlp.gate"],
        },
        modelopt("lm_head", "model.embed_tokens", "*.mlp.gate", "vision_tower*", "mtp.layers.0*"),
        compressed(FLOAT8, FLOAT8, ignore=["lm_head", "re:.*mlp.gate$", "re:visual.*"]),
    ],
)
def test_a_section_that_leaves_out_no_matrix_of_a_block_covers_all(section: object) -> None:
    assert covered(read(DEEPSEEK, quantization_config=section)) == [ALL] * 6


@pytest.mark.parametrize(
    ("names", "layers", "expected"),
    [
        (["model.layers.3.self_attn*"], {3}, (False, False, True, True)),
        (["model.layers.3.self_attn"], {3}, (False, False, True, True)),
        (["language_model.model.layers.3*"], {3}, (False, False, False, False)),
        (["model.language_model.layers.3.mlp.shared_experts*"], {3}, (True, True, True, False)),
        (["model.layers.3.self_attn.q_a_proj", "model.layers.3.self_attn.kv_b_proj"], {3}, (False, True, True, True)),
        (["model.layers.3.self_attn.o_proj"], {3}, (True, False, True, True)),
        (["model.layers.3.mlp.experts.*.down_proj"], {3}, (True, True, False, True)),
        (["model.layers.*.self_attn"], set(range(6)), (False, False, True, True)),
        (["self_attn"], set(range(6)), (False, False, True, True)),
        (["*.mlp.shared_experts.*"], {2, 3, 4, 5}, (True, True, True, False)),
        (["re:.*self_attn.*"], set(range(6)), (False, False, True, True)),
        (["re:.*layers\\.3\\..*shared_experts.*"], {3}, (True, True, True, False)),
        (["re:language_model.model.layers.3.mlp.experts"], {3}, (True, True, False, True)),
        (["re:.*mlp\\.(gate|up|gate_up|down)_proj.*"], {0, 1}, (True, True, False, True)),
        (["model.layers.30.self_attn*", "model.layers.3"], {3}, (False, False, False, False)),
    ],
)
def test_modules_left_out_are_found_by_name_glob_and_expression(
    names: list[str], layers: set[int], expected: tuple[bool, ...]
) -> None:
    rows = [expected if layer in layers else ALL for layer in range(6)]
    assert covered(read(DEEPSEEK, quantization_config=modelopt(*names))) == rows
    for key in ("ignore", "modules_to_not_convert"):
        section = compressed(FLOAT8, FLOAT8, **{key: names})
        assert covered(read(DEEPSEEK, quantization_config=section)) == rows


def test_layers_that_are_quantised_differently_make_several_runs() -> None:
    model = read(LLAMA, quantization_config=modelopt("model.layers.0.mlp*", "model.layers.5.self_attn.v_proj"))
    assert counts(model) == [1, 4, 1]
    assert covered(model) == [(True, True, False, True), *[ALL] * 4, (False, True, True, True)]


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (MIXTRAL, ["*.block_sparse_moe.experts.*"]),
        (QWEN_MOE, ["model.layers.*.mlp.experts"]),
        (LLAMA | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}, ["re:.*gate_up_proj"]),
    ],
)
def test_families_name_their_matrices_differently(config: dict[str, Any], names: list[str]) -> None:
    assert covered(read(config, quantization_config=modelopt(*names))) == [(True, True, False, True)] * 6


@pytest.mark.parametrize("listed", [["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"], []])
def test_mxfp4_covers_routed_experts_alone(listed: list[str]) -> None:
    section = {"quant_method": "mxfp4", "modules_to_not_convert": listed}
    assert covered(read(GPT_OSS, quantization_config=section)) == [(False, False, True, True)] * 6
    assert covered(read(DEEPSEEK, quantization_config=section))[0] == (False, False, False, True)
    assert covered(read(DEEPSEEK, quantization_config=section))[5] == (False, False, True, False)


def test_targets_that_are_named_are_the_only_ones_covered() -> None:
    group = {"weights": FLOAT8, "input_activations": FLOAT8}
    named = group | {"targets": ["re:.*mlp\\.experts.*"]}
    section = {"quant_method": "compressed-tensors", "config_groups": {"a": named}}
    rows = covered(read(DEEPSEEK, quantization_config=section))
    assert rows == [(False, False, False, True)] * 2 + [(False, False, True, False)] * 4
    section["config_groups"]["b"] = group | {"targets": ["Linear"]}  # type: ignore[index]
    assert covered(read(DEEPSEEK, quantization_config=section)) == [ALL] * 6


def test_a_section_that_quantises_the_cache_alone_leaves_nothing_out() -> None:
    section = {"quant_method": "compressed-tensors", "kv_cache_scheme": FLOAT8, "ignore": ["re:.*self_attn.*"]}
    assert covered(read(DEEPSEEK, quantization_config=section)) == [ALL] * 6


def test_a_long_list_of_modules_is_read_layer_by_layer() -> None:
    layers = 2000
    names = [f"model.layers.{n}.self_attn.{part}_proj" for n in range(0, layers, 2) for part in "qkvo"]
    model = read(LLAMA, num_hidden_layers=layers, quantization_config=modelopt(*names))
    assert [row[0] for row in covered(model)] == [False, True] * (layers // 2)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "told"),
    [
        ("qwen9", "near it: qwen"),
        ("mixtrel", "near it: mixtral"),
        ("perceiver", "docs/models.md lists"),
        ("ouro", "'ouro' is not supported; docs/models.md lists"),
        pytest.param("a" * 5000, "docs/models.md lists", id="long"),
    ],
)
def test_other_families_are_refused_with_those_near(model_type: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        read(LLAMA, model_type=model_type)
    message = str(caught.value)
    assert f"model_type '{model_type[:50]}" in message
    assert told in message
    assert "\n" not in message
    assert len(message) < 400


def test_every_family_is_told_of_in_the_documents() -> None:
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    table = text[text.index("## Families") : text.index("## Defaults")]
    assert not [name for name in SUPPORTED_MODEL_TYPES if not re.search(rf"\b{name}\b", table)]


@pytest.mark.parametrize("architecture", ["LlamaModel", "LlamaForSequenceClassification"])
def test_models_that_generate_no_text_are_refused(architecture: str) -> None:
    with pytest.raises(InputError, match=f"architectures '{architecture}' generates no text"):
        read(LLAMA, architectures=[architecture])


DIMENSIONS = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]


@pytest.mark.parametrize("key", [*DIMENSIONS, "max_position_embeddings"])
def test_a_missing_field_is_named(key: str) -> None:
    with pytest.raises(InputError, match=rf"^tiny\.json: {key} is missing$"):
        read({name: value for name, value in LLAMA.items() if name != key})


@pytest.mark.parametrize("key", [*DIMENSIONS, "max_position_embeddings", "num_key_value_heads", "head_dim"])
@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        True,
        False,
        4096.0,
        float("nan"),
        float("inf"),
        "64",
        [64],
        {},
        2**31 + 1,
        10**30,
        pytest.param(10**6000, id="huge"),
    ],
)
def test_a_dimension_that_is_no_count_is_named(key: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^tiny\.json: {key} must be a whole number from 1 to \d+, not "):
        read(LLAMA, **{key: value})


@pytest.mark.parametrize(
    ("config", "changes", "text"),
    [
        (LLAMA, {"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
        (LLAMA, {"hidden_size": 65}, "hidden_size 65 is not a multiple of num_attention_heads 8; give head_dim"),
        (LLAMA, {"num_hidden_layers": 4_097}, "num_hidden_layers must be a whole number from 1 to 4096, not 4097"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, not 'yes'"),
        (LLAMA, {"tie_word_embeddings": 10**6000}, "tie_word_embeddings must be true or false"),
        (LLAMA, {"vocab_size": True}, "vocab_size must be a whole number from 1 to 2147483648, not true$"),
        (LLAMA, {"attention_bias": 1}, "attention_bias must be true or false, not 1"),
        (LLAMA, {"torch_dtype": "int8"}, "torch_dtype must be one of bfloat16, float16, float32, not 'int8'"),
        (LLAMA, {"dtype": 16}, "dtype must be text, not 16"),
        (LLAMA, {"sliding_window": -1}, "sliding_window must be a whole number from 0"),
        (LLAMA, {"layer_types": "full"}, "layer_types must be a list, not 'full'"),
        (LLAMA, {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers 6"),
        (LLAMA, {"layer_types": ["linear_attention"] * 6}, "layer_types may hold .*, not 'linear_attention'"),
        (LLAMA, {"layer_types": [3] * 6}, "layer_types may hold .*, not 3"),
        (LLAMA, {"layer_types": ["sliding_attention"] * 6}, "but sliding_window is missing or switched off"),
        (LLAMA, {"sliding_window_pattern": "LLLG"}, "sliding_window_pattern must be a whole number"),
        (LLAMA, {"model_type": None, "architectures": None}, "model_type is missing"),
        (LLAMA, {"model_type": None, "architectures": ["PerceiverModel"]}, "model_type is missing"),
        (LLAMA, {"model_type": 5}, "model_type must be text, not 5"),
        (LLAMA, {"text_config": LLAMA, "model_type": 10**18}, "model_type must be text, not 10{18}$"),
        (LLAMA, {"text_config": LLAMA, "model_type": True}, "model_type must be text, not true"),
        (LLAMA, {"text_config": LLAMA, "architectures": 3.5}, "architectures must be a list of names, not 3.5"),
        (LLAMA, {"audio_config": {"model_type": [[]]}}, r"audio_config.model_type must be text, not \[\[\]\]"),
        (LLAMA, {"vision_config": {"model_type": {}}}, "vision_config.model_type must be text, not {}"),
        (
            {"model_type": "qwen3_vl", "text_config": LLAMA | {"model_type": None, "architectures": None}},
            {},
            r"\(text_config\): model_type is missing; by the file around it give 'qwen3_vl_text'$",
        ),
        (
            LLAMA,
            {"num_hidden_layers": 10**30},
            r"^\S+ num_hidden_layers must be a whole number from 1 to 4096, not 10{30}$",
        ),
        (
            MIXTRAL,
            {"num_hidden_layers": 10**9},
            r"^\S+ num_hidden_layers must be a whole number from 1 to 4096, not 10{9}$",
        ),
        (QWEN_MOE | {"intermediate_size": None}, {"num_hidden_layers": 10**9}, r"to 4096, not 10{9}$"),
        (LLAMA, {"architectures": "Llama"}, "architectures must be a list of names"),
        (LLAMA, {"architectures": [1]}, "architectures must be a list of names"),
        (LLAMA, {"text_config": [1]}, "text_config must be an object"),
        (LLAMA, {"text_config": {"model_type": "perceiver"}}, r"\(text_config\): model_type 'perceiver' is not"),
        (MIXTRAL, {"num_experts_per_tok": 5}, "num_experts_per_tok 5 is above num_local_experts 4"),
        (MIXTRAL, {"num_experts_per_tok": 0}, "num_experts_per_tok must be a whole number from 1"),
        (MIXTRAL, {"num_local_experts": None}, "num_local_experts is missing"),
        (QWEN_MOE, {"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        (QWEN_MOE, {"mlp_only_layers": 3}, "mlp_only_layers must be a list, not 3"),
        (QWEN_MOE, {"mlp_only_layers": [6]}, "mlp_only_layers entry must be a whole number from 0 to 5, not 6"),
        (QWEN_MOE, {"mlp_only_layers": [[]]}, "mlp_only_layers entry must be a whole number"),
        (QWEN_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number from 1"),
        (QWEN_MOE, {"first_k_dense_replace": -1}, "first_k_dense_replace must be a whole number from 0"),
        (QWEN_MOE, {"model_type": "qwen2_moe"}, "shared_expert_intermediate_size is missing"),
        (DEEPSEEK, {"kv_lora_rank": None}, "kv_lora_rank is missing"),
        (DEEPSEEK, {"q_lora_rank": 0}, "q_lora_rank must be a whole number from 1"),
        (DEEPSEEK, {"attention_bias": True}, "attention_bias true is not supported with latent attention"),
        (DEEPSEEK, {"moe_layer_freq": [0, 1]}, "moe_layer_freq must be a whole number from 1"),
        (
            GPT_OSS,
            {"sliding_window": 10**30},
            r"^\S+ sliding_window must be a whole number from 0 to 2147483648, not 10{30}$",
        ),
        (GPT_OSS, {"sliding_window": None}, "but sliding_window is missing or switched off"),
    ],
)
def test_a_bad_field_is_named_with_its_value(config: dict[str, Any], changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        read(config, **changes)
    assert str(caught.value).startswith("tiny.json")
    assert "\n" not in str(caught.value)


def test_all_faults_of_a_file_come_together() -> None:
    with pytest.raises(InputError) as caught:
        read(LLAMA, hidden_size=-1, vocab_size=True, num_key_value_heads=3, torch_dtype="int4")
    message = str(caught.value)
    for name in ("hidden_size", "vocab_size", "num_key_value_heads", "torch_dtype"):
        assert name in message


def test_more_than_five_faults_are_counted() -> None:
    with pytest.raises(InputError, match=r"; and 1 more$"):
        model_from_config({"model_type": "llama"}, "x", "x.json")


# --- files --------------------------------------------------------------------------------------------------------


def test_a_file_and_its_folder_give_the_same_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    model = read_config(folder)
    assert model == read_config(folder / "config.json")
    assert (model.name, model.source) == ("my-llama", str(folder / "config.json"))


def test_a_quantisation_file_beside_the_config_is_read_where_the_config_has_no_section(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK))
    algo = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["*.self_attn*"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": algo}))
    model = read_config(tmp_path)
    assert (model.weight_format, model.kv_format) == ("nvfp4", "fp8")
    assert covered(model) == [(False, False, True, True)] * 6
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK | {"quantization_config": {"quant_method": "fp8"}}))
    assert read_config(tmp_path).weight_format == "fp8"


@pytest.mark.parametrize("filename", ["small.config.json", "small.json"])
def test_a_file_of_another_name_names_the_model(tmp_path: Path, filename: str) -> None:
    (tmp_path / filename).write_text("\ufeff" + json.dumps(LLAMA), encoding="utf-8")
    assert read_config(tmp_path / filename).name == "small"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b'{"a": 1,\n oops}', "not JSON at line 2 column 2"),
        (b"[1, 2]", "holds a list, not an object"),
        (b"3", "holds a number, not an object"),
        (b"null", "holds null, not an object"),
        (b"\x80\x02\xff", "line 1 is not UTF-8 text"),
        pytest.param(b'{"hidden_size": ' + b"9" * 5000 + b"}", "too many digits", id="digits"),
        pytest.param(b'{"a": ' + b"[" * 100_000, "nested too deeply", id="deep"),
        pytest.param(
            b" " * (MAX_CONFIG_BYTES + 1),
            r"above the limit of 16,777,216; give a config\.json",
            id="large",
        ),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=text) as caught:
        read_config(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_with_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file; give a config\.json"):
        read_config(tmp_path / "config.json")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the folder holds no config\.json"):
        read_config(tmp_path)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        read_config(tmp_path)
    with pytest.raises(InputError, match=r"the folder holds no config\.json"):
        read_config(tmp_path / "config.json")


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        read_config(tmp_path)


def test_a_name_too_long_for_the_file_system_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_config(Path("x" * 5000))


# --- properties ---------------------------------------------------------------------------------------------------


@given(
    head_dim=st.integers(1, 64),
    kv_heads=st.integers(1, 16),
    group=st.integers(1, 12),
    hidden=st.integers(1, 5000),
    intermediate=st.integers(1, 20000),
    layers=st.integers(2, 200),  # one alone is refused as a draft head
    vocab=st.integers(1, 200_000),
    tied=st.booleans(),
    bias=st.booleans(),
)
def test_parameters_are_the_sum_of_the_checkpoint_tensors(
    head_dim: int,
    kv_heads: int,
    group: int,
    hidden: int,
    intermediate: int,
    layers: int,
    vocab: int,
    tied: bool,
    bias: bool,
) -> None:
    """The tensors of a Llama checkpoint, listed by shape."""
    heads = kv_heads * group
    model = read(
        LLAMA,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        attention_bias=bias,
    )
    shapes = [(vocab, hidden), (hidden,)]
    if not tied:
        shapes.append((vocab, hidden))
    for _ in range(layers):
        shapes += [(heads * head_dim, hidden), (kv_heads * head_dim, hidden), (kv_heads * head_dim, hidden)]
        shapes += [(hidden, heads * head_dim)]
        shapes += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate), (hidden,), (hidden,)]
        if bias:
            shapes += [(heads * head_dim,), (kv_heads * head_dim,), (kv_heads * head_dim,), (hidden,)]
    total = 0
    for shape in shapes:
        size = 1
        for extent in shape:
            size *= extent
        total += size
    assert model.parameters == model.active_parameters == total
    assert model.weight_bytes() == 2 * total


WORDS = ["", "fp8", "gptq", "awq", "mxfp4", "modelopt", "NVFP4", "compressed-tensors", "float", "int", "Linear"]
WORDS += ["full_attention", "a\nb", "re:[", "re:.*", "*"]
LEAF = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300) | st.integers(),
    st.floats(),
    st.sampled_from(WORDS),
)
INNER_KEYS = ["quant_method", "bits", "group_size", "quant_algo", "config_groups", "kv_cache_scheme", "weights"]
INNER_KEYS += ["ignore", "exclude_modules", "targets", "quantization"]
GROUP = LEAF | st.dictionaries(
    st.sampled_from([*INNER_KEYS, "input_activations", "num_bits", "type"]), LEAF, max_size=3
)
JSON = GROUP | st.lists(LEAF, max_size=3) | st.dictionaries(st.sampled_from(INNER_KEYS), GROUP, max_size=4)
KEYS = sorted(
    {
        *LLAMA,
        *QWEN_MOE,
        *DEEPSEEK,
        "layer_types",
        "sliding_window",
        "use_sliding_window",
        "mlp_only_layers",
        "text_config",
    }
    | {"quantization_config", "max_window_layers", "decoder_sparse_step", "first_k_dense_replace", "dtype"}
)


@given(
    st.sampled_from([LLAMA, QWEN_MOE, MIXTRAL, DEEPSEEK, GPT_OSS]),
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3),
)
def test_whatever_a_field_holds_the_answer_is_a_model_or_one_line(
    config: dict[str, Any], changes: dict[str, Any]
) -> None:
    try:
        model = read(config, **changes)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert model.parameters > 0


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (None, None),
        ({"quant_method": "fp8"}, Scheme(method="fp8")),
        ({"quant_method": "fp8", "weight_block_size": [128, 64]}, Scheme(method="fp8", block=(128, 64))),
        ({"quant_method": "fbgemm_fp8"}, Scheme(method="fbgemm_fp8")),
        ({"quant_algo": "FP8"}, Scheme(method="modelopt")),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, Scheme(method="modelopt_fp4", group=16)),
        ({"quant_method": "mxfp4"}, None),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, Scheme(method="gptq", group=128)),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, Scheme(method="gptq")),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, Scheme(method="awq", group=64)),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}, None),
    ],
)
def test_the_scheme_tells_the_method_and_what_shares_a_scale(section: Any, expected: Scheme | None) -> None:
    assert read(LLAMA, quantization_config=section).scheme == expected


@pytest.mark.parametrize("structure", [[128, 128], "128x128"])
def test_the_scheme_of_compressed_tensors_is_that_of_its_groups(structure: Any) -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": structure}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "type": "float"}}
    section = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    scheme = read(LLAMA, quantization_config=section).scheme
    assert scheme == Scheme(method="compressed-tensors", block=(128, 128))
    packed = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}}
    section = {"quant_method": "compressed-tensors", "config_groups": {"group_0": packed}}
    assert read(LLAMA, quantization_config=section).scheme == Scheme(method="compressed-tensors", group=128)


@pytest.mark.parametrize("block", [128, [128], [128, 0], [128, True], "128", "0x128x1", {"a": 1}])
def test_a_block_is_two_whole_numbers(block: Any) -> None:
    with pytest.raises(InputError, match=r"weight_block_size must be two whole numbers"):
        read(LLAMA, quantization_config={"quant_method": "fp8", "weight_block_size": block})


@pytest.mark.parametrize(
    ("tower", "heads"), [({"num_attention_heads": 16}, 16), ({"vt_num_attention_heads": 8}, 8), ({}, 0), (None, None)]
)
def test_a_tower_that_reads_images_is_told_even_where_its_heads_are_not(
    tower: dict[str, Any] | None, heads: int | None
) -> None:
    own = {} if tower is None else {"vision_config": tower}
    config = {"model_type": "llava", "text_config": LLAMA, **own}
    assert model_from_config(config, "tiny", "tiny.json").tower_heads == heads


@pytest.mark.parametrize(
    ("stated", "layers"),
    [
        ({}, 0),
        ({"num_nextn_predict_layers": 1}, 1),
        ({"num_nextn_predict_layers": 0}, 0),
        ({"mtp_num_hidden_layers": 1}, 1),
        ({"num_mtp_modules": 3}, 3),
        ({"num_nextn_predict_layers": None}, 0),
    ],
)
def test_layers_that_make_drafts_are_told_by_any_of_their_names(stated: dict[str, Any], layers: int) -> None:
    assert read(LLAMA, **stated).mtp_layers == layers


@pytest.mark.parametrize("value", ["8", [8], -1, 8.5, {}, True, 4097])
@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "n_mtp_layers"])
def test_layers_that_make_drafts_are_counted_or_refused(key: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^tiny\.json: {key} must be a whole number from 0 to 4096, not "):
        read(LLAMA, **{key: value})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 2**24, "intermediate_size": 2**26, "num_hidden_layers": 2000}, "than 67,108,864$"),
        ({"hidden_size": 2**31}, "give a smaller hidden_size than 2,147,483,648$"),
        ({"intermediate_size": 2**31}, "a matrix of 2,147,483,648 rows or columns; at most 268,435,456 are read"),
        ({"vocab_size": 2**31}, "give a smaller vocab_size"),
        ({"head_dim": 2**31, "max_position_embeddings": 2**31}, "give a smaller head_dim"),
    ],
)
def test_a_model_too_large_to_be_planned_is_refused_with_its_largest_number(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        read(LLAMA, **changes)
    assert str(caught.value).startswith("tiny.json: a m")
    assert "at most 1,000,000,000,000,000 are read" in str(caught.value) or "at most 268,435,456" in str(caught.value)


STUBS = json.loads((Path(__file__).parent / "cases" / "configs" / "stubs.json").read_text())


@pytest.mark.parametrize("name", STUBS)
def test_a_file_that_names_its_family_alone_is_refused_by_the_first_field_it_lacks(name: str) -> None:
    """What a class would take in its place is the size of another model, if any."""
    with pytest.raises(InputError) as caught:
        model_from_config(STUBS[name], name, name)
    first = str(caught.value).removeprefix(f"{name}: ").partition(";")[0]
    assert first.endswith(" is missing") or "is not supported" in first
