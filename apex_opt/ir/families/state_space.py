"""Mamba and Mamba2 alone, and between layers of attention: Granite 4, Jamba."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.cells import (
    Attention,
    AttentionCell,
    DenseFfn,
    Ffn,
    Mamba1,
    Mamba2,
    MoeFfn,
    Skipped,
)
from apex_opt.ir.checks import shown
from apex_opt.ir.families.base import Family, Layers, Sizes, module_names, within
from apex_opt.ir.families.decoder import head_fields, layer_kinds
from apex_opt.ir.families.states import refuse
from apex_opt.ir.model import Block

if TYPE_CHECKING:
    from apex_opt.ir.fields import Fields


def _inner(fields: Fields, hidden: int, expand: str, heads: int, head_dim: int, names: tuple[str, str]) -> None:
    """Check that heads make up so many times the hidden width."""
    factor = fields.get(expand, 2)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 100:
        fields.fault(expand, f"must be a number above 0 and below 100, not {shown(factor)}")
    elif heads and head_dim and hidden and heads * head_dim != int(factor * hidden):
        told = f"{expand} times hidden_size is {int(factor * hidden)}"
        fields.fault(names[0], f"{heads} times {names[1]} {head_dim} is {heads * head_dim}, but {told}")


def read_mamba2(fields: Fields, size: Sizes) -> Layers:
    """Layers of Mamba2 alone, each behind a norm."""
    sizes: dict[str, Any] = {
        "heads": fields.count("num_heads"),
        "head_dim": fields.count("head_dim"),
        "groups": fields.count("n_groups"),
        "state": fields.count("state_size"),
        "kernel": fields.count("conv_kernel"),
        "chunk": fields.count("chunk_size", default=256),
    }
    _inner(fields, size.hidden, "expand", sizes["heads"], sizes["head_dim"], ("num_heads", "head_dim"))
    if sizes["groups"] and sizes["heads"] % sizes["groups"]:
        fields.fault("num_heads", f"{sizes['heads']} is not a multiple of n_groups {sizes['groups']}")
    bias, conv_bias = fields.flag("use_bias"), fields.flag("use_conv_bias", default=True)
    refuse(fields, "rms_norm", True)
    fields.idle("time_step_rank", "norm_before_gate")
    if fields.faults:
        return Layers([])
    cell = Mamba2(hidden=size.hidden, bias=bias, conv_bias=conv_bias, **sizes)
    return Layers([Block(attention=cell, ffn=Skipped(hidden=size.hidden))] * size.layers)


def read_mamba1(fields: Fields, size: Sizes) -> Layers:
    """Layers of Mamba alone, each behind a norm."""
    sizes: dict[str, Any] = {
        "inner": fields.count("intermediate_size", default=fields.count("expand", default=2) * size.hidden),
        "state": fields.count("state_size", default=16),
        "kernel": fields.count("conv_kernel", default=4),
        "rank": _rank(fields, "time_step_rank", size.hidden),
    }
    refuse(fields, "rms_norm", True)
    refuse(fields, "d_model", size.hidden)
    refuse(fields, "d_inner", sizes["inner"])
    refuse(fields, "n_layer", size.layers)
    fields.idle("pad_vocab_size_multiple")
    bias, conv_bias = fields.flag("use_bias"), fields.flag("use_conv_bias", default=True)
    if fields.faults:
        return Layers([])
    cell = Mamba1(hidden=size.hidden, bias=bias, conv_bias=conv_bias, **sizes)
    return Layers([Block(attention=cell, ffn=Skipped(hidden=size.hidden))] * size.layers)


def _rank(fields: Fields, key: str, hidden: int) -> int:
    """Width that time steps are compressed to: "auto" is a sixteenth of the hidden one."""
    automatic = max(1, -(-hidden // 16))
    return automatic if fields.get(key) == "auto" else fields.count(key, default=automatic)


def read_granite(fields: Fields, size: Sizes) -> Layers:
    """Layers of Mamba2 or attention, each before experts beside a shared FFN, or before that alone."""
    kinds = layer_kinds(fields, size.layers, ("attention", "mamba"))
    if kinds is None:
        fields.fault("layer_types", "is missing")
    heads: dict[str, Any] = head_fields(fields, size.hidden)
    mamba = mamba2_fields(fields, mamba_head(fields, size.hidden))
    attention_bias = fields.flag("attention_bias")
    refuse(fields, "position_embedding_type", "nope", "rope")
    refuse(fields, "normalization_function", "rmsnorm")
    experts, shared = fields.count("num_local_experts", default=0, minimum=0), fields.count("shared_intermediate_size")
    rotary = fields.text("position_embedding_type") == "rope"
    routed: dict[str, Any] = {}
    if experts:
        routed = {
            "expert_intermediate": fields.count("intermediate_size"),
            "experts_per_token": fields.count("num_experts_per_tok", maximum=experts),
        }
    if fields.faults or kinds is None:
        return Layers([])
    ffn: Ffn = DenseFfn(hidden=size.hidden, intermediate=shared)
    if experts:
        ffn = MoeFfn(hidden=size.hidden, experts=experts, shared_intermediate=shared, **routed)
    cells: dict[str, AttentionCell] = {
        "attention": Attention(
            hidden=size.hidden,
            qkv_bias=attention_bias,
            output_bias=attention_bias,
            rotary=rotary,
            **heads,
        ),
        "mamba": Mamba2(hidden=size.hidden, **mamba),
    }
    return Layers([Block(attention=cells[kind], ffn=ffn) for kind in kinds])


def mamba2_fields(fields: Fields, head_dim: int) -> dict[str, Any]:
    """Arguments of `Mamba2` by the names that Granite, Bamba and Falcon-H1 share.

    Parameters
    ----------
    fields
    head_dim : int      width of a head
    """
    heads, groups = fields.count("mamba_n_heads"), fields.count("mamba_n_groups", default=1)
    if groups and heads % groups:
        fields.fault("mamba_n_heads", f"{heads} is not a multiple of mamba_n_groups {groups}")
    return {
        "heads": heads,
        "head_dim": head_dim,
        "groups": groups,
        "state": fields.count("mamba_d_state"),
        "kernel": fields.count("mamba_d_conv"),
        "chunk": fields.count("mamba_chunk_size", default=256),
        "bias": fields.flag("mamba_proj_bias"),
        "conv_bias": fields.flag("mamba_conv_bias", default=True),
    }


def mamba_head(fields: Fields, hidden: int) -> int:
    """Width of an SSM head: "auto" is what the expanded width leaves each."""
    heads, expand = fields.count("mamba_n_heads"), fields.count("mamba_expand", default=2)
    if fields.get("mamba_d_head") in (None, "auto"):
        if heads and expand * hidden % heads:
            fields.fault("mamba_n_heads", f"{heads} does not divide mamba_expand times hidden_size {expand * hidden}")
        return expand * hidden // heads if heads else 0
    head_dim = fields.count("mamba_d_head")
    _inner(fields, hidden, "mamba_expand", heads, head_dim, ("mamba_n_heads", "mamba_d_head"))
    return head_dim


def read_jamba(fields: Fields, size: Sizes) -> Layers:
    """Layers of Mamba, every so manieth of attention, and of FFNs, every so manieth of experts."""
    period, offset = fields.count("attn_layer_period", default=8), fields.count("attn_layer_offset", 4, minimum=0)
    every, first = fields.count("expert_layer_period", default=2), fields.count("expert_layer_offset", 1, minimum=0)
    heads: dict[str, Any] = head_fields(fields, size.hidden)
    sizes: dict[str, Any] = {
        "inner": fields.count("mamba_expand", default=2) * size.hidden,
        "state": fields.count("mamba_d_state", default=16),
        "kernel": fields.count("mamba_d_conv", default=4),
        "rank": _rank(fields, "mamba_dt_rank", size.hidden),
    }
    bias, conv_bias = fields.flag("mamba_proj_bias"), fields.flag("mamba_conv_bias", default=True)
    width, experts = fields.count("intermediate_size"), fields.count("num_experts", default=16)
    per_token = fields.count("num_experts_per_tok", default=2)
    if experts and per_token > experts:
        fields.fault("num_experts_per_tok", f"{per_token} is above num_experts {experts}")
    if fields.faults:
        return Layers([])
    dense = DenseFfn(hidden=size.hidden, intermediate=width)
    moe = MoeFfn(hidden=size.hidden, expert_intermediate=width, experts=experts, experts_per_token=per_token)
    full = Attention(hidden=size.hidden, rotary=False, **heads)
    mamba = Mamba1(hidden=size.hidden, bias=bias, conv_bias=conv_bias, norms=True, **sizes)
    return Layers(
        [
            Block(
                attention=full if layer % period == offset else mamba,
                ffn=moe if experts > 1 and layer % every == first else dense,
            )
            for layer in range(size.layers)
        ]
    )


_NO_POSITIONS: Final = {"max_position_embeddings": 2048}
"""Tokens that vLLM serves at most of a model whose file tells no length."""
_MIXER: Final = module_names(state_in=("mixer.in_proj",), state_out=("mixer.out_proj",))

FAMILIES: Final[dict[str, Family]] = {
    "mamba2": Family(architecture="Mamba2ForCausalLM", read=read_mamba2, modules=_MIXER, implied=_NO_POSITIONS),
    "mamba": Family(architecture="MambaForCausalLM", read=read_mamba1, modules={}, implied=_NO_POSITIONS, tied=True),
    "falcon_mamba": Family(
        architecture="FalconMambaForCausalLM", read=read_mamba1, modules={}, implied=_NO_POSITIONS, tied=True
    ),
    "granitemoehybrid": Family(
        architecture="GraniteMoeHybridForCausalLM",
        read=read_granite,
        modules=module_names(
            experts=within("block_sparse_moe", ("input_linear", "output_linear")),
            dense=within("shared_mlp", ("input_linear", "output_linear")),
            shared=within("shared_mlp", ("input_linear", "output_linear")),
            state_in=("mamba.in_proj",),
            state_out=("mamba.out_proj",),
        ),
    ),
    "jamba": Family(
        architecture="JambaForCausalLM",
        read=read_jamba,
        modules=module_names(
            dense=within("feed_forward"),
            experts=within("feed_forward.experts.0"),
        ),
    ),
}
