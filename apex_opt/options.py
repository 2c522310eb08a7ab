"""The one gate between command-line text and typed values: strict, never repairing silently."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

from apex_opt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

_WHOLE: Final = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_NUMBER: Final = re.compile(r"[+-]?(\d{1,18}(\.\d{0,18})?|\.\d{1,18})([eE][+-]?\d{1,3})?", re.ASCII)
_FLAGS: Final = {"true": True, "false": False}


def typed(values: Mapping[str, Any], annotations: Mapping[str, str]) -> dict[str, Any]:
    """Convert option texts to the types their parameters are annotated with.

    Parameters
    ----------
    values : option name to text as typed, or to a default that already has its type
    annotations : option name to "str", "int", "float" or "bool", each optionally followed by " | None"

    Raises
    ------
    UsageError    a text that is not exactly of its type, naming option, value and what is expected
    """
    return {name: _convert(name, value, annotations[name]) for name, value in values.items()}


def _convert(name: str, value: Any, annotation: str) -> Any:
    if not isinstance(value, str):
        return value  # a default
    kind = annotation.removesuffix(" | None")
    option = f"--{name}"
    if kind == "bool":
        if value.lower() not in _FLAGS:
            raise UsageError(f"{option}: expected true or false, got {value!r:.60}")
        return _FLAGS[value.lower()]
    if value == "True":
        # What the parser hands over for an option at the end of the line or before another one.
        raise UsageError(f"{option}: needs a value, e.g. {option}={'TEXT' if kind == 'str' else '4'}")
    if kind == "str":
        if not value.strip():
            raise UsageError(f"{option}: needs a value, got an empty text")
        return value
    if kind == "int":
        if not _WHOLE.fullmatch(value):
            raise UsageError(f"{option}: expected a whole number, got {value!r:.60}")
        return int(value)
    number = float(value) if _NUMBER.fullmatch(value) else math.nan
    if not math.isfinite(number):
        raise UsageError(f"{option}: expected a number, got {value!r:.60}")
    return number
