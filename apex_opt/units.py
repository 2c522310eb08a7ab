"""Named scales, integer rounding, sums. A number carries its unit in its name until it is an integer in a program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

NS_PER_S: Final = 1_000_000_000
S_PER_H: Final = 3600
NS_PER_MS: Final = 1_000_000
NS_PER_US: Final = 1_000
KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
GB: Final = 10**9
TERA: Final = 10**12

_PACKAGE: Final = Path(__file__).resolve().parent
_INSTALLED: Final = _PACKAGE / "_data"
DATA_ROOT: Final = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent
"""Folder that holds `profiles/` and `traces/`: the checkout, or within the package once installed."""


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b, for b > 0."""
    return -(-a // b)


def add_up(values: Iterable[float]) -> float:
    """The sum of floats, rounded after each: `sum` does so up to Python 3.11, and otherwise from 3.12 on."""
    found: float = 0
    for value in values:
        found += value
    return found
