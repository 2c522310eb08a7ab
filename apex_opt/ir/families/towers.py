"""Towers that read images beside a decoder, by the `model_type` of their configuration.

A tower is described where its file states its sizes; those left to defaults are not guessed. Facts follow the model
classes of the `transformers` library: patches, positions, norms, and the projector behind a tower.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from apex_opt.errors import join_faults
from apex_opt.ir.cells import DenseFfn, EncoderAttention, Matrix
from apex_opt.ir.fields import MISSING, Fields
from apex_opt.ir.model import MAX_LAYERS, Block, Run, Tower

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_CHANNELS: Final = 3


def read_tower(config: Mapping[str, Any], hidden: int, source: str) -> Tower | None:
    """The tower of a whole configuration; None where there is none, or it is not known or not stated in full.

    Parameters
    ----------
    config : mapping    the parsed file
    hidden : int        width of the decoder, which the projector ends in
    source : str        where the file came from; opens the message

    Raises
    ------
    InputError          sizes that are stated, and cannot be
    """
    whole = Fields(config)
    fields = whole.section("vision_config")
    tower = None
    if fields is not None:
        kind = fields.text("model_type") or whole.text("model_type")
        read = _READERS.get(kind, _READERS.get(kind.removesuffix("_vision")))  # as `transformers` 5 saves it
        tower = read(whole, fields, hidden) if read else None
    if any(fault.endswith(MISSING) for fault in whole.faults):
        return None
    if whole.faults:
        raise join_faults(source, list(dict.fromkeys(whole.faults)))
    return tower


def _alike(fields: Fields, layers: str, block: Callable[[], Block]) -> tuple[Run, ...]:
    """Layers that are all the same; none where a field is at fault."""
    count = fields.count(layers, maximum=MAX_LAYERS)
    return () if fields.faults else (Run(block=block(), count=count),)


def _cells(
    fields: Fields, names: tuple[str, str, str], *, bias: bool, gated: bool, rotary: bool = True
) -> Callable[..., Block]:
    """What builds a layer, given the window of its attention.

    Parameters
    ----------
    fields : Fields     of the tower
    names : of str      fields of the width, the heads and the width of the FFN
    bias : bool         on all projections; norms have one where FFNs have no gate
    gated : bool        FFNs have a gate
    rotary : bool       queries and keys are turned by position
    """
    width, heads, inner = (fields.count(name) for name in names)
    if heads and width % heads:
        fields.fault(names[1], f"{heads} does not divide {names[0]} {width}")

    def block(window: int | None = None) -> Block:
        attention = EncoderAttention(
            hidden=width,
            query_heads=heads,
            kv_heads=heads,
            head_dim=width // heads,
            qkv_bias=bias,
            output_bias=bias,
            window=window,
            rotary=rotary,
        )
        ffn = DenseFfn(hidden=width, intermediate=inner, gated=gated, bias=bias)
        return Block(attention=attention, ffn=ffn, norm_bias=not gated)

    return block


def _patches(fields: Fields, width: int, *, bias: bool, frames: int = 1) -> Matrix:
    side = fields.count("patch_size")
    return Matrix("patches", width, _CHANNELS * frames * side * side + bias)


def _projector(whole: Fields, width: int, hidden: int, *, bias: bool = True) -> tuple[Matrix, ...]:
    """Two products, from the tower's width to the decoder's."""
    bias = whole.flag("multimodal_projector_bias", default=bias)
    return Matrix("projector", hidden, width + bias), Matrix("projector", hidden, hidden + bias)


def _vit(fields: Fields, *, siglip: bool) -> Tower | None:
    """CLIP or SigLIP without what comes behind it: learned positions of a square of patches, behind a class."""
    names = ("hidden_size", "num_attention_heads", "intermediate_size")
    build = _cells(fields, names, bias=True, gated=False, rotary=False)
    width, side, patch = fields.count("hidden_size"), fields.count("image_size"), fields.count("patch_size")
    runs = _alike(fields, "num_hidden_layers", build)
    if side < patch:
        fields.fault("image_size", f"{side} is less than patch_size {patch}")
    if not runs:
        return None
    tokens = (side // patch) ** 2 + (not siglip)
    beside = [
        _patches(fields, width, bias=siglip),
        Matrix("positions", tokens, width),
        Matrix("norms", width, 2, times=1 if siglip else 2),
    ]
    if not siglip:
        beside.append(Matrix("class", width, 1))
    return Tower(
        reads="images", runs=runs, beside=tuple(beside), heads=fields.count("num_attention_heads"), tokens=tokens
    )


def _llava(whole: Fields, fields: Fields, hidden: int, *, siglip: bool = False) -> Tower | None:
    """CLIP or SigLIP, behind it a projector of two products as in LLaVA, or the projection of CLIP itself."""
    tower = _vit(fields, siglip=siglip)
    if tower is None:
        return None
    width = fields.count("hidden_size")
    if whole.get("model_type") == "clip":
        behind: tuple[Matrix, ...] = (Matrix("projection", whole.count("projection_dim"), width),)
    else:
        behind = _projector(whole, width, hidden)
    return replace(tower, beside=(*tower.beside, *behind))


def _pixtral(whole: Fields, fields: Fields, hidden: int) -> Tower | None:
    """Pixtral, whose patches may be merged in squares before the projector, as in Mistral 3."""
    build = _cells(fields, ("hidden_size", "num_attention_heads", "intermediate_size"), bias=False, gated=True)
    width, merge = fields.count("hidden_size"), whole.count("spatial_merge_size", default=1)
    runs = _alike(fields, "num_hidden_layers", build)
    if not runs:
        return None
    beside = [_patches(fields, width, bias=False), Matrix("norms", width, 1)]
    if whole.states("spatial_merge_size"):
        beside += [Matrix("norms", width, 1), Matrix("merger", width, width * merge**2)]
    beside += _projector(whole, width, hidden, bias=not whole.states("spatial_merge_size"))
    heads = fields.count("num_attention_heads")
    return Tower(reads="images", runs=runs, beside=tuple(beside), heads=heads, merged=merge**2)


def _merger(width: int, merge: int, hidden: int, norm: int) -> tuple[Matrix, ...]:
    """Patches merged in squares, two products and a norm of so many columns."""
    joined = width * merge**2
    return Matrix("norms", width, norm), Matrix("merger", joined, joined + 1), Matrix("merger", hidden, joined + 1)


def _qwen2(whole: Fields, fields: Fields, hidden: int) -> Tower | None:
    """Qwen2-VL: two frames a patch, rotary positions, a merger of squares of patches."""
    fields = fields.filled({"mlp_width": fields.count("embed_dim") * fields.count("mlp_ratio")})
    build = _cells(fields, ("embed_dim", "num_heads", "mlp_width"), bias=True, gated=False)
    return _qwen(fields, _alike(fields, "depth", build), fields.count("embed_dim"), fields.count("hidden_size"), 2)


def _qwen2_5(whole: Fields, fields: Fields, hidden: int) -> Tower | None:
    """Qwen2.5-VL: as Qwen2-VL, with a gate, and windows in all but a few layers."""
    build = _cells(fields, ("hidden_size", "num_heads", "intermediate_size"), bias=True, gated=True)
    side = fields.count("window_size") // max(fields.count("patch_size"), 1)
    full, depth = fields.rows("fullatt_block_indexes"), fields.count("depth", maximum=MAX_LAYERS)
    if fields.faults or full is None:
        return None
    windows = [None if layer in full else max(side**2, 1) for layer in range(depth)]
    runs = tuple(Run(block=build(window), count=len(list(group))) for window, group in groupby(windows))
    return _qwen(fields, runs, fields.count("hidden_size"), fields.count("out_hidden_size"), 1)


def _qwen3(whole: Fields, fields: Fields, hidden: int) -> Tower | None:
    """Qwen3-VL and Qwen3.5: as Qwen2-VL, with learned positions besides, and mergers behind some layers."""
    build = _cells(fields, ("hidden_size", "num_heads", "intermediate_size"), bias=True, gated=False)
    width, out, rows = (fields.count(name) for name in ("hidden_size", "out_hidden_size", "num_position_embeddings"))
    deep = len(fields.rows("deepstack_visual_indexes") or ())
    tower = _qwen(fields, _alike(fields, "depth", build), width, out, 2)
    if tower is None:
        return None
    joined = width * tower.merged
    mergers = (
        Matrix("norms", joined, 2, times=deep),
        Matrix("merger", joined, joined + 1, times=deep),
        Matrix("merger", out, joined + 1, times=deep),
    )
    beside = (*tower.beside, Matrix("positions", rows, width), Matrix("patches", width, 1), *mergers[: 3 * (deep > 0)])
    return replace(tower, beside=beside)


def _qwen(fields: Fields, runs: tuple[Run, ...], width: int, hidden: int, norm: int) -> Tower | None:
    """What towers of Qwen have in common."""
    merge, frames = fields.count("spatial_merge_size"), fields.count("temporal_patch_size")
    if fields.faults or not runs:
        return None
    beside = (_patches(fields, width, bias=False, frames=frames), *_merger(width, merge, hidden, norm))
    return Tower(reads="images", runs=runs, beside=beside, heads=fields.count("num_heads"), merged=merge**2)


_READERS: Final[dict[str, Callable[[Fields, Fields, int], Tower | None]]] = {
    "clip_vision_model": _llava,
    "siglip_vision_model": partial(_llava, siglip=True),
    "pixtral": _pixtral,
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2_5,
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _qwen3),
}
