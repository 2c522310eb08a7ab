"""What came before Llama and its like: LayerNorms with biases, FFNs without a gate, attention and FFN side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from apex_opt.ir.checks import shown
from apex_opt.ir.families.base import Family, Layers, Sizes, module_names
from apex_opt.ir.families.decoder import Decoder
from apex_opt.ir.families.states import agreeing, refuse

if TYPE_CHECKING:
    from apex_opt.ir.fields import Fields

_BIASED: Final = Decoder(qkv_bias=True, output_bias=True, mlp_bias=True, norm_bias=True, gated=False)
_GPT2: Final = replace(_BIASED, ffn_ratio=4, positions=0)
_SHORT: Final = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}
_GPT2_MODULES: Final = module_names(qkv=("attn.c_attn",), output=("attn.c_proj",), dense=("mlp.c_fc", "mlp.c_proj"))
_ATTENTION: Final = ("self_attention.query_key_value",)
_FOURFOLD: Final = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_FC: Final = ("mlp.fc1", "mlp.fc2")
_GPTJ: Final = Decoder(mlp_bias=True, gated=False, ffn_ratio=4, norms=1, norm_bias=True, parallel=True, head_bias=True)
_STARCODER2: Final = Decoder(
    qkv_bias=None, output_bias=None, mlp_bias=None, gated=False, norm_bias=True, window="always"
)
_LONGEST_UNSAID: Final = 2048
"""Context of files that tell of none, as vLLM takes it."""


def _bigcode(fields: Fields, size: Sizes) -> Layers:
    """GPT-2, whose query heads share one key and value unless the file says otherwise."""
    kv_heads = 1 if fields.flag("multi_query", default=True) else None
    return _GPT2(fields.filled({"num_key_value_heads": kv_heads}), size)


def _opt(fields: Fields, size: Sizes) -> Layers:
    """OPT, whose first two positions are never used."""
    width = fields.count("word_embed_proj_dim", default=size.hidden)
    if size.hidden and width != size.hidden:
        fields.fault("word_embed_proj_dim", f"{width} is not hidden_size {size.hidden}: a projected embedding")
    refuse(fields, "layer_norm_elementwise_affine", True)
    fields.idle("do_layer_norm_before")
    bias = fields.flag("enable_bias", default=True)
    return Decoder(qkv_bias=bias, output_bias=bias, mlp_bias=bias, norm_bias=True, gated=False, positions=2)(
        fields, size
    )


def _falcon(fields: Fields, size: Sizes) -> Layers:
    """Falcon, whose newer make has two norms side by side, one for attention and one for the FFN."""
    newer, parallel = fields.flag("new_decoder_architecture"), fields.flag("parallel_attn", default=True)
    one = fields.flag("multi_query", default=True) and not newer
    norms = fields.count("num_ln_in_parallel_attn", default=2) if newer else 2 - parallel
    bias = fields.flag("bias")
    fields.idle("num_kv_heads")  # where there is one for all
    reader = Decoder(
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        gated=False,
        ffn_ratio=fields.count("ff_factor", default=4),
        norms=norms,
        norm_bias=True,
        parallel=parallel or newer,
        rotary=not fields.flag("alibi"),
    )
    heads = (
        fields.filled({"num_key_value_heads": 1}) if one else fields.spelled({"num_key_value_heads": "num_kv_heads"})
    )
    return reader(heads, size)


def _starcoder2(fields: Fields, size: Sizes) -> Layers:
    """StarCoder2, whose files name the kinds of its norms and FFNs."""
    refuse(fields, "norm_type", "layer_norm")
    refuse(fields, "mlp_type", "default")
    return _STARCODER2(fields, size)


def _mpt(fields: Fields, size: Sizes) -> Layers:
    """MPT, whose fields of attention lie in an object of their own."""
    attention = fields.section("attn_config")
    kinds = {
        "multihead_attention": None,
        "multiquery_attention": 1,
        "grouped_query_attention": attention and attention.get("kv_n_heads"),
    }
    kind = attention.get("attn_type", "multihead_attention") if attention else "multihead_attention"
    if attention is not None and (not isinstance(kind, str) or kind not in kinds):
        attention.fault("attn_type", f"may be {', '.join(kinds)}, not {shown(kind)}")
        return Layers([])
    ratio = fields.count("expansion_ratio", default=4)
    bias = not fields.flag("no_bias", default=True)
    refuse(fields, "norm_type", "low_precision_layernorm", "layernorm")
    learned = fields.flag("learned_pos_emb", default=True)
    fields.idle("embedding_fraction", "verbose")
    if attention is not None:
        # What its class inherits is not its own.
        attention.idle("alibi_bias_max", "attn_impl", "clip_qkv", "softmax_scale", "tie_word_embeddings")
    alibi = attention is None or attention.flag("alibi", default=True)
    qk_norm = attention is not None and attention.flag("qk_ln")
    reader = Decoder(
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        norm_bias=bias,
        gated=False,
        ffn_ratio=ratio,
        qk_norm=qk_norm,
        qk_norm_whole=qk_norm,
        rotary=False,
        positions=0 if not alibi and learned else None,
    )
    return reader(agreeing(fields, {"num_key_value_heads": kinds.get(kind)}, "attn_config"), size)


FAMILIES: Final[dict[str, Family]] = {
    "gpt2": Family(architecture="GPT2LMHeadModel", read=_GPT2, modules=_GPT2_MODULES, spelled=_SHORT, tied=True),
    "gpt_bigcode": Family(
        architecture="GPTBigCodeForCausalLM",
        read=_bigcode,
        modules=_GPT2_MODULES,
        spelled=_SHORT,
        tied=True,
        idle=("inference_runner", "pre_allocate_kv_cache", "pad_key_length", "validate_runner_input"),
    ),
    "gptj": Family(
        architecture="GPTJForCausalLM",
        read=_GPTJ,
        modules=module_names(
            qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            output=("attn.out_proj",),
            dense=("mlp.fc_in", "mlp.fc_out"),
        ),
        spelled=_SHORT,
    ),
    "codegen": Family(
        architecture="CodeGenForCausalLM",
        read=_GPTJ,
        modules=module_names(qkv=("attn.qkv_proj",), output=("attn.out_proj",), dense=("mlp.fc_in", "mlp.fc_out")),
        spelled=_SHORT,
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        read=Decoder(
            qkv_bias=None, output_bias=None, mlp_bias=True, gated=False, norms=2, norm_bias=True, parallel=None
        ),
        modules=module_names(qkv=("attention.query_key_value",), output=("attention.dense",), dense=_FOURFOLD),
        implied={"attention_bias": True, "use_parallel_residual": True},
    ),
    "opt": Family(
        architecture="OPTForCausalLM",
        read=_opt,
        modules=module_names(output=("self_attn.out_proj",), dense=("fc1", "fc2")),
        spelled={"intermediate_size": "ffn_dim"},
        tied=True,
    ),
    "bloom": Family(
        architecture="BloomForCausalLM",
        read=replace(_BIASED, ffn_ratio=4, embedding_norm=True, rotary=False),
        modules=module_names(qkv=_ATTENTION, output=("self_attention.dense",), dense=_FOURFOLD),
        spelled={
            "hidden_size": "n_embed",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "seq_length",
            "intermediate_size": "n_inner",
        },
        implied={"max_position_embeddings": _LONGEST_UNSAID},
        tied=True,
        idle=("offset_alibi", "skip_bias_add", "apply_residual_connection_post_layernorm", "slow_but_exact"),
    ),
    "falcon": Family(
        architecture="FalconForCausalLM",
        read=_falcon,
        modules=module_names(qkv=_ATTENTION, output=("self_attention.dense",), dense=_FOURFOLD),
        spelled={"intermediate_size": "ffn_hidden_size"},
        implied={"max_position_embeddings": _LONGEST_UNSAID},
        tied=True,
    ),
    "mpt": Family(
        architecture="MPTForCausalLM",
        read=_mpt,
        modules=module_names(qkv=("attn.Wqkv",), output=("attn.out_proj",), dense=("ffn.up_proj", "ffn.down_proj")),
        spelled={
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
        },
        tied=True,
    ),
    "phi": Family(
        architecture="PhiForCausalLM",
        read=replace(_BIASED, norms=1, parallel=True, qk_norm=None, head_bias=True),
        modules=module_names(output=("self_attn.dense",), dense=_FC),
        spelled={"use_qk_norm": "qk_layernorm"},
    ),
    "starcoder2": Family(
        architecture="Starcoder2ForCausalLM",
        read=_starcoder2,
        modules=module_names(dense=("mlp.c_fc", "mlp.c_proj")),
        spelled={"attention_bias": "use_bias", "mlp_bias": "use_bias"},
        implied={"attention_bias": True, "mlp_bias": True},
        tied=True,
    ),
    "stablelm": Family(
        architecture="StableLmForCausalLM",
        read=Decoder(qkv_bias=None, norm_bias=True, parallel=None),
        modules=module_names(),
        spelled={"attention_bias": "use_qkv_bias"},
    ),
    "nemotron": Family(
        architecture="NemotronForCausalLM",
        read=Decoder(qkv_bias=None, output_bias=None, mlp_bias=None, gated=False, norm_bias=True),
        modules=module_names(dense=("mlp.up_proj", "mlp.down_proj")),
    ),
}
