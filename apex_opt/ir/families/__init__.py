"""Families of models by `model_type`: what a type implies beyond the fields of its file.

Each file holds a group of families as its `FAMILIES`, `decoder` the reader that most share, `base` what a family is. A
new family is an entry in one of these files, or in a new one, which is found by lying here.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Final

from apex_opt.ir.families.base import Family, Layers, Reader, Sizes

_GROUPS: Final = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]

FAMILIES: Final[dict[str, Family]] = {
    name: family for group in _GROUPS for name, family in getattr(group, "FAMILIES", {}).items()
}

SUPPORTED_MODEL_TYPES: Final = tuple(sorted(FAMILIES))

__all__ = ["FAMILIES", "SUPPORTED_MODEL_TYPES", "Family", "Layers", "Reader", "Sizes"]
