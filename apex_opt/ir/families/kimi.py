"""Kimi-Linear and Kimi-K3: KDA with latent attention in between, behind them experts, in K3 in a latent space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.cells import (
    AttentionCell,
    DenseFfn,
    Ffn,
    GatedLatentAttention,
    KimiDelta,
    LatentAttention,
    LatentMoeFfn,
    Matrix,
    MoeFfn,
)
from apex_opt.ir.checks import MAX_COUNT, count_fault
from apex_opt.ir.families.base import Family, Layers, Sizes, module_names, within
from apex_opt.ir.families.decoder import latent_fields, layer_kinds
from apex_opt.ir.families.listed import kinds_of
from apex_opt.ir.families.states import refuse
from apex_opt.ir.model import Block

if TYPE_CHECKING:
    from apex_opt.ir.fields import Fields


def _moe(fields: Fields, hidden: int) -> MoeFfn | None:
    faults = len(fields.faults)
    width = fields.count("moe_intermediate_size")
    sizes: dict[str, Any] = {
        "expert_intermediate": width,
        "experts": fields.count("num_experts"),
        "experts_per_token": fields.count("num_experts_per_token"),
        "shared_intermediate": fields.count("num_shared_experts", default=0, minimum=0) * width,
    }
    if sizes["experts_per_token"] > sizes["experts"]:
        told = sizes["experts_per_token"], sizes["experts"]
        fields.fault("num_experts_per_token", f"{told[0]} is above num_experts {told[1]}")
    if sizes["shared_intermediate"] > MAX_COUNT:
        fields.fault("num_shared_experts", f"times moe_intermediate_size is above {MAX_COUNT}")
    latent, latent_norm = fields.count("routed_expert_hidden_size", default=0), fields.flag("latent_moe_use_norm")
    if not hidden or len(fields.faults) > faults:
        return None
    if latent:
        return LatentMoeFfn(hidden=hidden, latent=latent, latent_norm=latent_norm, router_bias=True, **sizes)
    return MoeFfn(hidden=hidden, router_bias=True, **sizes)


def _ffns(fields: Fields, size: Sizes) -> list[Ffn]:
    """FFN of every layer; empty where a fault forbids to build one."""
    faults = len(fields.faults)
    first = fields.count("first_k_dense_replace", default=0, minimum=0)
    every = fields.count("moe_layer_freq", default=1)
    sparse = kinds_of(fields, "mlp_layer_types", size.layers, {"dense": False, "sparse": True})
    if sparse is None:
        sparse = [
            fields.get("num_experts") is not None and i >= first and i % (every or 1) == 0 for i in range(size.layers)
        ]
    moe = _moe(fields, size.hidden) if any(sparse) else None
    width = 1 if all(sparse) else fields.count("intermediate_size")
    if not size.hidden or len(fields.faults) > faults:
        return []
    dense = DenseFfn(hidden=size.hidden, intermediate=width)
    return [moe if is_sparse and moe else dense for is_sparse in sparse]


def _linear_layers(fields: Fields, linear: Fields, layers: int) -> list[bool]:
    """Whether each layer has linear attention; both lists count from 1."""
    kinds: dict[int, bool] = {}
    for key, is_linear in (("kda_layers", True), ("full_attn_layers", False)):
        for layer in linear.rows(key) or []:
            if fault := count_fault(f"{linear.name(key)} entry", layer, 1, max(layers, 1)):
                fields.faults.append(fault)
                return []
            if layer - 1 in kinds:
                linear.fault(key, f"lists layer {layer}, which is listed already")
                return []
            kinds[layer - 1] = is_linear
    missing = [layer for layer in range(layers) if layer not in kinds]
    if missing:
        linear.fault("kda_layers", f"and full_attn_layers leave out layer {missing[0] + 1}")
        return []
    return [kinds[layer] for layer in range(layers)]


def _saved(fields: Fields, layers: int) -> Fields | None:
    """The fields of linear attention where `transformers` 5 saved them among the others; None without its layers."""
    kinds = layer_kinds(fields, layers, ("full_attention", "linear_attention"))
    if kinds is None:
        return None
    named = {"num_heads": "linear_num_heads", "head_dim": "linear_head_dim"}
    named["short_conv_kernel_size"] = "linear_conv_kernel_dim"
    values: dict[str, object] = {usual: fields.get(own) for usual, own in named.items()}
    for key, kind in (("kda_layers", "linear_attention"), ("full_attn_layers", "full_attention")):
        values[key] = [layer + 1 for layer, found in enumerate(kinds) if found == kind]
    return type(fields)(values, "", fields.faults, named, fields.asked)


def read(fields: Fields, size: Sizes) -> Layers:
    """Layers of KDA, or of latent attention without positions, each before a dense FFN or experts."""
    linear = fields.section("linear_attn_config")
    if linear is None:
        linear = _saved(fields, size.layers)
    if linear is None:
        fields.fault("linear_attn_config", "is missing")
        return Layers([])
    refuse(fields, "hidden_act", "silu", "situ")
    linear.idle("gate_lower_bound")
    fields.idle("activation_situ_beta", "activation_situ_linear_beta")
    refuse(fields, "mla_use_nope", True)
    sizes: dict[str, Any] = {
        "heads": linear.count("num_heads"),
        "head_dim": linear.count("head_dim"),
        "kernel": linear.count("short_conv_kernel_size", default=4),
    }
    full_gate, gated = linear.flag("use_full_rank_gate"), fields.flag("mla_use_output_gate")
    latent = latent_fields(fields)
    is_linear = _linear_layers(fields, linear, size.layers)
    ffns = _ffns(fields, size)
    every = fields.count("attn_res_block_size", default=0)
    if fields.faults:
        return Layers([])
    delta = KimiDelta(hidden=size.hidden, full_gate=full_gate, **sizes)
    full = (GatedLatentAttention if gated else LatentAttention)(hidden=size.hidden, **latent)
    # Before each cell, and after all layers, a norm and a query that weighs the sums of earlier groups of layers.
    mixed = Matrix("attention residuals", size.hidden, 1, times=2)
    beside = (mixed._replace(times=4),) if every else ()
    # Layers see more of these sums the later they come: all are counted as the mean of them.
    residuals = -(-size.layers // every) // 2 if every else 0
    cells: list[AttentionCell] = [delta if linear_layer else full for linear_layer in is_linear]
    blocks = [
        Block(attention=cell, ffn=ffn, beside=beside, residuals=residuals)
        for cell, ffn in zip(cells, ffns, strict=True)
    ]
    return Layers(blocks, after=(mixed,) if every else ())


FAMILIES: Final[dict[str, Family]] = {
    "kimi_linear": Family(
        architecture="KimiLinearForCausalLM",
        read=read,
        modules=module_names(
            qkv=within("self_attn", ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
            experts=within("block_sparse_moe.experts.0", ("w1", "w2", "w3")),
            shared=within("block_sparse_moe.shared_experts"),
            latent=(),  # engines hold these projections in 16 bit
            state_in=within("self_attn", ("q_proj", "k_proj", "v_proj")),
            state_gates=within("self_attn", ("f_a_proj", "f_b_proj", "b_proj")),
            state_out=("self_attn.o_proj",),
        ),
        defaults={"mla_use_nope": True},
        spelled={
            "max_position_embeddings": "model_max_length",
            "num_experts_per_token": "num_experts_per_tok",
            "num_shared_experts": "n_shared_experts",
        },
    ),
}
