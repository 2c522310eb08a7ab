"""Traces from files, whatever their layout; `load_trace` is the one entry for all traces."""

from __future__ import annotations

import json
import os
import re
import tomllib
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt import units
from apex_opt.errors import ApexError, InputError, UnknownNameError, UsageError, shown
from apex_opt.files import absence, expanded, read_text, there
from apex_opt.units import NS_PER_S
from apex_opt.workload.cells import Faults, token_counts
from apex_opt.workload.collect import Collector
from apex_opt.workload.columns import MAX_REQUESTS
from apex_opt.workload.generators import EXAMPLES, describe_trace
from apex_opt.workload.layouts import ACCEPTED, layout_of, result_reader
from apex_opt.workload.layouts.results import Sent, drawn_ns
from apex_opt.workload.tables import table_of
from apex_opt.workload.trace import RECORDED, UNKNOWN, Arrivals, Trace, make_trace

if TYPE_CHECKING:
    from pathlib import Path

LARGEST_BYTES: Final = 256 << 20
"""Size of a file: 5 million rows of CSV take some 200 MB."""

_PACKED: Final = {
    ".parquet": "a Parquet table; write it as CSV, such as with pandas.read_parquet(file).to_csv",
    ".arrow": "an Arrow table; write it as CSV",
    ".feather": "a Feather table; write it as CSV",
    ".xlsx": "a spreadsheet; save it as CSV",
    ".gz.gz": "packed twice; unpack it once",
    ".tar.gz": "an archive of files; unpack it and name one",
    ".tgz": "an archive of files; unpack it and name one",
    ".tar": "an archive of files; unpack it and name one",
    ".zip": "a zip archive; unpack it and name the file in it",
    ".7z": "an archive; unpack it and name the file in it",
    ".zst": "packed by zstd; unpack it, or pack it with gzip",
    ".xz": "packed by xz; unpack it, or pack it with gzip",
    ".bz2": "packed by bzip2; unpack it, or pack it with gzip",
}
_BLOCK_IN_NAME: Final = re.compile(r"bl(?:oc)?k_?(?:sz|size)[_-]?(\d{1,5})(?!\d)", re.IGNORECASE)


def load_trace(spec: str, seed: int = 0, *, unit: str | None = None, block: int | None = None) -> Trace:
    """A trace by shipped name, description or path, looked up in that order.

    Parameters
    ----------
    spec : str                     `chat` (see `list_traces`), `poisson:rate=2,n=500` (see `describe_trace`), or a file
    seed : int                     for what is drawn
    unit : str or None             "s", "ms", "us" or "ns": of arrivals in a file that does not tell
    block : int or None            prompt tokens that a hash id of the file stands for

    Returns
    -------
    Trace                          in order of arrival; ties keep the order of the file

    A file is CSV with a header, JSON lines, a JSON list of objects, or the result of a benchmark, in UTF-8 or packed
    by gzip. `layouts` says which columns are known; others are ignored. Blank lines, a byte-order mark and CRLF do no
    harm. A column `max_new_tokens` or `max_tokens` says what clients state as the most tokens they take; where it is
    blank that is the output. Arrivals are converted in decimal, exact to the nanosecond; dates, and times since 1970,
    count from the earliest row. A trace of lengths alone is not `Trace.timed`. `Trace.notes` tells what is dropped or
    assumed.

    Raises
    ------
    InputError                     unreadable or unrecognised file; all bad rows, the first five with their lines
    UnknownNameError               neither a shipped name, nor a kind of description, nor a file
    UsageError                     a description that cannot be used, a unit or block where there is no use for one, or
                                   none where one is needed
    """
    if not isinstance(spec, str) or not spec.strip():
        raise UsageError(f"trace: expected a name, a description or a path, got {shown(spec)}")
    spec = spec.strip()
    shipped, described = spec in (names := _shipped_names()), spec.partition(":")[0] in EXAMPLES and ":" in spec
    for option, given in (("--trace_unit", unit), ("--trace_block", block)):
        if given is not None and (shipped or described):
            raise UsageError(f"{option}: is for trace files, and {spec!r:.60} is none; leave it out")
    if shipped:
        return _shipped(_folder(), spec)
    if described:
        return describe_trace(spec, seed)
    if not there(path := expanded(spec)):
        if os.path.islink(path):
            raise InputError(f"trace {spec}: {absence(path)}; name the file itself")
        describe = f"or describe one, e.g. {EXAMPLES['poisson']}"
        if (kind := re.match(r"([a-z]+):", spec)) and not spec.startswith(f"{kind[1]}://"):
            hint = f"there is no such file; shipped: {', '.join(names)}; {describe}"
            raise UnknownNameError("trace description", kind[1][:40], EXAMPLES, hint)
        raise UnknownNameError("trace", spec[:100], names, f"there is no such file; {describe}", every=True)
    named = _BLOCK_IN_NAME.search(path.name)
    return _parse(
        spec,
        path.name.removesuffix(".gz").rpartition(".")[0] or path.name,
        f"file {spec}",
        _read(path, spec),
        seed,
        unit,
        block,
        int(named[1]) if named else None,
    )


@cache
def _shipped(folder: Path, name: str) -> Trace:
    """A shipped trace, read once: studies ask many questions of the same one."""
    trace = _parse(f"trace {name}", name, f"file traces/{name}.jsonl", _read(folder / f"{name}.jsonl", name))
    with suppress(ApexError, KeyError):  # without its card it is a file like any other
        card = _card(name)
        return replace(trace, arrivals=describe_trace(card["law"], card["seed"], {"n": "1"}).arrivals)
    return trace


def frame_trace(frame: Any, seed: int = 0, *, unit: str | None = None, block: int | None = None) -> Trace:
    """A trace of a DataFrame with a row for each request and the columns of a trace file; its name is `attrs["name"]`.

    Parameters
    ----------
    frame : DataFrame       read as the lines of a JSON file; its index is not
    seed, unit, block       as for `load_trace`

    Raises
    ------
    UsageError    what is no DataFrame
    InputError    columns that are not known, and bad rows, counted from 1
    """
    if not callable(getattr(frame, "to_json", None)) or getattr(frame, "ndim", 0) != 2:
        raise UsageError(f"--trace: expected a name, a Trace or a DataFrame, got {shown(frame)}")
    lines = frame.to_json(orient="records", lines=True, date_format="iso", date_unit="ns", double_precision=15)
    name = str(getattr(frame, "attrs", {}).get("name", "frame"))[:60]
    return _parse("DataFrame", name, "a DataFrame", lines, seed, unit, block)


def list_traces() -> tuple[tuple[str, str], ...]:
    """Name and title of every shipped trace, the title from its card `traces/NAME.toml`.

    Raises
    ------
    InputError                     a card that is missing or not TOML, or has no title
    """
    found = []
    for name in _shipped_names():
        title = _card(name).get("title")
        if not isinstance(title, str):
            raise InputError(f"card of trace {name} has no title; reinstall or write the traces again")
        found.append((name, title))
    return tuple(found)


def trace_jsonl(trace: Trace) -> str:
    """The trace as JSON lines that `load_trace` reads: StartTimeOffset (ns), ContextTokens, GeneratedTokens.

    Where clients state the most tokens they take, also MaxNewTokens; where requests have priorities, also Priority.

    Raises
    ------
    UsageError                     a closed loop or lengths alone, which a list of arrivals cannot express
    """
    if trace.concurrency is not None:
        raise UsageError(f"trace {trace.name}: a closed loop has no arrivals to write; keep its description instead")
    if trace.delay_ns is not None:
        raise UsageError(f"trace {trace.name}: requests wait for answers, which is not written; keep its file instead")
    if not trace.timed:
        raise UsageError(f"trace {trace.name}: has lengths alone and no arrivals to write; give it a rate")
    columns = {"StartTimeOffset": trace.arrival_ns, "ContextTokens": trace.prompt, "GeneratedTokens": trace.output}
    if trace.max_new_tokens is not None:
        columns["MaxNewTokens"] = trace.max_new_tokens
    if trace.priority is not None:
        columns["Priority"] = trace.priority
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)


def _folder() -> Path:
    """Where the shipped traces lie; looked up at each call."""
    return units.DATA_ROOT / "traces"


def _shipped_names() -> tuple[str, ...]:
    """Names of the shipped traces."""
    return tuple(sorted(path.stem for path in _folder().glob("*.jsonl")))


def _card(name: str) -> dict[str, Any]:
    """What the card of a shipped trace says."""
    text = read_text(_folder() / f"{name}.toml", limit=LARGEST_BYTES, where=f"card of trace {name}")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"card of trace {name} is not TOML ({error}); reinstall or write the traces again") from error


def _read(path: Path, label: str) -> str:
    """A text file whole, without a byte-order mark."""
    for ending, what in _PACKED.items():
        if path.name.lower().endswith(ending) and path.is_file():
            raise InputError(f"{label}: {what}; a trace is CSV or JSON in UTF-8")
    return read_text(path, limit=LARGEST_BYTES, where=label, want="a trace is CSV or JSON in UTF-8, or that in gzip")


def _parse(
    label: str,
    name: str,
    source: str,
    text: str,
    seed: int = 0,
    unit: str | None = None,
    block: int | None = None,
    named_block: int | None = None,
) -> Trace:
    """A trace from the text of a file; the tokens of a hash id as the user says, or else the file's name."""
    if not text.strip():
        raise InputError(f"{label} is empty; accepted columns: {ACCEPTED}")
    faults = Faults(label)
    table = table_of(label, text, faults)
    if isinstance(table, dict):
        if unit is not None:
            raise UsageError(f"--trace_unit: {label} is the result of a benchmark, which tells its units; leave it out")
        _no_ids(label, block)
        return result_trace(label, name, source, table, seed)
    layout, called = layout_of(label, table.names)
    if "hash_ids" not in called:
        _no_ids(label, block)
    tokens = block or named_block
    collector = Collector(label=label, layout=layout, called=called, unit=unit, block=tokens, faults=faults)
    for places, column in table.batches():
        collector.add(places, column)
        if collector.rows > MAX_REQUESTS:
            raise InputError(f"{label}: more than {MAX_REQUESTS:,} requests, which can be used at most; cut the file")
    if faults.found:
        raise faults.error()
    if not collector.rows:
        raise InputError(f"{label}: {collector.empty}")
    return collector.trace(name, source, table.notes)


def _no_ids(label: str, block: int | None) -> None:
    if block is not None:
        raise UsageError(f"--trace_block: {label} has no hash_ids that it could be the size of; leave it out")


def result_trace(label: str, name: str, source: str, document: dict[str, Any], seed: int) -> Trace:
    """A trace of what a benchmark sent.

    Parameters
    ----------
    label, name, source : str    opens every message; of the trace; where it is from
    document : dict              the result of a benchmark
    seed : int                   for arrivals that are drawn

    Raises
    ------
    InputError    figures that cannot be used, or no request that was answered
    """
    read = result_reader(document)
    assert read is not None
    sent = read(label, document)
    faults = Faults(label, place="request")
    places = range(1, len(sent.prompt) + 1)
    prompt, output = (
        token_counts([_cell(value) for value in values], places, what, faults)
        for values, what in ((sent.prompt, "prompt tokens"), (sent.output, "output tokens"))
    )
    if faults.found:
        raise faults.error()
    answered = output > 0
    if not answered.any():
        raise InputError(f"{label}: no request has an answer")
    notes = list(sent.notes)
    if not answered.all():
        lost = int((~answered).sum())
        notes.append(f"{lost:,} of {answered.size:,} requests have no answer (0 output tokens) and are dropped")
    requests, arrivals = int(answered.sum()), RECORDED
    arrival = np.zeros(requests, np.int64)
    if sent.arrival_s is not None:
        arrival = _starts(label, sent)[answered]
        arrival = arrival - arrival.min()
    elif sent.rate_per_s is not None:
        arrival = drawn_ns(label, sent, requests, seed)
        cv = sent.burstiness**-0.5
        arrivals = Arrivals(kind="poisson" if sent.burstiness == 1 else "gamma", cv=cv, seed=seed)
        process = "a Poisson process" if sent.burstiness == 1 else f"a gamma process of burstiness {sent.burstiness:g}"
        notes.append(f"the file has no arrivals: they are drawn as {process} of its {sent.rate_per_s:g} requests/s")
    elif sent.concurrency is None and not sent.at_once:
        arrivals = UNKNOWN
    return make_trace(
        name=name,
        arrival_ns=arrival,
        prompt=prompt[answered],
        output=output[answered],
        concurrency=sent.concurrency,
        source=source,
        notes=tuple(notes),
        arrivals=arrivals,
    )


def _starts(label: str, sent: Sent) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Starts in nanoseconds, whenever they count from."""
    assert sent.arrival_s is not None
    for number, start in enumerate(sent.arrival_s, 1):
        if isinstance(start, bool) or not isinstance(start, int | float) or not 0 <= start < 1 << 33:
            raise InputError(f"{label}: request {number}: start {shown(start)} is no time in seconds")
    return np.array([round(start * NS_PER_S) for start in sent.arrival_s], np.int64)


_LONGEST_CELL: Final = 400
"""Digits of the longest number that is read to be told."""


def _cell(value: object) -> object:
    """A number as text, as cells are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return str(value) if isinstance(value, float) else shown(value, _LONGEST_CELL)
