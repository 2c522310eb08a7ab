"""Traces from files, recognised by their columns; `load_trace` is the one entry for all traces."""

from __future__ import annotations

import csv
import io
import json
import re
import tomllib
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from apex_opt import units
from apex_opt.errors import InputError, UnknownNameError, UsageError, join_faults
from apex_opt.files import expanded, read_text, there
from apex_opt.units import NS_PER_MS, NS_PER_S
from apex_opt.workload.generators import EXAMPLES, describe_trace
from apex_opt.workload.trace import LIMITS, MAX_ARRIVAL_NS, MAX_REQUESTS, Trace, make_trace, range_fault, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

_Faults: TypeAlias = list[tuple[int, str]]
"""Line number and what is wrong there."""

LARGEST_BYTES: Final = 256 << 20
"""Size of a file: 5 million rows of CSV take some 200 MB."""

MOST_LINES: Final = MAX_REQUESTS + 1000

_DECIMAL: Final = re.compile(r"[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_HASH_TOKENS: Final = 512  # what one of Mooncake's hash ids stands for
_WHOLE: Final = re.compile(r"-?\d{1,400}", re.ASCII)
_INSTANT: Final = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", re.ASCII)
_EPOCH: Final = datetime(1970, 1, 1)


def load_trace(spec: str, seed: int = 0) -> Trace:
    """A trace by shipped name, description or path, looked up in that order.

    Parameters
    ----------
    spec : str                     `chat` (see `list_traces`), `poisson:rate=2,n=500` (see `describe_trace`), or a file
    seed : int                     for descriptions

    Returns
    -------
    Trace                          in order of arrival; ties keep the order of the file

    A file is CSV with a header or one JSON object per line, in UTF-8, with the columns of one of these layouts; others
    are ignored. Blank lines, a byte-order mark and CRLF do no harm.

    - `StartTimeOffset` (ns), `ContextTokens`, `GeneratedTokens`: APEX
    - `TIMESTAMP` (date and time, at most nine decimals; UTC where no offset is given), `ContextTokens`,
      `GeneratedTokens`: Azure; arrivals count from the earliest row
    - `timestamp` (ms), `input_length`, `output_length`: Mooncake; `hash_ids`, one per 512 prompt tokens, where every
      request has them, become the trace's content
    - `arrival_s`, `prompt`, `output`: plain

    Arrivals are converted in decimal, exact to the nanosecond. A request without generated tokens is refused: it
    would have no first token to time (the public Azure, Mooncake and APEX traces have none).

    Raises
    ------
    InputError                     unreadable or unrecognised file; all bad rows, the first five with their lines
    UnknownNameError               neither a shipped name, nor a kind of description, nor a file
    UsageError                     a description that cannot be used
    """
    if not isinstance(spec, str) or not spec.strip():
        raise UsageError(f"trace: expected a name, a description or a path, got {shown(spec)}")
    spec = spec.strip()
    if spec in (names := _shipped_names()):
        return _parse(f"trace {spec}", spec, f"file traces/{spec}.jsonl", _read(_folder() / f"{spec}.jsonl", spec))
    if spec.partition(":")[0] in EXAMPLES and ":" in spec:
        return describe_trace(spec, seed)
    if not there(path := expanded(spec)):
        hint = f"there is no such file; shipped: {', '.join(names)}; or describe one, e.g. {EXAMPLES['poisson']}"
        if (kind := re.match(r"([a-z]+):", spec)) and not spec.startswith(f"{kind[1]}://"):
            raise UnknownNameError("trace description", kind[1][:40], EXAMPLES, hint)
        raise UnknownNameError("trace", spec[:100], names, hint)
    return _parse(spec, path.stem, f"file {spec}", _read(path, spec))


def list_traces() -> tuple[tuple[str, str], ...]:
    """Name and title of every shipped trace, the title from its card `traces/NAME.toml`.

    Raises
    ------
    InputError                     a card that is missing or not TOML, or has no title
    """
    found = []
    for name in _shipped_names():
        card = _folder() / f"{name}.toml"
        try:
            title = tomllib.loads(read_text(card, limit=LARGEST_BYTES, where=f"card of trace {name}")).get("title")
        except tomllib.TOMLDecodeError as error:
            raise InputError(
                f"card of trace {name} is not TOML ({error}); reinstall or write the traces again"
            ) from error
        if not isinstance(title, str):
            raise InputError(f"card of trace {name} has no title; reinstall or write the traces again")
        found.append((name, title))
    return tuple(found)


def trace_jsonl(trace: Trace) -> str:
    """The trace as JSON lines that `load_trace` reads: StartTimeOffset (ns), ContextTokens, GeneratedTokens.

    Raises
    ------
    UsageError                     a closed loop, which a list of arrivals cannot express
    """
    if trace.concurrency is not None:
        raise UsageError(f"trace {trace.name}: a closed loop has no arrivals to write; keep its description instead")
    rows = zip(trace.arrival_ns.tolist(), trace.prompt.tolist(), trace.output.tolist(), strict=True)
    return "".join(f'{{"StartTimeOffset": {a}, "ContextTokens": {p}, "GeneratedTokens": {o}}}\n' for a, p, o in rows)


def _folder() -> Path:
    """Where the shipped traces lie; looked up at each call."""
    return units.DATA_ROOT / "traces"


def _shipped_names() -> tuple[str, ...]:
    """Names of the shipped traces."""
    return tuple(sorted(path.stem for path in _folder().glob("*.jsonl")))


def _read(path: Path, label: str) -> str:
    """A text file whole, without a byte-order mark."""
    text = read_text(path, limit=LARGEST_BYTES, where=label, want="a trace is CSV or JSON lines in UTF-8")
    if (lines := text.count("\n")) > MOST_LINES:
        raise InputError(f"{label}: {lines:,} lines, at most {MOST_LINES:,} are read; cut the file")
    return text


def _tokens(cell: object) -> int:
    """A count written as digits."""
    # Nearly every cell is like this; matching a pattern on each costs a sixth of the time to read a file.
    if isinstance(cell, str) and len(cell) < 19 and cell.isdecimal() and cell.isascii():
        return int(cell)
    if not isinstance(cell, str) or _WHOLE.fullmatch(text := cell.strip()) is None:
        raise ValueError("is not a whole number of tokens")
    return int(text)


def _scaled(ns_per_unit: int) -> Callable[[object], int]:
    """Reader of decimal numbers in a unit of time, to the nearest nanosecond."""

    def nanoseconds(cell: object) -> int:
        if not isinstance(cell, str) or _DECIMAL.fullmatch(text := cell.strip()) is None:
            raise ValueError("is not a finite number")
        if text.isdecimal():
            return int(text) * ns_per_unit
        return round(Decimal(text) * ns_per_unit)

    return nanoseconds


def _instant(cell: object) -> int:
    """Nanoseconds since 1970 of a date and time; int arithmetic, as datetime stops at microseconds."""
    match = _INSTANT.fullmatch(cell.strip()) if isinstance(cell, str) else None
    if match is None:
        raise ValueError("is not a time like 2023-11-16 18:15:46.6805900")
    day, clock, decimals, zone = match.groups()
    try:
        since = datetime.fromisoformat(f"{day}T{clock}") - _EPOCH
    except ValueError:
        raise ValueError("is not a time that exists") from None
    if zone and zone != "Z":
        ahead = timedelta(hours=int(zone[1:3]), minutes=int(zone[4:]))
        since = since - ahead if zone[0] == "+" else since + ahead
    return (since.days * 86_400 + since.seconds) * NS_PER_S + int((decimals or "").ljust(9, "0"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Names of the three columns, how arrivals are read, and whether they count from the earliest row."""

    columns: tuple[str, str, str]
    unit: str
    arrival: Callable[[object], int]
    from_earliest: bool = False
    hashes: bool = False


_LAYOUTS: Final = (
    _Layout(columns=("StartTimeOffset", "ContextTokens", "GeneratedTokens"), unit="ns", arrival=_scaled(1)),
    _Layout(
        columns=("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
        unit="date and time",
        arrival=_instant,
        from_earliest=True,
    ),
    _Layout(columns=("timestamp", "input_length", "output_length"), unit="ms", arrival=_scaled(NS_PER_MS), hashes=True),
    _Layout(columns=("arrival_s", "prompt", "output"), unit="s", arrival=_scaled(NS_PER_S)),
)
_ACCEPTED: Final = " | ".join(f"{x.columns[0]} ({x.unit}), {x.columns[1]}, {x.columns[2]}" for x in _LAYOUTS)


def _layout_of(label: str, names: Iterable[str]) -> _Layout:
    """The one layout whose columns are all there."""
    present = [str(name) for name in names]
    if twice := sorted({name for name in present if present.count(name) > 1}):
        raise InputError(f"{label}: column {twice[0]!r:.40} appears twice; keep one")
    fits = [layout for layout in _LAYOUTS if set(layout.columns) <= set(present)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        times = " and ".join(layout.columns[0] for layout in fits)
        raise InputError(f"{label}: arrivals are given twice, as {times}; keep one")
    nearest = max(_LAYOUTS, key=lambda layout: len(set(layout.columns) & set(present)))
    missing = [name for name in nearest.columns if name not in present]
    found = ", ".join(present)
    found = found if len(found) <= 100 else found[:97] + "..."
    raise InputError(f"{label}: missing {', '.join(missing)}; found {found or 'none'}; accepted columns: {_ACCEPTED}")


def _parse(label: str, name: str, source: str, text: str) -> Trace:
    """A trace from the text of a file."""
    if not text.strip():
        raise InputError(f"{label} is empty; accepted columns: {_ACCEPTED}")
    faults: _Faults = []
    read = _json_rows if text.lstrip().startswith("{") else _csv_rows
    layout, lines, rows = read(label, text, faults)
    if len(rows) > MAX_REQUESTS:
        raise InputError(f"{label}: {len(rows):,} requests, at most {MAX_REQUESTS:,} can be used; cut the file")
    if not rows and not faults:
        raise InputError(f"{label}: columns but no requests; add at least one row")
    columns = []
    for index, (parse, (low, high)) in enumerate(zip((layout.arrival, _tokens, _tokens), LIMITS, strict=True)):
        cells = [row[index] for row in rows]
        earliest = layout.from_earliest and index == 0
        columns.append(_column(cells, lines, layout.columns[index], parse, low, high, earliest, faults))
    if faults:
        raise join_faults(label, [f"line {line}: {fault}" for line, fault in sorted(faults)])
    arrival, prompt, output = (np.array(column, dtype=np.int64) for column in columns)
    content = _content(label, layout, lines, rows, columns[1])
    return make_trace(
        name=name,
        arrival_ns=arrival,
        prompt=prompt,
        output=output,
        content=content,
        content_tokens=_HASH_TOKENS if content is not None else 0,
        source=source,
    )


def _content(
    label: str, layout: _Layout, lines: Sequence[int], rows: Sequence[tuple[object, ...]], prompts: Sequence[int]
) -> list[list[int]] | None:
    """Content ids of every request, where the layout has them and no request lacks them."""
    cells = [row[3] for row in rows] if layout.hashes else []
    if not cells or not all(cells):
        return None
    content: list[list[int]] = []
    faults: _Faults = []
    for cell, line, prompt in zip(cells, lines, prompts, strict=True):
        count = -(-prompt // _HASH_TOKENS)
        try:
            if not isinstance(cell, list) or len(cell) != count:
                raise ValueError(f"must be a list of {count} numbers, one per {_HASH_TOKENS} tokens of {prompt}")
            ids = [_tokens(item) for item in cell]
            if not all(0 <= item < 1 << 62 for item in ids):
                raise ValueError("has a number outside 0..2**62")
            content.append(ids)
        except ValueError as error:
            faults.append((line, f"hash_ids {str(error).replace(' of tokens', '')}"))
    if faults:
        raise join_faults(label, [f"line {line}: {fault}" for line, fault in faults])
    return content


def _column(
    cells: Sequence[object],
    lines: Sequence[int],
    column: str,
    parse: Callable[[object], int],
    low: int,
    high: int,
    from_earliest: bool,
    faults: _Faults,
) -> list[int]:
    """The numbers of one column; what cannot be used is added to `faults`."""
    values: list[int | None] = []
    for cell, line in zip(cells, lines, strict=True):
        try:
            values.append(parse(cell))
        except ValueError as error:
            values.append(None)
            faults.append((line, f"{column} {_shown(cell)} {error}"))
    good = [value for value in values if value is not None]
    base = min(good, default=0) if from_earliest else 0
    if good and not low <= min(good) - base <= max(good) - base <= high:
        for cell, line, value in zip(cells, lines, values, strict=True):
            if value is not None and not low <= value - base <= high:
                after = " ns after the earliest row" if from_earliest else " ns" if high == MAX_ARRIVAL_NS else ""
                faults.append((line, range_fault(column, _shown(cell), low, high) + after))
    return [value - base for value in good] if base else good


def _csv_rows(label: str, text: str, faults: _Faults) -> tuple[_Layout, list[int], list[tuple[object, ...]]]:
    """Layout, line numbers, the three cells and no content ids of every row of a CSV file."""
    reader = csv.reader(io.StringIO(text, newline=""))
    records: list[tuple[int, list[str]]] = []
    try:
        records = [(reader.line_num, row) for row in reader if row and (len(row) > 1 or row[0].strip())]
    except csv.Error as error:
        raise InputError(f"{label}: line {reader.line_num} is not CSV ({error}); check its quotes") from error
    header = [name.strip() for name in records[0][1]]
    layout = _layout_of(label, header)
    first, second, third = (header.index(name) for name in layout.columns)
    lines: list[int] = []
    rows: list[tuple[object, ...]] = []
    for line, row in records[1:]:
        if len(row) == len(header):
            lines.append(line)
            rows.append((row[first], row[second], row[third], None))
        elif any(cell.strip() for cell in row):
            faults.append((line, f"{len(row)} cells under {len(header)} columns"))
    return layout, lines, rows


def _json_rows(label: str, text: str, faults: _Faults) -> tuple[_Layout, list[int], list[tuple[object, ...]]]:
    """Layout, line numbers, the three values and content ids of every object of JSON lines; numbers stay text."""
    decode = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str).decode
    layout: _Layout | None = None
    lines: list[int] = []
    rows: list[tuple[object, ...]] = []
    for line, record in enumerate(text.split("\n"), 1):
        if not (record := record.strip()):
            continue
        try:
            entry = decode(record)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            faults.append((line, f"{_shown(record)} is not a JSON object"))
            continue
        layout = layout or _layout_of(label, entry)
        if missing := [name for name in layout.columns if name not in entry]:
            faults.append((line, f"missing {', '.join(missing)}"))
            continue
        lines.append(line)
        rows.append((*(entry[name] for name in layout.columns), entry.get("hash_ids")))
    if layout is None:
        raise join_faults(label, [f"line {line}: {fault}" for line, fault in faults])
    return layout, lines, rows


def _shown(cell: object) -> str:
    """A value as it stands in the file, cut for one line."""
    if isinstance(cell, list | dict):
        return "list" if isinstance(cell, list) else "object"
    text = cell.strip() if isinstance(cell, str) else json.dumps(cell)
    text = text if len(text) <= 40 else text[:37] + "..."
    return text if text.isprintable() and text else repr(text)
