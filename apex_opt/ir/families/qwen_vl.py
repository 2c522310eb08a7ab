"""Decoders behind a tower that reads images: of Qwen3-VL those of Qwen3, of GLM-4.5V that of GLM-4.5.

ERNIE 4.5 VL is ERNIE 4.5 with experts for images beside those for text.
"""

from __future__ import annotations

from dataclasses import fields as fields_of
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from apex_opt.ir.cells import MoeFfn, TwinMoeFfn
from apex_opt.ir.checks import count_fault
from apex_opt.ir.families import dense, experts, llama, qwen
from apex_opt.ir.families.base import Family, Layers, Sizes, module_names, sizes
from apex_opt.ir.families.decoder import Decoder

if TYPE_CHECKING:
    from apex_opt.ir.cells import Ffn
    from apex_opt.ir.fields import Fields


def _twins(fields: Fields, size: Sizes) -> Layers:
    """ERNIE 4.5 VL, whose fields may list an entry for text and one for images."""
    widths = fields.rows("moe_intermediate_size")
    if widths is None:
        widths = [1536, 512]
    if len(widths) != 2 or any(count_fault("width", width) for width in widths):
        fields.fault("moe_intermediate_size", "must list the columns of an expert for text and of one for images")
        return Layers([])
    alike: dict[str, object] = {"moe_intermediate_size": widths[0]}
    for name in ("moe_num_experts", "moe_layer_start_index", "moe_layer_end_index"):
        value = fields.get(name)
        if not isinstance(value, list):
            continue
        if name == "moe_layer_end_index":  # may lie past the last layer
            value = [min(entry, size.layers - 1) if type(entry) is int else entry for entry in value]
        if len(value) != 2 or value[0] != value[1]:
            fields.fault(name, "has entries that differ, which is not supported")
            return Layers([])
        alike[name] = value[0]
    found = _ERNIE.read(fields.replaced(alike).filled({"moe_layer_start_index": 1}), size)
    return found._replace(blocks=[replace(block, ffn=_twin(block.ffn, widths[1])) for block in found.blocks])


def _twin(ffn: Ffn, width: int) -> Ffn:
    if not isinstance(ffn, MoeFfn):
        return ffn
    own = {field.name: getattr(ffn, field.name) for field in fields_of(ffn) if field.init}
    return TwinMoeFfn(**own, twin_intermediate=width)


_ERNIE: Final = experts.FAMILIES["ernie4_5_moe"]
_ERNIE_VL: Final = replace(_ERNIE, architecture="Ernie4_5_VLMoeForConditionalGeneration", read=_twins)
_GLM4V: Final = Family(
    architecture="Glm4vForConditionalGeneration",
    read=Decoder(qkv_bias=True, kv_heads=2, norms=4),
    modules=dense.FAMILIES["glm4"].modules,
)
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
    "dots_ocr": replace(qwen.FAMILIES["qwen2"], architecture="DotsOCRForCausalLM", defaults={}),
    "Keye": replace(qwen.FAMILIES["qwen3"], architecture="KeyeForConditionalGeneration", defaults={}),
    "KeyeVL1_5": replace(qwen.FAMILIES["qwen3"], architecture="KeyeVL1_5ForConditionalGeneration", defaults={}),
    "qwen2_5_omni_text": replace(
        qwen.FAMILIES["qwen2"], architecture="Qwen2_5OmniThinkerForConditionalGeneration", defaults={}
    ),
    "qwen3_omni_moe_text": Family(
        architecture="Qwen3OmniMoeThinkerForConditionalGeneration",
        read=Decoder(qkv_bias=None, output_bias=None, qk_norm=True, kv_heads=4, experts_field="num_experts"),
        modules=module_names(),
    ),
    "glm4v_text": _GLM4V,
    "glm_ocr_text": replace(_GLM4V, read=Decoder(kv_heads=8, norms=4)),
    "hunyuan_vl_text": replace(dense.FAMILIES["hunyuan_v1_dense"], architecture="HunYuanVLForConditionalGeneration"),
    "paddleocr_vl_text": replace(dense.FAMILIES["ernie4_5"], architecture="PaddleOCRVLForConditionalGeneration"),
    "granite4_vision_text": replace(llama.FAMILIES["granite"], architecture="Granite4VisionForConditionalGeneration"),
    "granite_docling_text": replace(llama.FAMILIES["granite"], architecture="GraniteDoclingForConditionalGeneration"),
    "aria_text": Family(
        architecture="AriaForConditionalGeneration",
        read=Decoder(
            qkv_bias=None,
            output_bias=None,
            experts_field="moe_num_experts",
            expert_width_field="intermediate_size",
            shared_count_field="moe_num_shared_experts",
        ),
        modules=module_names(),
        spelled={"num_experts_per_tok": "moe_topk"},
        implied={"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 2},
    ),
    "glm4v_moe_text": replace(qwen.FAMILIES["glm4_moe"], architecture="Glm4vMoeForConditionalGeneration"),
    "ernie4_5_moe_vl": _ERNIE_VL,
    "ernie4_5_vl_moe_text": replace(
        _ERNIE_VL,
        defaults={"moe_num_experts": 64, "moe_k": 6, "moe_num_shared_experts": 2, "num_key_value_heads": 4}
        | sizes(103424, 2560, 12288, 28, 20, 131072),
    ),
}
