"""Short convolutions, and attention in some layers: LFM2 and LFM3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.cells import Attention, AttentionCell, DenseFfn, MoeFfn, ShortConvolution
from apex_opt.ir.checks import shown
from apex_opt.ir.families.base import Family, Layers, Sizes, module_names, within
from apex_opt.ir.families.decoder import head_fields, layer_kinds
from apex_opt.ir.families.states import refuse
from apex_opt.ir.model import Block

if TYPE_CHECKING:
    from apex_opt.ir.fields import Fields


def read_lfm2(fields: Fields, size: Sizes) -> Layers:
    """Layers of short convolutions or attention, each before an FFN, or past the first ones before experts.

    Some of LFM3 see a window; its attention has a gate for each head, and its cells norms behind them.
    """
    third = fields.text("model_type") == "lfm3"
    known = ("conv", "full_attention", "sliding_attention") if third else ("conv", "full_attention")
    kinds = layer_kinds(fields, size.layers, known)
    fields.idle("full_attn_idxs")  # where kinds are listed
    refuse(fields, "block_use_swiglu", True)
    refuse(fields, "use_pos_enc", True)
    refuse(fields, "tie_embedding", True)
    refuse(fields, "num_heads", fields.get("num_attention_heads"))
    fields.idle("theta")
    if kinds is None:
        full = fields.rows("full_attn_idxs")
        if full is None:
            fields.fault("layer_types", "is missing, and so is full_attn_idxs")
        odd = [layer for layer in full or () if isinstance(layer, bool) or layer not in range(size.layers)]
        if odd:
            fields.fault("full_attn_idxs", f"may list layers 0 to {size.layers - 1}, not {shown(odd[0])}")
        kinds = ["full_attention" if layer in (full or ()) else "conv" for layer in range(size.layers)]
    heads: dict[str, Any] = head_fields(fields, size.hidden)
    kernel, bias = fields.count("conv_L_cache", default=3), fields.flag("conv_bias")
    for key in ("conv_dim", "conv_dim_out", "block_dim"):
        refuse(fields, key, size.hidden)
    dense_first = size.layers
    routed: dict[str, Any] = {}
    if fields.get("num_experts") is not None:
        dense_first = fields.count("num_dense_layers", default=2, minimum=0)
        experts = fields.count("num_experts")
        routed = {
            "experts": experts,
            "expert_intermediate": fields.count("moe_intermediate_size"),
            "experts_per_token": fields.count("num_experts_per_tok", maximum=experts or 1),
            "router_bias": fields.flag("use_expert_bias", default=True),
        }
    width = _adjusted(fields) if not routed and not third else fields.count("intermediate_size")
    window = fields.count("sliding_window") if "sliding_attention" in kinds else None
    gated, sandwich = (third and fields.flag(key) for key in ("use_attention_gate", "use_sandwich_norm"))
    if fields.faults:
        return Layers([])
    dense = DenseFfn(hidden=size.hidden, intermediate=width)
    moe = MoeFfn(hidden=size.hidden, **routed) if routed else None
    attention = Attention(hidden=size.hidden, qk_norm=True, gated=gated, **heads)
    cells: dict[str, AttentionCell] = {
        "conv": ShortConvolution(hidden=size.hidden, kernel=kernel, bias=bias),
        "full_attention": attention,
        "sliding_attention": attention.with_window(window),
    }
    return Layers(
        [
            Block(
                attention=cells[kind],
                ffn=dense if moe is None or layer < dense_first else moe,
                norms=4 if sandwich else None,
            )
            for layer, kind in enumerate(kinds)
        ]
    )


def _adjusted(fields: Fields) -> int:
    """Columns of an FFN of LFM2: two thirds of those told, times a factor, up to a multiple, where it is to be so."""
    key = "block_ff_dim" if fields.get("block_ff_dim") is not None else "intermediate_size"
    columns = fields.count(key)
    if not fields.flag("block_auto_adjust_ff_dim", default=True):
        return columns
    multiple = fields.count("block_multiple_of", default=256)
    factor = fields.get("block_ffn_dim_multiplier", 1.0)
    if factor is None:
        factor = 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 100:
        fields.fault("block_ffn_dim_multiplier", f"must be a number above 0 and below 100, not {shown(factor)}")
        return 0
    columns = int(factor * int(2 * columns / 3))
    return columns + -columns % (multiple or 1)


_MODULES: Final = module_names(
    output=("self_attn.out_proj",),
    dense=within("feed_forward", ("w1", "w3", "w2")),
    experts=within("feed_forward.experts.0", ("w1", "w3", "w2")),
)

FAMILIES: Final[dict[str, Family]] = {
    "lfm2": Family(
        architecture="Lfm2ForCausalLM",
        read=read_lfm2,
        modules=_MODULES,
        tied=True,
    ),
    "lfm3": Family(
        architecture="Lfm3ForCausalLM",
        read=read_lfm2,
        modules=_MODULES,
        implied={"use_attention_gate": True, "use_sandwich_norm": True, "conv_L_cache": 7},
        tied=True,
    ),
    "lfm2_moe": Family(
        architecture="Lfm2MoeForCausalLM",
        read=read_lfm2,
        modules=_MODULES,
        tied=True,
    ),
}
