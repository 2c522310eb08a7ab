"""How far measured times stand above a simple bound, as a surface over shapes and sizes.

A table gives a curve over a size (m of a product, say) for some shapes (its n and k). What is interpolated is the ratio
of the bound to the time: it varies far less than the time itself, and carries over to shapes and devices not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Curve = tuple[Floats, Floats]

_SAME: Final = 1e-9
"""Distance between logarithms of shapes below which they are the same shape."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surface:
    """Curves of log(bound / time) over a logarithmic size, one per measured shape.

    Attributes
    ----------
    features : float64[n_shapes, n_features]    logarithms of the shape, scaled so that distances compare
    starts : int64[n_shapes + 1]                where each shape's points lie in the next two
    knots, values : float64[n_points]           logarithms of the measured sizes, rising; log(bound / time)
    neighbours, power : int, float              a shape between no others is the mean of its nearest, weighted by
                                                distance ** -power
    """

    features: Floats
    starts: NDArray[np.int64]
    knots: Floats
    values: Floats
    neighbours: int
    power: float

    def ratio(self, feature: tuple[float, ...], size_log: Floats) -> Floats:
        """Bound / time of a shape at the given sizes; beyond the measured sizes the last ratio holds.

        Parameters
        ----------
        feature : n_features numbers        the shape, as in `features`
        size_log : float64[...]             logarithm of the size

        Returns
        -------
        float64[...]                        the measured ratio wherever shape and size were measured
        """
        knots, values = _curve(self, feature)
        return np.exp(np.interp(size_log, knots, values))

    def distance(self, feature: tuple[float, ...]) -> float:
        """How far the nearest measured shape is, in scaled logarithms; 0 where the shape itself was measured."""
        return float(_distances(self, feature).min())

    def encloses(self, feature: tuple[float, ...]) -> bool:
        """Whether no size of a shape is smaller or larger than all measured ones."""
        point = np.array(feature)
        low, high = self.features.min(axis=0) - _SAME, self.features.max(axis=0) + _SAME
        return bool(((point >= low) & (point <= high)).all())

    def last(self, feature: tuple[float, ...]) -> float:
        """Logarithm of the largest size on the curve of a shape: beyond it the ratio is held."""
        return float(_curve(self, feature)[0][-1])

    def shape(self, index: int) -> Curve:
        """Knots and values of one measured shape."""
        points = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.knots[points], self.values[points]


def _distances(surface: Surface, feature: tuple[float, ...]) -> Floats:
    """How far every measured shape is."""
    return np.asarray(np.sqrt(((surface.features - np.array(feature)) ** 2).sum(axis=1)))


@lru_cache(maxsize=4096)
def _curve(surface: Surface, feature: tuple[float, ...]) -> Curve:
    """The curve of one shape: its own where measured, else a mean of those around it, else of the nearest."""
    distance = _distances(surface, feature)
    nearest = int(distance.argmin())
    if distance[nearest] < _SAME:
        return surface.shape(nearest)
    around = _corners(surface.features, feature)
    if around is None:
        near = np.argsort(distance, kind="stable")[: surface.neighbours]
        weights = distance[near] ** -surface.power
        around = [(int(index), float(weight)) for index, weight in zip(near, weights / weights.sum(), strict=True)]
    # Piecewise linear curves sum to a piecewise linear curve over all their knots: one look-up then serves any array.
    curves = [(weight, *surface.shape(index)) for index, weight in around]
    knots = np.unique(np.concatenate([own for _, own, _ in curves]))
    values = np.zeros_like(knots)
    for weight, own, value in curves:
        values += weight * np.interp(knots, own, value)
    return knots, values


def _corners(features: Floats, feature: tuple[float, ...]) -> list[tuple[int, float]] | None:
    """Shapes at the corners of the smallest box of the grid around a shape with their multilinear weights.

    None where the shape lies outside the grid, or a corner was not measured.
    """
    sides: list[tuple[tuple[float, float], ...]] = []
    for axis, value in enumerate(feature):
        lines = np.unique(features[:, axis])
        at = int(np.searchsorted(lines, value - _SAME))
        if at < len(lines) and abs(lines[at] - value) < _SAME:
            sides.append(((float(lines[at]), 1.0),))
            continue
        if at in (0, len(lines)):
            return None
        low, high = float(lines[at - 1]), float(lines[at])
        share = (value - low) / (high - low)
        sides.append(((low, 1 - share), (high, share)))
    found = []
    for corner in product(*sides):
        distance = np.abs(features - np.array([line for line, _ in corner])).max(axis=1)
        index = int(distance.argmin())
        if distance[index] >= _SAME:
            return None
        found.append((index, float(np.prod([weight for _, weight in corner]))))
    return found


def build_surface(
    shapes: Floats, feature_scale: tuple[float, ...], size_log: Floats, ratio: Floats, neighbours: int, power: float
) -> Surface:
    """A surface from rows of a table.

    Parameters
    ----------
    shapes : float64[n_rows, n_features]        rows with equal shapes form one curve
    feature_scale : n_features numbers          factor on each logarithm
    size_log, ratio : float64[n_rows]           logarithm of the size; bound / time
    """
    order = np.lexsort((size_log, *shapes.T[::-1]))
    rows = shapes[order]
    first = np.concatenate([[True], (rows[1:] != rows[:-1]).any(axis=1)])
    starts = np.flatnonzero(first)
    return Surface(
        features=np.log(rows[starts]) * np.array(feature_scale),
        starts=np.concatenate([starts, [len(rows)]]),
        knots=size_log[order],
        values=np.log(ratio[order]),
        neighbours=neighbours,
        power=power,
    )
