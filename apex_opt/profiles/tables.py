"""Strict readers of tables, and their writer.

A table is a CSV file with one header line, or an .npz archive of one array per column (`write_table` states its form).
Both are read into the same columns.
"""

from __future__ import annotations

import csv
import io
import math
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.errors import InputError, join_faults
from apex_opt.files import read_bytes, read_text
from apex_opt.profiles.schema import TABLE_DTYPES, Column, Schema

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

LARGEST_BYTES: Final = 64 << 20
"""Size of a table, packed and unpacked: the largest that ships has 160 KB, and 1 MB unpacked."""

_LOG_STEPS: Final = 1024
"""Steps per factor e in an archive: figures are kept to 0.05%."""
_BLANK: Final = np.iinfo(np.int16).min
_NAMES: Final = "_names"
_WIDEST_KEY: Final = 2**62


def read_table(path: Path, schema: Schema) -> dict[str, NDArray[Any]]:
    """A table as columns, from a .csv or .npz file.

    Returns
    -------
    dict of str to array[n_rows]
        float64 for numbers (NaN where an optional figure is blank), object (text) for text columns; formats are
        renamed as in `TABLE_DTYPES`, columns left out hold their defaults

    Raises
    ------
    InputError      unreadable, columns unlike the schema, no rows, bad or repeated rows: first faults with their
                    lines (of text) or rows (of an archive, counted from 1)
    """
    source = f"{schema.name} table {path}"
    return (_read_archive if path.suffix == ".npz" else _read_text)(path, schema, source)


def _read_text(path: Path, schema: Schema, source: str) -> dict[str, NDArray[Any]]:
    """A CSV table."""
    text = read_text(path, limit=LARGEST_BYTES, where=source)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise InputError(f"{source}: not CSV: {error}") from None
    if not rows:
        raise InputError(f"{source}: empty; the header must be {','.join(c.name for c in schema.columns)}")
    header = [name.strip() for name in rows[0][1]]
    faults = _header_faults(header, schema)
    if faults:
        raise join_faults(source, faults)
    body = rows[1:]
    if not body:
        raise InputError(f"{source}: a header and no rows")
    for line, row in body:
        if len(row) != len(header):
            faults.append(f"line {line} has {len(row)} fields instead of {len(header)}")
    if faults:
        raise join_faults(source, faults)
    lines = [line for line, _ in body]
    columns: dict[str, _Cells] = {}
    for column in schema.columns:
        if column.name in header:
            at = header.index(column.name)
            cells = np.array([row[at].strip() for _, row in body], dtype=object)
            if column.kind == "text":
                names, codes = np.unique(cells, return_inverse=True)
                columns[column.name] = _Cells(codes.ravel(), cells, names)
            else:
                columns[column.name] = _Cells(np.array([_number(cell) for cell in cells.tolist()]), cells)
    return _complete(columns, schema, source, lambda row: f"line {lines[row]}")


def _read_archive(path: Path, schema: Schema, source: str) -> dict[str, NDArray[Any]]:
    """An .npz table, in the form that `write_table` states."""
    arrays = _arrays(read_bytes(path, limit=LARGEST_BYTES, where=source), source)
    texts = {column.name for column in schema.columns if column.kind == "text"}
    listed = {name: arrays.pop(name + _NAMES, None) for name in texts & set(arrays)}
    faults = _header_faults(list(arrays), schema)
    lengths = {array.shape for array in arrays.values()}
    if not faults and (len(lengths) != 1 or len(next(iter(lengths))) != 1):
        faults.append(f"arrays must be one-dimensional and equally long, not of shapes {sorted(lengths)}"[:200])
    if faults:
        raise join_faults(source, faults)
    if not next(iter(arrays.values())).size:
        raise InputError(f"{source}: no rows")
    columns: dict[str, _Cells] = {}
    for column in schema.columns:
        if column.name not in arrays:
            continue
        array, names = arrays[column.name], listed.get(column.name)
        good = array.dtype == np.int16 if column.kind == "float" else array.dtype.kind == "u"
        if column.kind == "text":
            good = good and names is not None and names.ndim == 1 and names.dtype.kind == "U"
        if not good:
            form = {"float": "int16 logarithms", "int": "unsigned integers"}
            wanted = form.get(column.kind, f"codes with {column.name}{_NAMES}")
            faults.append(f"array {column.name} of {array.dtype} must be {wanted}")
        elif names is not None and array.max() >= len(names):
            faults.append(f"array {column.name} has code {array.max()} and only {len(names)} names")
        elif names is not None:
            columns[column.name] = _Cells(array.astype(np.int64), array, names.astype(object))
        elif column.kind == "int":
            columns[column.name] = _Cells(array.astype(np.float64), array)
        else:
            values = np.exp(array / _LOG_STEPS)
            values[array == _BLANK] = np.nan
            columns[column.name] = _Cells(values, array, blank=array == _BLANK)
    if faults:
        raise join_faults(source, faults)
    return _complete(columns, schema, source, lambda row: f"row {row + 1}")


def _arrays(data: bytes, source: str) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz archive; what it claims to hold is held to `LARGEST_BYTES` before any of it is unpacked."""
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > LARGEST_BYTES:
                raise InputError(f"{source}: unpacks to more than the limit of {LARGEST_BYTES:,} bytes")
            for member in members:
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError("packed in a way that is not read here")
                arrays[member.filename.removesuffix(".npy")] = _array(archive.read(member))
    except InputError:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
        RuntimeError,
        MemoryError,
    ) as error:
        text = " ".join(str(error).split())[:120]
        raise InputError(f"{source}: not an .npz archive of plain arrays: {text}") from None
    return arrays


def _array(data: bytes) -> NDArray[Any]:
    """An array in NumPy's format, no larger than the bytes that are there for it."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"format {version} of NumPy is not read here")
    shape, _, dtype = read_header[version](stream)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded")
    # NumPy makes room for what the header claims, whatever follows it.
    if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"an array of shape {shape} in {len(data) - stream.tell():,} bytes")
    stream.seek(0)
    array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array


@dataclass(frozen=True, slots=True, eq=False)
class _Cells:
    """One column as a file has it.

    `values` are float64, or int64 codes into `names` for text; `shown` is what to quote; `blank` marks figures that
    are not stated.
    """

    values: NDArray[Any]
    shown: NDArray[Any]
    names: NDArray[Any] | None = None
    blank: NDArray[np.bool_] | None = None


def _header_faults(header: list[str], schema: Schema) -> list[str]:
    """Columns missing, unknown or doubled."""
    known = [column.name for column in schema.columns]
    faults = [
        f"column {column.name} is missing"
        for column in schema.columns
        if column.name not in header and not column.optional and column.default is None
    ]
    faults += [
        f"column {name[:40]!r} is not known; allowed: {', '.join(known)}" for name in header if name not in known
    ]
    faults += [f"column {name} is there {header.count(name)} times" for name in known if header.count(name) > 1]
    return faults


def _check(column: Column, cells: _Cells, where: Callable[[int], str]) -> list[str]:
    """The rows of one column that are out of bounds; `where` tells the place of a row in the file."""
    if cells.names is not None:
        known = [name in column.choices if column.choices else bool(name) for name in cells.names.tolist()]
        wanted = f"one of {', '.join(column.choices)}" if column.choices else "text that is not empty"
        good = np.array(known)[cells.values]
        quoted = cells.names[cells.values]
    else:
        good = _in_bounds(column, cells.values)
        if column.optional:
            good |= cells.blank if cells.blank is not None else cells.shown == ""
        kind = "a whole number" if column.kind == "int" else "a number"
        wanted = f"{kind} above {column.low:g} and at most {column.high:g}"
        quoted = cells.shown
    return [
        f"{where(row)}: {column.name} = {str(quoted[row])[:40]!r} must be {wanted}"
        for row in np.flatnonzero(~good).tolist()
    ]


def _in_bounds(column: Column, values: NDArray[Any]) -> NDArray[np.bool_]:
    """The numbers that a column may hold."""
    with np.errstate(invalid="ignore"):
        good: NDArray[np.bool_] = (values > column.low) & (values <= column.high)
        if column.kind == "int":
            good &= values == np.floor(values)
    return good


def in_bounds(schema: Schema, table: dict[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """The rows whose numbers a table may hold.

    Parameters
    ----------
    table : dict of str to array[n_rows]        as `read_table` returns it, but unchecked

    Returns
    -------
    bool[n_rows]
    """
    good = np.ones(len(table["time_us"]), dtype=bool)
    for column in schema.columns:
        if column.kind != "text":
            values = table[column.name]
            good &= _in_bounds(column, values) | (np.isnan(values) if column.optional else False)
    return good


def _number(cell: str) -> float:
    """The cell as a number, NaN where it is none."""
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _complete(
    columns: dict[str, _Cells], schema: Schema, source: str, where: Callable[[int], str]
) -> dict[str, NDArray[Any]]:
    """The columns in order, checked, formats renamed, defaults filled in."""
    faults = [
        fault
        for column in schema.columns
        if column.name in columns
        for fault in _check(column, columns[column.name], where)
    ]
    if not faults:
        keys = [columns[column.name].values for column in schema.columns if column.key and column.name in columns]
        faults = [f"{where(row)} repeats the key of {where(first)}" for row, first in _repeats(keys)]
    if faults:
        raise join_faults(source, faults)
    rows = len(next(iter(columns.values())).values)
    table: dict[str, NDArray[Any]] = {}
    for column in schema.columns:
        if column.name in columns:
            cells = columns[column.name]
            names = cells.names
            if names is None:
                table[column.name] = cells.values
                continue
            if column.choices == tuple(TABLE_DTYPES):
                names = np.array([TABLE_DTYPES[name] for name in names.tolist()], dtype=object)
            table[column.name] = names[cells.values]
        elif column.default is None:
            table[column.name] = np.full(rows, np.nan)
        elif column.default in table:
            table[column.name] = table[str(column.default)].copy()
        else:
            table[column.name] = np.full(rows, column.default, dtype=object if column.kind == "text" else np.float64)
    return table


def _repeats(keys: list[NDArray[Any]]) -> list[tuple[int, int]]:
    """Rows whose key was seen before, each with the first row that has it."""
    key = np.zeros(len(keys[0]), dtype=np.int64)
    span = 1
    for values in keys:
        codes = values.astype(np.int64)
        low = int(codes.min())
        width = int(codes.max()) - low + 1
        if span * width > _WIDEST_KEY:
            # Numbered anew, the pairs stay below the square of the row count.
            _, key = np.unique(key, return_inverse=True)
            _, codes = np.unique(codes, return_inverse=True)
            key, codes, low = key.ravel(), codes.ravel(), 0
            span, width = int(key.max()) + 1, int(codes.max()) + 1
        key = key * width + (codes - low)
        span *= width
    order = np.argsort(key, kind="stable")
    again = np.flatnonzero(np.diff(key[order]) == 0) + 1
    if not len(again):
        return []
    first = {int(key[row]): int(row) for row in order[::-1].tolist()}
    return sorted((row, first[int(key[row])]) for row in order[again].tolist())


def write_table(path: Path, schema: Schema, table: dict[str, NDArray[Any]]) -> None:
    """Write columns as an .npz archive; equal columns give equal bytes.

    The archive holds one array per column: unsigned integers for whole numbers; for text unsigned codes into
    `<column>_names`; for figures int16, round(1024 ln value), the least int16 where blank. Columns that are all blank
    are left out.

    Parameters
    ----------
    table : dict of str to array[n_rows]        as `read_table` returns it
    """
    spelling = {name: spelled for spelled, name in TABLE_DTYPES.items()}
    arrays: dict[str, NDArray[Any]] = {}
    for column in schema.columns:
        values = table[column.name]
        if column.kind == "text":
            names, codes = np.unique(values.astype(str), return_inverse=True)
            arrays[column.name] = _narrow(codes.ravel())
            arrays[column.name + _NAMES] = np.array([spelling.get(name, name) for name in names.tolist()])
        elif column.kind == "int":
            arrays[column.name] = _narrow(values)
        elif np.isfinite(values).any():
            with np.errstate(invalid="ignore"):
                # The last step still within the bound, or a figure just below it could not be read back.
                steps = np.minimum(np.rint(_LOG_STEPS * np.log(values)), np.floor(_LOG_STEPS * np.log(column.high)))
            arrays[column.name] = np.where(np.isfinite(steps), steps, _BLANK).astype(np.int16)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def _narrow(values: NDArray[Any]) -> NDArray[Any]:
    """Whole numbers from 0 in the narrowest unsigned type."""
    return values.astype(np.min_scalar_type(int(values.max())))
