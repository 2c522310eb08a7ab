"""Files of measurements: read whole, unpacked, and checked as far as their form goes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from apex_opt.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

LARGEST_BYTES: Final = 1 << 30
"""Unpacked size of a file: a run of an hour with its log takes some ten MB."""


def read_text(path: Path) -> str:
    """A text file whole, gunzipped where its name says so.

    Raises
    ------
    InputError    not a regular file, unreadable, not gzip, too large or not UTF-8
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: not a regular file; name a file of measured runs or its folder")
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                data = file.read(LARGEST_BYTES + 1)
        else:
            with path.open("rb") as file:
                data = file.read(LARGEST_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(data) > LARGEST_BYTES:
        raise InputError(f"{path}: more than {LARGEST_BYTES >> 20} MiB unpacked; split it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line} is not UTF-8 text") from None


def read_json(path: Path) -> Any:
    """The JSON value a file holds.

    Raises
    ------
    InputError    as `read_text`; not JSON, or NaN and infinities in it, with line and column
    """

    def refuse(text: str) -> NoReturn:
        raise InputError(f"{path}: holds {text}, which is no JSON number; leave out what was not measured")

    try:
        return json.loads(read_text(path), parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON at line {error.lineno} column {error.colno} ({error.msg})") from None
    except RecursionError:
        raise InputError(f"{path}: JSON nested too deeply to read") from None
    except InputError:
        raise
    except ValueError:
        raise InputError(f"{path}: holds a number with too many digits to read") from None


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
