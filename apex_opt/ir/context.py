"""The longest sequence a model is made for, as vLLM 0.20.2 derives it from a `config.json`."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.checks import MAX_COUNT, is_number, shown
from apex_opt.ir.fields import printed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.ir.fields import Fields

LENGTHS: Final = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length"),
    *("max_sequence_length", "max_seq_length", "seq_len"),
)
"""Names of the length; the first is usual, and the least of those given holds."""
_UNSCALED: Final = ("su", "longrope", "llama3")
"""Kinds of scaling whose files give the scaled length as it is."""
_KINDS: Final = (
    *("default", "linear", "ntk", "dynamic", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "mllama4"),
    *("mrope", "xdrope", "openpangu", "proportional", "telechat3-yarn"),
)
"""Kinds of scaling whose factor extends the length; what one of another kind does is not known."""
_NUMBERS: Final = frozenset(
    (
        *("factor", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "rope_dim", "alpha"),
        *("max_position_embeddings", "attention_factor", "attn_factor", "extrapolation_factor", "mscale"),
        *("mscale_all_dim", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "short_mscale"),
        *("long_mscale", "llama_4_scaling_beta", "scaling_factor"),
    )
)
"""What scales positions, or how they turn, in a number."""
_OTHERS: Final = frozenset(
    (
        *("type", "rope_type", "short_factor", "long_factor", "mrope_section", "mrope_interleaved", "xdrope_section"),
        *("truncate", "finetuned", "apply_yarn_scaling", "is_deepseek_v4", "use_fope", "mixed_b"),
    )
)
_LOCAL_BASES: Final = ("rope_local_base_freq", "swa_rope_theta", "local_rope_theta")
"""Fields that give layers behind windows another base to turn by."""
_SCALED: Final = "gemma3"
"""In the types of models whose files give the scaled length, whatever the kind of scaling."""


def context_limit(fields: Fields) -> int:
    """Tokens of the longest sequence; 0 at a fault, which is noted in `fields`.

    Scaling of the rotary positions multiplies the length by its factor, for yarn that from before the scaling. Where
    layers scale differently, the last of them tells.
    """
    length = fields.count(next((key for key in LENGTHS if fields.get(key) is not None), LENGTHS[0]))
    for key in LENGTHS:
        length = min(length, fields.count(key, default=length))
    if not length:
        return 0
    stated = length
    key, kinds, nested = _scalings(fields)
    factor = 1.0
    for kind in kinds.values() if nested else (kinds,):
        if not _described(fields, key, kind):
            return 0
        called = "rope_type" if "rope_type" in kind or "type" not in kind else "type"
        name = kind.get(called, "default")
        if not isinstance(name, str):
            fields.fault(f"{key}.{called}", f"must be text, not {shown(name)}")
            return 0
        if name in _UNSCALED:
            continue
        if name not in _KINDS:
            fields.fault(f"{key}.{called}", f"may be {', '.join((*_KINDS, *_UNSCALED))}, not {shown(name)}")
            return 0
        given = kind.get("factor")
        if given is not None:
            if given > MAX_COUNT:
                fields.fault(f"{key}.factor", f"must be a number of at most {MAX_COUNT}, not {shown(given)}")
                return 0
            factor = float(given)
        if name == "yarn" and kind.get("original_max_position_embeddings") is not None:
            length = type(fields)(kind, f"{key}.", fields.faults).count("original_max_position_embeddings")
    limit = math.floor(length * factor)
    if length and not 1 <= limit <= MAX_COUNT:
        fields.fault(f"{key}.factor", f"makes a context of {limit} tokens; it must be from 1 to {MAX_COUNT}")
        return 0
    return stated if _SCALED in fields.text("model_type") else limit


def _described(fields: Fields, key: str, kind: Mapping[str, Any]) -> bool:
    """Whether all that an object says of positions is known, and its numbers are some; else that is noted.

    Parameters
    ----------
    fields : Fields    of the decoder
    key : str          of the object
    kind : mapping     the object, or that of one kind of layers within it
    """
    for name, value in kind.items():
        if name in _NUMBERS:
            positive = name == "factor"
            if value is not None and not (is_number(value) and (value > 0 or not positive)):
                fields.fault(f"{key}.{name}", f"must be a number{' above 0' * positive}, not {shown(value)}")
                return False
        elif name not in _OTHERS and value:
            fields.fault(f"{key}.{printed(name)}", f"is not understood (it is {shown(value)})")
            return False
    return True


def _scalings(fields: Fields) -> tuple[str, Mapping[str, Any], bool]:
    """What scales the rotary positions: the field, what it holds, and whether that is told for each kind of layer."""
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    scaling = fields.section(key)
    kinds: Mapping[str, Any] = scaling.values if scaling is not None else {}
    others = [name for name in kinds if name not in _NUMBERS | _OTHERS]
    nested = [name for name in others if isinstance(kinds[name], dict)]
    if nested:
        for odd in (name for name in others if name not in nested and kinds[name]):
            fields.fault(f"{key}.{printed(odd)}", f"must be an object, not {shown(kinds[odd])}")
        kinds = {name: kinds[name] for name in nested}
    return key, kinds, bool(nested)


def angle_positions(fields: Fields) -> tuple[int, int] | None:
    """Positions of the tables of angles of layers that see all, and of those behind windows; None where all share one.

    Asked once `context_limit` has found no fault. An engine keeps a table for each way to turn, as long as what scales
    the positions makes it: of Gemma 3, whose files give the scaled length, eight times as long once more.
    """
    length = fields.count(LENGTHS[0], default=0)
    _, kinds, nested = _scalings(fields)
    if nested:
        if len({json.dumps(kind, sort_keys=True) for kind in kinds.values()}) < 2:
            return None
        full, local = (kinds.get(name, {}) for name in ("full_attention", "sliding_attention"))
    elif any(fields.get(key) for key in _LOCAL_BASES):
        full, local = kinds, {}
    else:
        return None
    return _scaled(full, length), _scaled(local, length)


def _scaled(kind: Mapping[str, Any], length: int) -> int:
    """Positions that a table of angles has."""
    name, factor = kind.get("rope_type", kind.get("type", "default")), kind.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or name in _UNSCALED:
        return length
    if name == "yarn" and isinstance(before := kind.get("original_max_position_embeddings"), int):
        length = before
    return math.floor(length * factor)
