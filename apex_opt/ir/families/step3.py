"""Step-3: queries that are compressed before their own projection, one KV head for all, and experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from apex_opt.ir.cells import Attention
from apex_opt.ir.families.base import Family, Layers, module_names, sizes, within
from apex_opt.ir.families.decoder import Decoder
from apex_opt.ir.families.windowed import listed_mixtures
from apex_opt.ir.model import Block

if TYPE_CHECKING:
    from apex_opt.ir.families.base import Sizes
    from apex_opt.ir.fields import Fields

_FFNS: Final = Decoder(experts_field="num_experts", shared_width_field="share_expert_dim")


def read(fields: Fields, size: Sizes) -> Layers:
    """Layers of attention whose query heads share one KV head, and of experts behind dense layers.

    Source: vLLM, `models/step3_text.py`, which takes one KV head alone, and its configuration class.
    """
    heads, width = fields.count("num_attention_heads"), fields.count("head_dim", default=256)
    kv_heads = fields.count("num_key_value_heads", default=1)
    if kv_heads > 1:
        fields.fault("num_key_value_heads", f"{kv_heads} is not supported; supported: 1")
    rank = fields.count("share_q_dim", default=width)
    mixtures = listed_mixtures(fields, size.layers, dense_first=1)
    ffns = _FFNS.ffns(fields, size, mixtures)
    if fields.faults:
        return Layers([])
    cell = Attention(hidden=size.hidden, query_heads=heads, kv_heads=1, head_dim=width, query_rank=rank)
    return Layers([Block(attention=cell, ffn=ffn) for ffn in ffns])


FAMILIES: Final[dict[str, Family]] = {
    "step3_text": Family(
        architecture="Step3TextForCausalLM",
        read=read,
        modules=module_names(
            qkv=("self_attn.qkv_proj", "self_attn.wq"), experts=within("moe.experts.0"), shared=within("share_expert")
        ),
        defaults=sizes(128815, 7168, 18432, 61, 64, 65536)
        | {"num_experts": 48, "num_experts_per_tok": 3, "moe_intermediate_size": 5120}
        | {"share_expert_dim": 5120, "share_q_dim": 2048, "head_dim": 256}
        | {"moe_layers_enum": ",".join(map(str, range(4, 60)))},
        spelled={
            "num_key_value_heads": "num_attention_groups",
            "num_experts": "moe_num_experts",
            "num_experts_per_tok": "moe_top_k",
            "max_position_embeddings": "max_position_embedding",
        },
    ),
}
