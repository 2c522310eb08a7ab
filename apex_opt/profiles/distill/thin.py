"""Which points of a curve are needed: the fewest whose straight lines, in logarithms, pass by all the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.profiles.distill.curves import Curves

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.profiles.schema import Schema

    Columns = dict[str, NDArray[Any]]
    Floats = NDArray[np.float64]

TOLERANCE: Final = 0.04
"""Greatest error, relative, at a point left out."""


def needed(schema: Schema, columns: Columns, tolerance: float = TOLERANCE) -> NDArray[np.bool_]:
    """The fewest rows from which the others follow within the tolerance; the ends of every curve are among them.

    Parameters
    ----------
    columns : dict of str to array[n_rows]      keys do not repeat

    Returns
    -------
    bool[n_rows]
    """
    curves = Curves.of(schema, columns)
    size, time = curves.size_log, curves.time_log
    count, points = size.shape
    steps = np.full((count, points), np.inf)
    steps[:, 0] = 0
    back = np.zeros((count, points), dtype=np.int64)
    for end in range(1, points):
        for start in range(end):
            better = steps[:, start] + 1 < steps[:, end]
            better[better] = _passes(size[better], time[better], start, end, tolerance)
            steps[better, end] = steps[better, start] + 1
            back[better, end] = start
    kept = np.zeros(len(columns["time_us"]), dtype=bool)
    every = np.arange(count)
    at = (curves.rows >= 0).sum(axis=1) - 1
    kept[curves.rows[every, at]] = True
    while at.any():
        at = back[every, at]
        kept[curves.rows[every, at]] = True
    return kept


def _passes(size: Floats, time: Floats, start: int, end: int, tolerance: float) -> NDArray[np.bool_]:
    """Whether the line from one point of each curve to another meets all between; not where either is padding."""
    slope = (time[:, end] - time[:, start]) / (size[:, end] - size[:, start])
    between = slice(start + 1, end)
    line = time[:, start, None] + slope[:, None] * (size[:, between] - size[:, start, None])
    far = (np.abs(time[:, between] - line) > np.log1p(tolerance)).any(axis=1)
    passes: NDArray[np.bool_] = np.isfinite(slope) & ~far
    return passes


def lookup_error(schema: Schema, columns: Columns, kept: NDArray[np.bool_]) -> Floats:
    """Relative error of the time of every row when only some rows are kept, by straight lines in logarithms.

    Parameters
    ----------
    columns : dict of str to array[n_rows]      keys do not repeat
    kept : bool[n_rows]

    Returns
    -------
    float64[n_judged]       of the rows on curves of which any row is kept; beyond the ends the time of the end holds
    """
    curves = Curves.of(schema, columns)
    points = curves.rows.shape[1]
    there = curves.rows >= 0
    knot = there & kept[curves.rows]
    place = np.broadcast_to(np.arange(points), there.shape)
    left = np.maximum.accumulate(np.where(knot, place, -1), axis=1)
    right = np.minimum.accumulate(np.where(knot, place, points)[:, ::-1], axis=1)[:, ::-1]
    judged = there & knot.any(axis=1, keepdims=True)
    left, right = np.where(left < 0, right, left), np.where(right == points, left, right)
    left, right = np.where(judged, left, 0), np.where(judged, right, 0)
    every = np.arange(len(there))[:, None]
    size, time = curves.size_log, curves.time_log
    span = size[every, right] - size[every, left]
    share = np.divide(size - size[every, left], span, out=np.zeros_like(size), where=judged & (span > 0))
    guess = time[every, left] + share * (time[every, right] - time[every, left])
    error: Floats = np.abs(np.expm1(guess[judged] - time[judged]))
    return error
