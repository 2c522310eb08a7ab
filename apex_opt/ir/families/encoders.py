"""Encoder-decoders and encoders: Whisper, T5, CLIP, BERT and what is shaped like it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.cells import CrossedAttention, DenseFfn, EncoderAttention, Matrix
from apex_opt.ir.families.base import Family, Layers, Sizes, module_names
from apex_opt.ir.families.decoder import head_fields
from apex_opt.ir.families.states import refuse
from apex_opt.ir.model import MAX_LAYERS, Block, Run, Tower

if TYPE_CHECKING:
    from apex_opt.ir.fields import Fields

_SECONDS: Final = 30.0
"""Of sound that Whisper takes at once: shorter recordings are padded."""
_BIASES: Final[dict[str, Any]] = {"qkv_bias": True, "output_bias": True, "rotary": False}
_KERNEL: Final = 3  # of the convolutions over mel frames


def _whisper(fields: Fields, size: Sizes) -> Layers:
    """Whisper: convolutions and an encoder over 30 s of sound, and a decoder whose layers look at its output."""
    width = size.hidden
    heads: dict[str, Any] = {**head_fields(fields, width)}
    inner, mels = fields.count("intermediate_size"), fields.count("num_mel_bins")
    encoder = _encoder_sizes(fields)
    frames, longest = fields.count("max_source_positions"), fields.count("max_position_embeddings")
    if fields.faults:
        return Layers([])
    own = CrossedAttention(hidden=width, **heads, **_BIASES, source_tokens=frames)
    block = Block(
        attention=own,
        ffn=DenseFfn(hidden=width, intermediate=inner, gated=False, bias=True),
        norms=3,
        norm_bias=True,
    )
    count = encoder["attention_heads"]
    theirs = {"query_heads": count, "kv_heads": count, "head_dim": width // count}
    layer = _encoder_layer(width, theirs, encoder["ffn_dim"])
    tower = Tower(
        reads="audio",
        runs=(Run(block=layer, count=encoder["layers"]),),
        beside=(
            Matrix("convolution", width, mels * _KERNEL + 1),
            Matrix("convolution", width, width * _KERNEL + 1),
            Matrix("positions", frames, width),
            Matrix("norms", width, 2),
        ),
        heads=encoder["attention_heads"],
        tokens=frames,
        input_s=_SECONDS,
    )
    return Layers([block] * size.layers, (Matrix("positions", longest, width),), (), tower)


def _encoder_sizes(fields: Fields) -> dict[str, int]:
    """Layers, heads and columns of an encoder whose sizes are not the decoder's."""
    return {
        "layers": fields.count("encoder_layers", maximum=MAX_LAYERS),
        **{name: fields.count(f"encoder_{name}") for name in ("attention_heads", "ffn_dim")},
    }


def _t5(fields: Fields, size: Sizes) -> Layers:
    """T5: an encoder over the prompt, and a decoder that looks at its output in every layer, of as many unless told."""
    heads, width = fields.count("num_attention_heads"), fields.count("d_kv")
    fields.idle("relative_attention_max_distance", "is_gated_act")
    inner, layers = fields.count("intermediate_size"), size.layers
    buckets = fields.count("relative_attention_num_buckets", default=32)
    gated = fields.text("feed_forward_proj").startswith("gated-")
    refuse(fields, "feed_forward_proj", "relu", "gelu", "gated-gelu", "gated-silu", "gated-relu")
    if fields.faults:
        return Layers([])
    shape: dict[str, Any] = {
        "hidden": size.hidden,
        "query_heads": heads,
        "kv_heads": heads,
        "head_dim": width,
        "rotary": False,
    }
    ffn = DenseFfn(hidden=size.hidden, intermediate=inner, gated=gated)
    block = Block(attention=CrossedAttention(**shape), ffn=ffn, norms=3)
    positions = Matrix("relative positions", buckets, heads)
    tower = Tower(
        reads="text",
        runs=(Run(block=Block(attention=EncoderAttention(**shape), ffn=ffn), count=layers),),
        beside=(positions, Matrix("norms", size.hidden, 1)),
        heads=heads,
    )
    count = fields.count("num_decoder_layers", default=layers, maximum=MAX_LAYERS)
    return Layers([block] * count, (positions,), (), tower)


def _umt5(fields: Fields, size: Sizes) -> Layers:
    """UMT5: T5 whose every layer has relative positions of its own."""
    found = _t5(fields, size)
    if found.tower is None:
        return found
    (positions,) = found.before
    runs = tuple(replace(run, block=replace(run.block, beside=(positions,))) for run in found.tower.runs)
    tower = replace(found.tower, runs=runs, beside=tuple(m for m in found.tower.beside if m != positions))
    return Layers([replace(block, beside=(positions,)) for block in found.blocks], (), (), tower)


_POOLER: Final = ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")
"""Ends of the names of fields that BERT's files have from a pooler that no class builds."""


def _bert(fields: Fields, size: Sizes) -> Layers:
    """BERT: learned positions and kinds of tokens, norms behind every cell, a product over the first token."""
    heads: dict[str, Any] = {**head_fields(fields, size.hidden)}
    inner, longest = fields.count("intermediate_size"), fields.count("max_position_embeddings")
    kinds = fields.count("type_vocab_size", default=2, minimum=0)
    refuse(fields, "position_embedding_type", "absolute")
    fields.idle("directionality", "sinusoidal_pos_embds", "tie_weights_", *(f"pooler_{part}" for part in _POOLER))
    if fields.faults:
        return Layers([])
    before = (
        Matrix("positions", longest, size.hidden),
        *((Matrix("token types", kinds, size.hidden),) if kinds else ()),
        Matrix("embedding norm", size.hidden, 2),
    )
    block = _encoder_layer(size.hidden, heads, inner)
    return Layers([block] * size.layers, before, (Matrix("pooler", size.hidden, size.hidden + 1),))


def _encoder_layer(hidden: int, heads: dict[str, Any], inner: int) -> Block:
    """A layer of an encoder with biases everywhere.

    Parameters
    ----------
    hidden : int      width of the residual stream
    heads : dict      arguments of its attention
    inner : int       columns of its FFN
    """
    return Block(
        attention=EncoderAttention(hidden=hidden, **heads, **_BIASES),
        ffn=DenseFfn(hidden=hidden, intermediate=inner, gated=False, bias=True),
        norm_bias=True,
    )


def _roberta(fields: Fields, size: Sizes) -> Layers:
    """RoBERTa: BERT, whose positions are counted from behind that of the padding."""
    layers = _bert(fields, size)
    skipped = fields.count("pad_token_id", default=1, minimum=0) + 1
    return layers._replace(longest=max(1, fields.count("max_position_embeddings") - skipped))


def _distilbert(fields: Fields, size: Sizes) -> Layers:
    """DistilBERT: BERT without kinds of tokens and without a product over the first token."""
    return _bert(fields.replaced({"type_vocab_size": 0}), size)._replace(after=())


def _bart(
    fields: Fields, size: Sizes, *, learned: bool = True, embedding_norm: bool = True, last: bool = False
) -> Layers:
    """BART: learned positions, of which the first two are never used, and norms behind every cell and the embedding.

    Parameters
    ----------
    fields, size
    learned : bool          positions are; those of M2M-100 are computed
    embedding_norm : bool   a norm behind the embedding
    last : bool             a norm behind the last layer of each stack, as in mBART
    """
    width, inner = size.hidden, fields.count("intermediate_size")
    heads: dict[str, Any] = {**head_fields(fields, width)}
    encoder = _encoder_sizes(fields)
    rows = fields.count("max_position_embeddings") + 2
    if fields.faults:
        return Layers([])
    own = CrossedAttention(hidden=width, **heads, **_BIASES)
    ffn = DenseFfn(hidden=width, intermediate=inner, gated=False, bias=True)
    block = Block(attention=own, ffn=ffn, norms=3, norm_bias=True)
    count = encoder["attention_heads"]
    theirs = {"query_heads": count, "kv_heads": count, "head_dim": width // count}
    before = (
        *((Matrix("positions", rows, width),) if learned else ()),
        *((Matrix("embedding norm", width, 2),) if embedding_norm else ()),
    )
    tower = Tower(
        reads="text",
        runs=(Run(block=_encoder_layer(width, theirs, encoder["ffn_dim"]), count=encoder["layers"]),),
        beside=(*before, *((Matrix("norms", width, 2),) if last else ())),
        heads=count,
    )
    return Layers([block] * size.layers, before, (), tower)


def _clip_text(fields: Fields, size: Sizes) -> Layers:
    """The text tower of CLIP, whose tokens see what precedes them and of which nothing is kept."""
    heads: dict[str, Any] = {**head_fields(fields, size.hidden)}
    inner, longest = fields.count("intermediate_size"), fields.count("max_position_embeddings")
    projected = fields.count("projection_dim")
    if fields.faults:
        return Layers([])
    block = _encoder_layer(size.hidden, heads, inner)
    positions = Matrix("positions", longest, size.hidden)
    return Layers([block] * size.layers, (positions,), (Matrix("projection", projected, size.hidden),))


_BERT_MODULES: Final = module_names(
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    output=("attention.output.dense",),
    dense=("intermediate.dense", "output.dense"),
)

_T5: Final = Family(
    architecture="T5ForConditionalGeneration",
    read=_t5,
    modules=module_names(
        qkv=("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"),
        output=("SelfAttention.o",),
        dense=("DenseReluDense.wi", "DenseReluDense.wo"),
    ),
    spelled={
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "n_positions",
    },
    implied={"max_position_embeddings": 512},
    tied=True,
    idle=("is_encoder_decoder",),
)
_SEQ2SEQ: Final = {
    "hidden_size": "d_model",
    "num_hidden_layers": "decoder_layers",
    "num_attention_heads": "decoder_attention_heads",
    "intermediate_size": "decoder_ffn_dim",
}
_CLIP: Final = Family(
    architecture="CLIPModel",
    read=_clip_text,
    modules=module_names(output=("self_attn.out_proj",), dense=("mlp.fc1", "mlp.fc2")),
    implied={"projection_dim": 512},
    tied=True,
    pools=True,
)
_BART: Final = Family(
    architecture="BartForConditionalGeneration",
    read=_bart,
    modules=module_names(output=("self_attn.out_proj",), dense=("fc1", "fc2")),
    spelled=_SEQ2SEQ,
    tied=True,
    idle=(
        *("is_encoder_decoder", "normalize_before", "normalize_embedding", "add_final_layer_norm", "save_step"),
        *("force_bos_token_to_be_generated", "extra_pos_embeddings"),
    ),
)
_ROBERTA: Final = Family(architecture="RobertaModel", read=_roberta, modules=_BERT_MODULES, tied=True, pools=True)

FAMILIES: Final[dict[str, Family]] = {
    "whisper": Family(
        architecture="WhisperForConditionalGeneration",
        read=_whisper,
        modules=module_names(output=("self_attn.out_proj",), dense=("fc1", "fc2")),
        idle=("is_encoder_decoder", "median_filter_width"),
        spelled=_SEQ2SEQ | {"max_position_embeddings": "max_target_positions"},
        tied=True,
    ),
    "t5": _T5,
    "mt5": replace(_T5, architecture="MT5ForConditionalGeneration", tied=False),
    "umt5": replace(_T5, architecture="UMT5ForConditionalGeneration", read=_umt5, tied=False),
    "bart": _BART,
    "mbart": replace(_BART, architecture="MBartForConditionalGeneration", read=partial(_bart, last=True)),
    "m2m_100": replace(
        _BART,
        architecture="M2M100ForConditionalGeneration",
        read=partial(_bart, learned=False, embedding_norm=False, last=True),
    ),
    "camembert": replace(_ROBERTA, architecture="CamembertModel"),
    "roberta": _ROBERTA,
    "xlm-roberta": replace(_ROBERTA, architecture="XLMRobertaModel"),
    "distilbert": Family(
        architecture="DistilBertModel",
        read=_distilbert,
        modules=_BERT_MODULES,
        spelled={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
        },
        tied=True,
        pools=True,
    ),
    "bert": Family(architecture="BertModel", read=_bert, modules=_BERT_MODULES, tied=True, pools=True),
    "clip": _CLIP,
    "clip_text_model": _CLIP,
}
