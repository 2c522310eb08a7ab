"""Which family a decoder is of: by its `model_type`, by its class, or by the file around it."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Final

from apex_opt.errors import InputError, join_faults
from apex_opt.ir.checks import shown
from apex_opt.ir.families import FAMILIES, SUPPORTED_MODEL_TYPES, Family
from apex_opt.ir.fields import Fields
from apex_opt.ir.understood import BESIDE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_CLASSES: Final = frozenset(
    name.replace("_", "").lower()
    for name in (
        *(family.architecture for family in FAMILIES.values()),
        *("Step3p7FlashForCausalLM", "MiniMaxM3VLForCausalLM"),
    )
)
"""Classes of the families, as `_spelled_alike` has them."""
_OTHER_CLASSES: Final = {"ChatGLMModel": "chatglmforconditionalgeneration"}
"""Another class, so spelled, that engines run as that of a family: CodeGeeX2 has it."""

_READ: Final = "docs/models.md lists those that are"
_LONGEST_TYPE: Final = 60
_NEAR: Final = 0.75
"""Likeness from which a model_type may be another one misspelt: less is shared by unrelated names."""


def refuse_odd_kinds(parts: Iterable[Mapping[str, Any]], source: str) -> None:
    """Refuse kinds that are no text and classes that are no names, of a file and of the objects beside its decoder."""
    faults: list[str] = []
    for part in parts:
        fields = Fields(part, faults=faults)
        fields.text("model_type")
        _check_names(part.get("architectures"), source)
        for key, value in part.items():
            if isinstance(value, dict) and BESIDE.search(key) and (beside := fields.section(key)):
                beside.text("model_type")
    if faults:
        raise join_faults(source, list(dict.fromkeys(faults)))


def _check_names(architectures: object, source: str) -> None:
    if architectures is not None and not _are_names(architectures):
        raise InputError(f"{source}: architectures must be a list of names, not {shown(architectures)}")


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def text_type(config: Mapping[str, Any], wrapped: str) -> str:
    """The known type of the decoder within a file, by the type of the file around it; "" where there is none."""
    outer = config.get("model_type")
    if not wrapped or not isinstance(outer, str):
        return ""
    return next((name for name in (f"{outer}_text", outer) if name in FAMILIES), "")


def stated_family(fields: Fields) -> str:
    """The known type that a decoder states, or that its class does where it states none; "" where neither is known."""
    own, classes = fields.get("model_type"), fields.get("architectures")
    if own is not None:
        return own if isinstance(own, str) and own in FAMILIES else ""
    names = classes if _are_names(classes) else []
    return next((name for name, family in FAMILIES.items() if family.architecture in names), "")


def own_family(fields: Fields, around: str) -> str:
    """The known type of a decoder, if need be by the file around it; "" where none is known."""
    return stated_family(fields) or (around if fields.get("model_type") is None else "")


def family_of(fields: Fields, around: str, source: str, wrapped: bool) -> Family:
    """The family of the model; an unsupported one ends the reading, as its other fields mean something else.

    Parameters
    ----------
    fields : Fields     of the decoder
    around : str        that the file around it tells of; "": none
    source : str        opens an error message
    wrapped : bool      the decoder lies within another file
    """
    model_type = fields.get("model_type")
    architectures = fields.get("architectures")
    _check_names(architectures, source)
    if model_type is None:
        if known := stated_family(fields):
            return FAMILIES[known]
        if around:
            raise InputError(f"{source}: model_type is missing; by the file around it give {around!r}")
        raise InputError(f"{source}: model_type is missing and architectures names no known one; {_READ}")
    if not isinstance(model_type, str):
        raise InputError(f"{source}: model_type must be text, not {shown(model_type)}")
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(model_type[:_LONGEST_TYPE], SUPPORTED_MODEL_TYPES, n=3, cutoff=_NEAR)
        others = f"near it: {', '.join(near)}; " if near else ""
        raise InputError(f"{source}: model_type {model_type!r:.60} is not supported; {others}{_READ}")
    family = FAMILIES[model_type]
    if not wrapped:
        _check_class(architectures or (), family, source)
    return family


def _check_class(architectures: Sequence[str], family: Family, source: str) -> None:
    """Refuse a class that generates no text, and one that is not known, as its layers may be others than its type's."""
    if class_fits(architectures, family):
        return
    named = f"{source}: architectures {', '.join(architectures)!r:.60}"
    if not any("CausalLM" in entry for entry in architectures):
        raise InputError(f"{named} generates no text; give a model whose architecture ends in ForCausalLM")
    raise InputError(
        f"{named} is not known, and engines go by it: its layers may be others than those of {family.architecture}; "
        f"where they are not, give the file with that in its place"
    )


def class_fits(architectures: Any, family: Family) -> bool:
    """Whether a file's classes are left out, not asked for, or one of them is a class of decoders that is known."""
    if not architectures or family.pools or not _are_names(architectures):
        return True
    own = _spelled_alike(family.architecture)
    return any(
        _spelled_alike(entry) in (own, _OTHER_CLASSES.get(family.architecture))
        or ("CausalLM" in entry and _spelled_alike(entry) in _CLASSES)
        for entry in architectures
    )


def _spelled_alike(architecture: str) -> str:
    """The name of a class, which files spell with other capitals and underscores than engines do."""
    return architecture.replace("_", "").lower()
