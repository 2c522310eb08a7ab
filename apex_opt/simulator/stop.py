"""When a simulation can be cut short: its own requests already prove that a limit is passed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from apex_opt.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Metric = Literal["ttft", "tpot", "e2e", "makespan"]
METRICS: Final = ("ttft", "tpot", "e2e", "makespan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """A limit whose passing ends the simulation.

    A request counts when it is answered, with its latency in whole nanoseconds, rounded down: TTFT from arrival to
    first token, TPOT (last - first) / (tokens - 1) where there is more than one, E2E and makespan from its own and
    from the first arrival to its last token.

    - "sum": latencies add up to more than `limit_ns`, where a request that is not answered yet counts with its floor
    - "count": at least `most` requests take longer than `limit_ns`

    Both only grow as requests are answered, so the simulation is cut short exactly when the finished one would have
    passed the limit.
    """

    metric: Metric
    kind: Literal["sum", "count"]
    limit_ns: int
    most: int = 1

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UnknownNameError("metric of a stop", str(self.metric)[:60], METRICS)
        if self.kind not in ("sum", "count") or (self.kind == "sum" and self.metric == "makespan"):
            raise UsageError(f"a stop cannot {self.kind} the {self.metric}; makespans are counted, latencies either")
        if self.most < 1:
            raise UsageError(f"a stop at {self.most} requests would always fire; count at least 1")

    @classmethod
    def mean_above(cls, metric: Metric, seconds: float, requests: int) -> Stop:
        """The mean over so many requests is above a time; never fires on rounding."""
        return cls(metric=metric, kind="sum", limit_ns=_upwards(seconds * requests, requests))

    @classmethod
    def percentile_above(cls, metric: Metric, seconds: float, quantile: float, requests: int) -> Stop:
        """The quantile (linear between order statistics) over so many requests is above a time.

        It lies between the order statistics of rank floor(q (n - 1)) and the next, counted from 0: if all from the
        lower one on are above the time, so is it.
        """
        rank = math.floor(quantile * (requests - 1))
        return cls(metric=metric, kind="count", limit_ns=_upwards(seconds, 1), most=max(1, requests - rank))

    @classmethod
    def attainment_below(cls, metric: Metric, seconds: float, fraction: float, requests: int) -> Stop:
        """Fewer than a fraction of so many requests are within a time."""
        most = math.floor(requests * (1 - fraction) * (1 + 1e-12) + 1e-9) + 1
        return cls(metric=metric, kind="count", limit_ns=_upwards(seconds, 1), most=most)

    def passed(self, values_ns: NDArray[np.int64]) -> bool:
        """Whether a finished run with these latencies passes the limit."""
        if self.kind == "sum":
            return int(values_ns.sum()) > self.limit_ns
        return int((values_ns > self.limit_ns).sum()) >= self.most


def _upwards(seconds: float, terms: int) -> int:
    """Nanoseconds, rounded up beyond what adding up floating-point seconds can lose."""
    return min(math.ceil(min(seconds * 1e9 * (1 + 1e-12), 2.0**62)) + terms, 1 << 62)


def latencies_ns(
    metric: str,
    arrival_ns: NDArray[np.int64],
    first_token_ns: NDArray[np.int64],
    finish_ns: NDArray[np.int64],
    generated: NDArray[np.int64],
) -> NDArray[np.int64]:
    """One latency of every request as `Stop` counts it; 0 for the TPOT of a single token."""
    if metric == "ttft":
        return first_token_ns - arrival_ns
    if metric == "tpot":
        return np.where(generated > 1, (finish_ns - first_token_ns) // np.maximum(generated - 1, 1), 0)
    return finish_ns - (arrival_ns if metric == "e2e" else arrival_ns.min())
