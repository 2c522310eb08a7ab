"""Llama and what is shaped like it: Granite, Mistral, Phi-3, Mixtral, MiniMax-M2, gpt-oss."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from apex_opt.ir.families.base import Family, Layers, Sizes, module_names, sizes, within
from apex_opt.ir.families.decoder import Decoder
from apex_opt.ir.families.states import refuse

if TYPE_CHECKING:
    from apex_opt.ir.fields import Fields

LLAMA_DEFAULTS: Final = sizes(32000, 4096, 11008, 32, 32, 2048)
_BIASES_TOLD: Final = Decoder(qkv_bias=None, output_bias=None, mlp_bias=None)
_MISTRAL_DEFAULTS: Final = sizes(32000, 4096, 14336, 32, 32, 131072) | {"num_key_value_heads": 8}
_BLOCK_SPARSE: Final = module_names(experts=within("block_sparse_moe.experts.0", ("w1", "w2", "w3")))


def _minimax_m2(fields: Fields, size: Sizes) -> Layers:
    """MiniMax-M2, whose queries and keys each have one norm over all heads."""
    refuse(fields, "qk_norm_type", "per_layer")
    refuse(fields, "use_routing_bias", True)
    refuse(fields, "attn_type_list", [1] * size.layers)
    reader = Decoder(
        qk_norm=True,
        qk_norm_whole=True,
        kv_heads=8,
        experts_field="num_local_experts",
        expert_width_field="intermediate_size",
        router_bias=True,
    )
    return reader(fields, size)


_PHI3: Final = Family(
    architecture="Phi3ForCausalLM",
    read=Decoder(window="always"),
    modules=module_names(qkv=("self_attn.qkv_proj",), dense=("mlp.gate_up_proj", "mlp.down_proj")),
    defaults=sizes(32064, 3072, 8192, 32, 32, 4096),
    idle=("full_attn_mod", "interpolate_factor", "embd_layer"),  # the last of a tower
)

FAMILIES: Final[dict[str, Family]] = {
    "llama": Family(
        architecture="LlamaForCausalLM", read=_BIASES_TOLD, modules=module_names(), defaults=LLAMA_DEFAULTS
    ),
    "granite": Family(
        architecture="GraniteForCausalLM", read=_BIASES_TOLD, modules=module_names(), defaults=LLAMA_DEFAULTS
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        read=Decoder(window="always", kv_heads=8),
        modules=module_names(),
        defaults=_MISTRAL_DEFAULTS | {"sliding_window": 4096},
    ),
    "phi3": _PHI3,
    "phi3_v": replace(_PHI3, architecture="Phi3VForCausalLM"),
    "phi4mm": replace(_PHI3, architecture="Phi4MMForCausalLM"),
    "phi4_multimodal": replace(_PHI3, architecture="Phi4MultimodalForCausalLM"),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        read=Decoder(
            window="always", kv_heads=8, experts_field="num_local_experts", expert_width_field="intermediate_size"
        ),
        modules=_BLOCK_SPARSE,
        defaults=_MISTRAL_DEFAULTS | {"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "minimax_m2": Family(
        architecture="MiniMaxM2ForCausalLM",
        read=_minimax_m2,
        modules=_BLOCK_SPARSE,
        defaults={"num_key_value_heads": 8},
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        read=Decoder(
            qkv_bias=True,
            output_bias=True,
            sinks=True,
            window="always",
            window_pattern=2,
            kv_heads=8,
            experts_field="num_local_experts",
            expert_width_field="intermediate_size",
            expert_bias=True,
            router_bias=True,
        ),
        modules=module_names(),
        idle=("experts_per_token",),
        defaults=sizes(201088, 2880, 2880, 36, 64, 131072)
        | {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128}
        | {"num_local_experts": 128, "num_experts_per_tok": 4},
    ),
}
