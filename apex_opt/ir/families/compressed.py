"""DeepSeek-V4: a window and a compressed context, residual streams, and experts in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from apex_opt.ir.cells import CompressedAttention, Indexer, Matrix, MoeFfn
from apex_opt.ir.checks import shown
from apex_opt.ir.families.base import Family, Layers, module_names, sizes, within
from apex_opt.ir.families.decoder import Decoder
from apex_opt.ir.families.listed import kinds_of
from apex_opt.ir.model import Block
from apex_opt.ir.quantisation import QUANTISATION_KEYS

if TYPE_CHECKING:
    from typing import Any

    from apex_opt.ir.cells import Ffn
    from apex_opt.ir.families.base import Sizes
    from apex_opt.ir.fields import Fields

_RATIOS: Final = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
"""Kinds of layers, and tokens that an entry of their compressed cache stands for where the file does not say."""

_SPARSE: Final = "compressed_sparse_attention"
_SCALE_BYTES: Final = 4


def _deepseek_v4(fields: Fields, size: Sizes) -> Layers:
    """Layers of attention over a window and, of two kinds, over compressed entries; mixtures of experts.

    An entry that stands for few tokens sums up those of the one before as well, and an indexer chooses among entries.
    Source: `transformers`, `deepseek_v4`; vLLM, `layers/deepseek_v4_attention.py`.
    """
    ratios = _compress_ratios(fields, size.layers)
    shape: dict[str, Any] = {
        "query_heads": fields.count("num_attention_heads"),
        "head_dim": fields.count("head_dim"),
        "rope_head_dim": fields.count("qk_rope_head_dim"),
        "q_lora_rank": fields.count("q_lora_rank"),
        "output_groups": fields.count("o_groups"),
        "output_rank": fields.count("o_lora_rank"),
        "local_window": fields.count("sliding_window"),
    }
    if fields.count("num_key_value_heads", default=1) != 1:
        fields.fault("num_key_value_heads", "must be 1: keys of all heads are one vector")
    for flag in ("attention_bias", "mlp_bias"):
        if fields.flag(flag):
            fields.fault(flag, "true is not supported with compressed attention")
    heads, width, topk = (fields.count(key) for key in ("index_n_heads", "index_head_dim", "index_topk"))
    streams = fields.count("hc_mult")
    fields.idle("hc_sinkhorn_iters")
    experts = fields.text("expert_dtype")
    if experts not in ("", "fp4", "fp8"):
        fields.fault("expert_dtype", f"must be fp4 or fp8, not {shown(experts)}")
    told = any(fields.get(key) for key in QUANTISATION_KEYS)
    if told and fields.text("model_type") == "deepseek_v4" and fields.get("expert_dtype") is None:
        fields.fault("expert_dtype", "is missing; give fp4 or fp8")
    ffns = _ffns(fields, size)
    if fields.faults:
        return Layers([])
    cells = {}
    for kind, ratio in set(ratios):
        indexer = None
        if kind == _SPARSE:
            # Keys are compressed as those of attention are: sums and gates of two entries, positions and a norm.
            indexer = Indexer(
                hidden=size.hidden,
                inputs=shape["q_lora_rank"],
                heads=heads,
                width=width,
                topk=topk,
                entry_bytes=width + _SCALE_BYTES,
                key_rows=4 * width,
                small=2 * ratio * width + width,
                keys_covered=False,
                ratio=ratio,
            )
        cells[kind, ratio] = CompressedAttention(
            hidden=size.hidden, ratio=ratio, overlap=kind == _SPARSE, indexer=indexer, **shape
        )
    blocks = [Block(attention=cells[entry], ffn=ffn, streams=streams) for entry, ffn in zip(ratios, ffns, strict=True)]
    joined = Matrix("hyper head", streams, streams * size.hidden), Matrix("hyper head biases", streams + 1, 1)
    return Layers(blocks, after=joined)


def _compress_ratios(fields: Fields, layers: int) -> list[tuple[str, int]]:
    """Kind of every layer, and tokens that an entry of its compressed cache stands for; empty at a fault."""
    kinds = kinds_of(fields, "layer_types", layers, {kind: kind for kind in _RATIOS})
    if kinds is not None:
        section = fields.section("compress_rates")
        return [
            (kind, section.count(kind, _RATIOS[kind]) if section and _RATIOS[kind] else _RATIOS[kind]) for kind in kinds
        ]
    rows = fields.rows("compress_ratios")
    if rows is None:
        fields.fault("compress_ratios", "is missing")
        return []
    known = {ratio: kind for kind, ratio in _RATIOS.items()}
    odd = [row for row in rows if isinstance(row, bool) or not isinstance(row, int) or row not in known]
    if odd:
        fields.fault("compress_ratios", f"may hold {', '.join(map(str, known))}, not {shown(odd[0])}")
        return []
    # Lists may go on with the layers of multi-token prediction.
    drafted = max(fields.count(key, 0, minimum=0) for key in ("num_nextn_predict_layers", "n_mtp_layers"))
    if layers and not layers <= len(rows) <= layers + drafted:
        fields.fault("compress_ratios", f"has {len(rows)} entries for {fields.name('num_hidden_layers')} {layers}")
        return []
    return [(known[row], row) for row in rows[:layers]]


def _ffns(fields: Fields, size: Sizes) -> list[Ffn]:
    """Mixtures of experts, of which the first take the expert of each token from a table and need no correction."""
    hashed = kinds_of(fields, "mlp_layer_types", size.layers, {"hash_moe": True, "moe": False})
    if hashed is None:
        leading = fields.count("num_hash_layers", minimum=0)
        hashed = [layer < leading for layer in range(size.layers)]
    mixtures = {by_table: _EXPERTS[by_table].moe_ffn(fields, size.hidden) for by_table in (False, True)}
    chosen: list[MoeFfn | None] = [mixtures[by_table] for by_table in hashed]
    return [ffn for ffn in chosen if ffn is not None]


_EXPERTS: Final = {
    by_table: Decoder(experts_field="n_routed_experts", shared_count_field="n_shared_experts", router_bias=not by_table)
    for by_table in (False, True)
}
_MODULES: Final = module_names(
    qkv=within("attn", ("wq_a", "wq_b", "wkv")),
    output=within("attn", ("wo_a", "wo_b")),
    index=within("attn.indexer", ("wq_b",)),
    dense=within("ffn", ("w1", "w3", "w2")),
    experts=within("ffn.experts.0", ("w1", "w2", "w3")),
    shared=within("ffn.shared_experts", ("w1", "w3", "w2")),
)
_DEFAULTS: Final = (
    sizes(129280, 4096, 2048, 43, 64, 1048576)
    | {"num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 1024}
    | {"o_groups": 8, "o_lora_rank": 1024, "sliding_window": 128, "hc_mult": 4, "num_hash_layers": 3}
    | {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 512}
    | {"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 6, "moe_intermediate_size": 2048}
)

FAMILIES: Final[dict[str, Family]] = {
    "deepseek_v4": Family(
        architecture="DeepseekV4ForCausalLM", read=_deepseek_v4, modules=_MODULES, defaults=_DEFAULTS
    ),
    "deepseek_ref": Family(
        architecture="DeepseekV4ForCausalLM", read=_deepseek_v4, modules=_MODULES, defaults=_DEFAULTS
    ),
}
