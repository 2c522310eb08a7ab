"""How far measured times stand above a simple bound, as a surface over shapes and sizes.

A table gives a curve over a size (m of a product, say) for some shapes (its n and k). What is interpolated is the ratio
of the bound to the time: it varies far less than the time itself, and carries over to shapes and devices not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surface:
    """Curves of log(bound / time) over a logarithmic size, one per measured shape.

    Attributes
    ----------
    features : float64[n_shapes, n_features]    logarithms of the shape, scaled so that distances compare
    knots : tuple of float64[n_points]          per shape: logarithms of the measured sizes, rising
    values : tuple of float64[n_points]         per shape: log(bound / time)
    neighbours, power : int, float              a shape not measured is the mean of its nearest, weighted by
                                                distance ** -power
    """

    features: NDArray[np.float64]
    knots: tuple[NDArray[np.float64], ...]
    values: tuple[NDArray[np.float64], ...]
    neighbours: int
    power: float

    def ratio(self, feature: tuple[float, ...], size_log: NDArray[np.float64]) -> NDArray[np.float64]:
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

    def leave_one_out(self) -> NDArray[np.float64]:
        """Relative error of the time at every measured point, its whole shape being left out of the table."""
        errors = []
        for shape in range(len(self.knots)):
            kept = [other for other in range(len(self.knots)) if other != shape]
            rest = Surface(
                features=self.features[kept],
                knots=tuple(self.knots[other] for other in kept),
                values=tuple(self.values[other] for other in kept),
                neighbours=self.neighbours,
                power=self.power,
            )
            guess = rest.ratio(tuple(self.features[shape]), self.knots[shape])
            errors.append(np.exp(self.values[shape]) / guess - 1)
        return np.concatenate(errors)


@lru_cache(maxsize=4096)
def _curve(surface: Surface, feature: tuple[float, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The curve of one shape: its own where measured, else the weighted mean of its neighbours'."""
    distance = np.sqrt(((surface.features - np.array(feature)) ** 2).sum(axis=1))
    near = np.argsort(distance, kind="stable")[: surface.neighbours]
    if distance[near[0]] < 1e-9:
        return surface.knots[near[0]], surface.values[near[0]]
    weights = distance[near] ** -surface.power
    weights /= weights.sum()
    # Piecewise linear curves sum to a piecewise linear curve over all their knots: one look-up then serves any array.
    knots = np.unique(np.concatenate([surface.knots[shape] for shape in near]))
    values = np.zeros_like(knots)
    for weight, shape in zip(weights, near, strict=True):
        values += weight * np.interp(knots, surface.knots[shape], surface.values[shape])
    return knots, values


def build_surface(
    shapes: NDArray[np.float64],
    feature_scale: tuple[float, ...],
    size_log: NDArray[np.float64],
    ratio: NDArray[np.float64],
    neighbours: int,
    power: float,
) -> Surface:
    """A surface from rows of a table.

    Parameters
    ----------
    shapes : float64[n_rows, n_features]        rows with equal shapes form one curve
    feature_scale : n_features numbers          factor on each logarithm
    size_log, ratio : float64[n_rows]           logarithm of the size; bound / time
    """
    distinct, owner = np.unique(shapes, axis=0, return_inverse=True)
    knots, values = [], []
    for shape in range(len(distinct)):
        rows = np.flatnonzero(owner.ravel() == shape)
        rows = rows[np.argsort(size_log[rows])]
        knots.append(size_log[rows])
        values.append(np.log(ratio[rows]))
    return Surface(
        features=np.log(distinct) * np.array(feature_scale),
        knots=tuple(knots),
        values=tuple(values),
        neighbours=neighbours,
        power=power,
    )
