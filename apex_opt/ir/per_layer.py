"""Layers of which a file says field by field how they differ, as `transformers` 5 saves every family.

`per_layer_config` maps the number of a layer to the fields that hold there in place of those of the whole file.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from apex_opt.ir.checks import count_fault, shown

if TYPE_CHECKING:
    from apex_opt.ir.families import Family, Layers, Sizes
    from apex_opt.ir.fields import Fields

_KEY: Final = "per_layer_config"
_KNOWN: Final = frozenset(
    (
        *("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"),
        *("intermediate_size", "moe_intermediate_size", "num_local_experts", "num_experts", "n_routed_experts"),
        *("num_experts_per_tok", "sliding_window", "attention_chunk_size"),
    )
)
"""Fields that may differ: what another one would change is not known to be read layer by layer."""
_KEPT: Final = frozenset(("rope_parameters", "rope_theta", "rms_norm_eps", "hidden_act"))
"""Fields that may differ and change nothing of what is counted."""


def read_layers(family: Family, fields: Fields, size: Sizes) -> Layers:
    """The layers of a model, each as the whole file has it where it is read with the layer's own fields.

    Parameters
    ----------
    family : Family     that reads them
    fields : Fields     by their usual names
    size : Sizes        of the model
    """
    layers = family.read(fields, size)
    section = fields.section(_KEY)
    if section is None or fields.faults:
        return layers
    usual = {own: name for name, own in family.spelled.items()}
    found: dict[str, list[int]] = {}
    for number, entry in section.values.items():
        layer = _layer(number, size.layers)
        if layer is None or not isinstance(entry, dict):
            section.fault(number, f"must be an object for one of layers 0 to {size.layers - 1}, not {shown(entry)}")
            return layers
        for key, value in entry.items():
            if usual.get(key, key) not in _KNOWN and not (key in _KEPT or (key == "skip" and not value)):
                section.fault(number, f"has {shown(key)}, which is not read layer by layer")
                return layers
            if key not in _KEPT and value and (fault := count_fault(f"{section.name(number)}.{key}", value)):
                fields.faults.append(fault)
                return layers
        own = {usual.get(key, key): value for key, value in entry.items() if key not in _KEPT and key != "skip"}
        found.setdefault(json.dumps(own, sort_keys=True), []).append(layer)
    blocks = list(layers.blocks)
    for text, numbers in found.items():
        others = family.read(fields.replaced(json.loads(text)), size).blocks
        if fields.faults:
            return layers
        for where in numbers:
            blocks[where] = others[where]
    return layers._replace(blocks=blocks)


def _layer(number: str, layers: int) -> int | None:
    """The layer that a key numbers; None where there is none."""
    found = int(number) if number.isdecimal() and len(number) <= len(str(layers)) else layers
    return found if found < layers else None
