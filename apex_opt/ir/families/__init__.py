"""Families of models by `model_type`: what a type implies beyond the fields of its file.

Each file holds a group of families, `decoder` the reader that most share, `base` what a family is. A new family is an
entry in one of these files; a new file joins the list below.
"""

from typing import Final

from apex_opt.ir.families import deepseek, llama, qwen
from apex_opt.ir.families.base import Family, Layers, Reader, Sizes

_GROUPS: Final = (
    llama,
    qwen,
    deepseek,
)

FAMILIES: Final[dict[str, Family]] = {name: family for group in _GROUPS for name, family in group.FAMILIES.items()}

SUPPORTED_MODEL_TYPES: Final = tuple(sorted(FAMILIES))

__all__ = ["FAMILIES", "SUPPORTED_MODEL_TYPES", "Family", "Layers", "Reader", "Sizes"]
