"""Profile files of other simulators: finding them, reading them strictly, and what a reader of them hands over."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.errors import InputError
from apex_opt.files import absence, check_regular, files_below, read_text, there

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from apex_opt.profiles.folder import Dropped

    Columns = dict[str, NDArray[Any]]

LARGEST_BYTES: Final = 64 << 20
"""Size of a file: the largest one known has 19 MB."""

_POINTER: Final = "version https://git-lfs"
_SHOWN: Final = 300


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Rows of one file in our columns.

    Attributes
    ----------
    columns : dict of str to array[n_rows]      as `read_table` returns them, but with keys repeated
    kernel : object[n_rows]                     the kernel that ran; of several the fastest will stay
    dropped : tuple of (reason, rows)           rows that our columns do not cover
    """

    kind: str
    columns: Columns
    kernel: NDArray[Any]
    dropped: Dropped = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """What the files of another simulator hold of one accelerator.

    Attributes
    ----------
    parts : tuple of Part
    passed_over : tuple of (file, reason)       what was not read, or only in part
    head : dict of str to str                   fields of the card
    """

    parts: tuple[Part, ...]
    passed_over: tuple[tuple[str, str], ...]
    head: dict[str, str]


def csv_files(source: Path) -> list[Path]:
    """A CSV file, or all below a folder.

    Raises
    ------
    InputError      nothing there
    """
    if not there(source):
        raise InputError(f"{source}: {absence(source, 'no such file or folder')}")
    if not source.is_dir():
        check_regular(source)
        return [source]
    return files_below(source, (".csv",))


def read_columns(
    path: Path, what: str, numbers: Sequence[str], texts: Sequence[str] = (), optional: Sequence[str] = ()
) -> Columns:
    """Columns of a CSV file.

    Parameters
    ----------
    what : str                      what the file should be, for messages
    numbers, texts : names          columns that must be there
    optional : names                columns of numbers that may be left out

    Returns
    -------
    dict of str to array[n_rows]    float64 for numbers, NaN where blank; object (text) for texts

    Raises
    ------
    InputError      unreadable, columns missing, no rows, a cell that is no number
    """
    text = read_text(path, limit=LARGEST_BYTES, want=f"give a table of {what}")
    try:
        rows = [(number, row) for number, row in enumerate(csv.reader(io.StringIO(text, newline="")), 1) if row]
    except csv.Error as error:
        raise InputError(f"{path}: not a table of {what}: {' '.join(str(error).split())[:120]}") from None
    header = [name.strip() for name in rows[0][1]] if rows else []
    if header and header[0].startswith(_POINTER):
        raise InputError(f"{path}: a pointer of Git LFS, not the table itself; fetch it with: git lfs pull")
    if missing := [name for name in (*numbers, *texts) if name not in header]:
        there = ", ".join(header)
        there = there if len(there) <= _SHOWN else f"{there[:_SHOWN]} ..."
        raise InputError(f"{path}: not a table of {what}: column {', '.join(missing)} is missing; it has {there}")
    if len(rows) < 2:
        raise InputError(f"{path}: a header and no rows")
    columns: Columns = {}
    for name in (*numbers, *texts, *(name for name in optional if name in header)):
        at = header.index(name)
        cells = [row[at].strip() if at < len(row) else "" for _, row in rows[1:]]
        if name in texts:
            columns[name] = np.array(cells, dtype=object)
            continue
        try:
            columns[name] = np.array([float(cell) if cell else np.nan for cell in cells])
        except ValueError:
            line, cell = next((rows[i + 1][0], cell) for i, cell in enumerate(cells) if cell and not _is_number(cell))
            raise InputError(f"{path}: line {line}: {name} = {cell[:40]!r} must be a number") from None
    return columns


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def part(kind: str, columns: Columns, kernel: str | NDArray[Any], losses: Sequence[tuple[str, NDArray[Any]]]) -> Part:
    """A part out of rows of which some are lost.

    Parameters
    ----------
    losses : (reason, bool[n_rows]) each    rows to leave out; one that several reasons take counts for the first
    """
    count = len(columns["time_us"])
    kept = np.ones(count, dtype=bool)
    dropped = []
    for reason, lost in losses:
        if taken := int((kept & lost).sum()):
            dropped.append((reason, taken))
        kept &= ~lost
    names = np.full(count, kernel, dtype=object) if isinstance(kernel, str) else kernel
    return Part(
        kind=kind,
        columns={name: values[kept] for name, values in columns.items()},
        kernel=names[kept],
        dropped=tuple(dropped),
    )
