"""Qwen3-Next, Qwen3.5 and Qwen3.6: Gated DeltaNet, with gated attention in every so manieth layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.cells import Attention, AttentionCell, GatedAttention, GatedDelta
from apex_opt.ir.families.base import Family, Layers, Sizes, module_names, sizes, within
from apex_opt.ir.families.decoder import Decoder, head_fields, layer_kinds
from apex_opt.ir.families.states import refuse, state_bytes
from apex_opt.ir.model import Block

if TYPE_CHECKING:
    from apex_opt.ir.fields import Fields

_INTERVAL: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenNext:
    """A reader of layers whose kinds are told by `layer_types`, or by `full_attention_interval`."""

    ffn: Decoder
    gated: bool = True
    qk_norm_whole: bool = False

    def __call__(self, fields: Fields, size: Sizes) -> Layers:
        """Layers of linear and of full attention in turn, each before an FFN."""
        heads: dict[str, Any] = head_fields(fields, size.hidden)
        bias, gated = fields.flag("attention_bias"), fields.flag("attn_output_gate", default=self.gated)
        linear = {
            "key_heads": fields.count("linear_num_key_heads"),
            "value_heads": fields.count("linear_num_value_heads"),
            "key_dim": fields.count("linear_key_head_dim"),
            "value_dim": fields.count("linear_value_head_dim"),
            "kernel": fields.count("linear_conv_kernel_dim"),
            "state_bytes": state_bytes(fields, "mamba_ssm_dtype"),
        }
        keys, values = linear["key_heads"], linear["value_heads"]
        if keys and values % keys:
            fields.fault("linear_num_value_heads", f"{values} is not a multiple of linear_num_key_heads {keys}")
        every = fields.count("full_attention_interval", default=_INTERVAL)
        kinds = layer_kinds(fields, size.layers, ("full_attention", "linear_attention"))
        if kinds is None:
            kinds = ["linear_attention" if every and (i + 1) % every else "full_attention" for i in range(size.layers)]
        refuse(fields, "output_gate_type", "swish", "sigmoid")
        ffns = self.ffn.ffns(fields, size)
        if fields.faults:
            return Layers([])
        kind = GatedAttention if gated else Attention
        norms: dict[str, Any] = {"qk_norm": True, "qk_norm_whole": self.qk_norm_whole}
        full = kind(hidden=size.hidden, qkv_bias=bias, output_bias=bias, **norms, **heads)
        delta = GatedDelta(hidden=size.hidden, **linear)
        mixing: list[AttentionCell] = [full if kind == "full_attention" else delta for kind in kinds]
        return Layers([Block(attention=cell, ffn=ffn) for cell, ffn in zip(mixing, ffns, strict=True)])


_DENSE: Final = QwenNext(ffn=Decoder())
_SPARSE: Final = QwenNext(
    ffn=Decoder(experts_field="num_experts", shared_width_field="shared_expert_intermediate_size", shared_gate=True)
)
_MODULES: Final = module_names(
    shared=within("mlp.shared_expert"),
    state_in=within("linear_attn", ("in_proj_qkv", "in_proj_z")),
    state_gates=within("linear_attn", ("in_proj_b", "in_proj_a")),
    state_out=("linear_attn.out_proj",),
)
_LINEAR: Final = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}

FAMILIES: Final[dict[str, Family]] = {
    "olmo_hybrid": Family(
        architecture="OlmoHybridForCausalLM",
        read=QwenNext(ffn=Decoder(), gated=False, qk_norm_whole=True),
        modules=_MODULES
        | {
            "state in": within("linear_attn", ("q_proj", "k_proj", "v_proj", "g_proj")),
            "state gates": within("linear_attn", ("a_proj", "b_proj")),
            "state out": ("linear_attn.o_proj",),
        },
        implied={"linear_conv_kernel_dim": 4},
        idle=("linear_a_log_max", "linear_a_log_min", "linear_dt_max", "linear_dt_min", "linear_allow_neg_eigval"),
    ),
    "qwen3_next": Family(
        architecture="Qwen3NextForCausalLM",
        read=_SPARSE,
        modules=_MODULES | {"state in": ("linear_attn.in_proj_qkvz",), "state gates": ("linear_attn.in_proj_ba",)},
        defaults=sizes(151936, 2048, 5632, 48, 16, 32768)
        | _LINEAR
        | {"num_key_value_heads": 2, "head_dim": 256}
        | {"num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512}
        | {"shared_expert_intermediate_size": 512},
    ),
    "qwen3_5_text": Family(
        architecture="Qwen3_5ForCausalLM",
        read=_DENSE,
        modules=_MODULES,
        defaults=sizes(248320, 4096, 12288, 32, 16, 32768) | _LINEAR | {"num_key_value_heads": 4, "head_dim": 256},
    ),
    "qwen3_5_moe_text": Family(
        architecture="Qwen3_5MoeForCausalLM",
        read=_SPARSE,
        modules=_MODULES,
        defaults=sizes(248320, 2048, 512, 40, 16, 32768)
        | _LINEAR
        | {"num_key_value_heads": 2, "head_dim": 256}
        | {"num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512}
        | {"shared_expert_intermediate_size": 512},
    ),
}
