"""Mixtures of experts that differ from those of Mixtral, Qwen and DeepSeek-V3 in a norm, a bias or the names of fields.

Of types that `transformers` no longer carries (bailing_moe, bailing_moe_v2, deepseek) the fields are those of the
classes that come with the checkpoints, as vLLM reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from apex_opt.ir.families.base import Family, Layers, Sizes, module_names, within
from apex_opt.ir.families.decoder import Decoder
from apex_opt.ir.families.deepseek import LATENT_MODULES
from apex_opt.ir.families.states import agreeing, refuse

if TYPE_CHECKING:
    from typing import Any

    from apex_opt.ir.fields import Fields

_BIASES: Final = {"attention_bias": "use_bias", "mlp_bias": "use_bias"}
_W: Final = ("w1", "w2", "w3")


def _dbrx(fields: Fields, size: Sizes) -> Layers:
    """DBRX, whose fields of attention and experts lie in objects of their own."""
    inner: dict[str, Any] = {}
    for name, keys in (
        ("attn_config", {"kv_n_heads": "num_key_value_heads"}),
        (
            "ffn_config",
            {
                "ffn_hidden_size": "intermediate_size",
                "moe_num_experts": "num_experts",
                "moe_top_k": "num_experts_per_tok",
            },
        ),
    ):
        section = fields.section(name)
        if section is not None:
            # What its classes inherit is not theirs.
            section.idle("clip_qkv", "tie_word_embeddings", "hidden_size", "moe_normalize_expert_weights")
        if section is None:
            fields.fault(name, "is missing")
        else:
            inner |= {usual: section.count(own) for own, usual in keys.items()}
    if len(inner) < 4:
        return Layers([])
    return Decoder(experts_field="num_experts", expert_width_field="intermediate_size")(
        agreeing(fields, inner, "attn_config or ffn_config"), size
    )


def _first(fields: Fields, layers: int, *names: str) -> dict[str, Any]:
    """The entries that all layers share of fields that may be lists of one for each layer."""
    found = {}
    for name in names:
        value = fields.get(name)
        if isinstance(value, list) and value:
            if layers and len(value) != layers:
                fields.fault(name, f"has {len(value)} entries for num_hidden_layers {layers}")
            if any(entry != value[0] for entry in value):
                fields.fault(name, "has entries that differ, which is not supported")
            found[name] = value[0]
    return found


_TOWER: Final = ("num_media_embeds", "anyres_pooling_size", "max_image_size", "org_vocab_size", "pool_type")
"""Fields of Hunyuan's files that speak of images or of heads that are no part of what writes."""


def _hunyuan(fields: Fields, size: Sizes) -> Layers:
    """Hunyuan, some fields of which list an entry for each layer."""
    if fields.get("head_dim") is None:
        fields = fields.spelled({"head_dim": "attention_head_dim"})
    refuse(fields, "attention_head_dim", fields.get("head_dim"))
    refuse(fields, "norm_type", "rms")
    fields.idle("cla_share_factor", *_TOWER)
    if fields.flag("use_cla"):
        fields.fault("use_cla", "true is not supported: layers that share their keys and values")
    names = ("num_experts", "moe_topk", "num_experts_per_tok", "moe_intermediate_size", "num_shared_expert")
    alike = _first(fields, size.layers, *names)
    fields = fields.replaced(alike)
    if not fields.flag("use_mixed_mlp_moe"):
        fields = fields.replaced({"num_shared_expert": 0})
    reader = Decoder(
        qkv_bias=None,
        output_bias=None,
        mlp_bias=None,
        qk_norm=None,
        experts_field="num_experts",
        shared_count_field="num_shared_expert",
    )
    width = fields.get("intermediate_size")
    return reader(fields.filled({"moe_intermediate_size": width, "num_shared_expert": 1}), size)


def _ernie(fields: Fields, size: Sizes) -> Layers:
    """ERNIE 4.5, which tells the first and the last layer with experts."""
    start, every = fields.count("moe_layer_start_index", minimum=0), fields.count("moe_layer_interval", default=1)
    end = fields.get("moe_layer_end_index")
    last = size.layers - 1 if end in (None, -1) else fields.count("moe_layer_end_index", minimum=0)
    sparse = [start <= layer <= last and every > 0 and (layer + 1) % every == 0 for layer in range(size.layers)]
    reader = Decoder(
        qkv_bias=None,
        output_bias=None,
        mlp_bias=None,
        experts_field="moe_num_experts",
        shared_count_field="moe_num_shared_experts",
        router_bias=True,
    )
    kinds = ["sparse" if each else "dense" for each in sparse]
    return reader(fields.filled({"mlp_layer_types": kinds, "moe_num_shared_experts": 0}), size)


_BAILING: Final = {"attention_bias": "use_qkv_bias", "attention_out_bias": "use_bias", "mlp_bias": "use_bias"}
_BAILING_MODULES: Final = module_names(
    qkv=("attention.query_key_value",), output=("attention.dense",), shared=within("mlp.shared_experts")
)


def _bailing(fields: Fields, size: Sizes) -> Layers:
    """Ling and Ring, whose router has a bias where the file says so."""
    refuse(fields, "use_rmsnorm", True)
    reader = Decoder(
        qkv_bias=None,
        output_bias=None,
        mlp_bias=None,
        qk_norm=None,
        experts_field="num_experts",
        shared_count_field="num_shared_experts",
        router_bias=fields.flag("moe_router_enable_expert_bias"),
    )
    return reader(fields.filled({"num_shared_experts": 0}), size)


_OLMO: Final = Decoder(
    qkv_bias=None,
    output_bias=None,
    qk_norm=True,
    qk_norm_whole=True,
    experts_field="num_experts",
    expert_width_field="intermediate_size",
)
FAMILIES: Final[dict[str, Family]] = {
    "dbrx": Family(
        architecture="DbrxForCausalLM",
        read=_dbrx,
        modules=module_names(
            qkv=("norm_attn_norm.attn.Wqkv",),
            output=("norm_attn_norm.attn.out_proj",),
            experts=within("ffn.experts.mlp.experts.0", _W),
        ),
        spelled={
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
        },
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        read=_OLMO,
        modules=module_names(),
    ),
    "flex_olmo": Family(
        architecture="FlexOlmoForCausalLM",
        read=_OLMO,
        modules=module_names(),
    ),
    "solar_open": Family(
        architecture="SolarOpenForCausalLM",
        read=Decoder(
            qkv_bias=None,
            kv_heads=8,
            experts_field="n_routed_experts",
            shared_count_field="n_shared_experts",
            router_bias=True,
        ),
        modules=module_names(),
    ),
    "phimoe": Family(
        architecture="PhiMoEForCausalLM",
        read=Decoder(
            qkv_bias=None,
            output_bias=None,
            norm_bias=True,
            head_bias=None,
            kv_heads=8,
            experts_field="num_local_experts",
            expert_width_field="intermediate_size",
        ),
        modules=module_names(experts=within("block_sparse_moe.experts.0", _W)),
    ),
    "granitemoe": Family(
        architecture="GraniteMoeForCausalLM",
        read=Decoder(
            qkv_bias=None,
            output_bias=None,
            experts_field="num_local_experts",
            expert_width_field="intermediate_size",
        ),
        modules=module_names(experts=within("block_sparse_moe.experts.0", _W)),
        idle=("position_embedding_type",),
    ),
    "granitemoeshared": Family(
        architecture="GraniteMoeSharedForCausalLM",
        read=Decoder(
            qkv_bias=None,
            output_bias=None,
            experts_field="num_local_experts",
            expert_width_field="intermediate_size",
            shared_width_field="shared_intermediate_size",
        ),
        modules=module_names(experts=within("block_sparse_moe.experts.0", _W), shared=within("shared_mlp")),
        idle=("position_embedding_type",),
    ),
    "deepseek": Family(
        architecture="DeepseekForCausalLM",
        read=Decoder(
            qkv_bias=None, output_bias=None, experts_field="n_routed_experts", shared_count_field="n_shared_experts"
        ),
        modules=module_names(),
    ),
    "dots1": Family(
        architecture="Dots1ForCausalLM",
        read=Decoder(
            qkv_bias=None,
            output_bias=None,
            qk_norm=True,
            window="opt-in",
            experts_field="n_routed_experts",
            shared_count_field="n_shared_experts",
            router_bias=True,
        ),
        modules=module_names(),
    ),
    "ernie4_5_moe": Family(
        architecture="Ernie4_5_MoeForCausalLM",
        read=_ernie,
        modules=module_names(),
        spelled=_BIASES | {"num_experts_per_tok": "moe_k"},
        tied=True,
        idle=("moe_capacity", "moe_gate", "compression_ratio"),
    ),
    "hunyuan_v1_moe": Family(
        architecture="HunYuanMoEV1ForCausalLM",
        read=_hunyuan,
        modules=module_names(shared=within("mlp.shared_mlp")),
        spelled={"num_experts_per_tok": "moe_topk"},
    ),
    "glm4_moe_lite": Family(
        architecture="Glm4MoeLiteForCausalLM",
        read=Decoder(
            latent=True, experts_field="n_routed_experts", shared_count_field="n_shared_experts", router_bias=True
        ),
        modules=LATENT_MODULES,
    ),
    "bailing_moe": Family(
        architecture="BailingMoeForCausalLM", read=_bailing, modules=_BAILING_MODULES, spelled=_BAILING
    ),
    "bailing_moe_v2": Family(
        architecture="BailingMoeV2ForCausalLM", read=_bailing, modules=_BAILING_MODULES, spelled=_BAILING
    ),
}
