"""Qwen2 and Qwen3, dense and with experts, and GLM-4.5, which is built like the latter."""

from __future__ import annotations

from typing import Final

from apex_opt.ir.families.base import Family, module_names, sizes, within
from apex_opt.ir.families.decoder import Decoder

_QWEN_DEFAULTS: Final = sizes(151936, 4096, 22016, 32, 32, 32768) | {"num_key_value_heads": 32, "sliding_window": 4096}
_QWEN2: Final = Decoder(qkv_bias=True, window="opt-in", kv_heads=32)

_GLM_MOE: Final = Decoder(
    qkv_bias=None,
    qk_norm=None,
    kv_heads=8,
    experts_field="n_routed_experts",
    shared_count_field="n_shared_experts",
    router_bias=True,
)

FAMILIES: Final[dict[str, Family]] = {
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        read=_QWEN2,
        modules=module_names(),
        defaults=_QWEN_DEFAULTS,
    ),
    **{
        model_type: Family(architecture=architecture, read=_QWEN2, modules=module_names(), defaults=_QWEN_DEFAULTS)
        for model_type, architecture in (
            ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
            ("qwen2_vl_text", "Qwen2VLForConditionalGeneration"),
            ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
            ("qwen2_5_vl_text", "Qwen2_5_VLForConditionalGeneration"),
        )
    },
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        read=Decoder(
            qkv_bias=None,
            window="opt-in",
            kv_heads=16,
            experts_field="num_experts",
            shared_width_field="shared_expert_intermediate_size",
            shared_gate=True,
        ),
        modules=module_names(shared=within("mlp.shared_expert")),
        implied={"attention_bias": True},
        spelled={"attention_bias": "qkv_bias"},
        defaults=sizes(151936, 2048, 5632, 24, 16, 32768)
        | {"num_key_value_heads": 16, "sliding_window": 4096, "num_experts": 60, "num_experts_per_tok": 4}
        | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        read=Decoder(qkv_bias=None, output_bias=None, qk_norm=True, window="opt-in", kv_heads=32),
        modules=module_names(),
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        read=Decoder(
            qkv_bias=None, output_bias=None, qk_norm=True, window="opt-in", kv_heads=4, experts_field="num_experts"
        ),
        modules=module_names(),
        defaults=sizes(151936, 2048, 6144, 24, 32, 32768)
        | {"num_key_value_heads": 4, "sliding_window": 4096, "num_experts": 128, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 768},
    ),
    "sarvam_moe": Family(
        architecture="SarvamMoEForCausalLM",
        read=_GLM_MOE,
        modules=module_names(),
        implied={"use_qk_norm": True},
        spelled={"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"},
    ),
    "glm4_moe": Family(
        architecture="Glm4MoeForCausalLM",
        read=_GLM_MOE,
        modules=module_names(),
        defaults=sizes(151552, 4096, 10944, 46, 96, 131072)
        | {"num_key_value_heads": 8, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 1408, "first_k_dense_replace": 1},
    ),
}
