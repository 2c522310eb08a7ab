"""Lists with an entry for each layer, as files spell out what layers are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from apex_opt.ir.checks import shown

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from apex_opt.ir.fields import Fields

_Kind = TypeVar("_Kind")

_OLDER: Final = {
    "linear_attention": "mamba",
    "full_attention": "attention",
    "indexed_attention": "deepseek_sparse_attention",
}
"""What published files call kinds of layers that `transformers` 5 saves under one name for all families."""


def published_kind(entry: Any, known: Container[str]) -> Any:
    """An entry of a list of kinds as published files have it, where it is saved under a newer name.

    Parameters
    ----------
    entry : object      of the list
    known : of str      entries that there may be
    """
    if not isinstance(entry, str) or entry in known:
        return entry
    older = _OLDER.get(entry, entry)
    return older if older in known else entry


def kinds_of(fields: Fields, key: str, layers: int, known: Mapping[str, _Kind], beyond: int = 0) -> list[_Kind] | None:
    """What the words of a list, or the letters of a text, say of each layer; None where absent, empty at a fault.

    Parameters
    ----------
    fields
    key : str           of the list
    layers : int        that the model has, 0 where unknown
    known : mapping     entries that there may be, and what they say
    beyond : int        layers of multi-token prediction that some lists go on with, and that are left out
    """
    given = fields.get(key)
    entries = list(given) if isinstance(given, str) else fields.rows(key)
    if entries is None:
        return None
    entries = [published_kind(entry, known) for entry in entries]
    odd = [entry for entry in entries if not isinstance(entry, str) or entry not in known]
    if odd:
        fields.fault(key, f"may hold {' and '.join(known)}, not {shown(odd[0])}")
        return []
    if beyond and len(entries) == layers + beyond:
        entries = entries[:layers]
    if layers and len(entries) != layers:
        fields.fault(key, f"has {len(entries)} entries for {fields.name('num_hidden_layers')} {layers}")
        return []
    return [known[entry] for entry in entries]


def flags_of(fields: Fields, key: str, layers: int) -> list[bool] | None:
    """A list of 0 and 1 for each layer; None where absent, empty at a fault.

    Parameters
    ----------
    fields
    key : str       of the list
    layers : int    that the model has, 0 where unknown
    """
    entries = fields.rows(key)
    if entries is None:
        return None
    odd = [entry for entry in entries if entry not in (0, 1)]
    if odd:
        fields.fault(key, f"may hold 0 and 1, not {shown(odd[0])}")
        return []
    if layers and len(entries) != layers:
        fields.fault(key, f"has {len(entries)} entries for {layers} layers")
        return []
    return [bool(entry) for entry in entries]
