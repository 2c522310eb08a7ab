"""What readers of layers with states share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.checks import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.ir.fields import Fields

_STATE_BYTES: Final = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}


def state_bytes(fields: Fields, key: str, default: str = "auto") -> int:
    """Bytes of an element of a state that a recurrence keeps, where the engine is told nothing else.

    Parameters
    ----------
    fields
    key : str        that says it
    default : str    its value where the file leaves it out; "auto" is that of the model, which has 16 bit

    Source
    ------
    `mamba_utils.py` and `models/config.py` of vLLM 0.20.2.
    """
    told = fields.get(key)
    if told is None:
        return _STATE_BYTES[default]
    if not isinstance(told, str) or told not in _STATE_BYTES:
        fields.fault(key, f"must be one of {', '.join(_STATE_BYTES)}, not {shown(told)}")
        return _STATE_BYTES[default]
    return _STATE_BYTES[told]


def agreeing(fields: Fields, inner: Mapping[str, Any], section: str) -> Fields:
    """The fields, filled with those of an object within them; both may state a field, and then alike.

    Parameters
    ----------
    fields
    inner : mapping    what the object has, by the usual names
    section : str      where that lies
    """
    for key, value in inner.items():
        told = fields.get(key)
        if None not in (told, value) and told != value:
            fields.fault(key, f"is {shown(told)}, and {section} has {shown(value)}")
    return fields.filled(inner)


def refuse(fields: Fields, key: str, *known: object) -> None:
    """Refuse a value of a field that means what is not described here; a file may leave the field out.

    Parameters
    ----------
    fields
    key : str     of the value
    known : what it may be
    """
    value = fields.get(key)
    if value is not None and value not in known:
        may = ", ".join(one if isinstance(one, str) else shown(one) for one in known)
        fields.fault(key, f"{shown(value)} is not supported; supported: {may}")
