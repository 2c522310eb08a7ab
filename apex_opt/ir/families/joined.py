"""Bamba, some of whose layers are attention, and Falcon-H1, whose layers have attention and Mamba2 side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.cells import Attention, DenseFfn, JoinedAttention, Mamba2
from apex_opt.ir.checks import count_fault
from apex_opt.ir.families.base import Family, Layers, module_names, within
from apex_opt.ir.families.decoder import head_fields, layer_kinds
from apex_opt.ir.families.state_space import mamba2_fields, mamba_head
from apex_opt.ir.families.states import refuse
from apex_opt.ir.model import Block

if TYPE_CHECKING:
    from apex_opt.ir.families.base import Sizes
    from apex_opt.ir.fields import Fields


def _full_layers(fields: Fields, layers: int) -> set[int]:
    """Layers with attention: those numbered, or those of a list of kinds."""
    for key in ("layers_block_type", "layer_types"):
        kinds = layer_kinds(fields, layers, ("attention", "mamba"), key)
        if kinds is not None:
            return {layer for layer, kind in enumerate(kinds) if kind == "attention"}
    listed = fields.rows("attn_layer_indices") or []
    for entry in listed:
        if layers and (fault := count_fault("attn_layer_indices entry", entry, 0, layers - 1)):
            fields.faults.append(fault)
            return set()
    return set(listed)


def read_bamba(fields: Fields, size: Sizes) -> Layers:
    """Layers of Mamba2 or attention, each before an FFN."""
    heads: dict[str, Any] = head_fields(fields, size.hidden, 8)
    full = _full_layers(fields, size.layers)
    fields.idle("attn_rotary_emb", "attn_layer_indices")
    sizes = mamba2_fields(fields, mamba_head(fields, size.hidden))
    bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
    width = fields.count("intermediate_size")
    if fields.faults:
        return Layers([])
    ffn = DenseFfn(hidden=size.hidden, intermediate=width, bias=mlp_bias)
    attention = Attention(hidden=size.hidden, qkv_bias=bias, output_bias=bias, **heads)
    mamba = Mamba2(hidden=size.hidden, **sizes)
    return Layers([Block(attention=attention if layer in full else mamba, ffn=ffn) for layer in range(size.layers)])


def read_falcon(fields: Fields, size: Sizes) -> Layers:
    """Layers of attention beside Mamba2, each before an FFN."""
    heads: dict[str, Any] = head_fields(fields, size.hidden, 8)
    count = fields.count("mamba_n_heads")
    inner = fields.count("mamba_d_ssm", default=0) or fields.count("mamba_expand", default=2) * size.hidden
    stated = fields.get("mamba_d_head")
    head_dim = inner // count if count and stated in (None, "auto") else fields.count("mamba_d_head", default=0)
    if count and inner and head_dim * count != inner:
        fields.fault("mamba_n_heads", f"{count} times mamba_d_head {head_dim} is not mamba_d_ssm {inner}")
    sizes = mamba2_fields(fields, head_dim)
    norm = fields.flag("mamba_rms_norm")
    refuse(fields, "mamba_use_mlp", True)
    fields.idle("mamba_norm_before_gate", "mamba_expand", "mlp_expansion_factor", "time_step_rank")
    bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
    refuse(fields, "projectors_bias", sizes["bias"])
    width = fields.count("intermediate_size")
    if fields.faults:
        return Layers([])
    cell = JoinedAttention(
        hidden=size.hidden,
        attention=Attention(hidden=size.hidden, qkv_bias=bias, output_bias=bias, **heads),
        mamba=Mamba2(hidden=size.hidden, gated_norm=norm, **sizes),
    )
    ffn = DenseFfn(hidden=size.hidden, intermediate=width, bias=mlp_bias)
    return Layers([Block(attention=cell, ffn=ffn)] * size.layers)


_MODULES: Final = module_names(dense=within("feed_forward"), state_in=("mamba.in_proj",), state_out=("mamba.out_proj",))

FAMILIES: Final[dict[str, Family]] = {
    "bamba": Family(
        architecture="BambaForCausalLM",
        read=read_bamba,
        modules=_MODULES,
        implied={"mamba_d_state": 256, "mamba_d_conv": 4, "mamba_n_heads": 128},
        layer_lists=("layers_block_type",),
    ),
    "falcon_h1": Family(
        architecture="FalconH1ForCausalLM",
        read=read_falcon,
        modules=_MODULES,
        implied={"mamba_d_state": 256, "mamba_d_conv": 4, "mamba_n_heads": 128},
    ),
}
