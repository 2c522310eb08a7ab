"""How uneven uniform routing is: exactly, between its limits, and always in the same direction."""

from __future__ import annotations

import itertools
from math import factorial, prod

import numpy as np
import pytest

from apex_opt.cost.routing import expected_maximum, fullest_group_factor


def by_enumeration(balls: int, cells: int) -> float:
    """Expected largest count over every way the balls can fall."""
    total = 0
    for counts in itertools.product(range(balls + 1), repeat=cells):
        if sum(counts) == balls:
            total += max(counts) * (factorial(balls) // prod(map(factorial, counts)))
    return total / cells**balls


@pytest.mark.parametrize(
    ("balls", "cells"), [(n, c) for c in range(1, 6) for n in range(1, 9) if (n + 1) ** c <= 60_000]
)
def test_the_expected_maximum_equals_enumeration(balls: int, cells: int) -> None:
    assert expected_maximum(balls, cells) == pytest.approx(by_enumeration(balls, cells), rel=1e-9)


@pytest.mark.parametrize(("balls", "cells"), [(16, 8), (200, 8), (1000, 3), (64, 64), (4096, 16), (300, 128)])
def test_the_expected_maximum_lies_within_the_error_of_a_simulation(balls: int, cells: int) -> None:
    rng = np.random.default_rng(balls)
    seen = rng.multinomial(balls, np.full(cells, 1 / cells), size=20_000).max(axis=1)
    assert abs(seen.mean() - expected_maximum(balls, cells)) < 5 * seen.std() / np.sqrt(len(seen))


def test_one_group_is_always_even_one_assignment_is_all_in_one_group_and_none_is_no_load() -> None:
    assert fullest_group_factor(np.array([0, 1, 50]), 1).tolist() == [1.0, 1.0, 1.0]
    for groups in (2, 3, 8, 64):
        assert fullest_group_factor(np.array([0, 1]), groups).tolist() == pytest.approx([1.0, groups])


@pytest.mark.parametrize("groups", [2, 3, 4, 6, 8, 16, 64])
def test_the_more_assignments_the_more_even_down_to_one_and_never_above_the_groups(groups: int) -> None:
    factor = fullest_group_factor(np.arange(1, 65_536, dtype=np.int64), groups)
    assert factor.max() <= groups
    assert factor.min() >= 1.0
    assert (np.diff(factor) <= 1e-12).all()
    assert factor[-1] < 1 + 4 * np.sqrt(groups / 65_536)


@pytest.mark.parametrize("groups", [2, 4, 8, 32])
def test_between_and_beyond_the_grid_the_factor_stays_within_two_percent_of_exact(groups: int) -> None:
    counts = np.array([2, 3, 5, 7, 8, 11, 23, 47, 101, 333, 997, 1999, 64 * groups + 1, 90 * groups, 150 * groups])
    exact = np.array([expected_maximum(int(n), groups) * groups / n for n in counts])
    assert np.abs(fullest_group_factor(counts, groups) / exact - 1).max() < 0.02


@pytest.mark.parametrize("load", [4, 64, 1000])
def test_more_groups_are_less_even(load: int) -> None:
    factors = [fullest_group_factor(np.array([load]), groups)[0] for groups in (1, 2, 4, 8, 16, 32)]
    assert factors == sorted(factors)


def test_any_shape_of_array_is_answered_in_its_shape() -> None:
    assert fullest_group_factor(np.arange(6).reshape(2, 3), 4).shape == (2, 3)
