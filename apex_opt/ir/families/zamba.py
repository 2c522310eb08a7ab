"""Zamba2: Mamba2 in every layer, in front of it in some layers attention and an FFN whose weights these share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.cells import Ffn, Mamba2, SharedAttention, SharedFfn, Skipped
from apex_opt.ir.checks import count_fault
from apex_opt.ir.families.base import Family, Layers, module_names
from apex_opt.ir.families.listed import kinds_of
from apex_opt.ir.families.states import refuse
from apex_opt.ir.model import Block

if TYPE_CHECKING:
    from apex_opt.ir.cells import AttentionCell
    from apex_opt.ir.families.base import Sizes
    from apex_opt.ir.fields import Fields

_KINDS: Final = {"mamba": False, "hybrid": True}


def _hybrids(fields: Fields, layers: int) -> list[bool]:
    """Which layers have attention: those of a list of kinds, or those numbered."""
    for key in ("layers_block_type", "layer_types"):
        kinds = kinds_of(fields, key, layers, _KINDS)
        if kinds is not None:
            return kinds
    listed = fields.rows("hybrid_layer_ids")
    if listed is None:
        fields.fault("hybrid_layer_ids", "is missing, and so is layers_block_type")
    for entry in listed or ():
        if layers and (fault := count_fault("hybrid_layer_ids entry", entry, 0, layers - 1)):
            fields.faults.append(fault)
            return []
    return [layer in (listed or ()) for layer in range(layers)]


def read(fields: Fields, size: Sizes) -> Layers:
    """Layers of Mamba2, some of them behind one of a few blocks of attention and FFN in turn.

    Source: `transformers` and vLLM, `models/zamba2.py`.
    """
    heads, inner = fields.count("num_attention_heads"), fields.count("mamba_expand", default=2) * size.hidden
    for key in ("num_key_value_heads", "num_query_groups"):
        refuse(fields, key, heads)
    refuse(fields, "attention_hidden_size", 2 * size.hidden)
    refuse(fields, "use_conv_bias", True)
    refuse(fields, "gated_linear_unit", True)
    fields.idle("kv_channels", "hybrid_layer_ids", "use_long_context")  # beside attention_head_dim, and a list of kinds
    head_dim = fields.count("attention_head_dim", default=2 * size.hidden // heads if heads else 0)
    states, groups = fields.count("n_mamba_heads", default=8), fields.count("mamba_ngroups", default=1)
    if states and inner % states:
        fields.fault("n_mamba_heads", f"{states} does not divide mamba_expand times hidden_size {inner}")
    if states and groups and states % groups:
        fields.fault("n_mamba_heads", f"{states} is not a multiple of mamba_ngroups {groups}")
    refuse(fields, "mamba_headdim", inner // states if states else 0)
    mamba: dict[str, Any] = {
        "heads": states,
        "head_dim": inner // states if states else 0,
        "groups": groups,
        "state": fields.count("mamba_d_state", default=64),
        "kernel": fields.count("mamba_d_conv", default=4),
        "chunk": fields.count("chunk_size", default=256),
        "bias": fields.flag("add_bias_linear"),
    }
    hybrids, blocks = _hybrids(fields, size.layers), fields.count("num_mem_blocks", default=1)
    rank = fields.count("adapter_rank", default=128)
    adapted, rotary = fields.flag("use_shared_attention_adapter"), fields.flag("use_mem_rope")
    width = fields.count("intermediate_size", default=4 * size.hidden)
    if fields.faults:
        return Layers([])
    own = Mamba2(hidden=size.hidden, **mamba)
    gone = Skipped(hidden=size.hidden)
    found, met = [], 0
    for hybrid in hybrids:
        cell: AttentionCell = own
        ffn: Ffn = gone
        if hybrid:
            again = met >= blocks
            cell = SharedAttention(
                hidden=size.hidden,
                heads=heads,
                head_dim=head_dim,
                mamba=own,
                adapter=rank if adapted else 0,
                rotary=rotary,
                again=again,
            )
            ffn = SharedFfn(hidden=size.hidden, intermediate=width, bias=mamba["bias"], adapter=rank, again=again)
            met += 1
        found.append(Block(attention=cell, ffn=ffn, norms=1))
    return Layers(found)


FAMILIES: Final[dict[str, Family]] = {
    "zamba2": Family(
        architecture="Zamba2ForCausalLM",
        read=read,
        modules=module_names(
            qkv=tuple(f"shared_transformer.self_attn.{name}_proj" for name in "qkv"),
            output=("shared_transformer.self_attn.o_proj",),
            dense=("shared_transformer.feed_forward.gate_up_proj", "shared_transformer.feed_forward.down_proj"),
            state_in=("mamba.in_proj",),
            state_out=("mamba.out_proj",),
        ),
        layer_lists=("layers_block_type", "layer_types"),
        tied=True,
    ),
}
