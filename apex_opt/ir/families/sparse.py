"""Families whose attention sees the tokens that an indexer chooses: DeepSeek-V3.2, GLM-5 and MiniMax-M3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from apex_opt.ir.cells import Attention, DenseFfn, Indexer, LatentAttention
from apex_opt.ir.checks import shown
from apex_opt.ir.families.base import Family, Layers, module_names, sizes, within
from apex_opt.ir.families.decoder import Decoder, head_fields, latent_fields, layer_kinds
from apex_opt.ir.families.listed import flags_of, kinds_of
from apex_opt.ir.families.states import refuse
from apex_opt.ir.model import Block

if TYPE_CHECKING:
    from apex_opt.ir.families.base import Sizes
    from apex_opt.ir.fields import Fields

_SCALE_BYTES: Final = 4
_INDEX_NAMES: Final = ("index_n_heads", "index_head_dim", "index_topk_blocks", "index_block_size")
"""Sizes of the indexer of MiniMax-M3 in files that `transformers` saved."""
_HALF_BYTES: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseLatent:
    """Reader of layers of latent attention behind an indexer, of which some may use what one before them chose.

    Source: `transformers`, `deepseek_v32` and `glm_moe_dsa`; the indexer's cache as in vLLM, `models/deepseek_v2.py`.

    Parameters
    ----------
    ffns : Decoder      reader of the FFNs
    """

    ffns: Decoder

    def __call__(self, fields: Fields, size: Sizes) -> Layers:
        """Layers of latent attention, and of dense FFNs and mixtures of experts in turn."""
        attention = latent_fields(fields)
        heads, width, topk = (fields.count(key) for key in ("index_n_heads", "index_head_dim", "index_topk"))
        if attention["q_lora_rank"] is None:
            fields.fault("q_lora_rank", "is missing; the indexer's queries are projected from compressed ones")
        layer_kinds(fields, size.layers, ("deepseek_sparse_attention",))
        own = _own_indexer(fields, size.layers)
        fields.idle("index_topk_freq", "index_skip_topk_offset")  # where layers are listed
        mixtures = kinds_of(fields, "mlp_layer_types", size.layers, {"dense": False, "sparse": True})
        ffns = self.ffns.ffns(fields, size, mixtures)
        if fields.faults:
            return Layers([])
        indexer = Indexer(
            hidden=size.hidden,
            inputs=attention["q_lora_rank"],
            heads=heads,
            width=width,
            topk=topk,
            entry_bytes=width + _SCALE_BYTES,
            small=2 * width,  # a LayerNorm of the keys
        )
        cells = [
            LatentAttention(hidden=size.hidden, topk=topk, indexer=indexer if has else None, **attention) for has in own
        ]
        return Layers([Block(attention=cell, ffn=ffn) for cell, ffn in zip(cells, ffns, strict=True)])


def _own_indexer(fields: Fields, layers: int) -> list[bool]:
    """Which layers have an indexer of their own: those listed, those of a pattern, or every so manieth; else all."""
    listed = kinds_of(fields, "indexer_types", layers, {"full": True, "shared": False})
    if listed is None:
        listed = kinds_of(fields, "index_topk_pattern", layers, {"F": True, "S": False})
    if listed is not None:
        if listed and not listed[0]:
            fields.fault("indexer_types", "shares in the first layer what no layer before it chose")
        return listed
    every = fields.count("index_topk_freq", default=1)
    offset = fields.count("index_skip_topk_offset", default=2, minimum=0)
    return [max(layer - offset + 1, 0) % max(every, 1) == 0 for layer in range(layers)]


def _minimax_m3(fields: Fields, size: Sizes) -> Layers:
    """Layers of grouped-query attention, in some of which every KV head sees the blocks that its indexer chose.

    Source: `transformers`, `minimax_m3_vl`; caches as in vLLM, `models/minimax_m3/common/indexer.py`.
    """
    heads = head_fields(fields, size.hidden, 4)
    if fields.flag("attention_output_gate"):
        fields.fault("attention_output_gate", "true is not supported")
    kind = fields.text("qk_norm_type")
    if kind not in ("", "per_head"):
        fields.fault("qk_norm_type", f"must be per_head, not {shown(kind)}")
    norm = fields.flag("use_qk_norm", default=True)
    refuse(fields, "use_routing_bias", True)
    refuse(fields, "n_shared_experts", 1)  # whose width is told
    # Of experts the width of any is read; leading dense layers are listed as such.
    fields.idle("use_gemma_norm", "moe_intermediate_size", "first_k_dense_replace")
    fields.idle("dense_intermediate_size")
    sparse, indexer = _block_indexer(fields, size, heads["kv_heads"])
    mixtures = kinds_of(fields, "mlp_layer_types", size.layers, {"dense": False, "sparse": True})
    if mixtures is None:
        mixtures = flags_of(fields, "moe_layer_freq", size.layers)
    if mixtures is None:
        mixtures = [True] * size.layers
    dense_width = fields.count("dense_intermediate_size") if not all(mixtures) else 0
    experts = _M3_EXPERTS.moe_ffn(fields, size.hidden)
    if fields.faults or experts is None:
        return Layers([])
    plain = Attention(hidden=size.hidden, qk_norm=norm, **heads)
    chosen = Attention(hidden=size.hidden, qk_norm=norm, indexer=indexer, **heads)
    dense = DenseFfn(hidden=size.hidden, intermediate=dense_width) if dense_width else None
    return Layers(
        [
            Block(attention=chosen if sees_some else plain, ffn=experts if mixes or dense is None else dense)
            for sees_some, mixes in zip(sparse, mixtures, strict=True)
        ]
    )


def _block_indexer(fields: Fields, size: Sizes, kv_heads: int) -> tuple[list[bool], Indexer | None]:
    """Which layers of MiniMax-M3 see only some blocks of tokens, and what chooses them; files tell it in either form.

    Parameters
    ----------
    fields, size
    kv_heads : int      of attention, each of which has an index head of its own
    """
    section = fields.section("sparse_attention_config")
    fields.idle(*_INDEX_NAMES, "index_local_blocks", "index_init_blocks")
    if section is not None:
        section.idle("sparse_local_block", "sparse_init_block", "sparse_score_type")
    kinds = kinds_of(fields, "layer_types", size.layers, {"full_attention": False, "minimax_m3_sparse": True})
    if section is not None and section.flag("use_sparse_attention", default=True):
        names = "sparse_num_index_heads", "sparse_index_dim", "sparse_topk_blocks", "sparse_block_size"
        sparse = kinds or flags_of(section, "sparse_attention_freq", size.layers)
        if sparse is None:
            section.fault("sparse_attention_freq", "is missing")
        values = flags_of(section, "sparse_disable_index_value", size.layers) or []
        if not all(off for off, chosen in zip(values, sparse or [], strict=False) if chosen):
            section.fault("sparse_disable_index_value", "has layers whose indexer adds a value, which is not supported")
    elif kinds is not None and any(kinds):
        section, sparse = fields, kinds
        names = _INDEX_NAMES
    else:
        return [False] * size.layers, None
    heads, width, blocks, length = (section.count(name) for name in names)
    if heads and kv_heads and heads != kv_heads:
        section.fault(names[0], f"{heads} is not {fields.name('num_key_value_heads')} {kv_heads}")
    if fields.faults or not sparse:
        return [], None
    indexer = Indexer(
        hidden=size.hidden,
        inputs=size.hidden,
        heads=heads,
        width=width,
        topk=blocks * length,
        entry_bytes=_HALF_BYTES * width,
        small=2 * width,  # norms of its queries and keys
        weighted=False,
        by_heads=True,
    )
    return sparse, indexer


_DSA_EXPERTS: Final = Decoder(
    experts_field="n_routed_experts", shared_count_field="n_shared_experts", router_bias=True, mlp_bias=None
)
_M3_EXPERTS: Final = Decoder(
    experts_field="num_local_experts",
    expert_width_field="intermediate_size",
    shared_width_field="shared_intermediate_size",
    router_bias=True,
)
_DSA_MODULES: Final = module_names(
    qkv=within("self_attn", ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
    index=within("self_attn.indexer", ("wq_b", "wk")),
)
_M3_FAMILY: Final = Family(
    architecture="MiniMaxM3ForCausalLM",
    read=_minimax_m3,
    modules=module_names(
        experts=within("block_sparse_moe.experts.0", ("w1", "w2", "w3")),
        shared=within("block_sparse_moe.shared_experts"),
        index=within("self_attn", ("index_q_proj", "index_k_proj")),
    ),
    defaults=sizes(200064, 6144, 3072, 60, 64, 524288)
    | {"num_key_value_heads": 4, "head_dim": 128, "num_local_experts": 128, "num_experts_per_tok": 4}
    | {"dense_intermediate_size": 12288, "shared_intermediate_size": 3072},
)

FAMILIES: Final[dict[str, Family]] = {
    "deepseek_v32": Family(
        architecture="DeepseekV32ForCausalLM",
        read=SparseLatent(ffns=_DSA_EXPERTS),
        modules=_DSA_MODULES,
        defaults=sizes(129280, 7168, 18432, 61, 128, 163840)
        | {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
        | {"v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 2048, "first_k_dense_replace": 3}
        | {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048},
    ),
    "glm_moe_dsa": Family(
        architecture="GlmMoeDsaForCausalLM",
        read=SparseLatent(ffns=_DSA_EXPERTS),
        modules=_DSA_MODULES,
        defaults=sizes(154880, 6144, 12288, 78, 64, 202752)
        | {"q_lora_rank": 2048, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64}
        | {"v_head_dim": 256, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 2048, "first_k_dense_replace": 3}
        | {"index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048},
    ),
    "minimax_m3": _M3_FAMILY,
    "minimax_m3_vl_text": Family(
        architecture="MiniMaxM3SparseForCausalLM",
        read=_minimax_m3,
        modules=_M3_FAMILY.modules,
        defaults=_M3_FAMILY.defaults,
    ),
}
