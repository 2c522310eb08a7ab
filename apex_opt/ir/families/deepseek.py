"""DeepSeek-V2 and V3, and Kimi-K2, which is read as the latter: latent attention and experts behind dense layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from apex_opt.ir.families.base import Family, Layers, module_names, sizes, within
from apex_opt.ir.families.decoder import Decoder

if TYPE_CHECKING:
    from apex_opt.ir.families.base import Sizes
    from apex_opt.ir.fields import Fields

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


def _axk1(fields: Fields, size: Sizes) -> Layers:
    """A.X K1: DeepSeek-V3 with a norm after the experts of each layer that has some."""
    found = _DEEPSEEK_V3.read(fields, size)
    return found._replace(blocks=[replace(block, norms=3 if block.is_moe else None) for block in found.blocks])


_V2: Final = Decoder(latent=True, experts_field="n_routed_experts", shared_count_field="n_shared_experts")


def _deepseek_v2(fields: Fields, size: Sizes) -> Layers:
    """DeepSeek-V2, whose smallest sizes, as in DeepSeek-VL2 and DeepSeek-OCR, have usual attention instead.

    Source: vLLM, `models/deepseek_v2.py`: latent attention where one of its head widths is above 0.
    """
    widths = [fields.values.get(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim")]
    if widths == [0, 0]:
        return replace(_V2, latent=False)(fields, size)
    return _V2(fields, size)


FAMILIES: Final[dict[str, Family]] = {
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        read=_deepseek_v2,
        modules={**LATENT_MODULES, "qkv": (*LATENT_MODULES["qkv"], *within("self_attn", ("k_proj", "v_proj")))},
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
    "axk1": replace(_DEEPSEEK_V3, architecture="AXK1ForCausalLM", read=_axk1, defaults={}),
    "mistral4": Family(
        architecture="Mistral4ForCausalLM",
        read=Decoder(latent=True, experts_field="n_routed_experts", shared_count_field="n_shared_experts"),
        modules=LATENT_MODULES,
    ),
    "sarvam_mla": replace(
        _DEEPSEEK_V3,
        architecture="SarvamMLAForCausalLM",
        defaults={},
        spelled={"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"},
    ),
}
