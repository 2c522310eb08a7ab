"""What proves early that a run misses a goal, or is worse than a cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apex_opt.simulator.stop import Stop
from apex_opt.units import S_PER_H
from apex_opt.workload.slo import FIGURES, OF_REQUESTS, percent

if TYPE_CHECKING:
    from apex_opt.simulator.stop import Metric

_AS_STOP: dict[str, Metric] = {"ttft": "ttft", "tpot": "tpot", "e2e": "e2e"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Passing:
    """The stops of one plan.

    Parameters
    ----------
    requests, decoding : int        requests, and those with a time per output token
    output_tokens : int             tokens the requests generate
    request_s : float               time of a request outside the simulation
    least_j : float                 energy above the idle draw that no run can do without
    idle_w, limit_w : float         least and most draw of all its GPUs
    cost_per_h : float or None      $ per hour of them
    """

    requests: int
    decoding: int
    output_tokens: int
    request_s: float
    least_j: float
    idle_w: float
    limit_w: float
    cost_per_h: float | None

    def limit(self, metric: str, statistic: str, limit: float, fraction: float | None = None) -> list[Stop]:
        """What a run passes only where a figure is on the wrong side of a limit; none where no such sign is known.

        - throughput, goodput: no more requests than there are, over a makespan that only grows
        - energy: no less than the idle draw over the makespan and what every token takes, or all that may be drawn
        - cost of tokens: the makespan's, over tokens that are known beforehand
        - ITL: none, as a simulation without log does not see single tokens; cost: none, as it is known beforehand
        """
        if metric in FIGURES:
            return self._slower_than(self._longest_s(metric, limit))
        requests = self.decoding if metric == "tpot" else self.requests
        if metric not in OF_REQUESTS or not requests:
            return []
        which = _AS_STOP[metric]
        inside_s = (
            limit if metric == "tpot" else limit - self.request_s
        )  # the simulator does not see the way in and out
        if fraction is not None:
            return [Stop.attainment_below(which, inside_s, fraction, requests)]
        if statistic == "mean":
            return [Stop.mean_above(which, inside_s, requests)]
        return [Stop.percentile_above(which, inside_s, percent(statistic) / 100, requests)]

    def _longest_s(self, metric: str, limit: float) -> float:
        """The makespan beyond which a figure is surely on the wrong side of a limit."""
        if metric == "makespan":
            return limit
        if metric in ("throughput", "goodput"):
            return self.requests / limit if limit > 0 else math.inf
        if metric in ("energy", "energy_per_token"):
            joules = limit * self.output_tokens if metric == "energy_per_token" else limit
            free_j = joules - self.least_j
            return max(free_j / self.idle_w if self.idle_w else math.inf, joules / self.limit_w)
        if metric == "cost_per_mtoken" and self.cost_per_h:
            return limit / 1e6 * self.output_tokens * S_PER_H / self.cost_per_h
        return math.inf

    def _slower_than(self, makespan_s: float) -> list[Stop]:
        if makespan_s == math.inf:
            return []
        return [Stop.percentile_above("makespan", max(makespan_s - self.request_s, 0.0), 1.0, self.requests)]
