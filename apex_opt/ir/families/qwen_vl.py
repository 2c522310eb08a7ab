"""Decoders behind a tower that reads images: of Qwen3-VL those of Qwen3, of GLM-4.5V that of GLM-4.5."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from apex_opt.ir.families import qwen
from apex_opt.ir.families.base import Family, module_names, sizes
from apex_opt.ir.families.decoder import Decoder

FAMILIES: Final[dict[str, Family]] = {
    "qwen3_vl_text": Family(
        architecture="Qwen3VLForConditionalGeneration",
        read=Decoder(qkv_bias=None, output_bias=None, qk_norm=True, kv_heads=32),
        modules=module_names(),
        defaults=sizes(151936, 4096, 22016, 32, 32, 128000) | {"num_key_value_heads": 32, "head_dim": 128},
    ),
    "qwen3_vl_moe_text": Family(
        architecture="Qwen3VLMoeForConditionalGeneration",
        read=Decoder(qkv_bias=None, output_bias=None, qk_norm=True, kv_heads=16, experts_field="num_experts"),
        modules=module_names(),
        defaults=sizes(151936, 2048, 5632, 24, 16, 128000)
        | {"num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408},
        tied=True,
    ),
    "glm4v_moe_text": replace(qwen.FAMILIES["glm4_moe"], architecture="Glm4vMoeForConditionalGeneration"),
}
