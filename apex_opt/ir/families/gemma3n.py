"""Gemma 3n: four residual streams, an embedding for every layer, and last layers that borrow keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.cells import Attention, DenseFfn, Matrix
from apex_opt.ir.checks import count_fault
from apex_opt.ir.families.base import Family, Layers, module_names, sizes
from apex_opt.ir.families.decoder import head_fields, window_of_layers
from apex_opt.ir.families.gemma import LOCAL_BASE
from apex_opt.ir.model import Block

if TYPE_CHECKING:
    from apex_opt.ir.families.base import Sizes
    from apex_opt.ir.fields import Fields

_NORMS: Final = 4  # before and after each cell
_TRAFFIC: Final = 6
"""Sums of outputs that prediction and correction of four streams move for each cell, less those of every layer."""


def _widths(fields: Fields, layers: int) -> list[int]:
    """Columns of every layer's FFN: a list, or one number for all."""
    listed = fields.get("intermediate_size")
    if not isinstance(listed, list):
        return [fields.count("intermediate_size")] * layers
    if layers and len(listed) != layers:
        fields.fault("intermediate_size", f"has {len(listed)} entries for {fields.name('num_hidden_layers')} {layers}")
    faults = (count_fault("intermediate_size entry", entry) for entry in listed)
    found = next((fault for fault in faults if fault), None)
    if found:
        fields.faults.append(found)
    return listed


def read(fields: Fields, size: Sizes) -> Layers:
    """Layers behind windows but for every fifth, each beside products of the streams and of its own embedding.

    Source: `transformers` and vLLM, `models/gemma3n.py`: attention and FFN read one of the streams.
    """
    heads: dict[str, Any] = head_fields(fields, size.hidden, 2)
    windows = window_of_layers(fields, size.layers, "always", 5)
    fields.idle("activation_sparsity_pattern", "altup_active_idx", "altup_coef_clip", "altup_correct_scale")
    shared = fields.count("num_kv_shared_layers", default=15, minimum=0, maximum=max(size.layers, 1))
    own, widths, bias = size.layers - shared, _widths(fields, size.layers), fields.flag("attention_bias")
    narrow = fields.count("hidden_size_per_layer_input", default=256)
    rows = fields.count("vocab_size_per_layer_input", default=262144)
    streams, rank = fields.count("altup_num_inputs", default=4), fields.count("laurel_rank", default=64)
    if own < size.layers and not all(any((at is None) is full for at in windows[:own]) for full in (False, True)):
        fields.fault("num_kv_shared_layers", f"{shared} leaves no layer of each kind to keep keys and values")
    if fields.faults:
        return Layers([])
    beside = (
        Matrix("stream router", streams, size.hidden),
        Matrix("stream coefficients", streams * (streams + 1), streams),
        Matrix("stream norm and scale", size.hidden, 1, times=2),
        Matrix("augmented residual", rank, size.hidden),
        Matrix("augmented residual", size.hidden, rank),
        Matrix("augmented residual norm", size.hidden, 1),
        Matrix("per-layer gate", narrow, size.hidden),
        Matrix("per-layer projection", size.hidden, narrow),
        Matrix("per-layer norm", size.hidden, 1),
    )
    common: dict[str, Any] = {"hidden": size.hidden, "qkv_bias": bias, "output_bias": bias, "qk_norm": True, **heads}
    cells = [Attention(**common, borrowed=borrowed) for borrowed in (False, True)]
    blocks = [
        Block(
            attention=cells[layer >= own].with_window(window),
            ffn=DenseFfn(hidden=size.hidden, intermediate=width),
            norms=_NORMS,
            residuals=_TRAFFIC,
            beside=beside,
        )
        for layer, (window, width) in enumerate(zip(windows, widths, strict=True))
    ]
    width = size.layers * narrow
    before = (
        Matrix("per-layer embedding", width, 1, cut="heads", times=rows, used=1),
        Matrix("per-layer projection", width, size.hidden),
        Matrix("per-layer norm", narrow, 1),
        Matrix("streams", size.hidden, size.hidden, times=streams - 1),
    )
    return Layers(blocks, before=before, after=(Matrix("streams", size.hidden, size.hidden, times=streams - 1),))


FAMILIES: Final[dict[str, Family]] = {
    "gemma3n_text": Family(
        architecture="Gemma3nForCausalLM",
        read=read,
        modules=module_names(),
        implied={"sliding_window": 512} | LOCAL_BASE,
        defaults=sizes(262400, 2048, 16384, 35, 8, 32768) | {"num_key_value_heads": 2, "head_dim": 256},
        tied=True,
    ),
}
