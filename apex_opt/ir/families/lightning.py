"""MiniMax-Text-01, MiniMax-M1 and their form in `transformers`: lightning attention and full attention in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.cells import Attention, AttentionCell, LightningAttention, MoeFfn
from apex_opt.ir.families.base import Family, Layers, Sizes, module_names, within
from apex_opt.ir.families.decoder import head_fields, layer_kinds
from apex_opt.ir.families.states import refuse
from apex_opt.ir.model import Block

if TYPE_CHECKING:
    from apex_opt.ir.fields import Fields


def _full_layers(fields: Fields, layers: int) -> list[bool]:
    """Whether each layer has full attention: 1 of `attn_type_list`, or a kind of `layer_types`; empty at a fault."""
    if fields.get("attn_type_list") is None:
        kinds = layer_kinds(fields, layers, ("full_attention", "linear_attention"))
        if kinds is None:
            fields.fault("attn_type_list", "is missing, and so is layer_types")
        return [kind == "full_attention" for kind in kinds or ()]
    rows = fields.rows("attn_type_list") or []
    if any(row not in (0, 1) or isinstance(row, bool) for row in rows):
        fields.fault("attn_type_list", "may hold 0 (lightning attention) and 1 (full attention)")
        return []
    if layers and len(rows) != layers:
        fields.fault("attn_type_list", f"has {len(rows)} entries for num_hidden_layers {layers}")
    return [row == 1 for row in rows]


_SCALED: Final = ("full_attn", "linear_attn", "mlp", "layernorm_full_attention", "layernorm_linear_attention")
"""Sums that factors scale, by the beginning of their names."""


def read(fields: Fields, size: Sizes) -> Layers:
    """Layers of either kind of attention, each before experts."""
    heads: dict[str, Any] = head_fields(fields, size.hidden)
    full = _full_layers(fields, size.layers)
    experts = fields.count("num_local_experts")
    routed: dict[str, Any] = {
        "experts": experts,
        "expert_intermediate": fields.count("intermediate_size"),
        "experts_per_token": fields.count("num_experts_per_tok", default=2, maximum=max(experts, 1)),
        "shared_intermediate": fields.count("shared_intermediate_size", default=0, minimum=0),
    }
    refuse(fields, "attention_bias", False)
    fields.idle("postnorm")
    fields.idle("block_size", *(f"{kind}_{factor}_factor" for kind in _SCALED for factor in ("alpha", "beta")))
    if routed["shared_intermediate"]:
        refuse(fields, "shared_moe_mode", "softmax", "sigmoid")
    if fields.faults:
        return Layers([])
    lightning = LightningAttention(hidden=size.hidden, heads=heads["query_heads"], head_dim=heads["head_dim"])
    cells: tuple[AttentionCell, AttentionCell] = (lightning, Attention(hidden=size.hidden, **heads))
    moe = MoeFfn(hidden=size.hidden, shared_gate=routed["shared_intermediate"] > 0, **routed)
    return Layers([Block(attention=cells[is_full], ffn=moe) for is_full in full])


_MODULES: Final = module_names(
    experts=within("block_sparse_moe.experts.0", ("w1", "w2", "w3")),
    shared=within("shared_mlp"),
    state_in=within("self_attn", ("qkv_proj", "output_gate")),
    state_out=("self_attn.out_proj",),
)

FAMILIES: Final[dict[str, Family]] = {
    "minimax_text_01": Family(architecture="MiniMaxText01ForCausalLM", read=read, modules=_MODULES),
    "minimax_m1": Family(architecture="MiniMaxM1ForCausalLM", read=read, modules=_MODULES),
    "minimax": Family(architecture="MiniMaxForCausalLM", read=read, modules=_MODULES),
}
