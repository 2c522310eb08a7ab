"""Rates on a grid, and the last of them that holds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.studies.rates import FASTEST_PER_S, SLOWEST_PER_S, Grid, highest_step
from apex_opt.workload.columns import MAX_ARRIVAL_NS


@given(low=st.integers(-400, 0), high=st.integers(0, 400), place=st.floats(0, 1), last=st.integers(-450, 450))
def test_bisection_finds_the_last_step_and_asks_about_it_and_the_next(
    low: int, high: int, place: float, last: int
) -> None:
    start = round(low + place * (high - low))
    told: list[int] = []

    def holds(step: int) -> bool:
        told.append(step)
        return step <= last

    found = highest_step(holds, low=low, high=high, start=start)
    assert told[0] == start
    assert all(low <= step <= high for step in told)
    assert found == (None if last < low else min(last, high))
    assert len(told) <= 2 * math.ceil(math.log2(high - low + 2)) + 3
    if found is not None:
        assert {found, min(found + 1, high)} <= set(told)


@given(own=st.floats(1e-3, 1e4), resolution=st.floats(0.001, 1), requests=st.integers(1, 1_000_000))
def test_a_grid_has_the_own_rate_and_ends_at_rates_that_can_be_simulated(
    own: float, resolution: float, requests: int
) -> None:
    grid = Grid.of(own, resolution, requests)
    assert grid.rate_per_s(0) == own
    assert grid.rate_per_s(grid.high) <= FASTEST_PER_S * (1 + 1e-9)
    assert grid.rate_per_s(grid.low) >= SLOWEST_PER_S * (1 - 1e-9)
    assert requests / grid.rate_per_s(grid.low) * 1e9 < MAX_ARRIVAL_NS or grid.low == 0
    for step in (grid.low, 0, grid.high):
        assert grid.below(grid.rate_per_s(step) * (1 + 1e-9)) == step


def test_rates_beyond_the_grid_are_its_ends() -> None:
    grid = Grid.of(2.0, 0.02, 1000)
    assert (grid.below(0.0), grid.below(1e12)) == (grid.low, grid.high)
    assert grid.rate_per_s(grid.below(3.0)) == pytest.approx(3.0, rel=0.02)
