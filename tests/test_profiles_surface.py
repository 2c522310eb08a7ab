"""Interpolation over shapes: exact where measured, a mean of neighbours elsewhere, held beyond the ends."""

from __future__ import annotations

import numpy as np
import pytest

from apex_opt.profiles.surface import build_surface

SHAPES = np.array([[2.0, 2.0], [2.0, 2.0], [8.0, 2.0], [8.0, 2.0]])
SIZES = np.log(np.array([1.0, 100.0, 1.0, 10.0]))
RATIO = np.array([0.2, 0.8, 0.4, 0.4])


def test_measured_points_come_back_and_ends_are_held() -> None:
    surface = build_surface(SHAPES, (1.0, 1.0), SIZES, RATIO, 2, 2.0)
    feature = (float(np.log(2.0)), float(np.log(2.0)))
    ratio = surface.ratio(feature, np.log(np.array([1.0, 10.0, 100.0, 1e6, 1e-3])))
    assert ratio == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.2])


def test_a_shape_midway_gets_the_geometric_mean() -> None:
    surface = build_surface(SHAPES, (1.0, 1.0), SIZES, RATIO, 2, 2.0)
    feature = (float(np.log(4.0)), float(np.log(2.0)))
    assert surface.ratio(feature, np.zeros(1))[0] == pytest.approx((0.2 * 0.4) ** 0.5)


def test_leaving_a_shape_out_compares_it_with_the_others() -> None:
    surface = build_surface(SHAPES, (1.0, 1.0), SIZES, RATIO, 2, 2.0)
    # Two shapes: each is guessed by the other, so the time is off by the ratio of their ratios.
    assert surface.leave_one_out() == pytest.approx([0.2 / 0.4 - 1, 0.8 / 0.4 - 1, 0.4 / 0.2 - 1, 0.4 / 0.4 - 1])
