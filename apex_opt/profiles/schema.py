"""What a profile folder holds: the columns of its tables, and strict readers of tables and cards."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.cluster.toml_reader import TomlTable, read_toml
from apex_opt.cluster.types import DTYPES
from apex_opt.errors import InputError, join_faults
from apex_opt.units import GB, TERA

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

TABLE_DTYPES: Final = {"bfloat16": "bf16", "float16": "fp16", "float8": "fp8"}
"""How tables spell the number formats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column: `kind` is `text`, `int` or `float`; numbers lie above `low` and up to `high`."""

    name: str
    kind: str
    unit: str
    meaning: str
    low: float = 0.0
    high: float = 2.0**31
    choices: tuple[str, ...] = ()
    key: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """One kind of table."""

    name: str
    columns: tuple[Column, ...]


def _size(name: str, unit: str, meaning: str, high: float = 2.0**31) -> Column:
    """A whole number that belongs to the key."""
    return Column(name=name, kind="int", unit=unit, meaning=meaning, high=high, key=True)


_DTYPE: Final = Column(
    name="dtype", kind="text", unit="", meaning="number format", choices=tuple(TABLE_DTYPES), key=True
)
_RESULTS: Final = (
    Column(name="time_us", kind="float", unit="us", meaning="device time of one call", high=1e9),
    Column(name="energy_uj", kind="float", unit="uJ", meaning="board energy of one call", high=1e12, optional=True),
)

GEMM: Final = Schema(
    name="gemm",
    columns=(
        _DTYPE,
        _size("m", "rows", "rows of the input"),
        _size("n", "columns", "columns of the output"),
        _size("k", "elements", "depth of the product"),
        *_RESULTS,
    ),
)
MOE: Final = Schema(
    name="moe",
    columns=(
        _DTYPE,
        _size("tokens", "tokens", "tokens routed"),
        _size("hidden", "elements", "width of the model"),
        _size("expert_ffn", "elements", "width of one expert"),
        _size("experts", "count", "experts held", 2.0**20),
        _size("topk", "count", "experts per token", 2.0**20),
        *_RESULTS,
    ),
)
MEMORY: Final = Schema(
    name="memory",
    columns=(
        Column(name="op", kind="text", unit="", meaning="kernel and width", key=True),
        _size("bytes", "bytes", "read plus written", 2.0**50),
        *_RESULTS,
    ),
)
ATTENTION_DECODE: Final = Schema(
    name="attention_decode",
    columns=(
        _DTYPE,
        _size("heads", "count", "query heads", 2.0**20),
        _size("kv_heads", "count", "KV heads", 2.0**20),
        _size("head_dim", "elements", "width of one head", 2.0**20),
        _size("batch", "sequences", "sequences of the batch"),
        _size("context", "tokens", "tokens cached per sequence"),
        *_RESULTS,
    ),
)
SCHEMAS: Final = (GEMM, MOE, MEMORY, ATTENTION_DECODE)


def read_table(path: Path, schema: Schema) -> dict[str, NDArray[Any]]:
    """A table as columns.

    Returns
    -------
    dict of str to array[n_rows]
        float64 for numbers (NaN where an optional figure is blank), object (text) for text columns; formats are
        renamed as in `TABLE_DTYPES`

    Raises
    ------
    InputError      unreadable, header unlike the schema, no rows, bad or repeated rows: first faults with their lines
    """
    source = f"{schema.name} table {path}"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, row) for row in reader if row]
    except FileNotFoundError:
        raise InputError(f"{source}: no such file") from None
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{source}: not UTF-8 text") from None
    except (csv.Error, ValueError) as error:
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
    table: dict[str, NDArray[Any]] = {}
    for column in schema.columns:
        if column.name in header:
            at = header.index(column.name)
            table[column.name] = _column(column, [row[at].strip() for _, row in body], lines, faults)
        else:
            table[column.name] = np.full(len(body), np.nan)
    if not faults:
        faults = _repeats(table, schema, lines)
    if faults:
        raise join_faults(source, faults)
    return table


def _header_faults(header: list[str], schema: Schema) -> list[str]:
    """Columns that are missing, unknown or there twice."""
    known = [column.name for column in schema.columns]
    faults = [f"column {c.name} is missing" for c in schema.columns if c.name not in header and not c.optional]
    faults += [
        f"column {name[:40]!r} is not known; allowed: {', '.join(known)}" for name in header if name not in known
    ]
    faults += [f"column {name} is there {header.count(name)} times" for name in known if header.count(name) > 1]
    return faults


def _column(column: Column, cells: list[str], lines: list[int], faults: list[str]) -> NDArray[Any]:
    """One column as an array, its faults noted."""
    if column.kind == "text":
        for line, cell in zip(lines, cells, strict=True):
            if not cell or (column.choices and cell not in column.choices):
                wanted = f"one of {', '.join(column.choices)}" if column.choices else "text that is not empty"
                faults.append(f"line {line}: {column.name} = {cell[:40]!r} must be {wanted}")
        renamed = [TABLE_DTYPES.get(cell, cell) for cell in cells] if column.choices else cells
        return np.array(renamed, dtype=object)
    values = np.array([_number(cell) for cell in cells])
    blank = np.array([not cell for cell in cells]) if column.optional else np.zeros(len(cells), dtype=bool)
    with np.errstate(invalid="ignore"):
        good = (values > column.low) & (values <= column.high)
        if column.kind == "int":
            good &= values == np.floor(values)
    for row in np.flatnonzero(~(good | blank)):
        wanted = "a whole number" if column.kind == "int" else "a number"
        faults.append(
            f"line {lines[row]}: {column.name} = {cells[row][:40]!r} must be {wanted} above {column.low:g} "
            f"and at most {column.high:g}"
        )
    return values


def _number(cell: str) -> float:
    """The cell as a number, NaN where it is none."""
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _repeats(table: dict[str, NDArray[Any]], schema: Schema, lines: list[int]) -> list[str]:
    """Rows whose key was seen before."""
    faults: list[str] = []
    first: dict[tuple[object, ...], int] = {}
    keys = zip(*(table[column.name].tolist() for column in schema.columns if column.key), strict=True)
    for line, key in zip(lines, keys, strict=True):
        if key in first:
            faults.append(f"line {line} repeats the key of line {first[key]}")
        first.setdefault(key, line)
    return faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A folder's card: the datasheet figures its efficiencies are taken against, and its tables.

    `tables` maps a table's name to (file name, sha256 or empty).
    """

    name: str
    licence: str
    gpu: str
    memory_bytes_per_s: float
    flops_per_s: tuple[tuple[str, float], ...]
    tdp_w: float
    idle_w: float
    tables: tuple[tuple[str, str, str], ...]


def read_card(folder: Path) -> Card:
    """The card of a profile folder.

    Raises
    ------
    InputError      missing or faulty card, all faults in one line
    """
    path = folder / "card.toml"
    root = TomlTable(read_toml(path, "profile card"), "", faults := [])
    name, licence = root.text("name"), root.text("licence")
    for field in ("hardware", "software", "method", "origin", "not_measured"):
        root.text(field, required=False)
    gpu_name = memory = tdp_w = idle_w = None
    flops: list[tuple[str, float]] = []
    if (gpu := root.table("gpu")) is not None:
        gpu_name = gpu.text("name")
        memory = gpu.number("memory_gb_per_s", high=1e6)
        tdp_w = gpu.number("tdp_w", high=1e5)
        idle_w = gpu.number("idle_w", high=1e5)
        if (peaks := gpu.table("tflops")) is not None:
            for dtype in DTYPES:
                if (tflops := peaks.number(dtype, high=1e6, required=False)) is not None:
                    flops.append((dtype, tflops * TERA))
            if not {"bf16", "fp16"} & {dtype for dtype, _ in flops}:
                faults.append("gpu.tflops needs bf16 or fp16")
            peaks.close()
        gpu.close()
    tables: list[tuple[str, str, str]] = []
    if (listed := root.table("tables")) is not None:
        for schema in SCHEMAS:
            if (entry := listed.table(schema.name, required=False)) is not None:
                file, digest = entry.text("file"), entry.text("sha256", required=False)
                entry.text("about", required=False)
                entry.close()
                if file is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+\.csv", file):
                    faults.append(f"tables.{schema.name}.file = {file[:40]!r} must name a .csv file beside the card")
                tables.append((schema.name, file or "", digest or ""))
        listed.close()
    root.close()
    if faults or not (name and licence and gpu_name and memory and tdp_w and idle_w):
        raise join_faults(f"profile card {path}", faults)
    return Card(
        name=name,
        licence=licence,
        gpu=gpu_name,
        memory_bytes_per_s=memory * GB,
        flops_per_s=tuple(flops),
        tdp_w=tdp_w,
        idle_w=idle_w,
        tables=tuple(tables),
    )
