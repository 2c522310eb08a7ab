"""Rates to search: a grid on which each is a share above the one before, and the last of them that holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from apex_opt.units import NS_PER_S
from apex_opt.workload.columns import MAX_ARRIVAL_NS

if TYPE_CHECKING:
    from collections.abc import Callable

SLOWEST_PER_S: Final = 1e-6
FASTEST_PER_S: Final = 1e6
"""Rates that are looked at: far below, requests are alone; far above, all have arrived before the first is answered."""

STRIDE: Final = 4
"""Steps gone first, up or down from where a search begins; then twice as many each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Rates by step; 0 is the trace's own.

    Parameters
    ----------
    own_per_s : float      requests per second
    ratio : float          of a rate to the one before
    low, high : int        first and last step
    """

    own_per_s: float
    ratio: float
    low: int
    high: int

    @classmethod
    def of(cls, own_per_s: float, resolution: float, requests: int) -> Self:
        """The grid about a rate.

        Parameters
        ----------
        resolution : float    step, as a share of the rate, above 0
        requests : int        of the longest trace, whose arrivals end within what a clock can hold
        """
        step = math.log1p(resolution)
        slowest = max(SLOWEST_PER_S, 2 * requests * NS_PER_S / MAX_ARRIVAL_NS)
        return cls(
            own_per_s=own_per_s,
            ratio=1 + resolution,
            low=min(0, math.ceil(math.log(slowest / own_per_s) / step)),
            high=max(0, math.floor(math.log(FASTEST_PER_S / own_per_s) / step)),
        )

    def rate_per_s(self, step: int) -> float:
        return self.own_per_s * self.ratio**step

    def below(self, rate_per_s: float) -> int:
        """The last step no faster than a rate."""
        step = math.floor(math.log(max(rate_per_s, SLOWEST_PER_S) / self.own_per_s) / math.log(self.ratio))
        return max(self.low, min(step, self.high))


def highest_step(holds: Callable[[int], bool], *, low: int, high: int, start: int) -> int | None:
    """The last step from `low` to `high` that holds, or None, if none holds after one that does not.

    Parameters
    ----------
    holds : callable    asked about `start` first, and in the end about the step found and the next
    """
    stride = STRIDE
    if holds(start):
        good = start
        while (bad := min(good + stride, high)) > good and holds(bad):
            good, stride = bad, 2 * stride
        if good == high:
            return high
    else:
        bad = start
        while (good := max(bad - stride, low)) < bad and not holds(good):
            bad, stride = good, 2 * stride
        if good == bad:
            return None
    while bad - good > 1:
        middle = (good + bad) // 2
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good
