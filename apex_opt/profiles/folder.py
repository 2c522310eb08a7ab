"""How a profile folder is written: its tables, and the card that describes them."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from apex_opt.cluster.toml_reader import LARGEST_BYTES
from apex_opt.errors import InputError
from apex_opt.files import read_text
from apex_opt.outputs import fresh_folder, placed
from apex_opt.profiles.schema import PEAK_DTYPES, schema_of
from apex_opt.profiles.tables import write_table
from apex_opt.units import GB, TERA

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from apex_opt.cluster.types import Gpu

    Columns = dict[str, NDArray[Any]]
    Dropped = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """One table to write.

    Attributes
    ----------
    columns : dict of str to array[n_rows]      as `read_table` returns them, keys once
    about : str                                 what the rows are
    source_rows, screened_rows : int            rows of the source; those of them that can be believed
    dropped : tuple of (reason, rows)
    error : tuple of four floats or None        as in `TableReport`
    """

    kind: str
    columns: Columns
    about: str
    source_rows: int
    screened_rows: int
    dropped: Dropped = ()
    error: tuple[float, float, float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TableReport:
    """What became of one table.

    Attributes
    ----------
    folder, kind : str
    source_rows, screened_rows, rows, file_bytes : int
    dropped : tuple of (reason, rows)
    error : tuple of four floats or None    relative look-up error: median and P95 of all screened rows, then of all
                                            rows before the rule `lone`; None where no row was left out by thinning
    """

    folder: str
    kind: str
    source_rows: int
    screened_rows: int
    rows: int
    file_bytes: int
    dropped: Dropped
    error: tuple[float, float, float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a command made.

    Attributes
    ----------
    folder : Path                               the profile folder written
    reports : tuple of TableReport
    passed_over : tuple of (source, reason)     files not read, or only in part; tables that could not be measured
    """

    folder: Path
    reports: tuple[TableReport, ...]
    passed_over: tuple[tuple[str, str], ...]


def write_folder(
    folder: Path, made: str, head: Mapping[str, str], gpu: Gpu, tables: Sequence[Table]
) -> tuple[TableReport, ...]:
    """Write a profile folder in place of the one there; equal input gives equal bytes.

    The `[power]` of the card there is kept: a fit is made by hand, on serving runs or on the rows of such a folder.

    Parameters
    ----------
    made : str          what the command that writes it does with tables, for the first line of the card
    head : mapping      fields of the card, without its name
    gpu : Gpu           whose datasheet efficiencies are taken against

    Raises
    ------
    InputError      a folder that cannot be written, or holds something else
    """
    name = f"{folder.parent.name}/{folder.name}"
    reports, entries = [], []
    try:
        folder = placed(folder)
        with fresh_folder(folder, partial(_check_ours, folder)) as fresh:
            for table in tables:
                file = fresh / f"{table.kind}.npz"
                write_table(file, schema_of(table.kind), table.columns)
                report = TableReport(
                    folder=name,
                    kind=table.kind,
                    source_rows=table.source_rows,
                    screened_rows=table.screened_rows,
                    rows=len(table.columns["time_us"]),
                    file_bytes=file.stat().st_size,
                    dropped=table.dropped,
                    error=table.error,
                )
                reports.append(report)
                entries.append(_entry(report, hashlib.sha256(file.read_bytes()).hexdigest(), table.about))
            entries = [*_power(folder / "card.toml"), *entries]
            (fresh / "card.toml").write_text(_card(made, {"name": name, **head}, gpu, entries), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return tuple(reports)


def _check_ours(folder: Path) -> None:
    """Whether a folder is a profile's, or empty, or not there."""
    if folder.exists() and not (folder / "card.toml").is_file() and any(folder.iterdir()):
        raise InputError(f"{folder}: holds files and no card.toml; move them away, or name another --target")


def _power(card: Path) -> list[str]:
    """The section of a card that holds a power model, as it stands, or nothing."""
    if not card.is_file():
        return []
    found = re.search(r"^\[power\]\n(?:[^\[\n].*\n)*", read_text(card, limit=LARGEST_BYTES), re.MULTILINE)
    return [found[0].rstrip("\n")] if found else []


def lookup_text(report: TableReport) -> str:
    """The look-up error in words, empty where there is none."""
    if report.error is None:
        return ""
    median, high, before_median, before_high = (100 * figure for figure in report.error)
    return (
        f"look-up error over all {report.screened_rows:,} screened rows: median {median:.1f}%, P95 {high:.1f}%; "
        f"with the lone rows put back: median {before_median:.1f}%, P95 {before_high:.1f}%"
    )


def _entry(report: TableReport, digest: str, about: str) -> str:
    """The card's section of one table."""
    lines = [
        f"[tables.{report.kind}]",
        f'file = "{report.kind}.npz"',
        f'sha256 = "{digest}"',
        f"about = {_quoted(about)}",
    ]
    if report.dropped:
        lines.append(f"dropped = {_quoted('; '.join(f'{reason}: {count:,} rows' for reason, count in report.dropped))}")
    if report.error:
        lines.append(f"lookup = {_quoted(lookup_text(report))}")
    return "\n".join(lines)


def _card(made: str, head: Mapping[str, str], gpu: Gpu, entries: Sequence[str]) -> str:
    """The text of a card."""
    tflops = ", ".join(f"{dtype} = {flops / TERA:g}" for dtype, flops in gpu.flops_per_s if dtype in PEAK_DTYPES)
    lines = [f"# Written by the command that {made} tables. Columns, units and bounds: profiles/README.md."]
    lines += [f"{key} = {_quoted(text)}" for key, text in head.items() if text]
    lines += [
        "",
        "[gpu]",
        f"name = {_quoted(gpu.name)}",
        f"memory_gb_per_s = {gpu.memory_bytes_per_s / GB:g}",
        f"tflops = {{ {tflops} }}",
        f"tdp_w = {gpu.tdp_w:g}",
        f"idle_w = {gpu.idle_w:g}",
        f"source = {_quoted(f'the catalogue, {gpu.name}')}",
    ]
    return "\n".join(lines) + "\n\n" + "\n\n".join(entries) + "\n"


def _quoted(text: str) -> str:
    """A TOML string; JSON's form of one is among TOML's."""
    return json.dumps(text, ensure_ascii=True)
