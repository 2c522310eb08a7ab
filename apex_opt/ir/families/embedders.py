"""Encoders that answer with a vector and have rotary positions or gates: ModernBERT, Nomic's, GTE's and Jina's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.cells import DenseFfn, EncoderAttention, Matrix
from apex_opt.ir.families.base import Family, Layers, module_names, within
from apex_opt.ir.families.decoder import head_fields, window_of_layers
from apex_opt.ir.families.states import refuse
from apex_opt.ir.model import Block

if TYPE_CHECKING:
    from apex_opt.ir.families.base import Sizes
    from apex_opt.ir.fields import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedder:
    """A reader of encoders with rotary positions, by facts of a family.

    Source: the model classes of `transformers` 5.24.

    Parameters
    ----------
    gated : bool        FFNs have a gate
    bias : bool         on projections of attention
    norm_bias : bool    norms have a bias
    mlp_bias : bool     on projections of FFNs
    kinds : bool        an embedding of kinds of tokens, and a norm behind the sum
    pooler : bool       a product over the first token
    """

    gated: bool = True
    bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = True
    kinds: bool = True
    pooler: bool = False

    def __call__(self, fields: Fields, size: Sizes) -> Layers:
        """Layers that all see the whole input."""
        heads: dict[str, Any] = head_fields(fields, size.hidden)
        inner = fields.count("intermediate_size")
        kinds = fields.count("type_vocab_size", default=1, minimum=0) if self.kinds else 0
        if fields.faults:
            return Layers([])
        cell = EncoderAttention(hidden=size.hidden, qkv_bias=self.bias, output_bias=self.bias, **heads)
        ffn = DenseFfn(hidden=size.hidden, intermediate=inner, gated=self.gated, bias=self.mlp_bias)
        before = [Matrix("token types", kinds, size.hidden)] if kinds else []
        if self.kinds:
            before.append(Matrix("embedding norm", size.hidden, 2))
        after = (Matrix("pooler", size.hidden, size.hidden + 1),) if self.pooler else ()
        block = Block(attention=cell, ffn=ffn, norm_bias=self.norm_bias)
        return Layers([block] * size.layers, tuple(before), after)


def _modernbert(fields: Fields, size: Sizes) -> Layers:
    """ModernBERT: every third layer sees all, the others a window; the first one has no norm before its attention."""
    heads: dict[str, Any] = head_fields(fields, size.hidden)
    every = fields.count("global_attn_every_n_layers", default=3)
    kinds = ["sliding_attention" if layer % (every or 1) else "full_attention" for layer in range(size.layers)]
    told = fields.filled({"layer_types": kinds, "sliding_window": fields.count("local_attention", default=128)})
    windows = window_of_layers(told, size.layers, "always")
    inner = fields.count("intermediate_size")
    # Of a head that engines leave out, and names of what the class has always.
    fields.idle("decoder_bias", "sparse_prediction", "repad_logits_with_grad", "position_embedding_type")
    bias, mlp_bias, norm_bias = (fields.flag(key) for key in ("attention_bias", "mlp_bias", "norm_bias"))
    if fields.faults:
        return Layers([])
    cell = EncoderAttention(hidden=size.hidden, qkv_bias=bias, output_bias=bias, **heads)
    ffn = DenseFfn(hidden=size.hidden, intermediate=inner, bias=mlp_bias)
    blocks = [
        Block(attention=cell.with_window(window), ffn=ffn, norms=1 if layer == 0 else None, norm_bias=norm_bias)
        for layer, window in enumerate(windows)
    ]
    return Layers(blocks, (Matrix("embedding norm", size.hidden, 1 + norm_bias),))


def _nomic(fields: Fields, size: Sizes) -> Layers:
    """Nomic's BERT, whose published files have switches for what its class has always."""
    refuse(fields, "activation_function", "swiglu", "silu")
    fields.idle("dense_seq_output", "max_trained_positions", "pad_vocab_size_multiple", "use_xentropy")
    for key in ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "num_experts"):
        refuse(fields, key, False, 0)
    return Embedder()(fields, size)


_MODULES: Final = module_names()

FAMILIES: Final[dict[str, Family]] = {
    "modernbert": Family(
        architecture="ModernBertModel",
        read=_modernbert,
        modules=module_names(qkv=("attn.Wqkv",), output=("attn.Wo",), dense=within("mlp", ("Wi", "Wo"))),
        tied=True,
        pools=True,
    ),
    "nomic_bert": Family(
        architecture="NomicBertModel",
        read=_nomic,
        modules=_MODULES,
        spelled={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
        },
        tied=True,
        pools=True,
    ),
    "gte": Family(
        architecture="GteModel",
        read=Embedder(bias=True),
        modules=_MODULES,
        tied=True,
        pools=True,
    ),
    "eurobert": Family(
        architecture="EuroBertModel",
        read=Embedder(kinds=False, norm_bias=False),
        modules=_MODULES,
        tied=True,
        pools=True,
    ),
    "jina_embeddings_v3": Family(
        architecture="JinaEmbeddingsV3Model",
        read=Embedder(gated=False, bias=True, mlp_bias=True, pooler=True),
        modules=module_names(dense=("mlp.fc1", "mlp.fc2")),
        tied=True,
        pools=True,
    ),
}
