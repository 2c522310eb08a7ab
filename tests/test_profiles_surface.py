"""Interpolation over shapes: exact where measured, a mean of neighbours elsewhere, held beyond the ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profile_cases import leave_one_out

from apex_opt.profiles.surface import Surface, build_surface

SHAPES = np.array([[2.0, 2.0], [2.0, 2.0], [8.0, 2.0], [8.0, 2.0]])
SIZES = np.log(np.array([1.0, 100.0, 1.0, 10.0]))
RATIO = np.array([0.2, 0.8, 0.4, 0.4])
LINE = build_surface(SHAPES, (1.0, 1.0), SIZES, RATIO, 2, 2.0)

# Four shapes at the corners of a cell, and one beside it.
GRID = build_surface(
    np.array([[1.0, 1.0], [4.0, 1.0], [1.0, 16.0], [4.0, 16.0], [9.0, 1.0]]),
    (1.0, 0.5),
    np.zeros(5),
    np.array([0.1, 0.2, 0.4, 0.8, 0.3]),
    3,
    2.0,
)


def feature(*sizes: float, scale: tuple[float, ...] = (1.0, 1.0)) -> tuple[float, ...]:
    return tuple(float(np.log(size) * factor) for size, factor in zip(sizes, scale, strict=True))


def test_measured_points_come_back_and_ends_are_held() -> None:
    ratio = LINE.ratio(feature(2.0, 2.0), np.log(np.array([1.0, 10.0, 100.0, 1e6, 1e-3])))
    assert ratio == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.2])
    assert LINE.last(feature(2.0, 2.0)) == pytest.approx(np.log(100.0))
    assert LINE.last(feature(8.0, 2.0)) == pytest.approx(np.log(10.0))


def test_a_shape_midway_gets_the_geometric_mean() -> None:
    assert LINE.ratio(feature(4.0, 2.0), np.zeros(1))[0] == pytest.approx((0.2 * 0.4) ** 0.5)


def test_within_a_cell_of_the_grid_only_its_corners_count() -> None:
    scale = (1.0, 0.5)
    assert GRID.ratio(feature(2.0, 4.0, scale=scale), np.zeros(1))[0] == pytest.approx((0.1 * 0.2 * 0.4 * 0.8) ** 0.25)
    assert GRID.ratio(feature(4.0, 4.0, scale=scale), np.zeros(1))[0] == pytest.approx((0.2 * 0.8) ** 0.5)


@pytest.mark.parametrize(("sizes", "inside"), [((2.0, 4.0), True), ((9.0, 1.0), True), ((5.0, 20.0), False)])
def test_a_shape_larger_than_all_measured_ones_is_outside(sizes: tuple[float, float], inside: bool) -> None:
    assert GRID.encloses(feature(*sizes, scale=(1.0, 0.5))) == inside


@given(n=st.floats(1e-3, 1e6), k=st.floats(1e-3, 1e6), size=st.floats(-50, 50))
def test_no_shape_and_no_size_leaves_the_range_of_the_measured_ratios(n: float, k: float, size: float) -> None:
    for surface, scale in ((LINE, (1.0, 1.0)), (GRID, (1.0, 0.5))):
        ratio = surface.ratio(feature(n, k, scale=scale), np.array([size]))
        assert np.exp(surface.values.min()) * (1 - 1e-9) <= ratio[0] <= np.exp(surface.values.max()) * (1 + 1e-9)


def test_the_order_of_rows_does_not_matter() -> None:
    order = np.array([3, 0, 2, 1])
    again: Surface = build_surface(SHAPES[order], (1.0, 1.0), SIZES[order], RATIO[order], 2, 2.0)
    assert (again.features == LINE.features).all()
    assert (again.values == LINE.values).all()


def test_leaving_a_shape_out_compares_it_with_the_others() -> None:
    # Two shapes: each is guessed by the other, so the time is off by the ratio of their ratios.
    assert leave_one_out(LINE) == pytest.approx([0.2 / 0.4 - 1, 0.8 / 0.4 - 1, 0.4 / 0.2 - 1, 0.4 / 0.4 - 1])
