"""Families of models by `model_type`: what a type implies beyond the fields of its file.

Which field means what, which modules a checkpoint has and which default a class has follow the configuration classes of
the `transformers` library.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

_PROJECTIONS: Final = ("gate_proj", "up_proj", "down_proj")
_BLOCK_SPARSE_MODULES: Final = tuple(f"block_sparse_moe.experts.0.{name}" for name in ("w1", "w2", "w3"))
_LATENT_MODULES: Final = tuple(
    f"self_attn.{name}" for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a model_type implies beyond the fields of its file; None means that the file says.

    The modules are the matrices of a layer by their names in a checkpoint; experts are quantised alike. Defaults are
    those of the configuration class: files leave them out where the model lies within another one's file.
    """

    architecture: str
    latent: bool = False
    qkv_bias: bool | None = False
    output_bias: bool | None = False
    qk_norm: bool | None = False
    qk_norm_whole: bool = False
    sinks: bool = False
    mlp_bias: bool | None = False
    window: Literal["never", "always", "opt-in"] = "never"
    window_pattern: int = 0
    experts_field: str = ""
    expert_width_field: str = "moe_intermediate_size"
    shared_width_field: str = ""
    shared_count_field: str = ""
    shared_gate: bool = False
    expert_bias: bool = False
    router_bias: bool = False
    qkv_modules: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output_modules: tuple[str, ...] = ("self_attn.o_proj",)
    dense_modules: tuple[str, ...] = tuple(f"mlp.{name}" for name in _PROJECTIONS)
    expert_modules: tuple[str, ...] = tuple(f"mlp.experts.0.{name}" for name in _PROJECTIONS)
    shared_modules: tuple[str, ...] = tuple(f"mlp.shared_experts.{name}" for name in _PROJECTIONS)
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _sizes(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, positions: int) -> dict[str, Any]:
    """Defaults that every class has."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
    }


_LLAMA_DEFAULTS: Final = _sizes(32000, 4096, 11008, 32, 32, 2048)
_MISTRAL_DEFAULTS: Final = _sizes(32000, 4096, 14336, 32, 32, 131072) | {"num_key_value_heads": 8}
_QWEN_DEFAULTS: Final = _sizes(151936, 4096, 22016, 32, 32, 32768) | {"num_key_value_heads": 32, "sliding_window": 4096}
_DEEPSEEK_V3: Final = Family(
    architecture="DeepseekV3ForCausalLM",
    latent=True,
    experts_field="n_routed_experts",
    shared_count_field="n_shared_experts",
    router_bias=True,
    qkv_modules=_LATENT_MODULES,
    defaults=_sizes(129280, 7168, 18432, 61, 128, 4096)
    | {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    | {"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048}
    | {"first_k_dense_replace": 3},
)

FAMILIES: Final[dict[str, Family]] = {
    "llama": Family(
        architecture="LlamaForCausalLM", qkv_bias=None, output_bias=None, mlp_bias=None, defaults=_LLAMA_DEFAULTS
    ),
    "granite": Family(
        architecture="GraniteForCausalLM", qkv_bias=None, output_bias=None, mlp_bias=None, defaults=_LLAMA_DEFAULTS
    ),
    "mistral": Family(
        architecture="MistralForCausalLM", window="always", defaults=_MISTRAL_DEFAULTS | {"sliding_window": 4096}
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        window="always",
        qkv_modules=("self_attn.qkv_proj",),
        dense_modules=("mlp.gate_up_proj", "mlp.down_proj"),
        defaults=_sizes(32064, 3072, 8192, 32, 32, 4096),
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        window="always",
        experts_field="num_local_experts",
        expert_width_field="intermediate_size",
        expert_modules=_BLOCK_SPARSE_MODULES,
        defaults=_MISTRAL_DEFAULTS | {"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "minimax_m2": Family(
        architecture="MiniMaxM2ForCausalLM",
        qk_norm=True,
        qk_norm_whole=True,
        experts_field="num_local_experts",
        expert_width_field="intermediate_size",
        router_bias=True,
        expert_modules=_BLOCK_SPARSE_MODULES,
        defaults={"num_key_value_heads": 8},
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        qkv_bias=True,
        output_bias=True,
        sinks=True,
        window="always",
        window_pattern=2,
        experts_field="num_local_experts",
        expert_width_field="intermediate_size",
        expert_bias=True,
        router_bias=True,
        defaults=_sizes(201088, 2880, 2880, 36, 64, 131072)
        | {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128}
        | {"num_local_experts": 128, "num_experts_per_tok": 4},
    ),
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=True, window="opt-in", defaults=_QWEN_DEFAULTS),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        qkv_bias=True,
        window="opt-in",
        experts_field="num_experts",
        shared_width_field="shared_expert_intermediate_size",
        shared_gate=True,
        shared_modules=tuple(f"mlp.shared_expert.{name}" for name in _PROJECTIONS),
        defaults=_sizes(151936, 2048, 5632, 24, 16, 32768)
        | {"num_key_value_heads": 16, "sliding_window": 4096, "num_experts": 60, "num_experts_per_tok": 4}
        | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        qkv_bias=None,
        output_bias=None,
        qk_norm=True,
        window="opt-in",
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        qkv_bias=None,
        output_bias=None,
        qk_norm=True,
        window="opt-in",
        experts_field="num_experts",
        defaults=_sizes(151936, 2048, 6144, 24, 32, 32768)
        | {"num_key_value_heads": 4, "sliding_window": 4096, "num_experts": 128, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 768},
    ),
    "glm4_moe": Family(
        architecture="Glm4MoeForCausalLM",
        qkv_bias=None,
        qk_norm=None,
        experts_field="n_routed_experts",
        shared_count_field="n_shared_experts",
        router_bias=True,
        defaults=_sizes(151552, 4096, 10944, 46, 96, 131072)
        | {"num_key_value_heads": 8, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 1408, "first_k_dense_replace": 1},
    ),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        latent=True,
        experts_field="n_routed_experts",
        shared_count_field="n_shared_experts",
        qkv_modules=_LATENT_MODULES,
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
}

SUPPORTED_MODEL_TYPES: Final = tuple(sorted(FAMILIES))
