"""Whether all that a file states is understood: a field is read, changes nothing of what is counted, or is refused.

Readers ask for what they need by name, and say with `Fields.idle` what changes nothing in their family. Of the rest
`IDLE` tells what changes nothing in any. A field that is null, false, zero or empty says that there is nothing of it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.checks import is_number, shown
from apex_opt.ir.fields import printed
from apex_opt.ir.quantisation import QUANTISATION_KEYS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from apex_opt.ir.fields import Fields

IDLE: Final[dict[str, str]] = {
    "what the file is": r"""
        _.* architectures model_type auto_map license (.*_)?version (model_)?name tags .*_name_or_path languages?
        finetuning_task problem_type id2label label2id num_labels task_specific_params custom_pipelines
        tokenizer(_.*)? processor_class unsloth_.* torch_dtype dtype is_composition keys_to_ignore_at_inference
        transformers\.js_config
    """,
    "tokens": r"""
        .*token_ids? .*_token_index (begin_)?suppress_tokens bad_words_ids forced_decoder_ids .*ignore_index
        (.*_)?(start|end|newline|sep|eod|pad|init)_id
    """,
    "generation, and what a call returns": r"""
        (max|min)_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
        typical_p repetition_penalty length_penalty prefix (encoder_)?no_repeat_ngram_size num_return_sequences
        exponential_decay_length_penalty output_(attentions|hidden_states|scores|router_logits|past)
        (use_)?return_(dict|.*_in_generate) use_cache num_logits_to_keep torchscript chunk_size_feed_forward
        generation_config cache_implementation remove_invalid_values
    """,
    "training": r"""
        .*dropout(_.*)? .*_pdrop .*layerdrop (.*_)?init(ializer)?(_.*)? .*aux_loss.* .*_loss(_.*)? .*jitter.*
        gradient_checkpointing.* label_smoothing.* rescale_prenorm_residual seq_aux neftune_noise_alpha
        mask_(time|feature)_.* apply_spec_augment time_step_(min|max|floor) moe_use_aux_free classifier_.* summary_.*
    """,
    "turning by position": r"""
        (.*_)?rope_(theta|base|scaling|parameters|ratio|type|pct|percent|interleaved?|local_base_freq|embedding_base)
        rope_position_scale
        (global_|local_|partial_)?rotary(_(pct|base|emb_base|emb_fraction|dim|factor|percentage))?
        partial_rotary_factors?
        original_max_position_embeddings initial_context_length n_ctx
    """,
    "functions, scales and precision": r"""
        (.*_)?(hidden_)?act(ivation)?(_fn|_func|_function)? (.*_)?eps(ilon)? .*soft_?cap(ping)?
        (.*_)?scaling(_factor)? (.*_)?multipliers? logits?_scale query_pre_attn_scalar (.*_)?swiglu_(alpha|beta|limit)
        scale_(emb|depth|embedding|attn_weights|decoder_outputs) (.*_)?in_fp32 time_step_(limit|scale)
        layernorm_(full_attention|linear_attention|mlp)_(alpha|beta) clip_qkv mup_enabled dim_model_base use_bfloat16
        bf16 fp16 fp32 onnx_safe apply_query_key_layer_scaling scale_attn_by_inverse_layer_idx reorder_and_upcast_attn
    """,
    "choice among experts": r"""
        norm_topk_prob scoring_func score_function topk_method n_group topk_group moe_norm_min num_expert_group
        use_grouped_topk moe_renormalize (moe_)?router_dtype expert_selection_fn
    """,
    "engines, and layers of multi-token prediction": r"""
        pretraining_tp ep_size (use_)?flash_attn(_.*)? attn_implementation use_mamba_kernels use_associative_scan
        use_(falcon_)?mambapy use_mem_eff_path masked_softmax_fusion fused_bias_fc fused_add_norm reference_compile
        deterministic_flash_attn use_mtp mtp_transformer_layers mtp_(layers_block_type|layer_types|mlp_layer_types)
        mtp_hybrid_override_pattern index_share_for_mtp_iteration
    """,
}
"""Expressions of the names of fields that change nothing in any family, by what they are about."""

_ACTIVATIONS: Final = """
    gelu gelu_10 gelu_accurate gelu_fast gelu_new gelu_python gelu_python_tanh gelu_pytorch_tanh gelu_tanh quick_gelu
    gegelu geglu hardswish laplace leaky_relu linear mish relu relu2 relu6 sigmoid silu situ sqrtsoftplus swiglu
    swigluoai swish tanh xielu
"""
KINDS: Final[dict[str, frozenset[str]]] = {
    r"(?!is_)(.*_)?(hidden_)?act(ivation)?(_fn|_func|_function)?": frozenset(_ACTIVATIONS.split()),
    r"scoring_func|score_function|expert_selection_fn": frozenset(("sigmoid", "softmax", "sqrtsoftplus", "noaux_tc")),
    r"topk_method": frozenset(("noaux_tc", "greedy", "group_limited_greedy")),
    r"(layer_)?rope_type|rotary_type": frozenset(
        ("default", "linear", "dynamic", "yarn", "longrope", "su", "llama3", "mrope")
    ),
}
"""Words of fields that name a kind of function, by expressions of the fields: others may be of layers yet to come."""

_NUMBERS: Final = re.compile(
    r"(.*_)?rope_(theta|base|ratio|pct|percent|local_base_freq|embedding_base)|rope_position_scale"
    r"|(global_|local_|partial_)?rotary_(pct|base|emb_base|emb_fraction|dim|factor|percentage)"
)
"""Names of fields that turn queries and keys by a number, if they are not null."""

BESIDE: Final = re.compile(
    r"(?:^|_)(?:vision|visual|vit|image|img|audio|sound|speech|talker|token2wav|code2wav|tts|mm_tower)",
    re.IGNORECASE,
)
"""Names of objects that have towers, or what speaks, beside a decoder."""

_KINDS: Final = {re.compile(names): known for names, known in KINDS.items()}
_IDLE: Final = re.compile("|".join(f"(?:{name})" for names in IDLE.values() for name in names.split()))
_OWN_RULES: Final = (*QUANTISATION_KEYS, "per_layer_config")
"""Objects whose readers refuse themselves what they do not know."""


def changes_nothing(key: str) -> bool:
    """Whether a field changes nothing of what is counted in any family."""
    return _IDLE.fullmatch(key) is not None


def refuse_unknown(fields: Fields, unknown: Iterable[tuple[str, Any]]) -> None:
    """Refuse what is not understood.

    Parameters
    ----------
    fields : Fields    of the decoder
    unknown : of (str, object)    names and values
    """
    for name, value in unknown:
        held = f"(it is {shown(value)})"
        text = f"is not understood and may change what is counted {held}; where it does not, give the file without it"
        fields.faults.append(f"{name} {text}")


def odd_values(stated: Mapping[str, Any]) -> Iterator[str]:
    """Faults of fields that change nothing as long as they say what is known.

    Parameters
    ----------
    stated : mapping    what the file itself has in the decoder
    """
    for key, value in stated.items():
        if value is None or not _IDLE.fullmatch(key):
            continue
        rows = value if isinstance(value, list) else [value]
        if _NUMBERS.fullmatch(key) and not all(map(is_number, rows)):
            yield f"{printed(key)} must be a number, not {shown(value)}"
        known = next((words for names, words in _KINDS.items() if names.fullmatch(key)), None)
        if known is not None and not (isinstance(value, str) and value.lower() in known):
            yield f"{printed(key)} {shown(value)} is not supported; supported: {', '.join(sorted(known))}"


def unknown_fields(fields: Fields, stated: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields that are not understood, by the names that messages use, and their values.

    Parameters
    ----------
    fields : Fields     of the decoder, which know what was asked for
    stated : mapping    what the file itself has, in the decoder or in an object within it
    prefix : str        of the names in that object
    """
    for key, value in stated.items():
        name = f"{prefix}{key}"
        if not value or _IDLE.fullmatch(key) or (not prefix and key in _OWN_RULES):
            continue
        if isinstance(value, dict) and not prefix and BESIDE.search(key):
            continue
        if name not in fields.asked:
            yield f"{prefix}{printed(key)}", value
            continue
        rows = value if isinstance(value, list) else [value]
        for index, row in enumerate(rows):
            inner = f"{name}[{index}]." if isinstance(value, list) else f"{name}."
            if isinstance(row, dict) and any(asked.startswith(inner) for asked in fields.asked):
                yield from unknown_fields(fields, row, inner)
