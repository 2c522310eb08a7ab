"""Sums that are the same on every Python."""

from __future__ import annotations

from apex_opt.units import add_up


def test_floats_are_added_in_turn() -> None:
    assert add_up([0.1] * 10) == 0.1 + 0.1 + 0.1 + 0.1 + 0.1 + 0.1 + 0.1 + 0.1 + 0.1 + 0.1 == 0.9999999999999999
    assert add_up(value for value in (1e16, 1.0, -1e16)) == 0.0
    assert add_up([]) == 0
