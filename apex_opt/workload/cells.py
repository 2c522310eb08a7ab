"""Cells of a trace as whole numbers: tokens, and times in nanoseconds, exact; a column at a time, as files are long."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Final, cast

import numpy as np

from apex_opt.errors import InputError, join_faults
from apex_opt.units import NS_PER_MS, NS_PER_S, NS_PER_US
from apex_opt.workload.columns import MAX_ARRIVAL_NS, MAX_TOKENS, Ints, range_fault

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UNITS: Final = {"s": NS_PER_S, "ms": NS_PER_MS, "us": NS_PER_US, "ns": 1}
"""Units of time that arrivals can be in, in nanoseconds."""

ABSENT: Final = object()
"""Stands for a cell that a row does not have."""

NONE: Final = -(1 << 63)
"""Stands for a number that a row does not have."""

_MOST_FAULTS: Final = 10_000
_INT64: Final = 1 << 62
_DECIMAL: Final = re.compile(r"[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_WHOLE: Final = re.compile(r"(-?\d{1,400})(?:\.0{0,20})?", re.ASCII)
_INSTANT: Final = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))? ?(?:(Z|UTC)|([+-])(\d\d):?(\d\d)?)?", re.ASCII
)
_DATE: Final = re.compile(r"\s*\d{4}-\d\d-\d\d", re.ASCII)
_EPOCH: Final = datetime(1970, 1, 1)


@dataclass(slots=True)
class Faults:
    """What is wrong in a file, by line or item, until there is too much of it."""

    label: str
    found: list[tuple[int, str]] = field(default_factory=list)
    place: str = "line"

    def add(self, at: int, fault: str) -> None:
        self.found.append((at, fault))
        if len(self.found) >= _MOST_FAULTS:
            raise self.error()

    def error(self) -> InputError:
        """All of them as one error, in the order of the file."""
        return join_faults(self.label, [f"{self.place} {at}: {fault}" for at, fault in sorted(self.found)])


def token_counts(cells: Sequence[object], places: Sequence[int], column: str, faults: Faults, least: int = 1) -> Ints:
    """Counts of tokens, 0 to 10,000,000; `NONE` where a cell is none, which is added to the faults.

    Parameters
    ----------
    cells : sequence of object    texts or numbers of a column
    places : sequence of int      of the cells, for messages
    column : str                  name of the column, for messages
    faults : Faults               what was found wrong so far
    least : int                   that a request may have, for messages: what of 0 becomes is up to the caller
    """
    fast = digits(cells)
    if fast is not None and int(fast.max()) <= MAX_TOKENS:
        return fast

    def whole(cell: object) -> int:
        match = _WHOLE.fullmatch(cell.strip()) if isinstance(cell, str) else None
        if match is None:
            raise ValueError("is not a whole number of tokens")
        return int(match[1])

    return _column(cells, places, column, whole, (0, MAX_TOKENS), (least, MAX_TOKENS, ""), faults)


def times_ns(cells: Sequence[object], places: Sequence[int], column: str, unit: str, faults: Faults) -> Ints:
    """Times since 0, or since 1970 where the unit is "date"; `NONE` where a cell is none.

    Parameters
    ----------
    cells : sequence of object    texts or numbers of a column
    places : sequence of int      of the cells, for messages
    column : str                  name of the column, for messages
    unit : str                    of the times
    faults : Faults               what was found wrong so far
    """
    if unit == "date":
        told = (0, MAX_ARRIVAL_NS, " ns after the earliest row")
        return _column(cells, places, column, _instant, (-_INT64, _INT64), told, faults)
    scale = UNITS[unit]
    fast = digits(cells)
    if fast is not None and int(fast.max()) <= MAX_ARRIVAL_NS // scale:
        return fast * scale

    def nanoseconds(cell: object) -> int:
        if not isinstance(cell, str) or _DECIMAL.fullmatch(text := cell.strip()) is None:
            raise ValueError("is not a finite number")
        return int(text) * scale if text.isdecimal() else round(Decimal(text) * scale)

    told = (0, MAX_ARRIVAL_NS // scale, f" {unit}")
    return _column(cells, places, column, nanoseconds, (0, MAX_ARRIVAL_NS), told, faults)


def is_date(cell: object) -> bool:
    """Whether a cell begins as dates do."""
    return isinstance(cell, str) and _DATE.match(cell) is not None


def is_blank(cell: object) -> bool:
    """Whether a cell says nothing."""
    return cell is None or cell is ABSENT or (isinstance(cell, str) and not cell.strip())


def digits(cells: Sequence[object]) -> Ints | None:
    """A column where every cell is plain digits, as nearly all are: a pattern on each takes ten times as long."""
    if not all(isinstance(cell, str) for cell in cells):
        return None
    texts = cast("Sequence[str]", cells)
    text = "".join(texts)
    if not (text.isdecimal() and text.isascii()) or not all(texts) or max(map(len, texts)) > 18:
        return None
    return np.fromiter(map(int, texts), np.int64, len(texts))


def _column(
    cells: Sequence[object],
    places: Sequence[int],
    column: str,
    parse: Callable[[object], int],
    limits: tuple[int, int],
    told: tuple[int, int, str],
    faults: Faults,
) -> Ints:
    """A column cell by cell, within limits, which are told to people in a unit of their own."""
    low, high = limits
    values = np.full(len(cells), NONE, np.int64)
    for index, cell in enumerate(cells):
        try:
            value = parse(cell)
        except ValueError as error:
            faults.add(places[index], f"{column} {cell_text(cell)} {error}")
            continue
        if low <= value <= high:
            values[index] = value
        else:
            faults.add(places[index], range_fault(column, cell_text(cell), *told[:2]) + told[2])
    return values


def _instant(cell: object) -> int:
    """Nanoseconds since 1970 of a date and time; int arithmetic, as datetime stops at microseconds."""
    match = _INSTANT.fullmatch(cell.strip()) if isinstance(cell, str) else None
    if match is None:
        raise ValueError("is not a time like 2023-11-16 18:15:46.6805900")
    day, clock, decimals, _, sign, hours, minutes = match.groups()
    try:
        since = datetime.fromisoformat(f"{day}T{clock}") - _EPOCH
    except ValueError:
        raise ValueError("is not a time that exists") from None
    if sign:
        if int(hours) > 23 or int(minutes or 0) > 59:
            raise ValueError("is not a time that exists")
        ahead = timedelta(hours=int(hours), minutes=int(minutes or 0))
        since = since - ahead if sign == "+" else since + ahead
    return (since.days * 86_400 + since.seconds) * NS_PER_S + int((decimals or "").ljust(9, "0"))


def cell_text(cell: object) -> str:
    """A value as it stands in the file, cut for one line."""
    if isinstance(cell, list | dict):
        return "list" if isinstance(cell, list) else "object"
    if cell is ABSENT:
        return "is missing:"
    text = cell.strip() if isinstance(cell, str) else json.dumps(cell)
    text = text if len(text) <= 40 else text[:37] + "..."
    return text if text.isprintable() and text else repr(text)
