"""A table as curves: rows that differ in one size only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.profiles.schema import Schema

    Columns = dict[str, NDArray[Any]]
    Floats = NDArray[np.float64]


def group(columns: list[NDArray[Any]]) -> NDArray[np.int64]:
    """One number per distinct combination of values, rising with them column by column.

    Parameters
    ----------
    columns : list of array[n_rows]

    Returns
    -------
    int64[n_rows]
    """
    owner = np.zeros(len(columns[0]), dtype=np.int64)
    for values in columns:
        _, codes = np.unique(values, return_inverse=True)
        # Numbered anew after each column, the pairs stay below the square of the row count.
        _, owner = np.unique(owner * (int(codes.max()) + 1) + codes.ravel(), return_inverse=True)
        owner = owner.ravel()
    return owner


def ordered_keys(schema: Schema, columns: Columns) -> list[NDArray[Any]]:
    """The key columns, the size that curves run over last."""
    axis = schema.size[-1]
    return [columns[column.name] for column in schema.columns if column.key and column.name != axis] + [columns[axis]]


@dataclass(frozen=True, slots=True, eq=False)
class Curves:
    """Rows of a table as curves over the last of its schema's sizes, padded with NaN.

    Attributes
    ----------
    rows : int64[n_curves, n_points]            row of the table, -1 where padded; sizes rise along a curve
    size_log, time_log : float64[n_curves, n_points]
    """

    rows: NDArray[np.int64]
    size_log: Floats
    time_log: Floats

    @classmethod
    def of(cls, schema: Schema, columns: Columns) -> Curves:
        """The curves of columns whose keys do not repeat."""
        *shape, last = ordered_keys(schema, columns)
        owner = group(shape)
        order = np.lexsort((last, owner))
        counts = np.bincount(owner)
        place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = np.full((len(counts), counts.max()), -1, dtype=np.int64)
        rows[owner[order], place] = order
        blank = rows < 0
        size_log = np.where(blank, np.nan, np.log(last.astype(np.float64))[rows])
        time_log = np.where(blank, np.nan, np.log(columns["time_us"])[rows])
        return cls(rows, size_log, time_log)
