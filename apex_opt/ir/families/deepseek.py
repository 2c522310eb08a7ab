"""DeepSeek-V2 and V3, Kimi-K2, which is read as the latter, and others with latent attention: LongCat-Flash, Youtu."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from apex_opt.ir.cells import DenseFfn
from apex_opt.ir.checks import shown
from apex_opt.ir.families.base import Family, Layers, module_names, sizes, within
from apex_opt.ir.families.decoder import Decoder
from apex_opt.units import ceil_div

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
    widths = [fields.get(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim")]
    fields.idle("use_mla", "lm_head")  # DeepSeek-VL2 repeats what its other fields tell
    if widths == [0, 0]:
        fields.idle("v_head_dim", "q_lora_rank", "kv_lora_rank")
        return replace(_V2, latent=False)(fields, size)
    return _V2(fields, size)


_LONGCAT: Final = Decoder(
    latent=True, experts_field="n_routed_experts", shared_width_field="intermediate_size", router_bias=True
)


def _longcat(fields: Fields, size: Sizes) -> Layers:
    """LongCat-Flash: two attentions and two dense FFNs a layer, and experts beside the second half.

    Some experts hand on what they get. Which those of a token are is not known: of the chosen so many are others as
    there are in the mean, rounded up. The shortcut that lets engines overlap experts with the second half is left out.

    Source: `transformers`, `longcat_flash`; arXiv:2509.01322, section 2.
    """
    if (kind := fields.text("zero_expert_type")) not in ("", "identity"):
        fields.fault("zero_expert_type", f"may be identity, not {shown(kind)}")
    chosen, routed = fields.count("num_experts_per_tok"), fields.count("n_routed_experts")
    idle = fields.count("zero_expert_num", default=0, minimum=0)
    mean = ceil_div(chosen * routed, max(routed + idle, 1))
    width = fields.count("intermediate_size")
    found = _LONGCAT(fields.replaced({"num_experts_per_tok": mean or 1}), size)
    if fields.faults:
        return Layers([])
    dense = DenseFfn(hidden=size.hidden, intermediate=width)
    halves = [half for block in found.blocks for half in (replace(block, ffn=dense), block)]
    return found._replace(blocks=halves, together=2)


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
    "longcat_flash": Family(
        architecture="LongcatFlashForCausalLM",
        read=_longcat,
        modules=module_names(
            qkv=within("self_attn.0", ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
            output=("self_attn.0.o_proj",),
            dense=within("mlps.0"),
            shared=within("mlps.1"),
        ),
        spelled={
            "num_hidden_layers": "num_layers",
            "intermediate_size": "ffn_hidden_size",
            "moe_intermediate_size": "expert_ffn_hidden_size",
            "num_experts_per_tok": "moe_topk",
        },
    ),
    "youtu": Family(
        architecture="YoutuForCausalLM",
        read=Decoder(latent=True),
        modules=LATENT_MODULES,
        defaults=sizes(128256, 2048, 6144, 32, 16, 131072)
        | {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
        | {"v_head_dim": 128},
        tied=True,
    ),
    "sarvam_mla": replace(
        _DEEPSEEK_V3,
        architecture="SarvamMLAForCausalLM",
        defaults={},
        spelled={"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"},
    ),
}
