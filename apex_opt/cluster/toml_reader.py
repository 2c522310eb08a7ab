"""Strict reading of TOML: every field typed and bounded, unknown fields named, all faults gathered."""

from __future__ import annotations

import re
import tomllib
import unicodedata
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from apex_opt.errors import InputError
from apex_opt.files import read_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


LARGEST_BYTES: Final = 4 << 20
"""Size of a file: a cluster of 10,000 nodes, each described by itself, takes some 2 MB."""


_MOST_PARTS: Final = 64
"""Parts of a dotted key: `tomllib` takes time with their square, minutes with 100,000."""

_BETWEEN: Final = re.compile(r"[\n=,\[\]{}#]")
"""What ends a key."""

_BREAKING: Final = ("Cc", "Zl", "Zp", "Cs")
"""Unicode's categories of letters that end lines or are not printed."""


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The file as nested dictionaries.

    Raises
    ------
    InputError      missing, unreadable, not UTF-8 or not TOML; `what` names the kind of file in the message
    """
    where = f"{what} {path}"
    text = read_text(path, limit=LARGEST_BYTES, where=where)
    if text.count(".") > _MOST_PARTS and any(piece.count(".") > _MOST_PARTS for piece in _BETWEEN.split(text)):
        raise InputError(f"{where}: a key of more than {_MOST_PARTS} parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where}: not valid TOML: {error}") from None


class TomlTable:
    """One table being read: a getter returns the value, or notes a fault and returns None.

    `faults` is shared by all tables of a file; `close()` names the fields nobody asked for.
    """

    def __init__(self, table: dict[str, Any], where: str, faults: list[str]) -> None:
        self._table = table
        self.where = where
        self._asked: dict[str, None] = {}
        self.faults = faults

    def _label(self, field: str) -> str:
        return f"{self.where}.{field}" if self.where else field

    def has(self, field: str) -> bool:
        """Whether the field is there; counts as known either way."""
        self._asked[field] = None
        return field in self._table

    def raw(self, field: str) -> Any:
        """The field as TOML gave it, or None."""
        return self._table[field] if self.has(field) else None

    def _missing(self, field: str, required: bool) -> bool:
        if self.has(field):
            return False
        if required:
            self.faults.append(f"{self._label(field)} is missing")
        return True

    def number(self, field: str, *, high: float, required: bool = True) -> float | None:
        """A number above 0 and up to `high`.

        Parameters
        ----------
        field : str        key of the table
        high : float       most that is allowed
        required : bool    whether it must be given
        """
        return self._within(field, lambda value: 0 < value <= high, f"above 0 and at most {high:g}", required)

    def within(self, field: str, span: tuple[float, float], *, required: bool = True) -> float | None:
        """A number from the least to the most that it can be.

        Parameters
        ----------
        field : str             key of the table
        span : pair of float    least and most allowed
        required : bool         whether it must be given
        """
        least, most = span
        return self._within(field, lambda value: least <= value <= most, f"from {least:.12g} to {most:.12g}", required)

    def _within(self, field: str, good: Callable[[float], bool], limits: str, required: bool) -> float | None:
        if self._missing(field, required):
            return None
        value = self._table[field]
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.faults.append(f"{self._label(field)} = {shown(value)} must be a number")
        elif not good(value):
            self.faults.append(f"{self._label(field)} = {shown(value)} must be {limits}")
        else:
            return float(value)
        return None

    def integer(self, field: str, *, low: int = 1, high: int, required: bool = True) -> int | None:
        """A whole number from `low` to `high`.

        Parameters
        ----------
        field : str        key of the table
        low : int          least that is allowed
        high : int         most that is allowed
        required : bool    whether it must be given
        """
        if self._missing(field, required):
            return None
        value = self._table[field]
        if isinstance(value, bool) or not isinstance(value, int):
            self.faults.append(f"{self._label(field)} = {shown(value)} must be a whole number")
        elif not low <= value <= high:
            self.faults.append(f"{self._label(field)} = {shown(value)} must be from {low} to {high}")
        else:
            return value
        return None

    def switch(self, field: str, *, required: bool = True) -> bool | None:
        """True or false."""
        if self._missing(field, required):
            return None
        value = self._table[field]
        if isinstance(value, bool):
            return value
        self.faults.append(f"{self._label(field)} = {shown(value)} must be true or false")
        return None

    def text(self, field: str, *, choices: tuple[str, ...] = (), required: bool = True) -> str | None:
        """A text of one line that is not empty, one of `choices` where given.

        Parameters
        ----------
        field : str               key of the table
        choices : tuple of str    texts allowed; any where empty
        required : bool           whether it must be given
        """
        if self._missing(field, required):
            return None
        value = self._table[field]
        if not isinstance(value, str) or not value.strip():
            self.faults.append(f"{self._label(field)} = {shown(value)} must be text that is not empty")
        elif any(unicodedata.category(letter) in _BREAKING for letter in value):
            self.faults.append(f"{self._label(field)} = {shown(value)} must be one line of printable text")
        elif choices and value not in choices:
            self.faults.append(f"{self._label(field)} = {shown(value)} must be one of {', '.join(choices)}")
        else:
            return value
        return None

    def table(self, field: str, *, required: bool = True) -> TomlTable | None:
        """A table inside this one."""
        if self._missing(field, required):
            return None
        value = self._table[field]
        if not isinstance(value, dict):
            self.faults.append(f"{self._label(field)} = {shown(value)} must be a table")
            return None
        return TomlTable(value, self._label(field), self.faults)

    def tables(self, field: str) -> list[TomlTable]:
        """A non-empty list of tables."""
        if self._missing(field, True):
            return []
        value = self._table[field]
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            self.faults.append(f"{self._label(field)} = {shown(value)} must be a list of tables")
            return []
        return [TomlTable(item, f"{self._label(field)}[{row}]", self.faults) for row, item in enumerate(value)]

    def numbers(self, field: str, *, high: float) -> list[float]:
        """A list of at least two numbers, above 0 and rising."""
        if self._missing(field, True):
            return []
        value = self._table[field]
        good = isinstance(value, list) and all(
            isinstance(item, int | float) and not isinstance(item, bool) and 0 < item <= high for item in value
        )
        if not good or len(value) < 2 or any(b <= a for a, b in pairwise(value)):
            self.faults.append(
                f"{self._label(field)} = {shown(value)} must be two or more rising numbers up to {high:g}"
            )
            return []
        return [float(item) for item in value]

    def items(self) -> list[tuple[str, Any]]:
        """All fields as they are; nothing is unknown afterwards."""
        self._asked.update(dict.fromkeys(self._table))
        return list(self._table.items())

    def close(self) -> None:
        """Note the fields that are not known."""
        for field in self._table:
            if field not in self._asked:
                self.faults.append(f"{self._label(field)} is not a known field; allowed: {', '.join(self._asked)}")


def shown(value: object) -> str:
    """A value short enough for one line."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
