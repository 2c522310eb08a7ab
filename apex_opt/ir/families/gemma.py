"""Gemma 2, 3 and 4: windows in most layers, and norms after cells as well as before them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.cells import Attention, DenseFfn, Ffn, Matrix, MoeFfn
from apex_opt.ir.families.base import Family, Layers, module_names, sizes, within
from apex_opt.ir.families.decoder import head_fields, window_of_layers
from apex_opt.ir.families.states import refuse
from apex_opt.ir.model import Block

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.ir.families.base import Sizes
    from apex_opt.ir.fields import Fields

LOCAL_BASE: Final = {"rope_local_base_freq": 10_000.0}
"""What layers behind windows turn by in Gemma 3, whose files leave it to the class."""
_NORMS: Final = 4  # before and after each cell
_MOE_NORMS: Final = 3  # before the experts, and after them and the FFN beside


def _gemma(every: int, *, qk_norm: bool, norms: int = _NORMS) -> Callable[[Fields, Sizes], Layers]:
    """Reader of Gemma 2 and 3, whose layers differ in their windows alone.

    Parameters
    ----------
    every : int     every so manieth layer sees the whole context
    qk_norm : bool  one norm each on query and key heads
    norms : int     of a layer
    """

    def read(fields: Fields, size: Sizes) -> Layers:
        heads = head_fields(fields, size.hidden, 4)
        bias = fields.flag("attention_bias")
        windows = _windows(fields, size, every)
        intermediate = fields.count("intermediate_size")
        if fields.faults:
            return Layers([])
        cell = Attention(hidden=size.hidden, qkv_bias=bias, output_bias=bias, qk_norm=qk_norm, **heads)
        ffn = DenseFfn(hidden=size.hidden, intermediate=intermediate)
        return Layers([Block(attention=cell.with_window(window), ffn=ffn, norms=norms) for window in windows])

    return read


def _windows(fields: Fields, size: Sizes, every: int) -> list[int | None]:
    """Window of every layer, None where it sees the whole context."""
    if not fields.states("sliding_window"):
        fields.fault("sliding_window", "is missing")
    # Newer files spell an unused pattern with an underscore, beside a list of layers.
    every = fields.count("_sliding_window_pattern", default=every)
    return window_of_layers(fields, size.layers, "always", every)


def _gemma4(fields: Fields, size: Sizes) -> Layers:
    """Layers of which those that see the whole context have heads of their own, and the last ones no keys and values.

    Small sizes add to every layer an embedding of its own; some have experts beside the FFN, each behind norms.
    """
    windows = _windows(fields, size, 6)
    refuse(fields, "use_bidirectional_attention", False, "vision")
    # Where layers have no embedding of their own, or no experts.
    fields.idle("vocab_size_per_layer_input", "num_experts", "top_k_experts", "moe_intermediate_size")
    if windows:
        windows[-1] = None  # the class has the last layer see all
    local = head_fields(fields, size.hidden, 4)
    joint = fields.flag("attention_k_eq_v")
    # Files that tell fields layer by layer have no others for layers that see all.
    told = fields.states("per_layer_config")
    whole = local | {"head_dim": fields.count("global_head_dim", default=local["head_dim"] if told else 512)}
    if joint and fields.get("num_global_key_value_heads") is not None:
        whole["kv_heads"] = fields.count("num_global_key_value_heads")
    bias = fields.flag("attention_bias")
    shared = fields.count("num_kv_shared_layers", default=0, minimum=0, maximum=max(size.layers, 1))
    own = size.layers - shared
    narrow = fields.count("hidden_size_per_layer_input", default=256, minimum=0)
    rows = fields.count("vocab_size_per_layer_input", default=262144) if narrow else 0
    ffn, wide, beside = _gemma4_ffns(fields, size)
    if own < size.layers and not all(any((at is None) is full for at in windows[:own]) for full in (False, True)):
        fields.fault("num_kv_shared_layers", f"{shared} leaves no layer of each kind to keep keys and values")
    if fields.faults or ffn is None or wide is None:
        return Layers([])
    common: dict[str, Any] = {"hidden": size.hidden, "qkv_bias": bias, "output_bias": bias, "qk_norm": True}
    cells = {
        (full, borrowed): Attention(
            **common, **(whole if full else local), keys_as_values=full and joint, borrowed=borrowed
        )
        for full in (False, True)
        for borrowed in (False, True)
    }
    if narrow:
        beside = (
            *beside,
            Matrix("per-layer gate", narrow, size.hidden),
            Matrix("per-layer projection", size.hidden, narrow),
            Matrix("per-layer norm", size.hidden, 1),
        )
    blocks = [
        Block(
            attention=cells[window is None, layer >= own].with_window(window),
            ffn=wide if layer >= own else ffn,
            norms=_NORMS + (_MOE_NORMS if ffn.experts else 0),
            beside=beside,
        )
        for layer, window in enumerate(windows)
    ]
    width = size.layers * narrow
    before = (
        Matrix("per-layer embedding", width, 1, cut="heads", times=max(rows, 1), used=1),
        Matrix("per-layer projection", width, size.hidden),
        Matrix("per-layer norm", narrow, 1),
    )
    return Layers(blocks, before=before if narrow else ())


def _gemma4_ffns(fields: Fields, size: Sizes) -> tuple[Ffn | None, Ffn | None, tuple[Matrix, ...]]:
    """FFN of most layers, that of layers without keys and values, and weights beside them; None at a fault."""
    intermediate = fields.count("intermediate_size")
    if not fields.flag("enable_moe_block"):
        double = 2 if fields.flag("use_double_wide_mlp") else 1
        if not intermediate or not size.hidden:
            return None, None, ()
        dense = [DenseFfn(hidden=size.hidden, intermediate=times * intermediate) for times in (1, double)]
        return dense[0], dense[1], ()
    experts, topk, width = (fields.count(key) for key in ("num_experts", "top_k_experts", "moe_intermediate_size"))
    if experts and topk > experts:
        fields.fault("top_k_experts", f"{topk} is above num_experts {experts}")
    if fields.flag("use_double_wide_mlp"):
        fields.fault("use_double_wide_mlp", "true is not supported with enable_moe_block")
    if fields.faults:
        return None, None, ()
    ffn = MoeFfn(
        hidden=size.hidden,
        expert_intermediate=width,
        experts=experts,
        experts_per_token=topk,
        shared_intermediate=intermediate,
    )
    return ffn, ffn, (Matrix("router scale", size.hidden, 1), Matrix("expert scales", experts, 1))


_GEMMA3: Final = Family(
    architecture="Gemma3ForCausalLM",
    read=_gemma(6, qk_norm=True),
    modules=module_names(),
    implied=LOCAL_BASE,
    defaults=sizes(262208, 2304, 9216, 26, 8, 131072)
    | {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096},
    tied=True,
)
_GEMMA4: Final = Family(
    architecture="Gemma4ForCausalLM",
    read=_gemma4,
    modules=module_names(experts=within("experts.0"), shared=within("mlp")),
    defaults=sizes(262144, 2304, 9216, 30, 8, 131072)
    | {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 512},
    tied=True,
)

FAMILIES: Final[dict[str, Family]] = {
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        read=_gemma(2, qk_norm=False),
        modules=module_names(),
        defaults=sizes(256000, 2304, 9216, 26, 8, 8192)
        | {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096},
        tied=True,
        idle=("num_image_tokens", "use_bidirectional_attention"),  # of PaliGemma 2
    ),
    "vaultgemma": Family(
        architecture="VaultGemmaForCausalLM", read=_gemma(2, qk_norm=False, norms=2), modules=module_names(), tied=True
    ),
    "gemma3_text": _GEMMA3,
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": replace(
        _GEMMA4, architecture="Gemma4UnifiedForCausalLM", implied={"hidden_size_per_layer_input": 0}
    ),
}
