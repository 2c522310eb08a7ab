"""Nemotron-H and Nemotron-3, whose layers are one cell each, and Nemotron-NAS, whose layers were pruned one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.cells import (
    Attention,
    AttentionCell,
    DenseFfn,
    Ffn,
    LatentMoeFfn,
    Mamba2,
    MoeFfn,
    Replaced,
    Skipped,
)
from apex_opt.ir.checks import MAX_COUNT, shown
from apex_opt.ir.families.base import Family, Layers, Sizes, module_names, within
from apex_opt.ir.families.decoder import head_fields
from apex_opt.ir.families.listed import published_kind
from apex_opt.ir.families.states import refuse, state_bytes
from apex_opt.ir.fields import Fields
from apex_opt.ir.model import Block

if TYPE_CHECKING:
    from apex_opt.ir.cells import Cell

_LETTERS: Final = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}

_OF_CELLS: Final = (
    *("intermediate_size", "moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size"),
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "mamba_num_heads", "mamba_head_dim", "n_groups"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "ssm_state_size", "conv_kernel", "chunk_size"),
    *("use_bias", "use_conv_bias", "mamba_proj_bias", "mlp_bias", "attention_bias", "mamba_ssm_cache_dtype"),
)
"""Fields of cells, which a model without any such layer may state all the same."""


def _kinds(fields: Fields, layers: int) -> list[str]:
    """What each layer is: a list in newer files, a text of one letter per layer in older ones; empty at a fault."""
    faults, pattern = len(fields.faults), fields.text("hybrid_override_pattern")
    if len(fields.faults) > faults:
        return []
    named = "layers_block_type" if fields.get("layers_block_type") is not None else "layer_types"
    key = "hybrid_override_pattern" if pattern else named
    kinds = [_LETTERS.get(letter, letter) for letter in pattern] if pattern else fields.rows(key) or []
    kinds = [published_kind(kind, _LETTERS.values()) for kind in kinds]
    odd = [kind for kind in kinds if kind not in _LETTERS.values()]
    if odd:
        known = " and ".join(_LETTERS if pattern else _LETTERS.values())
        fields.fault(key, f"may hold {known}, not {shown(odd[0])}")
        return []
    if layers and len(kinds) != layers:
        fields.fault(key, f"has {len(kinds)} entries for num_hidden_layers {layers}")
    return kinds


def _moe(fields: Fields, hidden: int) -> MoeFfn | None:
    """Experts without gates, perhaps in a latent space, beside a shared one."""
    faults = len(fields.faults)
    shared = fields.count("n_shared_experts", default=0, minimum=0)
    sizes: dict[str, Any] = {
        "expert_intermediate": fields.count("moe_intermediate_size"),
        "experts": fields.count("n_routed_experts"),
        "experts_per_token": fields.count("num_experts_per_tok"),
        "shared_intermediate": shared and shared * fields.count("moe_shared_expert_intermediate_size"),
    }
    if sizes["experts_per_token"] > sizes["experts"]:
        told = sizes["experts_per_token"], sizes["experts"]
        fields.fault("num_experts_per_tok", f"{told[0]} is above n_routed_experts {told[1]}")
    latent = fields.count("moe_latent_size", default=0)
    if not hidden or len(fields.faults) > faults:
        return None
    if latent:
        return LatentMoeFfn(hidden=hidden, latent=latent, gated=False, router_bias=True, **sizes)
    return MoeFfn(hidden=hidden, gated=False, router_bias=True, **sizes)


def _mamba(fields: Fields, hidden: int) -> Mamba2 | None:
    faults = len(fields.faults)
    sizes: dict[str, Any] = {
        "heads": fields.count("mamba_num_heads"),
        "head_dim": fields.count("mamba_head_dim"),
        "groups": fields.count("n_groups"),
        "state": fields.count("ssm_state_size"),
        "kernel": fields.count("conv_kernel"),
        "chunk": fields.count("chunk_size", default=128),
        # Where neither file nor engine is told, vLLM takes 32 bit for this family.
        "state_bytes": state_bytes(fields, "mamba_ssm_cache_dtype", default="float32"),
    }
    if sizes["groups"] and sizes["heads"] % sizes["groups"]:
        fields.fault("mamba_num_heads", f"{sizes['heads']} is not a multiple of n_groups {sizes['groups']}")
    bias, conv_bias = fields.flag("use_bias"), fields.flag("use_conv_bias", default=True)
    if fields.flag("mamba_proj_bias", default=bias) != bias:
        fields.fault("mamba_proj_bias", f"must be use_bias, which is {str(bias).lower()}")
    if not hidden or len(fields.faults) > faults:
        return None
    return Mamba2(hidden=hidden, bias=bias, conv_bias=conv_bias, **sizes)


def read_hybrid(fields: Fields, size: Sizes) -> Layers:
    """Layers of one cell behind one norm: Mamba2, attention without positions, an FFN or experts without gates."""
    if fields.get("head_dim") is None and fields.get("attention_head_dim") is not None:
        fields = fields.spelled({"head_dim": "attention_head_dim"})
    kinds = _kinds(fields, size.layers)
    refuse(fields, "mlp_hidden_act", "relu2")
    # Of cells that the model may lack, and the width of an SSM that its heads tell.
    fields.idle("expand", "time_step_rank", "moe_shared_expert_overlap", *_OF_CELLS)
    there: dict[str, Cell | None] = {}
    if "attention" in kinds:
        heads: dict[str, Any] = head_fields(fields, size.hidden)
        bias = fields.flag("attention_bias")
        if not fields.faults:
            there["attention"] = Attention(hidden=size.hidden, qkv_bias=bias, output_bias=bias, rotary=False, **heads)
    if "mlp" in kinds:
        width, bias = fields.count("intermediate_size"), fields.flag("mlp_bias")
        if not fields.faults:
            there["mlp"] = DenseFfn(hidden=size.hidden, intermediate=width, gated=False, bias=bias)
    if "moe" in kinds:
        there["moe"] = _moe(fields, size.hidden)
    if "mamba" in kinds:
        there["mamba"] = _mamba(fields, size.hidden)
    if fields.faults:
        return Layers([])
    gone = Skipped(hidden=size.hidden)
    blocks = {}
    for kind, cell in there.items():
        if isinstance(cell, AttentionCell):
            blocks[kind] = Block(attention=cell, ffn=gone)
        elif isinstance(cell, Ffn):
            blocks[kind] = Block(attention=gone, ffn=cell)
    return Layers([blocks[kind] for kind in kinds])


_MULTIPLE: Final = 256
"""Columns of pruned FFNs are rounded up to multiples of this."""


def _mixed(entry: Fields, size: Sizes, heads: int, head_dim: int, bias: bool) -> AttentionCell | None:
    """Attention of one layer: with so many query heads to a KV head, a matrix in its place, or none."""
    if entry.flag("no_op"):
        return Skipped(hidden=size.hidden)
    if entry.flag("replace_with_linear"):
        return Replaced(hidden=size.hidden)
    group = entry.count("n_heads_in_group")
    if group and heads % group:
        entry.fault("n_heads_in_group", f"{group} does not divide num_attention_heads {heads}")
    if entry.faults:
        return None
    return Attention(
        hidden=size.hidden,
        query_heads=heads,
        kv_heads=heads // group,
        head_dim=head_dim,
        qkv_bias=bias,
        output_bias=bias,
    )


def _fed(entry: Fields, size: Sizes, bias: bool) -> Ffn | None:
    """FFN of one layer: of two thirds of so many times the width, a matrix in its place, or none."""
    if entry.flag("no_op"):
        return Skipped(hidden=size.hidden)
    if entry.flag("replace_with_linear"):
        return Replaced(hidden=size.hidden)
    factor = entry.get("ffn_mult")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor * size.hidden < MAX_COUNT:
        entry.fault("ffn_mult", f"must be a number above 0, not {shown(factor)}")
    if entry.faults:
        return None
    columns = int(2 * factor * size.hidden / 3)
    return DenseFfn(hidden=size.hidden, intermediate=columns + -columns % _MULTIPLE, bias=bias)


def read_pruned(fields: Fields, size: Sizes) -> Layers:
    """Layers as `block_configs` lists them: attention with fewer KV heads, narrower FFNs, cells that are gone.

    Source: `modeling_decilm.py` of the checkpoints, `models/nemotron_nas.py` of vLLM.
    """
    heads = fields.count("num_attention_heads")
    head_dim = fields.count("head_dim", default=size.hidden // heads if heads else 0)
    bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
    rows = fields.rows("block_configs")
    if rows is None:
        fields.fault("block_configs", "is missing")
        return Layers([])
    if size.layers and len(rows) != size.layers:
        fields.fault("block_configs", f"has {len(rows)} entries for num_hidden_layers {size.layers}")
    blocks = []
    for index, row in enumerate(rows):
        entry = Fields(
            row if isinstance(row, dict) else {}, f"block_configs[{index}].", fields.faults, asked=fields.asked
        )
        attention, ffn = entry.section("attention"), entry.section("ffn")
        if attention is None or ffn is None:
            entry.fault("attention" if attention is None else "ffn", "is missing")
            return Layers([])
        mixed, fed = _mixed(attention, size, heads, head_dim, bias), _fed(ffn, size, mlp_bias)
        if mixed is None or fed is None or fields.faults:
            return Layers([])
        blocks.append(Block(attention=mixed, ffn=fed))
    return Layers(blocks)


FAMILIES: Final[dict[str, Family]] = {
    "nemotron_h": Family(
        architecture="NemotronHForCausalLM",
        read=read_hybrid,
        modules=module_names(
            qkv=within("mixer", ("q_proj", "k_proj", "v_proj")),
            output=("mixer.o_proj",),
            dense=within("mixer", ("up_proj", "down_proj")),
            experts=within("mixer.experts.0", ("up_proj", "down_proj")),
            shared=within("mixer.shared_experts", ("up_proj", "down_proj")),
            latent=within("mixer", ("fc1_latent_proj", "fc2_latent_proj")),
            state_in=("mixer.in_proj",),
            state_out=("mixer.out_proj",),
        ),
        layer_lists=("hybrid_override_pattern", "layers_block_type", "layer_types"),
    ),
    "nemotron-nas": Family(
        architecture="DeciLMForCausalLM",
        read=read_pruned,
        modules=module_names(replaced=("self_attn.linear_attn", "mlp.linear_mlp")),
    ),
}
