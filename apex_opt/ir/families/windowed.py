"""Families of which most layers see a window or a chunk of the context, and some of them other heads than the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.cells import Attention, DenseFfn, MoeFfn
from apex_opt.ir.checks import count_fault, shown
from apex_opt.ir.families.base import Family, Layers, module_names, sizes, within
from apex_opt.ir.families.decoder import Decoder, head_fields, window_of_layers
from apex_opt.ir.families.listed import flags_of, kinds_of
from apex_opt.ir.families.states import refuse
from apex_opt.ir.model import MAX_LAYERS, Block

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.ir.families.base import Sizes
    from apex_opt.ir.fields import Fields

_SEES: Final = {"full_attention": False, "sliding_attention": True}
_MIXES: Final = {"dense": False, "sparse": True}


def _llama4(fields: Fields, size: Sizes) -> Layers:
    """Layers that see chunks of the context, and some without positions that see all of it; experts in some layers."""
    heads = head_fields(fields, size.hidden, 8)
    bias = fields.flag("attention_bias")
    fields.idle("attn_scale", "attn_temperature_tuning", "floor_scale", "use_qk_norm")  # norms without weights
    chunk = 0 if fields.get("attention_chunk_size", 0) is None else fields.count("attention_chunk_size")
    turned = flags_of(fields, "no_rope_layers", size.layers) if fields.get("no_rope_layers") else None
    interval = fields.count("no_rope_layer_interval", default=4)
    if turned is None:
        turned = [(layer + 1) % max(interval, 1) != 0 for layer in range(size.layers)]
    chunks = kinds_of(fields, "layer_types", size.layers, {"full_attention": False, "chunked_attention": True})
    chunks = [bool(chunk) and sees for sees in (turned if chunks is None else chunks)]
    mixtures = _llama4_mixtures(fields, size.layers)
    width = fields.count("intermediate_size")
    fields.idle("intermediate_size_mlp", "interleave_moe_layer_step")  # where layers do not ask for them
    dense_width = fields.count("intermediate_size_mlp") if not all(mixtures) else 0
    experts, topk = fields.count("num_local_experts"), fields.count("num_experts_per_tok")
    if experts and topk > experts:
        fields.fault("num_experts_per_tok", f"{topk} is above num_local_experts {experts}")
    if fields.faults:
        return Layers([])
    cells = {
        (rotary, chunked): Attention(
            hidden=size.hidden,
            qkv_bias=bias,
            output_bias=bias,
            rotary=rotary,
            window=chunk if chunked else None,
            chunked=chunked,
            **heads,
        )
        for rotary, chunked in set(zip(turned, chunks, strict=True))
    }
    mixture = MoeFfn(
        hidden=size.hidden,
        expert_intermediate=width,
        experts=experts,
        experts_per_token=topk,
        shared_intermediate=width,
    )
    dense = DenseFfn(hidden=size.hidden, intermediate=dense_width) if dense_width else None
    return Layers(
        [
            Block(attention=cells[rotary, chunked], ffn=mixture if mixes or dense is None else dense)
            for rotary, chunked, mixes in zip(turned, chunks, mixtures, strict=True)
        ]
    )


def _llama4_mixtures(fields: Fields, layers: int) -> list[bool]:
    """Which layers have experts: those listed, else every so manieth."""
    listed = fields.rows("moe_layers")
    if listed is None:
        step = fields.count("interleave_moe_layer_step")
        return [step > 0 and (layer + 1) % step == 0 for layer in range(layers)]
    for row in listed:
        if layers and (fault := count_fault("moe_layers entry", row, 0, layers - 1)):
            fields.faults.append(fault)
            return []
    return [layer in listed for layer in range(layers)]


def _step(fields: Fields, size: Sizes) -> Layers:
    """Layers of which those behind a window may have more query heads, each with a gate; experts behind dense layers.

    Source: `transformers`, `step3p7`, whose class has the gate in every layer; vLLM, `models/step3p5.py`.
    """
    whole = head_fields(fields, size.hidden)
    # Beside the names that are read, and limits of activations.
    fields.idle("n_shared_experts", "n_routed_experts", "swiglu_limits", "swiglu_limits_shared")
    local = _step_local(fields, whole)
    drafted = fields.count("num_nextn_predict_layers", default=0, minimum=0, maximum=MAX_LAYERS)
    sees = kinds_of(fields, "layer_types", size.layers, _SEES, beyond=drafted)
    if sees is None:
        sees = [False] * size.layers
    window = fields.count("sliding_window") if any(sees) else 0
    mixtures = kinds_of(fields, "mlp_layer_types", size.layers, _MIXES, beyond=drafted)
    if mixtures is None:
        mixtures = listed_mixtures(fields, size.layers, dense_first=3)
    if not fields.flag("use_moe_router_bias", default=True):
        fields.fault("use_moe_router_bias", "false is not supported")
    bias, gated = fields.flag("attention_bias"), fields.flag("use_head_wise_attn_gate", default=True)
    ffns = _STEP_FFNS.ffns(fields, size, mixtures)
    if fields.faults:
        return Layers([])
    common: dict[str, Any] = {"hidden": size.hidden, "qkv_bias": bias, "qk_norm": True, "gated": gated}
    cells = Attention(**common, **whole), Attention(**common, **local, window=window or None)
    return Layers([Block(attention=cells[behind], ffn=ffn) for behind, ffn in zip(sees, ffns, strict=True)])


def _step_local(fields: Fields, whole: dict[str, Any]) -> dict[str, Any]:
    """Heads of layers behind a window: those of all layers, less what the file says of them."""
    if fields.get("num_sliding_attention_heads") is not None:
        return whole | {"query_heads": fields.count("num_sliding_attention_heads")}
    section = fields.section("attention_other_setting")
    if section is None:
        return whole
    kind = section.text("attention_type")
    if kind != "sliding_attention":
        section.fault("attention_type", f"must be sliding_attention, not {shown(kind)}")
    return {
        "query_heads": section.count("num_attention_heads", default=whole["query_heads"]),
        "kv_heads": section.count("num_attention_groups", default=whole["kv_heads"]),
        "head_dim": section.count("head_dim", default=whole["head_dim"]),
    }


def listed_mixtures(fields: Fields, layers: int, dense_first: int) -> list[bool]:
    """Which layers have experts: those listed as numbers with commas, else all behind the first dense ones.

    Parameters
    ----------
    fields
    layers : int        that the model has
    dense_first : int   dense layers before them where the file tells neither
    """
    listed = fields.get("moe_layers_enum")
    listed = ",".join(map(str, listed)) if isinstance(listed, list) else fields.text("moe_layers_enum")
    if not listed:
        dense_first = fields.count("first_k_dense_replace", default=dense_first, minimum=0)
        return [layer >= dense_first for layer in range(layers)]
    entries = [entry.strip() for entry in listed.split(",") if entry.strip()]
    odd = [entry for entry in entries if not entry.isdecimal()]
    if odd:
        fields.fault("moe_layers_enum", f"must hold numbers with commas, not {shown(odd[0])}")
        return []
    found = {int(entry) for entry in entries}
    return [layer in found for layer in range(layers)]


def _mimo_v2(fields: Fields, size: Sizes) -> Layers:
    """Layers of which those behind a window have KV heads of their own, with sinks; values narrower than keys.

    Source: vLLM, `models/mimo_v2_flash.py`; names as in the file that the model was published with.
    """
    whole = head_fields(fields, size.hidden)
    fields.idle("attention_chunk_size", "attention_value_scale")
    values = fields.count("v_head_dim", default=whole["head_dim"])
    sees = kinds_of(fields, "layer_types", size.layers, _SEES)
    if sees is None:
        sees = flags_of(fields, "hybrid_layer_pattern", size.layers)
    if sees is None:
        fields.fault("hybrid_layer_pattern", "is missing")
        sees = []
    local, window, local_values = whole, 0, values
    if any(sees):
        window = fields.count("sliding_window")
        names = {"query_heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
        local = {part: fields.count(f"swa_{name}") for part, name in names.items()}
        local_values = fields.count("swa_v_head_dim", default=local["head_dim"])
    mixtures = kinds_of(fields, "mlp_layer_types", size.layers, _MIXES)
    if mixtures is None:
        mixtures = flags_of(fields, "moe_layer_freq", size.layers)
    if mixtures is None:
        fields.fault("moe_layer_freq", "is missing")
        mixtures = []
    if fields.get("n_shared_experts"):
        fields.fault("n_shared_experts", f"{shown(fields.get('n_shared_experts'))} is not supported")
    bias = fields.flag("attention_bias")
    sinks = [fields.flag(f"add_{kind}_attention_sink_bias") for kind in ("full", "swa")]
    ffns = _MIMO_FFNS.ffns(fields, size, mixtures)
    if fields.faults:
        return Layers([])
    cells = (
        Attention(hidden=size.hidden, qkv_bias=bias, value_dim=values, sinks=sinks[0], **whole),
        Attention(
            hidden=size.hidden, qkv_bias=bias, value_dim=local_values, sinks=sinks[1], window=window or None, **local
        ),
    )
    return Layers([Block(attention=cells[behind], ffn=ffn) for behind, ffn in zip(sees, ffns, strict=True)])


def _exaone4(fields: Fields, size: Sizes) -> Layers:
    """Layers with norms after their cells; those that see all of the context have no positions beside windows."""
    heads = head_fields(fields, size.hidden, 32)
    spelled = fields.get("sliding_window_pattern")
    if fields.get("sliding_window") is None:
        windows: list[int | None] = [None] * size.layers
    elif isinstance(spelled, str) and spelled and fields.get("layer_types") is None:
        # The pattern is repeated, but for the last layer, which sees all.
        local = kinds_of(fields, "sliding_window_pattern", 0, {"L": True, "G": False}) or [False]
        window = fields.count("sliding_window")
        windows = [window if local[layer % len(local)] else None for layer in range(size.layers)]
        windows[-1:] = [None] * (size.layers > 0)
    else:
        kept = fields.replaced({"sliding_window_pattern": None}) if isinstance(spelled, str) else fields
        windows = window_of_layers(kept, size.layers, "always", 4)
    return _behind_windows(fields, size, windows, heads, rotary_everywhere=not any(windows), qk_norm=True)


def _olmo3(fields: Fields, size: Sizes) -> Layers:
    """Layers with norms after their cells, and norms over the whole width of queries and keys."""
    heads = head_fields(fields, size.hidden)
    windows = window_of_layers(fields, size.layers, "always", 4)
    bias = fields.flag("attention_bias")
    return _behind_windows(
        fields, size, windows, heads, qkv_bias=bias, output_bias=bias, qk_norm=True, qk_norm_whole=True
    )


def _behind_windows(
    fields: Fields,
    size: Sizes,
    windows: Sequence[int | None],
    heads: dict[str, Any],
    *,
    rotary_everywhere: bool = True,
    **attention: Any,
) -> Layers:
    """Layers of a dense FFN that differ in their windows, and in whether they turn queries and keys.

    Parameters
    ----------
    fields, size
    windows : of every layer
    heads : query heads, KV heads and their width
    rotary_everywhere : bool    else only behind windows
    attention : other arguments of `Attention`
    """
    intermediate = fields.count("intermediate_size")
    if fields.faults:
        return Layers([])
    cells = {
        window: Attention(
            hidden=size.hidden, window=window, rotary=rotary_everywhere or window is not None, **heads, **attention
        )
        for window in set(windows)
    }
    ffn = DenseFfn(hidden=size.hidden, intermediate=intermediate)
    return Layers([Block(attention=cells[window], ffn=ffn) for window in windows])


def _cohere(fields: Fields, size: Sizes) -> Layers:
    """Layers whose attention and FFN read one norm; of Command A, those behind windows alone have positions.

    Source: `transformers`, `cohere` and `cohere2`: LayerNorms without a bias; vLLM, `models/commandr.py`.
    """
    second = fields.text("model_type") == "cohere2"
    heads = head_fields(fields, size.hidden)
    bias = fields.flag("attention_bias")
    norm = fields.flag("use_qk_norm")
    if second:
        refuse(fields, "use_qk_norm", False)
    windows = window_of_layers(fields, size.layers, "always", 4) if second else [None] * size.layers
    if second and not fields.states("sliding_window"):
        fields.fault("sliding_window", "is missing")
    found = _behind_windows(
        fields,
        size,
        windows,
        heads,
        rotary_everywhere=not second,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=norm,
        qk_norm_each=norm,
    )
    return Layers([Block(attention=block.attention, ffn=block.ffn, norms=1, parallel=True) for block in found.blocks])


_STEP_FFNS: Final = Decoder(experts_field="num_experts", shared_width_field="share_expert_dim", router_bias=True)
_MIMO_FFNS: Final = Decoder(experts_field="n_routed_experts", router_bias=True)
_STEP: Final = Family(
    architecture="Step3p5ForCausalLM",
    read=_step,
    modules=module_names(experts=within("moe.experts.0"), shared=within("share_expert")),
    defaults=sizes(128815, 4096, 11264, 45, 64, 128000)
    | {"num_key_value_heads": 8, "head_dim": 128, "num_experts": 288, "num_experts_per_tok": 8}
    | {"moe_intermediate_size": 1280, "share_expert_dim": 1280},
    spelled={
        "num_key_value_heads": "num_attention_groups",
        "num_experts": "moe_num_experts",
        "num_experts_per_tok": "moe_top_k",
        "share_expert_dim": "share_expert_dims",
    },
)

_MIMO_V2: Final = Family(
    architecture="MiMoV2FlashForCausalLM",
    read=_mimo_v2,
    modules=module_names(),
    spelled={"sliding_window": "sliding_window_size"},
)

FAMILIES: Final[dict[str, Family]] = {
    "llama4_text": Family(
        architecture="Llama4ForCausalLM",
        read=_llama4,
        modules=module_names(
            dense=within("feed_forward"),
            experts=within("feed_forward.experts", ("gate_up_proj", "down_proj")),
            shared=within("feed_forward.shared_expert"),
        ),
        defaults=sizes(202048, 5120, 8192, 48, 40, 131072)
        | {"num_key_value_heads": 8, "head_dim": 128, "intermediate_size_mlp": 16384, "num_local_experts": 16}
        | {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "attention_chunk_size": 8192},
    ),
    "step3p5": _STEP,
    "step3p7": _STEP,
    "mimo": Family(
        architecture="MiMoForCausalLM",
        read=Decoder(qkv_bias=True, window="opt-in", kv_heads=32),
        modules=module_names(),
    ),
    "mimo_v2_flash": _MIMO_V2,
    "mimo_v2": replace(_MIMO_V2, architecture="MiMoV2ForCausalLM"),
    "exaone4": Family(
        architecture="Exaone4ForCausalLM",
        read=_exaone4,
        modules=module_names(),
        defaults=sizes(102400, 4096, 16384, 32, 32, 2048) | {"num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        read=_olmo3,
        modules=module_names(),
        defaults=sizes(50304, 4096, 11008, 32, 32, 2048) | {"sliding_window": 4096},
    ),
    **{
        name: Family(
            architecture=architecture,
            read=_cohere,
            modules=module_names(),
            defaults=sizes(256000, 8192, 22528, 40, 64, 8192) | {"sliding_window": 4096},
            tied=True,
            idle=(
                *("use_gated_activation", "use_embedding_sharing", "use_parallel_block", "position_embedding_type"),
                *("order_of_interleaved_layers", "layer_switch"),
            ),
        )
        for name, architecture in (("cohere", "CohereForCausalLM"), ("cohere2", "Cohere2ForCausalLM"))
    },
}
