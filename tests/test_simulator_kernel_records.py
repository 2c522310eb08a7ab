"""apex_opt.simulator.kernel.records: what a function takes, and the same values one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from apex_opt.simulator.kernel.records import kinds, leaves, names, spread

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.sglang_state import F64
    from apex_opt.simulator.kernel.state import I64


class Pair(NamedTuple):
    size: int
    values: I64


class Single(NamedTuple):
    ratio: F64


TAKES: tuple[Any, ...] = (Pair, (Single, None), int, np.int32, None)
GIVEN = (Pair(1, np.array([2])), (Single(np.array([0.5])), None), 3, np.array([4], np.int32), None)


def test_values_stand_in_the_order_of_their_kinds() -> None:
    assert list(kinds(TAKES)) == [int, np.int64, np.float64, int, np.int32]
    assert list(names(TAKES)) == ["pair", "single"]
    for kind, value in zip(kinds(TAKES), leaves(GIVEN), strict=True):
        assert type(value) is int if kind is int else value.dtype == kind


def test_a_function_that_takes_values_one_by_one_hands_on_what_was_given() -> None:
    got: list[Any] = []
    flat = spread(lambda *given: got.extend(given), "flat", TAKES)
    flat(*leaves(GIVEN))
    assert (flat.__name__, tuple(got)) == ("flat", GIVEN)
    assert list(map(type, got[:2])) == [Pair, tuple]
