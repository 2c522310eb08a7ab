"""Text of a trace file as columns of cells, some thousand rows at a time: CSV, JSON lines, or JSON objects."""

from __future__ import annotations

import csv
import itertools
import json
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from apex_opt.errors import InputError
from apex_opt.files import MOST_VALUES, parse_json
from apex_opt.workload.cells import ABSENT, Faults, cell_text
from apex_opt.workload.columns import MAX_REQUESTS
from apex_opt.workload.layouts import nesting_of, result_reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from re import Pattern

_ROWS: Final = 8192
_DELIMITERS: Final = ",\t;|"
_LISTS: Final = ("requests", "data", "trace", "traces", "records", "rows")
_LONG_LINE: Final = 1 << 20
_MOST_LINES: Final = MAX_REQUESTS + 1000
_MOST_COLUMNS: Final = 1000
_BLANKS: Final = re.compile(r"[ \t\r\n]*")
_BLANKS_AND_COMMAS: Final = re.compile(r"[ \t\r\n,]*")
_PARTS: Final = (1 << 16, 1 << 20, 1 << 24)
_MOST_IN_LINE: Final = 2_000_000
_DECODER: Final = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of a file; numbers stay text, so that they can be read exactly.

    Parameters
    ----------
    names : columns there are, as far as the first rows tell
    batches : function    rows, some at a time: their lines or places in a list, and what gives a column of cells
    notes : list of str   what is assumed or dropped, complete once all rows are read
    """

    names: list[str]
    batches: Callable[[], Iterator[tuple[list[int], Callable[[str], list[Any]]]]]
    notes: list[str]


def table_of(label: str, text: str, faults: Faults) -> Table | dict[str, Any]:
    """The rows of a file, or the one object it holds where that is the result of a benchmark.

    Parameters
    ----------
    label : str        opens every message
    text : str         as it was given
    faults : Faults    what was found wrong so far

    Raises
    ------
    InputError    neither CSV nor JSON; several results
    """
    start = text.lstrip()[:1]
    if start not in ("{", "["):
        _check_lines(label, text)
        return _csv_table(label, text, faults)
    if start == "[":
        return _json_table(label, _listed(label, text, text.index("["), faults), faults)
    kind, entry = _shape(label, text)
    if kind == "lines":
        _check_lines(label, text)
        return _json_table(label, _lines(text, faults), faults)
    if kind == "several":
        return _json_table(label, _several(text, faults), faults)
    if isinstance(entry, dict) and result_reader(entry) is not None:
        return parse_json(text, where=label)  # type: ignore[no-any-return]
    listed = next((entry[name] for name in _LISTS if _is_list_of_objects(entry.get(name))), None)
    if listed is None:
        return _json_table(label, iter([(1, entry)]), faults)
    faults.place = "item"
    return _json_table(label, iter(enumerate(listed, 1)), faults)


def _check_lines(label: str, text: str) -> None:
    if (lines := text.count("\n")) > _MOST_LINES:
        raise InputError(f"{label}: {lines:,} lines, at most {_MOST_LINES:,} are read; cut the file")


def _shape(label: str, text: str) -> tuple[str, Any]:
    """Whether a text that begins with an object holds one, and which, several over many lines each, or lines of them.

    A first line that is an object of its own makes a file of lines.
    """
    text = text.strip()
    first = text.split("\n", 1)[0]
    if _values(first) > MOST_VALUES:
        raise InputError(f"{label}: more than {MOST_VALUES:,} values in the first line; give an object a line")
    entry, end = _decoded(first, 0)
    if entry is not ABSENT and not first[end:].strip():
        return ("one" if len(first) == len(text) and _result_or_list(entry) else "lines"), entry
    if _values(text) > MOST_VALUES:
        return "lines", None
    entry, end = _decoded(text, 0)
    if entry is ABSENT:
        return "lines", None
    return ("several" if text[end:].strip() else "one"), entry


def _result_or_list(entry: dict[str, Any]) -> bool:
    """Whether an object is more than one row."""
    return result_reader(entry) is not None or any(_is_list_of_objects(entry.get(name)) for name in _LISTS)


def _csv_table(label: str, text: str, faults: Faults) -> Table:
    """A header and rows, with commas, tabs, semicolons or bars between."""
    first = next((line for line in _split(text) if line.strip()), "")
    delimiter = next((mark for mark in _DELIMITERS if mark in first), ",")
    reader = csv.reader(_split(text), delimiter=delimiter)

    def records() -> Iterator[tuple[int, list[str]]]:
        try:
            for row in reader:
                if row and (len(row) > 1 or row[0].strip()):
                    yield reader.line_num, row
        except csv.Error as error:
            raise InputError(f"{label}: line {reader.line_num} is not CSV ({error}); check its quotes") from error

    rows = records()
    header = [name.strip() for name in next(rows)[1]]
    if len(header) > _MOST_COLUMNS:
        raise InputError(
            f"{label}: {len(header):,} columns, at most {_MOST_COLUMNS:,} are read; keep those that matter"
        )
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{label}: column {twice!r:.40} appears twice; keep one")

    def batches() -> Iterator[tuple[list[int], Callable[[str], list[Any]]]]:
        while some := list(itertools.islice(rows, _ROWS)):
            whole = [(line, row) for line, row in some if len(row) == len(header)]
            if len(whole) < len(some):
                for line, row in some:
                    if len(row) != len(header) and any(cell.strip() for cell in row):
                        faults.add(line, f"{len(row)} cells under {len(header)} columns")
            if whole:
                columns = dict(zip(header, zip(*(row for _, row in whole), strict=True), strict=True))
                yield [line for line, _ in whole], partial(_of_columns, columns)

    return Table(names=header, batches=batches, notes=[])


def _json_table(label: str, entries: Iterator[tuple[int, Any]], faults: Faults) -> Table:
    """Objects, each a row or what holds some."""
    some = _objects(entries, faults)
    first = next(some, None)
    if first is None:
        raise faults.error() if faults.found else InputError(f"{label}: no objects in it; add at least one request")
    if result_reader(first[1]) is not None:
        raise InputError(f"{label}: results of several runs, one after the other; keep one")
    nesting = nesting_of(label, first[1])
    notes: list[str] = [] if nesting is None or not nesting.note else [nesting.note]
    dropped, seen = 0, 0

    def flat() -> Iterator[tuple[int, Mapping[str, Any]]]:
        nonlocal dropped, seen
        for place, entry in itertools.chain([first], some):
            if nesting is None:
                yield place, entry
                continue
            rows, seen = nesting.rows(entry), seen + 1
            if rows is None:
                dropped += 1
            else:
                yield from ((place, row) for row in rows)

    found = flat()
    head = list(itertools.islice(found, _ROWS))
    names = list(dict.fromkeys(name for _, row in head for name in row))

    def batches() -> Iterator[tuple[list[int], Callable[[str], list[Any]]]]:
        batch = head
        while batch:
            yield [place for place, _ in batch], partial(_of_rows, [row for _, row in batch])
            batch = list(itertools.islice(found, _ROWS))
        if dropped and nesting is not None:
            notes.append(f"{dropped:,} of {seen:,} {nesting.dropped} and are left out")

    return Table(names=names, batches=batches, notes=notes)


def _of_columns(columns: Mapping[str, tuple[str, ...]], name: str) -> list[Any]:
    return list(columns[name])


def _of_rows(rows: list[Mapping[str, Any]], name: str) -> list[Any]:
    return [row.get(name, ABSENT) for row in rows]


def _objects(entries: Iterator[tuple[int, Any]], faults: Faults) -> Iterator[tuple[int, dict[str, Any]]]:
    for place, entry in entries:
        if isinstance(entry, dict):
            yield place, entry
        elif entry is not ABSENT:
            faults.add(place, f"{cell_text(entry)} is not a JSON object")


def _lines(text: str, faults: Faults) -> Iterator[tuple[int, Any]]:
    """JSON lines."""
    for line, record in enumerate(_split(text), 1):
        if not (record := record.strip()):
            continue
        if len(record) > _LONG_LINE and _values(record) > _MOST_IN_LINE:
            faults.add(line, f"more than {_MOST_IN_LINE:,} values in one line")
            continue
        try:
            entry = _DECODER.decode(record)
        except (ValueError, RecursionError):
            entry = ABSENT
        if not isinstance(entry, dict):
            faults.add(line, f"{cell_text(record)} is not a JSON object")
            continue
        yield line, entry


def _listed(label: str, text: str, at: int, faults: Faults) -> Iterator[tuple[int, Any]]:
    """Items of a JSON list, one at a time."""
    faults.place = "item"
    at, place, few = at + 1, 0, _values(text) <= MOST_VALUES
    while True:
        at = _skipped(text, at, _BLANKS)
        if text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                raise InputError(f"{label}: there is more after the end of the JSON list; keep one list")
            return
        place += 1
        if place > 1:
            if text[at : at + 1] != ",":
                raise InputError(f"{label}: the JSON list ends early, or lacks a comma, after item {place - 1}")
            at = _skipped(text, at + 1, _BLANKS)
        entry, at = _decoded(text, at) if few else _decoded_in_part(text, at)
        if entry is ABSENT:
            raise InputError(f"{label}: item {place} of the JSON list is not JSON: {cell_text(text[at : at + 60])}")
        yield place, entry


def _several(text: str, faults: Faults) -> Iterator[tuple[int, Any]]:
    """JSON objects one after the other, over several lines each; by lines from where that ends."""
    at, line, before = 0, 1, 0
    while (at := _skipped(text, at, _BLANKS_AND_COMMAS)) < len(text):
        line += text.count("\n", before, at)
        before = at
        entry, end = _decoded(text, at)
        if entry is ABSENT:
            faults.add(line, f"{cell_text(text[at : at + 60].split(chr(10))[0])} is not a JSON object")
            end = text.find("\n", at) + 1 or len(text)
        else:
            yield line, entry
        at = end


def _decoded(text: str, at: int) -> tuple[Any, int]:
    """A JSON value and where it ends; `ABSENT` where there is none."""
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return ABSENT, at


def _decoded_in_part(text: str, at: int) -> tuple[Any, int]:
    """`_decoded` of a value that is not too large, in a text that may hold too much."""
    for size in _PARTS:
        part = text[at : at + size]
        entry, end = _decoded(part, 0) if _values(part) <= _MOST_IN_LINE else (ABSENT, 0)
        if entry is not ABSENT:
            return entry, at + end
    return ABSENT, at


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _values(text: str) -> int:
    """Values that a JSON text can hold at most."""
    return sum(map(text.count, ",[{"))


def _skipped(text: str, at: int, blanks: Pattern[str]) -> int:
    """The next place that is none of these."""
    match = blanks.match(text, at)
    return match.end() if match else at


def _split(text: str) -> Iterator[str]:
    """Lines with their ends, without a copy of them all."""
    at = 0
    while at < len(text):
        end = text.find("\n", at) + 1 or len(text)
        yield text[at:end]
        at = end
