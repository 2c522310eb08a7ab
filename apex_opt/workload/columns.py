"""Columns of whole numbers, one value per request: their limits, and what is said of those beyond."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from apex_opt.errors import InputError, join_faults, shown
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Sequence

Ints: TypeAlias = npt.NDArray[np.int64]

MAX_REQUESTS: Final = 5_000_000
MAX_TOKENS: Final = 10_000_000
MAX_PAUSE_NS: Final = 3600 * NS_PER_S
MAX_ARRIVAL_NS: Final = 1 << 61
"""About 73 years. The rest of int64 is left to the simulated clock."""

LABELS: Final = ("arrival_ns", "prompt", "output", "max_new_tokens")
LIMITS: Final = ((0, MAX_ARRIVAL_NS), (1, MAX_TOKENS), (1, MAX_TOKENS), (1, MAX_TOKENS))
"""Least and most value of arrival (ns), prompt, output and the stated most of it (tokens)."""


def range_fault(label: str, value: object, low: int, high: int) -> str:
    """One value out of range, in words.

    Parameters
    ----------
    label : str       opens every message
    value : object    that was given
    low : int         least that is allowed
    high : int        most that is allowed
    """
    advice = "; drop the request or count it as 1" if low == 1 and value in (0, "0") else ""
    return f"{label} {value} is outside {low:,}..{high:,}{advice}"


def beyond_stated(output: int, stated: int) -> str:
    """An output of more tokens than the request says it takes, in words."""
    return f"output {output} is above max_new_tokens {stated}; a request ends there"


def row_faults(columns: Sequence[Ints]) -> list[str]:
    """Every value out of range, by row, counted from 1, and outputs of more than their client takes."""
    faults: list[tuple[int, str]] = []
    for label, column, (low, high) in zip(LABELS, columns, LIMITS, strict=False):
        bad = np.flatnonzero((column < low) | (column > high))
        faults += [(int(row), range_fault(label, int(column[row]), low, high)) for row in bad]
    if len(columns) > 3:
        _, _, output, stated = columns
        faults += [(int(row), beyond_stated(output[row], stated[row])) for row in np.flatnonzero(output > stated)]
    return [f"row {row + 1}: {text}" for row, text in sorted(faults)]


def check_sizes(name: str, columns: Sequence[Ints]) -> None:
    """All columns as long as each other, with something in them."""
    sizes = [column.size for column in columns]
    if len(set(sizes)) > 1:
        pairs = ", ".join(f"{size} {label}" for label, size in zip(LABELS, sizes, strict=False))
        raise InputError(f"trace {name}: columns differ in length ({pairs}); give one value per request")
    if not 1 <= sizes[0] <= MAX_REQUESTS:
        raise InputError(f"trace {name}: {sizes[0]:,} requests; give 1 to {MAX_REQUESTS:,}")


def check_layout(where: str, label: str, column: object) -> None:
    """Refuse a column on which a compiled kernel cannot rely.

    Parameters
    ----------
    where : str        opens the message
    label : str        of the column
    column : object    what should be a one-dimensional, contiguous, read-only int64 array
    """
    if not isinstance(column, np.ndarray) or column.dtype != np.int64 or column.ndim != 1:
        raise InputError(f"{where}: {label} must be a one-dimensional int64 array; use make_trace")
    if not column.flags.c_contiguous or column.flags.writeable:
        raise InputError(f"{where}: {label} must be contiguous and read-only; use make_trace")


def check_count(label: str, value: object, most: int, where: str) -> None:
    """Refuse what is not a whole number from 1 to `most`.

    Parameters
    ----------
    label : str       of the value
    value : object    that was given
    most : int        that is allowed
    where : str       opens the message
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InputError(f"{where}: {label} must be a whole number from 1 to {most:,}, got {shown(value)}")


def to_int64(name: str, label: str, values: Sequence[int] | npt.NDArray[Any], place: str = "row") -> Ints:
    """A column as int64; anything that is not a whole number in range is named by its row.

    Parameters
    ----------
    name : str                           of the trace
    label : str                          of the column
    values : sequence of int or array
    place : str                          what a row of it is called
    """
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise InputError(f"trace {name}: {label} must have one dimension, got {values.ndim}")
        if values.dtype.kind == "i":
            return values.astype(np.int64)
        values = values.tolist()
    elif isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise InputError(f"trace {name}: {label} must be a list of whole numbers, got {shown(values)}")
    given = list(values)
    faults = [
        f"{place} {row}: {label} {shown(value)} is not a whole number below 2**63"
        for row, value in enumerate(given, 1)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not -(1 << 63) <= value < 1 << 63
    ]
    if faults:
        raise join_faults(f"trace {name}", faults)
    return np.array(given, dtype=np.int64)


def check_pieces(where: str, counts: Ints, prompt: Ints, tokens: int) -> None:
    """Refuse prompts without a content id for each of their pieces.

    Parameters
    ----------
    where : str         opens the message
    counts : int64[n]   ids of each prompt
    prompt : int64[n]   tokens of each
    tokens : int        of a piece
    """
    wrong = np.flatnonzero(counts != -(-prompt // tokens))
    if wrong.size:
        raise join_faults(
            where,
            [
                f"row {row + 1}: {counts[row]} content ids for a prompt of {prompt[row]} tokens; give one per {tokens}"
                for row in wrong
            ],
        )
