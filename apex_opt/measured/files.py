"""Files of measurements: read whole, unpacked, and checked as far as their form goes."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from apex_opt import files
from apex_opt.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

LARGEST_BYTES: Final = 64 << 20
"""Unpacked size of a file: a run of an hour with its log takes some ten MB."""

_WANT: Final = "name a file of measured runs or its folder"


def read_text(path: Path) -> str:
    """A text file whole, unpacked where it is gzip's.

    Raises
    ------
    InputError    as `files.read_text`
    """
    return files.read_text(path, limit=LARGEST_BYTES, want=_WANT)


def read_json(path: Path) -> Any:
    """The JSON value a file holds.

    Raises
    ------
    InputError    as `files.read_json`; NaN and infinities in it
    """
    return files.read_json(path, limit=LARGEST_BYTES, want=_WANT, finite=True)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a CSV file: cells by column, and where it stands."""

    path: Path
    line: int
    cells: dict[str, str]

    @property
    def where(self) -> str:
        return f"{self.path}: line {self.line}"

    def number(self, column: str) -> float | None:
        """A finite number of at least 0, or None where the cell is blank.

        Raises
        ------
        InputError    anything else
        """
        text = self.cells[column].strip()
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0:
            raise InputError(f"{self.where}: {column} {text!r:.40} is not a finite number of at least 0")
        return value

    def whole(self, column: str) -> int | None:
        """A whole number of at least 0, or None where the cell is blank.

        Raises
        ------
        InputError    anything else
        """
        value = self.number(column)
        if value is not None and (value != int(value) or value > 1 << 40):
            raise InputError(f"{self.where}: {column} {self.cells[column]!r:.40} is not a whole number")
        return None if value is None else int(value)


def read_header(path: Path) -> list[str]:
    """Column names of a CSV file."""
    first = next(csv.reader(io.StringIO(read_text(path), newline="")), [])
    return [name.strip() for name in first]


def read_rows(path: Path, needed: tuple[str, ...]) -> list[Row]:
    """Every row of a CSV file.

    Raises
    ------
    InputError    as `read_text`; columns that are missing, rows of another length, no rows
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        records = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num} is not CSV ({error}); check its quotes") from None
    header = [name.strip() for name in records[0][1]] if records else []
    if missing := [name for name in needed if name not in header]:
        raise InputError(f"{path}: missing column {', '.join(missing)}; found {', '.join(header) or 'none'}")
    if len(records) < 2:
        raise InputError(f"{path}: columns but no rows")
    for line, cells in records[1:]:
        if len(cells) != len(header):
            raise InputError(f"{path}: line {line} has {len(cells)} cells under {len(header)} columns")
    return [Row(path, line, dict(zip(header, cells, strict=True))) for line, cells in records[1:]]
