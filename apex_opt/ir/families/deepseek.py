"""DeepSeek-V2 and V3, and Kimi-K2, which is read as the latter: latent attention and experts behind dense layers."""

from __future__ import annotations

from typing import Final

from apex_opt.ir.families.base import Family, module_names, sizes, within
from apex_opt.ir.families.decoder import Decoder

LATENT_MODULES: Final = module_names(
    qkv=within("self_attn", ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"))
)
_DEEPSEEK_V3: Final = Family(
    architecture="DeepseekV3ForCausalLM",
    read=Decoder(
        latent=True, experts_field="n_routed_experts", shared_count_field="n_shared_experts", router_bias=True
    ),
    modules=LATENT_MODULES,
    defaults=sizes(129280, 7168, 18432, 61, 128, 4096)
    | {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    | {"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048}
    | {"first_k_dense_replace": 3},
)

FAMILIES: Final[dict[str, Family]] = {
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        read=Decoder(latent=True, experts_field="n_routed_experts", shared_count_field="n_shared_experts"),
        modules=LATENT_MODULES,
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
}
