"""What a profile folder holds: the columns of its tables, and strict readers of tables and cards.

A table is a CSV file with one header line, or an .npz archive of one array per column (`write_table` states its form).
Both are read into the same columns.
"""

from __future__ import annotations

import csv
import io
import math
import re
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.cluster.toml_reader import TomlTable, read_toml
from apex_opt.cluster.uniform import MEMORY_GB_PER_S, TFLOPS, WATTS
from apex_opt.errors import InputError, join_faults
from apex_opt.files import read_bytes, read_text
from apex_opt.profiles.power import PowerFit
from apex_opt.units import GB, TERA

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

TABLE_DTYPES: Final = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float8": "fp8",
    "fp8_block": "fp8_block",
    "nvfp4": "nvfp4",
    "w4a16": "w4a16",
    "mxfp4": "mxfp4",
    "mxfp4_fp8": "mxfp4_fp8",
}
"""How tables spell the number formats, and how they are called once read."""

PEAK_DTYPES: Final = ("bf16", "fp16", "fp8", "fp4")
"""Formats whose matrix throughput a card may state."""

CARD_USES: Final = ("times", "energies")
"""What a folder serves: look-ups, or only the fit of a power model on a sample of rows."""

CARD_TEXTS: Final = ("hardware", "software", "method", "origin", "derived", "not_measured", "dropped")
"""What a card tells people: on what, with what and how its tables were measured, and what became of them since."""

TABLE_ENGINES: Final = ("vllm", "sglang", "trtllm")
"""Engines whose kernels a folder may hold; a card without one serves all of them."""

ROUTINGS: Final = ("uniform", "balanced", "power_law_1.01", "power_law_1.2")
COLLECTIVES: Final = ("all_reduce", "custom_all_reduce", "all_gather", "reduce_scatter", "all_to_all")

STATE_OPS: Final = ("gated_delta", "kda", "mamba2", "mamba1", "lightning", "convolution")
"""Recurrences, and the causal convolution of so many channels (`heads`) over so many tokens (`key`) before them."""

SPARSE_OPS: Final = ("scores", "choice", "attention")
"""Kernels of sparse attention: an indexer's scores of what the context holds, its choice of the highest, and attention
over what it chose."""

LARGEST_BYTES: Final = 64 << 20
"""Size of a table, packed and unpacked: the largest that ships has 160 KB, and 1 MB unpacked."""

_LOG_STEPS: Final = 1024
"""Steps per factor e in an archive: figures are kept to 0.05%."""
_BLANK: Final = np.iinfo(np.int16).min
_NAMES: Final = "_names"
_WIDEST_KEY: Final = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column: `kind` is `text`, `int` or `float`; numbers lie above `low` and up to `high`.

    An `optional` figure may be blank or its column left out. A column with a `default` may be left out: each row then
    holds that value, or what the row has in the column of that name where `default` names one.
    """

    name: str
    kind: str
    unit: str
    meaning: str
    low: float = 0.0
    high: float = 2.0**31
    choices: tuple[str, ...] = ()
    key: bool = False
    optional: bool = False
    default: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """One kind of table; `size` names the columns whose product a curve runs over."""

    name: str
    columns: tuple[Column, ...]
    size: tuple[str, ...]


def _size(name: str, unit: str, meaning: str, high: float = 2.0**31, default: str | None = None) -> Column:
    """A whole number that belongs to the key."""
    return Column(name=name, kind="int", unit=unit, meaning=meaning, high=high, key=True, default=default)


def _format(name: str, meaning: str) -> Column:
    """A number format that belongs to the key."""
    return Column(name=name, kind="text", unit="", meaning=meaning, choices=tuple(TABLE_DTYPES), key=True)


_DTYPE: Final = _format("dtype", "number format")
_CACHE: Final = _format("dtype", "number format of the KV cache")
_WEIGHTS: Final = _format("weights", "number format of the projections")
_HEADS: Final = _size("heads", "count", "query heads", 2.0**20)
_ATTENTION: Final = (
    _CACHE,
    _HEADS,
    _size("kv_heads", "count", "KV heads", 2.0**20),
    _size("head_dim", "elements", "width of one head", 2.0**20),
    Column(
        name="window",
        kind="int",
        unit="tokens",
        meaning="tokens that a query sees at most, 0 for all",
        low=-1.0,
        key=True,
        default=0,
    ),
)
_BATCH: Final = _size("batch", "sequences", "sequences of the batch")
_CONTEXT: Final = _size("context", "tokens", "tokens per sequence, the new one included")
_LENGTH: Final = _size("length", "tokens", "tokens of each prompt, none of them cached before")
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
    size=("m",),
)
MOE: Final = Schema(
    name="moe",
    columns=(
        _DTYPE,
        _size("tokens", "tokens", "tokens routed over all experts"),
        _size("hidden", "elements", "width of the model"),
        _size("expert_ffn", "elements", "width of one expert on one rank"),
        _size("experts", "count", "experts of the layer", 2.0**20),
        _size("topk", "count", "experts per token", 2.0**20),
        _size("held", "count", "experts on one rank", 2.0**20, default="experts"),
        Column(
            name="routing",
            kind="text",
            unit="",
            meaning="how tokens fall on experts",
            choices=ROUTINGS,
            key=True,
            default="uniform",
        ),
        *_RESULTS,
    ),
    size=("tokens",),
)
MEMORY: Final = Schema(
    name="memory",
    columns=(
        Column(name="op", kind="text", unit="", meaning="kernel and width", key=True),
        _size("bytes", "bytes", "read plus written", 2.0**50),
        *_RESULTS,
    ),
    size=("bytes",),
)
ATTENTION_DECODE: Final = Schema(
    name="attention_decode", columns=(*_ATTENTION, _BATCH, _CONTEXT, *_RESULTS), size=("batch", "context")
)
ATTENTION_PREFILL: Final = Schema(
    name="attention_prefill", columns=(*_ATTENTION, _BATCH, _LENGTH, *_RESULTS), size=("batch", "length")
)
MLA_DECODE: Final = Schema(
    name="mla_decode", columns=(_CACHE, _WEIGHTS, _HEADS, _BATCH, _CONTEXT, *_RESULTS), size=("batch", "context")
)
MLA_PREFILL: Final = Schema(
    name="mla_prefill", columns=(_CACHE, _WEIGHTS, _HEADS, _BATCH, _LENGTH, *_RESULTS), size=("batch", "length")
)
MLA_KERNEL_DECODE: Final = Schema(
    name="mla_kernel_decode", columns=(_CACHE, _HEADS, _BATCH, _CONTEXT, *_RESULTS), size=("batch", "context")
)
MLA_KERNEL_PREFILL: Final = Schema(
    name="mla_kernel_prefill", columns=(_CACHE, _HEADS, _BATCH, _LENGTH, *_RESULTS), size=("batch", "length")
)
_STATES: Final = (
    Column(name="op", kind="text", unit="", meaning="recurrence or convolution", choices=STATE_OPS, key=True),
    _size("heads", "count", "matrices of the state, or channels", 2.0**20),
    _size("key", "elements", "rows of each, or tokens an output depends on", 2.0**20),
    _size("value", "elements", "columns of each", 2.0**20),
    _size("key_heads", "count", "heads of queries and keys", 2.0**20),
)
STATE_DECODE: Final = Schema(name="state_decode", columns=(*_STATES, _BATCH, *_RESULTS), size=("batch",))
STATE_PREFILL: Final = Schema(
    name="state_prefill",
    columns=(*_STATES, _size("length", "tokens", "tokens of one prompt"), *_RESULTS),
    size=("length",),
)
SPARSE: Final = Schema(
    name="sparse",
    columns=(
        Column(name="op", kind="text", unit="", meaning="kernel", choices=SPARSE_OPS, key=True),
        _HEADS,
        _size("width", "elements", "multiplied per head: of an indexer's, or key and value", 2.0**20),
        _size("length", "tokens", "tokens of one prompt in the call"),
        _size("context", "tokens", "tokens that it holds after the call"),
        *_RESULTS,
    ),
    size=("length", "context"),
)
ENCODER: Final = Schema(
    name="attention_encoder",
    columns=(
        _HEADS,
        _size("head_dim", "elements", "width of one head", 2.0**20),
        _size("length", "tokens", "tokens of one input, which all see each other"),
        *_RESULTS,
    ),
    size=("length",),
)
COLLECTIVE: Final = Schema(
    name="collective",
    columns=(
        Column(name="op", kind="text", unit="", meaning="collective", choices=COLLECTIVES, key=True),
        _size("ranks", "count", "GPUs of the group", 2.0**20),
        _size("bytes", "bytes", "the whole vector of one GPU", 2.0**50),
        *_RESULTS,
    ),
    size=("bytes",),
)
SCHEMAS: Final = (
    GEMM,
    MOE,
    MEMORY,
    ATTENTION_DECODE,
    ATTENTION_PREFILL,
    MLA_DECODE,
    MLA_PREFILL,
    MLA_KERNEL_DECODE,
    MLA_KERNEL_PREFILL,
    STATE_DECODE,
    STATE_PREFILL,
    ENCODER,
    SPARSE,
    COLLECTIVE,
)


def schema_of(kind: str) -> Schema:
    """The schema of a kind of table."""
    return next(schema for schema in SCHEMAS if schema.name == kind)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A folder's card: the datasheet figures its efficiencies are taken against, and its tables.

    Attributes
    ----------
    use : str                   of `CARD_USES`
    engine : str or None        engine whose kernels were measured, of `TABLE_ENGINES`; None serves every engine
    date : str                  when the tables were measured or published; empty where not stated
    flops_per_s : tuple of (dtype, float)       by the formats of `PEAK_DTYPES`
    tables : tuple of (kind, file, sha256)      sha256 may be empty
    power : PowerFit or None    coefficients of a power model fitted on this accelerator
    texts : tuple of (field, text)      what people are told: `CARD_TEXTS` that are there
    """

    name: str
    licence: str
    use: str
    engine: str | None
    date: str
    gpu: str
    memory_bytes_per_s: float
    flops_per_s: tuple[tuple[str, float], ...]
    tdp_w: float
    idle_w: float
    tables: tuple[tuple[str, str, str], ...]
    power: PowerFit | None = None
    texts: tuple[tuple[str, str], ...] = ()


def read_card(folder: Path) -> Card:
    """The card of a profile folder.

    Raises
    ------
    InputError      missing or faulty card, all faults in one line
    """
    path = folder / "card.toml"
    root = TomlTable(read_toml(path, "profile card"), "", faults := [])
    name, licence = root.text("name"), root.text("licence")
    use = root.text("use", choices=CARD_USES, required=False)
    engine = root.text("engine", choices=TABLE_ENGINES, required=False)
    date = root.text("date", required=False)
    texts = tuple((field, text) for field in CARD_TEXTS if (text := root.text(field, required=False)))
    gpu_name = memory = tdp_w = idle_w = None
    flops: list[tuple[str, float]] = []
    if (gpu := root.table("gpu")) is not None:
        gpu_name = gpu.text("name")
        memory = gpu.within("memory_gb_per_s", MEMORY_GB_PER_S)
        tdp_w = gpu.within("tdp_w", WATTS)
        idle_w = gpu.number("idle_w", high=WATTS[1])
        gpu.text("source", required=False)
        if (peaks := gpu.table("tflops")) is not None:
            for dtype in PEAK_DTYPES:
                if (tflops := peaks.within(dtype, TFLOPS, required=False)) is not None:
                    flops.append((dtype, tflops * TERA))
            if not {"bf16", "fp16"} & {dtype for dtype, _ in flops}:
                faults.append("gpu.tflops needs bf16 or fp16")
            peaks.close()
        gpu.close()
    power = None
    if (entry := root.table("power", required=False)) is not None:
        power = _read_power(entry)
    tables: list[tuple[str, str, str]] = []
    if (listed := root.table("tables")) is not None:
        for schema in SCHEMAS:
            if (entry := listed.table(schema.name, required=False)) is not None:
                file, digest = entry.text("file"), entry.text("sha256", required=False)
                for field in ("about", "dropped", "lookup"):
                    entry.text(field, required=False)
                entry.close()
                if file is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+\.(csv|npz)", file):
                    faults.append(
                        f"tables.{schema.name}.file = {file[:40]!r} must name a .csv or .npz file beside the card"
                    )
                tables.append((schema.name, file or "", digest or ""))
        listed.close()
    root.close()
    if faults or not (name and licence and gpu_name and memory and tdp_w and idle_w):
        raise join_faults(f"profile card {path}", faults)
    return Card(
        name=name,
        licence=licence,
        use=use or CARD_USES[0],
        engine=engine,
        date=date or "",
        gpu=gpu_name,
        memory_bytes_per_s=memory * GB,
        flops_per_s=tuple(flops),
        tdp_w=tdp_w,
        idle_w=idle_w,
        tables=tuple(tables),
        power=power,
        texts=texts,
    )


def _read_power(entry: TomlTable) -> PowerFit | None:
    """Coefficients of a power model, or None after noting their faults."""
    names = ("active_w", "pj_per_flop", "pj_per_narrow_flop", "pj_per_byte")
    values = [entry.within(name, (0, 1e6)) for name in names]
    spin_w, source = entry.within("spin_w", (0, 1e6), required=False), entry.text("source")
    entry.close()
    if source is None or any(value is None for value in values):
        return None
    active_w, half, narrow, byte = (max(value or 0.0, 0.0) for value in values)
    return PowerFit(
        active_w=active_w,
        joule_per_flop_half=half * 1e-12,
        joule_per_flop_narrow=narrow * 1e-12,
        joule_per_byte=byte * 1e-12,
        source=source,
        spin_w=spin_w,
    )
